"""What a token says once its signature and its chain were verified. Only a platform's `Verifier`
makes claims of a token.

Register names are the same on every platform: "launcher", "runtime", "application" and "runconfig"
for fedark's own measurements, next to a hardware platform's registers under their own names. Every
value is a SHA-384, 48 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

__all__ = ["MEASURED_REGISTERS", "RUN_CONFIG", "SANDBOX_MODES", "Claims", "SandboxFacts"]

# Weakest first: a policy that names one admits those after it.
SANDBOX_MODES = ("none", "landlock", "namespaces")
MEASURED_REGISTERS = ("launcher", "runtime", "application")
RUN_CONFIG = "runconfig"


@dataclass(frozen=True)
class SandboxFacts:
    """How an enclave process is confined.

    Attributes:
        mode: one of `SANDBOX_MODES`.
        seccomp_digest, landlock_digest: SHA-384 of the installed policies, 48 bytes, or empty where
            there is none. Every mode but "none" has seccomp, and "landlock" has both.

    Raises:
        ValueError: the three do not fit together.
    """

    mode: str
    seccomp_digest: bytes = b""
    landlock_digest: bytes = b""

    def __post_init__(self) -> None:
        if self.mode not in SANDBOX_MODES:
            raise ValueError(f"{self.mode!r} is not a sandbox mode")
        if any(
            len(digest) not in (0, 48) for digest in (self.seccomp_digest, self.landlock_digest)
        ):
            raise ValueError("a policy digest has 48 bytes or none")
        if self.mode != "none" and not self.seccomp_digest:
            raise ValueError("a confined process has a seccomp policy")
        if self.mode == "landlock" and not self.landlock_digest:
            raise ValueError("mode landlock has a landlock policy")

    @classmethod
    def none(cls) -> SandboxFacts:
        """Not confined at all: `fedark simulate`."""
        return cls("none")


@dataclass(frozen=True)
class Claims:
    """The claims of one verified token.

    Attributes:
        platform: name of the verifier that checked it, such as "simulated".
        hwmodel: what the hardware calls itself; "fedark-sim" says that nothing protects it from its
            host's root.
        ueid: identifies the device (RFC 9711, section 4.2.1).
        report_data: 64 bytes, to be compared with `KeyBinding.report_data`.
        measurements: register name -> SHA-384, 48 bytes.
        debug: memory of the enclave can be read from outside.
        svn: security version number of the platform.
        sandbox, seccomp_digest, landlock_digest: as in `SandboxFacts`.
        issued_at: aware; None on a platform whose evidence holds no time, where the nonce alone
            proves freshness.
        nonce: the token's own nonce; None on a platform that only has report data.
    """

    platform: str
    hwmodel: str
    ueid: bytes
    report_data: bytes
    measurements: Mapping[str, bytes]
    debug: bool
    svn: int
    sandbox: str
    seccomp_digest: bytes
    landlock_digest: bytes
    issued_at: datetime | None
    nonce: bytes | None
