"""Evidence of an enclave inside a confidential guest: the hardware speaks for the guest, the
guest's launcher for the enclave.

Hardware measures a guest's image (firmware, kernel, root file system) before it runs, and signs 64
bytes that the guest chooses. It knows nothing of fedark's launcher, of the process that it
confines, nor of what that process was started for. So evidence has two layers, as RATS has it for
layered attesters (RFC 9334, section 3.3):

- the launcher, which is part of the measured image and alone in the guest can reach the quoting
  device (root, a device file or configfs: nothing that the sandbox shows), states what the
  simulated platform's token says too: registers launcher, runtime, application and runconfig,
  sandbox mode, digests of both sandbox policies, and the enclave's own report data;
- the hardware signs `SHA-512(label, statement)` as its report data.

The statement counts because, and only where, the image registers are reference values: whoever
boots another image can state anything, but then PLATFORM.REGISTER differs. So a contract names
both, the image ("tdx.mrtd") and fedark's own registers, and a sandbox is appraised on hardware as
it is on the simulated platform. A confined enclave cannot make a statement of its own.

Form of a token: canonical CBOR {"quote": bytes, "statement": bytes}; of a statement: canonical CBOR
map, exactly the fields of `GuestStatement`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedark.attestation.binding import REPORT_DATA_BYTES
from fedark.attestation.claims import MEASURED_REGISTERS, RUN_CONFIG, Claims, SandboxFacts
from fedark.attestation.platforms.base import Attester, Verifier
from fedark.foundation import canonical
from fedark.foundation.errors import EvidenceRefused, ProtocolError

__all__ = ["Guest", "GuestAttester", "GuestStatement", "GuestVerifier"]

_LABEL = "fedark/guest-statement/1"
_MAX_TOKEN = 64 << 10
_MAX_STATEMENT = 2048
_REGISTERS = {*MEASURED_REGISTERS, RUN_CONFIG}


@dataclass(frozen=True)
class GuestStatement:
    """What the launcher of a guest says of the enclave that it started.

    Attributes:
        report_data: of the enclave's key binding, 64 bytes.
        registers: the four, SHA-384 each.
        sandbox: how the enclave process is confined.
    """

    report_data: bytes
    registers: Mapping[str, bytes]
    sandbox: SandboxFacts

    def encode(self) -> bytes:
        """The canonical form.

        Raises:
            ProtocolError: a field has another form.
        """
        data = canonical.encode(
            {
                "report_data": self.report_data,
                "registers": dict(self.registers),
                "sandbox": self.sandbox.mode,
                "seccomp": self.sandbox.seccomp_digest,
                "landlock": self.sandbox.landlock_digest,
            }
        )
        self.decode(data)
        return data

    @classmethod
    def decode(cls, data: bytes) -> GuestStatement:
        """Read exactly what `encode` gives.

        Raises:
            ProtocolError: anything else.
        """
        value = canonical.decode(data, max_bytes=_MAX_STATEMENT, max_depth=2)
        forms = {
            "report_data": bytes,
            "registers": dict,
            "sandbox": str,
            "seccomp": bytes,
            "landlock": bytes,
        }
        if type(value) is not dict or {name: type(item) for name, item in value.items()} != forms:
            raise ProtocolError("A guest's statement is not a map of exactly its fields.")
        registers = value["registers"]
        if registers.keys() != _REGISTERS or any(
            type(item) is not bytes or len(item) != 48 for item in registers.values()
        ):
            raise ProtocolError("A guest's statement does not hold exactly the four registers.")
        if len(value["report_data"]) != REPORT_DATA_BYTES:
            raise ProtocolError("A guest's statement has malformed report data.")
        try:
            facts = SandboxFacts(value["sandbox"], value["seccomp"], value["landlock"])
        except ValueError as error:
            raise ProtocolError(f"A guest's statement is inconsistent: {error}.") from None
        return cls(value["report_data"], registers, facts)


def _report(statement: bytes) -> bytes:
    """The report data that the hardware signs for a statement, 64 bytes."""
    return hashlib.sha512(canonical.encode([_LABEL, statement])).digest()


class GuestAttester:
    """Quotes for one enclave of this guest. It lives in the launcher.

    Args:
        hardware: asks the guest's hardware.
        measurements: the four registers.
        sandbox: how the enclave process is confined.
    """

    def __init__(
        self, hardware: Attester, *, measurements: Mapping[str, bytes], sandbox: SandboxFacts
    ) -> None:
        self._hardware = hardware
        self._measurements = dict(measurements)
        self._sandbox = sandbox

    @property
    def platform(self) -> str:
        return self._hardware.platform

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """See `Attester.quote`.

        Raises:
            ProtocolError: `report_data` or a register has another length.
            EnclaveFailed: the hardware gave no quote.
        """
        statement = GuestStatement(report_data, self._measurements, self._sandbox).encode()
        return canonical.encode(
            {"quote": self._hardware.quote(_report(statement), nonce), "statement": statement}
        )


class GuestVerifier:
    """Verifies a platform's quote and the statement that it stands for.

    Args:
        hardware: verifies quotes of the platform.
    """

    def __init__(self, hardware: Verifier) -> None:
        self._hardware = hardware

    @property
    def platform(self) -> str:
        return self._hardware.platform

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """The hardware's claims, its registers named PLATFORM.REGISTER, and the launcher's beside
        them.

        Raises:
            EvidenceRefused: with every reason.
        """
        subject = f"a guest on {self.platform}"
        try:
            value: Any = canonical.decode(token, max_bytes=_MAX_TOKEN, max_depth=1)
            if type(value) is not dict or {name: type(item) for name, item in value.items()} != {
                "quote": bytes,
                "statement": bytes,
            }:
                raise ProtocolError("The token is not a quote with its guest's statement.")
            statement = GuestStatement.decode(value["statement"])
        except ProtocolError as error:
            raise EvidenceRefused(subject, [error.what]) from None
        claims = self._hardware.verify(value["quote"], now=now, admitted=admitted)
        if claims.report_data != _report(value["statement"]):
            raise EvidenceRefused(subject, ["its quote is not over its launcher's statement"])
        image = {f"{self.platform}.{name}": digest for name, digest in claims.measurements.items()}
        return replace(
            claims,
            report_data=statement.report_data,
            measurements=MappingProxyType({**image, **statement.registers}),
            sandbox=statement.sandbox.mode,
            seccomp_digest=statement.sandbox.seccomp_digest,
            landlock_digest=statement.sandbox.landlock_digest,
        )


@dataclass(frozen=True)
class Guest:
    """The machine that enclaves run on, where it is a confidential guest: what a launcher makes
    attesters of.

    Checkpoints are sealed under a secret of this object: an enclave that died goes on while the
    launching process lives, and a guest that is started again begins anew. Keys that survive it are
    a hardware service that this release does not ask for.

    Attributes:
        hardware: asks the guest's hardware.
        secret: 32 bytes, in memory only.
    """

    hardware: Attester
    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    def attester(self, *, measurements: Mapping[str, bytes], sandbox: SandboxFacts) -> Attester:
        """See `fedark.attestation.platforms.base.EnclavePlatform`."""
        return GuestAttester(self.hardware, measurements=measurements, sandbox=sandbox)

    def sealing_key(self, measurements: Mapping[str, bytes], sandbox: SandboxFacts) -> bytes:
        """See `fedark.attestation.platforms.base.EnclavePlatform`; HKDF-SHA384 (RFC 5869)."""
        facts = [sandbox.mode, sandbox.seccomp_digest, sandbox.landlock_digest]
        info = canonical.encode(["fedark/guest-sealing/1", dict(measurements), facts])
        return HKDF(hashes.SHA384(), 32, None, info).derive(self.secret)
