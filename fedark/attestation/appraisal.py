"""A party's own appraisal policy: which evidence it accepts, whatever a contract admits, as a TOML file.

    version = 1
    publishers = ["<64 hex digits>"]             # Ed25519 keys whose signed reference values count
    signed = ["trainer.reference"]               # such files, beside this one

    [platforms.simulated]                        # a platform is admitted by having a table here, and in no other way
    root = "<64 hex digits>"                     # SHA-256 of the manufacturer's root certificate
    minimum_svn = 1
    sandbox = "namespaces"

    [platforms.tdx]
    accepted = ["UpToDate", "SWHardeningNeeded"]
    minimum_svn = 20250101                       # date of the TCB level

    [platforms.sev-snp.minimum_tcb.Milan]
    bootloader = 3
    tee = 0
    snp = 8
    microcode = 115

    [platforms.nitro]

    [aggregator]                                 # reference values of a role, written out
    launcher = "<96 hex digits>"

Where several references of one role are given, written out or signed, an enclave must be exactly one of them. A gate asks the
contract's terms and this policy: evidence needs both, and a refusal names the reasons of both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedark.attestation.claims import Claims
from fedark.attestation.platforms.sev_snp import SnpTcb
from fedark.attestation.policy import (
    AllOf,
    AnyOf,
    Check,
    ClockWithin,
    MinimumSvn,
    NotDebug,
    PlatformIn,
    SandboxAtLeast,
    measured_as,
    reference_values,
)
from fedark.attestation.reference import Register, VerifiedReference
from fedark.contract import Hex32, Hex48, Terms, explain, to_tuples
from fedark.errors import ContractError, FedarkError, InputError, printable

__all__ = ["AppraisalPolicy", "NitroRules", "PolicyFile", "SevSnpRules", "SimulatedRules", "TcbRules", "TdxRules"]

_MAX_BYTES = 1 << 20
Version = Annotated[int, Field(ge=0, le=255)]
Svn = Annotated[int, Field(ge=0)]
Registers = dict[Register, Hex48]
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]


class SimulatedRules(Terms):
    """Of the simulated platform, which protects nothing from its own host."""

    root: Hex32
    minimum_svn: Svn = 1
    sandbox: Literal["namespaces", "landlock", "none"] = "landlock"


class TcbRules(Terms):
    """The oldest admissible versions of an SNP platform's parts, as AMD's security bulletins name them."""

    bootloader: Version
    tee: Version
    snp: Version
    microcode: Version

    def tcb(self) -> SnpTcb:
        return SnpTcb(bootloader=self.bootloader, tee=self.tee, snp=self.snp, microcode=self.microcode)


class SevSnpRules(Terms):
    """Of AMD SEV-SNP. `minimum_svn` is the guest's own; a product without a minimum TCB is refused."""

    minimum_tcb: Annotated[dict[Literal["Milan", "Genoa"], TcbRules], Field(min_length=1)]
    vmpls: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1)] = (0,)
    minimum_svn: Svn = 0


class TdxRules(Terms):
    """Of Intel TDX. `minimum_svn` is the date of the TCB level, YYYYMMDD. "Revoked" is no state that can be accepted."""

    accepted: Annotated[tuple[TcbStatus, ...], Field(min_length=1)] = ("UpToDate",)
    minimum_svn: Svn = 0


class NitroRules(Terms):
    """Of AWS Nitro, which has no security version: its root, its image registers and its freshness are all there is."""


class PlatformRules(Terms):
    simulated: SimulatedRules | None = None
    sev_snp: Annotated[SevSnpRules | None, Field(alias="sev-snp")] = None
    tdx: TdxRules | None = None
    nitro: NitroRules | None = None


class PolicyFile(Terms):
    """The TOML file's form; see the module's docstring."""

    version: Literal[1]
    publishers: tuple[Hex32, ...] = ()
    signed: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")], ...] = ()
    platforms: PlatformRules
    trainer: Registers = Field(default_factory=dict)
    aggregator: Registers = Field(default_factory=dict)


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
                signed.append(VerifiedReference.verify(_content(path.parent / name), publishers, now=now, source=name))
            except ContractError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
            except FedarkError as error:
                problems.append(error.what)
        policy = cls(rules, tuple(signed))
        names = [(reference.values.role, _name(reference)) for reference in signed]
        problems += [
            f"two signed files speak of the {role} of {name}" for role, name in sorted({n for n in names if names.count(n) > 1})
        ]
        if not policy.platforms:
            problems.append("platforms: it admits none")
        if not problems and not any(policy.references(role) for role in ("trainer", "aggregator")):
            problems.append("it has no reference values for any role, so it would admit nobody")
        if problems:
            raise ContractError(str(path), problems)
        return policy

    @property
    def platforms(self) -> tuple[str, ...]:
        """Names of the admitted platforms."""
        return tuple(name for name, rules in self._tables().items() if rules is not None)

    def references(self, role: str) -> dict[str, Mapping[str, str]]:
        """Name -> register -> hex, of every reference for `role`."""
        written = {"trainer": self.rules.trainer, "aggregator": self.rules.aggregator}.get(role, {})
        found: dict[str, Mapping[str, str]] = {"the policy's own values": written} if written else {}
        return found | {_name(one): one.values.registers for one in self.signed if one.values.role == role}

    def check(self, role: str, platform: str) -> Check:
        """The demands on claims of an enclave of `role` on `platform`; where nothing is said of either, none are met."""
        table = self._tables().get(platform)
        ends = {_name(one): NotAfter(_name(one), datetime.fromisoformat(one.values.expires)) for one in self.signed}
        references = [
            (name, AllOf((measured_as(values, platform), *([ends[name]] if name in ends else []))))
            for name, values in self.references(role).items()
            if reference_values(values, platform)
        ]
        if len(references) > 1:
            measured: Check = AnyOf(tuple(references))
        else:
            measured = references[0][1] if references else measured_as({}, platform)
        demands: list[Check] = [PlatformIn(self.platforms), measured, NotDebug(), ClockWithin()]
        if isinstance(table, SimulatedRules):
            demands.append(SandboxAtLeast(table.sandbox))
        if isinstance(table, SimulatedRules | SevSnpRules | TdxRules):
            demands.append(MinimumSvn(table.minimum_svn))
        return AllOf(tuple(demands))

    def _tables(self) -> Mapping[str, Any]:
        platforms = self.rules.platforms
        return {
            "simulated": platforms.simulated,
            "sev-snp": platforms.sev_snp,
            "tdx": platforms.tdx,
            "nitro": platforms.nitro,
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
