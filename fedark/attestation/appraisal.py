"""A party's own appraisal policy: which evidence it accepts, whatever a contract admits, as a TOML
file.

    version = 1
    publishers = ["<64 hex digits>"]             # Ed25519 keys whose signed reference values count
    signed = ["trainer.reference"]               # such files, beside this one

    [platforms.simulated]                        # a platform without a table is not admitted
    root = "<64 hex digits>"                     # SHA-256 of the manufacturer's root certificate
    minimum_svn = 1
    sandbox = "namespaces"

    [platforms.tdx]
    accepted = ["UpToDate", "SWHardeningNeeded"]
    minimum_svn = 20250101                       # date of the TCB level
    minimum_evaluation = 17                      # Intel's tcbEvaluationDataNumber

    [platforms.sev-snp.minimum_tcb.Milan]
    bootloader = 3
    tee = 0
    snp = 8
    microcode = 115

    [platforms.nitro]

    [policies.namespaces]                        # the sandbox's policies, written out
    seccomp = ["<96 hex digits>"]
    landlock = ["<96 hex digits>"]

    [aggregator]                                 # reference values of a role, written out
    launcher = "<96 hex digits>"

Where several references of one role are given, written out or signed, an enclave must be exactly
one of them, its sandbox's policies with it. A gate asks the contract's terms and this policy:
evidence needs both, and a refusal names the reasons of both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedark.attestation.binding import ROLES
from fedark.attestation.claims import Claims
from fedark.attestation.policy import (
    AllOf,
    AnyOf,
    Check,
    ClockWithin,
    NotDebug,
    PlatformIn,
    SandboxKnown,
    measured_as,
    of_platform,
    speaks_of,
)
from fedark.attestation.reference import VerifiedReference
from fedark.attestation.terms import (
    HardwareTerms,
    NitroTerms,
    Policies,
    Registers,
    SevSnpTerms,
    SimulatedTerms,
    TdxTerms,
)
from fedark.foundation.errors import ContractError, FedarkError, InputError, printable
from fedark.foundation.terms import Hex32, Terms, explain, to_tuples

__all__ = ["AppraisalPolicy", "PlatformTerms", "PolicyFile"]

_MAX_BYTES = 1 << 20
_OWN = "the policy's own values"


class PlatformTerms(HardwareTerms):
    """The admitted platforms, the simulated one among them."""

    simulated: SimulatedTerms | None = None


class PolicyFile(Terms):
    """The TOML file's form; see the module's docstring."""

    version: Literal[1]
    publishers: tuple[Hex32, ...] = ()
    signed: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")], ...] = ()
    platforms: PlatformTerms
    policies: Policies = Field(default_factory=dict)
    trainer: Registers = Field(default_factory=dict)
    aggregator: Registers = Field(default_factory=dict)
    inference: Registers = Field(default_factory=dict)


@dataclass(frozen=True)
class NotAfter:
    """Signed reference values have not expired since they were read: a node runs for months."""

    name: str
    expires: datetime

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if now >= self.expires:
            yield f"the reference values {self.name} expired at {self.expires:%Y-%m-%d %H:%M %Z}"


@dataclass(frozen=True)
class AppraisalPolicy:
    """A policy with its signed reference values verified.

    Attributes:
        rules: what the file says.
        signed: the references that it names, in its order.
    """

    rules: PolicyFile
    signed: tuple[VerifiedReference, ...]

    @classmethod
    def read(cls, path: Path, *, now: datetime) -> AppraisalPolicy:
        """Read a policy and the signed reference values beside it.

        Raises:
            InputError: it cannot be read.
            ContractError: with every problem of the file, and of each signed file that it names.
        """
        try:
            value = tomllib.loads(_content(path).decode("utf-8"))
            rules = PolicyFile.model_validate(to_tuples(value))
        except ValidationError as error:
            raise ContractError(str(path), [printable(line) for line in explain(error)]) from None
        except ValueError as error:
            raise ContractError(str(path), [printable(str(error))]) from None
        publishers = [bytes.fromhex(key) for key in rules.publishers]
        problems, signed = [], list[VerifiedReference]()
        for name in rules.signed:
            try:
                signed.append(
                    VerifiedReference.verify(
                        _content(path.parent / name), publishers, now=now, source=name
                    )
                )
            except ContractError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
            except FedarkError as error:
                problems.append(error.what)
        policy = cls(rules, tuple(signed))
        names = [(reference.values.role, _name(reference)) for reference in signed]
        problems += [
            f"two signed files speak of the {role} of {name}"
            for role, name in sorted({n for n in names if names.count(n) > 1})
        ]
        if not policy.platforms:
            problems.append("platforms: it admits none")
        if not problems and not any(policy.references(role) for role in ROLES):
            problems.append("it has no reference values for any role, so it would admit nobody")
        if problems:
            raise ContractError(str(path), problems)
        return policy

    @property
    def platforms(self) -> tuple[str, ...]:
        """Names of the admitted platforms."""
        return tuple(self._tables())

    def references(self, role: str) -> dict[str, Mapping[str, str]]:
        """Name -> register -> hex, of every reference for `role`."""
        written: Registers = getattr(self.rules, role) if role in ROLES else {}
        found: dict[str, Mapping[str, str]] = {_OWN: written} if written else {}
        return found | {
            _name(one): one.values.registers for one in self.signed if one.values.role == role
        }

    def policies(self, role: str) -> dict[str, Policies]:
        """Name -> sandbox mode -> reference values of policies, of every reference for `role`."""
        found = {_OWN: self.rules.policies} if _OWN in self.references(role) else {}
        return found | {
            _name(one): one.values.policies for one in self.signed if one.values.role == role
        }

    def check(self, role: str, platform: str) -> Check:
        """The demands on claims of an enclave of `role` on `platform`; where nothing is said of
        either, none are met.
        """
        table = self._tables().get(platform)
        ends = {
            _name(one): NotAfter(_name(one), datetime.fromisoformat(one.values.expires))
            for one in self.signed
        }
        policies = self.policies(role)
        references = [
            (
                name,
                AllOf(
                    (
                        measured_as(values, platform),
                        SandboxKnown(policies[name]),
                        *([ends[name]] if name in ends else []),
                    )
                ),
            )
            for name, values in self.references(role).items()
            if speaks_of(values, platform)
        ]
        if len(references) > 1:
            measured: Check = AnyOf(tuple(references))
        else:
            measured = references[0][1] if references else measured_as({}, platform)
        demands: list[Check] = [PlatformIn(self.platforms), measured, NotDebug(), ClockWithin()]
        demands += of_platform(table) if table is not None else ()
        return AllOf(tuple(demands))

    def _tables(self) -> Mapping[str, SimulatedTerms | SevSnpTerms | TdxTerms | NitroTerms]:
        simulated = self.rules.platforms.simulated
        return {
            **({} if simulated is None else {"simulated": simulated}),
            **self.rules.platforms.tables(),
        }


def _name(reference: VerifiedReference) -> str:
    return f"{reference.values.release} of {reference.publisher.hex()[:16]}"


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES} bytes.")
    return data
