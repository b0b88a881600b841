"""The appraisal policy (RFC 9334, section 8.5): small checks of verified claims, each of which
gives its reasons.

A check never raises and never stops another one: who is refused learns every reason at once.
`from_terms` builds the policy of one role from the contract's `AttestationTerms`;
`fedark.attestation.appraisal` builds one party's own from TOML. There is no check that admits debug
mode, and no switch for one.

fedark's launcher measures fedark itself, on every platform: launcher, runtime, application,
runconfig; and it states the sandbox. Hardware measures the image of a guest, the launcher in it:
reference values for that are named PLATFORM.REGISTER ("tdx.mrtd"), and are demanded besides, for
they are what makes the launcher's statement worth anything (`fedark.attestation.guest`).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from fedark.attestation.binding import ROLES, KeyBinding
from fedark.attestation.claims import RUN_CONFIG, SANDBOX_MODES, Claims
from fedark.attestation.nonces import NONCE_LIFETIME
from fedark.attestation.terms import (
    AttestationTerms,
    NitroTerms,
    Policies,
    SevSnpTerms,
    SimulatedTerms,
    TdxTerms,
)
from fedark.foundation.errors import printable

__all__ = [
    "CLOCK_SKEW",
    "AllOf",
    "BoundTo",
    "Check",
    "AnyOf",
    "ClockWithin",
    "IMAGE_REGISTERS",
    "ImageMeasured",
    "Registers",
    "MinimumSvn",
    "NotDebug",
    "PlatformIn",
    "RunConfigured",
    "SandboxAtLeast",
    "SandboxKnown",
    "from_terms",
    "measured_as",
    "of_platform",
    "speaks_of",
]

CLOCK_SKEW = timedelta(minutes=2)

# What hardware measures of a guest before the guest runs: without a reference value for each of
# these, any guest would do.
IMAGE_REGISTERS: Mapping[str, tuple[str, ...]] = {
    "nitro": ("pcr0", "pcr1", "pcr2"),  # image, kernel with bootstrap, application
    "sev-snp": ("measurement",),  # launch digest
    "tdx": (
        "mrtd",
        "rtmr0",
        "rtmr1",
        "rtmr2",
    ),  # firmware, its configuration, boot loader, kernel with command line
}


class Check(Protocol):
    """One demand on claims."""

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        """Why `claims` do not meet it at `now`; nothing where they do."""


@dataclass(frozen=True)
class AllOf:
    """Every one of `checks`."""

    checks: tuple[Check, ...]

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        for check in self.checks:
            yield from check.reasons(claims, now=now)


@dataclass(frozen=True)
class AnyOf:
    """At least one of `choices`, a name and a check each; where none is met, the reasons of all are
    given.
    """

    choices: tuple[tuple[str, Check], ...]

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        found = [(name, list(check.reasons(claims, now=now))) for name, check in self.choices]
        if all(reasons for _, reasons in found):
            yield from (f"{name}: {reason}" for name, reasons in found for reason in reasons)


@dataclass(frozen=True)
class PlatformIn:
    """The claims come from one of the platforms that the contract names."""

    platforms: tuple[str, ...]

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.platform not in self.platforms:
            yield f"evidence of platform {printable(claims.platform)!r} is not admitted"


@dataclass(frozen=True)
class Registers:
    """fedark's own registers are exactly the reference values: none differs, is missing, or is left
    without a reference.
    """

    reference: Mapping[str, bytes]

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        measured = {
            name: value
            for name, value in claims.measurements.items()
            if "." not in name and name != RUN_CONFIG
        }
        if not self.reference:
            yield "there are no reference values for this role"
        for name in sorted(self.reference.keys() | measured.keys()):
            expected, found = self.reference.get(name), measured.get(name)
            if found is None:
                yield f"register {printable(name)} is missing"
            elif expected is None:
                yield f"register {printable(name)} has no reference value"
            elif not hmac.compare_digest(expected, found):
                yield (
                    f"register {printable(name)} is {found.hex()[:16]}..., the reference value is"
                    f" {expected.hex()[:16]}..."
                )


@dataclass(frozen=True)
class ImageMeasured:
    """The guest's image is the reference (names without PLATFORM.): every register in
    `IMAGE_REGISTERS` has a value there, and every value there holds.

    Other registers (of the host's choosing, or extended by the guest itself later) count where the
    reference names them.
    """

    reference: Mapping[str, bytes]

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        required = IMAGE_REGISTERS.get(claims.platform, ())
        if not required:
            yield f"nothing is known of what platform {printable(claims.platform)!r} measures"
        for name in required:
            if name not in self.reference:
                yield f"there is no reference value for register {claims.platform}.{name}"
        for name, expected in sorted(self.reference.items()):
            found = claims.measurements.get(f"{claims.platform}.{name}")
            if found is None:
                yield f"register {printable(claims.platform)}.{printable(name)} is missing"
            elif not hmac.compare_digest(expected, found):
                yield (
                    f"register {printable(claims.platform)}.{printable(name)} is"
                    f" {found.hex()[:16]}..., the reference value is {expected.hex()[:16]}..."
                )


@dataclass(frozen=True)
class RunConfigured:
    """The enclave was started with exactly the run configuration whose SHA-384 is `digest`."""

    digest: bytes

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if not hmac.compare_digest(claims.measurements.get(RUN_CONFIG, b""), self.digest):
            yield "it was started with another run configuration"


@dataclass(frozen=True)
class NotDebug:
    """Nobody can read the enclave's memory through a debug interface."""

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.debug:
            yield "it runs in debug mode"


@dataclass(frozen=True)
class MinimumSvn:
    """The platform's security version is not below `minimum`."""

    minimum: int

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.svn < self.minimum:
            yield f"its security version {claims.svn} is below {self.minimum}"


@dataclass(frozen=True)
class SandboxAtLeast:
    """The sandbox is `mode` or a stronger one."""

    mode: str

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.sandbox not in SANDBOX_MODES or SANDBOX_MODES.index(
            claims.sandbox
        ) < SANDBOX_MODES.index(self.mode):
            yield f"its sandbox mode {printable(claims.sandbox)!r} is weaker than {self.mode!r}"


@dataclass(frozen=True)
class SandboxKnown:
    """The sandbox's own policies are reference values of its mode. Mode "none" has no policies;
    `SandboxAtLeast` judges it.
    """

    policies: Policies

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.sandbox == SANDBOX_MODES[0]:
            return
        reference = next(
            (policies for mode, policies in self.policies.items() if mode == claims.sandbox), None
        )
        if reference is None:
            yield (
                "there are no reference values for the policies of sandbox mode"
                f" {printable(claims.sandbox)!r}"
            )
            return
        for name, found, known in (
            ("system call (seccomp)", claims.seccomp_digest, reference.seccomp),
            ("file (landlock)", claims.landlock_digest, reference.landlock),
        ):
            if found.hex() not in known:
                said = f"{found.hex()[:16]}..." if found else "missing"
                yield (
                    f"its {name} policy is {said}, which is no reference value of sandbox mode"
                    f" {claims.sandbox!r}"
                )


@dataclass(frozen=True)
class ClockWithin:
    """The token's time, where it has one, is not in the future and not older than a nonce lives,
    give or take `skew`.
    """

    skew: timedelta = CLOCK_SKEW
    lifetime: timedelta = NONCE_LIFETIME

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if claims.issued_at is None:
            return
        if claims.issued_at > now + self.skew:
            yield (
                f"it was issued {claims.issued_at - now} in the future: one of two clocks is wrong"
            )
        if claims.issued_at < now - self.lifetime - self.skew:
            yield (
                f"it was issued {now - claims.issued_at} ago: it is stale, or one of two clocks is"
                " wrong"
            )


@dataclass(frozen=True)
class BoundTo:
    """The token stands for exactly `binding`."""

    binding: KeyBinding

    def reasons(self, claims: Claims, *, now: datetime) -> Iterator[str]:
        if not hmac.compare_digest(claims.report_data, self.binding.report_data()):
            yield (
                "its report data stands for other keys, or another nonce, contract, run, role or"
                " party"
            )
        if claims.nonce is not None and not hmac.compare_digest(claims.nonce, self.binding.nonce):
            yield "its token was made for another nonce"


def measured_as(values: Mapping[str, str], platform: str) -> Check:
    """The check that what `platform` measured is `values` (register -> hex); an empty reference is
    met by nothing.
    """
    own = Registers(
        {name: bytes.fromhex(value) for name, value in values.items() if "." not in name}
    )
    if platform not in IMAGE_REGISTERS:
        return own
    prefix = f"{platform}."
    image = {
        name.removeprefix(prefix): bytes.fromhex(value)
        for name, value in values.items()
        if name.startswith(prefix)
    }
    return AllOf((ImageMeasured(image), own))


def speaks_of(values: Mapping[str, str], platform: str) -> bool:
    """Whether `values` (register -> hex) could be met on `platform` at all: those of a guest's
    image stand in them, or need not.
    """
    return platform not in IMAGE_REGISTERS or any(
        name.startswith(f"{platform}.") for name in values
    )


def of_platform(terms: SimulatedTerms | SevSnpTerms | TdxTerms | NitroTerms) -> tuple[Check, ...]:
    """What one platform's terms ask of claims; what they ask of a token, its verifier is told
    (`fedark.attestation.trust`).
    """
    minimum = () if isinstance(terms, NitroTerms) else (MinimumSvn(terms.minimum_svn),)
    return (SandboxAtLeast(terms.sandbox), *minimum)


def from_terms(
    terms: AttestationTerms, role: str, run_config_digest: bytes, platform: str
) -> AllOf:
    """The policy for enclaves of `role` on `platform` under a contract's terms; for an unknown role
    nothing is a reference.
    """
    values = getattr(terms, role) if role in ROLES else {}
    table = terms.hardware.tables().get(platform)
    return AllOf(
        (
            PlatformIn(terms.platforms),
            measured_as(values, platform),
            RunConfigured(run_config_digest),
            NotDebug(),
            *((MinimumSvn(terms.minimum_svn),) if table is None else of_platform(table)),
            SandboxAtLeast(terms.sandbox),
            SandboxKnown(terms.policies),
            ClockWithin(),
        )
    )
