"""What a node knows of itself and of the others before any job, and what it compares a contract
with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.terms import AttestationTerms
from fedark.attestation.trust import SIMULATED_ROOT
from fedark.contract.contract import Contract, Party, now
from fedark.contract.privacy import claim_problems, futile_problems
from fedark.contract.protection import fewest_in_a_sum, protection_problems
from fedark.contract.taste import tasted_problems
from fedark.enclave.host import EnclaveHandle
from fedark.foundation.keys import HYBRID, Kem, PartyKeys
from fedark.measurement import reference_policies
from fedark.privacy.accounting import Budget

__all__ = ["SANDBOX_ORDER", "EnclaveFactory", "NodeSettings", "node_problems"]

SANDBOX_ORDER = ("none", "landlock", "namespaces")


class EnclaveFactory(Protocol):
    """Starts an enclave on this machine."""

    def __call__(self, role: str, run_config: bytes, checkpoint: bytes = b"") -> EnclaveHandle:
        """A new enclave of `role`, or the one of `checkpoint` again."""
        ...


@dataclass(frozen=True)
class NodeSettings:
    """What a node knows of itself and of the others, before any job.

    Attributes:
        party: its name.
        keys: its long-lived keys.
        roster: every party that it deals with, by name, with the keys it got by a trusted way.
        state: its folder.
        catalogue: the folder with sealed bundles, one folder NAME.fedark each.
        reference: role -> register -> SHA-384, as this node measures its own installation.
        collateral: platform roots and CRLs; see `fedark.attestation.trust`.
        own: its own appraisal policy, if it has one: then its reference values are what a contract
            must name, instead of `reference`, and every enclave must meet it besides the contract.
        platforms: platforms that it accepts evidence of.
        sandbox: weakest sandbox mode that it accepts.
        minimum_cohort: fewest customers in a sum that it takes part in:
            `fedark.contract.protection.fewest_in_a_sum`.
        budget: the most that a customer's records may ever spend on all jobs.
        kem: KEMs that it accepts in a contract.
        personal_key: the HPKE key that its enclave seals personal adapters to; empty: to none.
        start_enclave: starts an enclave on this machine; a provider needs none.
        on_progress: told of what goes on, for people to read; gets no secret.
    """

    party: str
    keys: PartyKeys
    roster: Mapping[str, Party]
    state: Path
    catalogue: Path
    reference: Mapping[str, Mapping[str, bytes]]
    collateral: Mapping[str, bytes]
    platforms: tuple[str, ...] = ("simulated",)
    sandbox: str = "landlock"
    minimum_cohort: int = 3
    kem: tuple[Kem, ...] = (HYBRID,)
    own: AppraisalPolicy | None = None
    personal_key: bytes = b""
    budget: Budget = field(default_factory=lambda: Budget(8.0, 1e-5))
    start_enclave: EnclaveFactory | None = None
    on_progress: Callable[[str], None] = field(default=lambda text: None)


def node_problems(contract: Contract, settings: NodeSettings, role: str) -> list[str]:
    """Everything in a contract that contradicts what this node, in this role, knows itself."""
    problems = []
    me = contract.party(settings.party)
    if me is None or me.role != role:
        problems.append(f"{settings.party} is not a {role} in it")
    roster = dict(settings.roster.items())
    problems += [
        f"the keys of {party.name} are not those in the roster of {settings.party}"
        for party in contract.parties
        if roster.get(party.name) != party
    ]
    if contract.expired(now()):
        problems.append("it is not valid now")
    terms = contract.attestation
    problems += [
        f"platform {name!r} is not accepted here"
        for name in terms.platforms
        if name not in settings.platforms
    ]
    if SANDBOX_ORDER.index(terms.sandbox) < SANDBOX_ORDER.index(settings.sandbox):
        problems.append(
            f"it admits sandbox mode {terms.sandbox!r}; {settings.party} asks for"
            f" {settings.sandbox!r} or better"
        )
    root = hashlib.sha256(settings.collateral.get(SIMULATED_ROOT, b"")).hexdigest()
    if "simulated" in terms.platforms and terms.simulated_root != root:
        problems.append("its simulated platform root is not the one that this node trusts")
    if settings.own is not None:
        problems += [
            f"beside the policy of {settings.party}, {line}"
            for line in terms.hardware.looser(settings.own.rules.platforms)
        ]
    problems += _policy_problems(terms, settings)
    for role, registers in (("trainer", terms.trainer), ("aggregator", terms.aggregator)):
        mine = {name: value.hex() for name, value in settings.reference[role].items()}
        if settings.own is not None:
            if registers not in settings.own.references(role).values():
                problems.append(
                    f"its {role} enclave is none that the policy of {settings.party} has reference"
                    " values for"
                )
        elif registers != mine:
            differing = ", ".join(
                sorted({n for n in {*mine, *registers} if mine.get(n) != registers.get(n)})
            )
            problems.append(
                f"its {role} enclave is not the one installed here (differs in: {differing})"
            )
    if terms.kem not in settings.kem:
        problems.append(f"its KEM {terms.kem} is not accepted here ({', '.join(settings.kem)})")
    if (fewest := fewest_in_a_sum(contract)) < settings.minimum_cohort:
        problems.append(
            f"a sum of it may cover {fewest} customers, fewer than {settings.minimum_cohort}"
        )
    adapters = [(model.name, model.adapter) for model in contract.models]
    problems += protection_problems(
        contract.protection, [party.name for party in contract.customers], adapters
    )
    problems += tasted_problems(contract)
    problems += claim_problems(contract) or futile_problems(contract)
    return problems


def _policy_problems(terms: AttestationTerms, settings: NodeSettings) -> list[str]:
    """Whether every sandbox policy that the contract takes for good is one that this node does."""
    if settings.own is None:
        known = [reference_policies()]
    else:
        known = [
            *settings.own.policies("trainer").values(),
            *settings.own.policies("aggregator").values(),
        ]
    return [
        f"its {kind} policy {digest[:16]}... of sandbox mode {mode!r} is not one that"
        f" {settings.party} has a reference value for"
        for mode, named in terms.policies.items()
        for kind in ("seccomp", "landlock")
        for digest in getattr(named, kind)
        if not any(mode in one and digest in getattr(one[mode], kind) for one in known)
    ]
