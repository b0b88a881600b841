"""What a contract, and a party's own policy, say of the evidence that counts: small parts, the same
in CBOR and in TOML.

    [hardware.tdx]                      # a platform without a table is not admitted
    accepted = ["UpToDate", "SWHardeningNeeded"]
    minimum_evaluation = 17
    [hardware.sev-snp.minimum_tcb.Milan]
    bootloader = 4
    tee = 0
    snp = 22
    microcode = 213
    [policies.namespaces]               # reference values of the sandbox's policies, by mode
    seccomp = ["<96 hex digits>"]
    landlock = ["<96 hex digits>", ""]  # "" admits a kernel without landlock

`looser` compares two of a kind: a party signs no contract that would admit, in some enclave, what
its own policy refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedark.foundation.keys import HYBRID, Kem
from fedark.foundation.terms import Hex32, Hex48, Terms

__all__ = [
    "HARDWARE",
    "AttestationTerms",
    "HardwareTerms",
    "NitroTerms",
    "Policies",
    "Register",
    "Registers",
    "SandboxMode",
    "SandboxPolicies",
    "SevSnpTerms",
    "SimulatedTerms",
    "TcbTerms",
    "TdxTerms",
]

HARDWARE = ("nitro", "sev-snp", "tdx")
_MODES = ("none", "landlock", "namespaces")  # weakest first
SandboxMode = Literal["namespaces", "landlock", "none"]
Version = Annotated[int, Field(ge=0, le=255)]
Svn = Annotated[int, Field(ge=0)]
Register = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}(\.[a-z0-9_]{1,31})?$")]
Registers = dict[Register, Hex48]
PlatformFact = Literal["no-smt", "ciphertext-hiding", "alias-check"]
TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]


class SandboxPolicies(Terms):
    """Reference values of one sandbox mode (`fedark enclave measure` prints them).

    Attributes:
        seccomp: SHA-384 of every admissible system call policy.
        landlock: SHA-384 of every admissible landlock policy: they differ by what the kernel can
            do. "" admits none at all.
    """

    seccomp: Annotated[tuple[Hex48, ...], Field(min_length=1, max_length=64)]
    landlock: Annotated[tuple[Hex48 | Literal[""], ...], Field(min_length=1, max_length=64)]


Policies = dict[Literal["namespaces", "landlock"], SandboxPolicies]


class SimulatedTerms(Terms):
    """Of the simulated platform, which protects nothing from its own host."""

    root: Hex32
    minimum_svn: Svn = 1
    sandbox: SandboxMode = "landlock"


class _GuestTerms(Terms):
    """Of every hardware platform.

    Attributes:
        sandbox: how the launcher inside the measured guest confines the enclave process, at least.
    """

    sandbox: SandboxMode = "landlock"

    def _looser_sandbox(self, own: _GuestTerms) -> Iterator[str]:
        if _MODES.index(self.sandbox) < _MODES.index(own.sandbox):
            yield f"sandbox {self.sandbox!r} is weaker than {own.sandbox!r}"


class TcbTerms(Terms):
    """The oldest admissible versions of an SNP platform's parts, as AMD's security bulletins name
    them.

    Attributes:
        bootloader, tee, snp, microcode: the version of that part, or a newer one.
    """

    bootloader: Version
    tee: Version
    snp: Version
    microcode: Version


class SevSnpTerms(_GuestTerms):
    """Of AMD SEV-SNP.

    Attributes:
        minimum_tcb: by product; one that is not named here is refused.
        vmpls: privilege levels that may ask; 0 unless a paravisor below the guest is part of what
            is trusted.
        minimum_svn: the guest's own, from its ID block.
        requires: what the report must say of the machine: "no-smt" (no thread of another guest
            shares a core), "ciphertext-hiding" (the host cannot watch the ciphertext of memory
            change), "alias-check" (the firmware found no two addresses for one place in memory).
        revocation: "required": AMD's list of revoked ASKs must be at hand and current, so that no
            host hides a revocation by leaving it out. "if-given": where there is one, it counts.
    """

    minimum_tcb: Annotated[dict[Literal["Milan", "Genoa"], TcbTerms], Field(min_length=1)]
    vmpls: Annotated[tuple[Annotated[int, Field(ge=0, le=3)], ...], Field(min_length=1)] = (0,)
    minimum_svn: Svn = 0
    requires: tuple[PlatformFact, ...] = ()
    revocation: Literal["required", "if-given"] = "required"

    def looser(self, own: SevSnpTerms) -> Iterator[str]:
        """What these terms admit and `own` refuses."""
        yield from self._looser_sandbox(own)
        for product, tcb in self.minimum_tcb.items():
            floor = own.minimum_tcb.get(product)
            if floor is None:
                yield f"{product} is not admitted"
                continue
            for part in TcbTerms.model_fields:
                if getattr(tcb, part) < getattr(floor, part):
                    yield (
                        f"{product}'s minimum {part} {getattr(tcb, part)} is below"
                        f" {getattr(floor, part)}"
                    )
        if set(self.vmpls) - set(own.vmpls):
            yield f"VMPL {sorted(set(self.vmpls) - set(own.vmpls))} is not admitted"
        if self.minimum_svn < own.minimum_svn:
            yield f"minimum_svn {self.minimum_svn} is below {own.minimum_svn}"
        if missing := sorted(set(own.requires) - set(self.requires)):
            yield f"it does not ask for {', '.join(missing)}"
        if own.revocation == "required" != self.revocation:
            yield "it asks for no revocation list"


class TdxTerms(_GuestTerms):
    """Of Intel TDX.

    Attributes:
        accepted: states of the platform's TCB that are good enough. "Revoked" is no state that can
            be accepted.
        minimum_svn: the date of the TCB level, YYYYMMDD.
        minimum_evaluation: Intel's `tcbEvaluationDataNumber` of TCB info and QE identity:
            collateral stays valid for a month, and a host could go on bringing the one from before
            a recovery; a newer number refuses it.
    """

    accepted: Annotated[tuple[TcbStatus, ...], Field(min_length=1)] = ("UpToDate",)
    minimum_svn: Svn = 0
    minimum_evaluation: Svn = 0

    def looser(self, own: TdxTerms) -> Iterator[str]:
        """What these terms admit and `own` refuses."""
        yield from self._looser_sandbox(own)
        if states := sorted(set(self.accepted) - set(own.accepted)):
            yield f"TCB state {', '.join(states)} is not accepted"
        for name in ("minimum_svn", "minimum_evaluation"):
            if getattr(self, name) < getattr(own, name):
                yield f"{name} {getattr(self, name)} is below {getattr(own, name)}"


class NitroTerms(_GuestTerms):
    """Of AWS Nitro, which has no security version and no revocation: its root, image registers and
    freshness are all there is.
    """

    def looser(self, own: NitroTerms) -> Iterator[str]:
        """What these terms admit and `own` refuses."""
        yield from self._looser_sandbox(own)


class HardwareTerms(Terms):
    """The hardware platforms that are admitted, each with what is asked of it."""

    sev_snp: Annotated[SevSnpTerms | None, Field(alias="sev-snp")] = None
    tdx: TdxTerms | None = None
    nitro: NitroTerms | None = None

    def tables(self) -> Mapping[str, SevSnpTerms | TdxTerms | NitroTerms]:
        """Platform name -> its terms, of those that are admitted."""
        every = {"nitro": self.nitro, "sev-snp": self.sev_snp, "tdx": self.tdx}
        return {name: terms for name, terms in every.items() if terms is not None}

    def looser(self, own: HardwareTerms) -> list[str]:
        """What these terms admit and `own` refuses, one line each."""
        theirs = own.tables()
        found = [f"{name} is not admitted" for name in self.tables() if name not in theirs]
        for name, mine, other in (
            ("nitro", self.nitro, own.nitro),
            ("sev-snp", self.sev_snp, own.sev_snp),
            ("tdx", self.tdx, own.tdx),
        ):
            if mine is not None and other is not None:
                found += [f"{name}: {line}" for line in mine.looser(other)]  # type: ignore[arg-type]  # of one kind by their names
        return found


class AttestationTerms(Terms):
    """Which evidence counts. Debug mode never does: there is no switch for it.

    Attributes:
        platforms: admissible platforms by name; "simulated" only if it stands here.
        simulated_root: SHA-256 of the DER certificate of the simulated manufacturer's root, or ""
            where none is admitted.
        sandbox: the weakest admissible sandbox mode, on every platform; "none" is for `fedark
            simulate` alone.
        minimum_svn: security version number of the simulated platform; hardware's are in
            `hardware`.
        kem: of every key that something is sealed to under this contract. The hybrid stays
            confidential if one half of it is broken; plain X25519 only where it is named here, and
            in the release policy of every bundle.
        hardware: what is asked of each hardware platform in `platforms`.
        policies: sandbox mode -> reference values of its policies. A mode that does not stand here
            is refused.
        trainer, aggregator, inference: reference values, register name -> SHA-384 (hex); of
            inference in a lease alone.
    """

    platforms: Annotated[tuple[str, ...], Field(min_length=1)]
    simulated_root: str = ""
    sandbox: SandboxMode = "landlock"
    minimum_svn: Svn = 1
    kem: Kem = HYBRID
    hardware: HardwareTerms = HardwareTerms()
    policies: Policies = Field(default_factory=dict)
    trainer: dict[str, Hex48]
    aggregator: dict[str, Hex48]
    inference: dict[str, Hex48] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        named, tables = set(self.platforms), self.hardware.tables()
        problems = [
            f"platform {name!r} is admitted without its terms"
            for name in HARDWARE
            if name in named - tables.keys()
        ]
        problems += [
            f"there are terms for platform {name!r}, which is not admitted"
            for name in tables.keys() - named
        ]
        if self.sandbox != "none" and not self.policies:
            problems.append("it asks for a sandbox and has no reference values for its policies")
        if problems:
            raise ValueError("; ".join(problems))
        return self
