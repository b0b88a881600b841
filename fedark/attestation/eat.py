"""The EAT profile of the simulated platform: CWT claims (RFC 8392) with EAT names (RFC 9711), in
canonical CBOR.

key     claim         form                     meaning here
6       iat           uint                     seconds since the epoch by the launcher's clock
10      eat_nonce     bstr .size 32            the verifier's challenge
256     ueid          bstr .size 17            0x01 (RAND), 16 random bytes: the certificate's
                                               serialNumber
258     oemid         bstr .size 16            first 16 bytes of the SHA-256 of the maker's root
259     hwmodel       bstr "fedark-sim"        says that this is a simulation
263     dbgstat       uint 0 or 2              0 enabled; 2 disabled since boot
265     eat_profile   tstr                     `PROFILE`
266     submods       {"sandbox": claims-set}  -70001 sandbox mode, -70002 seccomp digest,
                                               -70003 landlock digest
273     measurements  [[60, bstr .cbor map]]   format 60 (application/cbor): register -> SHA-384,
                                               all four
-70000  report data   bstr .size 64            what was asked for: `KeyBinding.report_data`
-70004  svn           uint                     security version number of launcher and device

Exactly these claims; keys below -65536 are for private use (RFC 8392, section 9.1). `cnf` is not
used: the quoting key signs what the enclave's keys hash to, and does not see the keys.
docs/eat-profile.md says who checks each claim, and what else a profile settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedark.attestation.binding import NONCE_BYTES, REPORT_DATA_BYTES
from fedark.attestation.claims import MEASURED_REGISTERS, RUN_CONFIG, SandboxFacts
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError

__all__ = ["HWMODEL", "OEMID_BYTES", "PROFILE", "UEID_BYTES", "SimulatedClaims"]

PROFILE = "tag:fedark.invalid,2026:eat/simulated/1"
HWMODEL = b"fedark-sim"
UEID_BYTES = 17
OEMID_BYTES = 16
_UEID_RAND = 1
_REGISTERS = {*MEASURED_REGISTERS, RUN_CONFIG}
_CBOR_FORMAT = 60
_DEBUG_ENABLED, _DEBUG_OFF_SINCE_BOOT = 0, 2
_IAT, _NONCE, _UEID, _OEMID, _HWMODEL, _DBGSTAT, _PROFILE, _SUBMODS, _MEASUREMENTS = (
    6, 10, 256, 258, 259, 263, 265, 266, 273,
)  # fmt: skip
_REPORT_DATA, _MODE, _SECCOMP, _LANDLOCK, _SVN = -70000, -70001, -70002, -70003, -70004
_KEYS = {
    _IAT, _NONCE, _UEID, _OEMID, _HWMODEL, _DBGSTAT, _PROFILE, _SUBMODS, _MEASUREMENTS,
    _REPORT_DATA, _SVN,
}  # fmt: skip
_MAX_PAYLOAD = 2048
_MAX_TIME = 1 << 36
_MAX_SVN = 1 << 31


@dataclass(frozen=True)
class SimulatedClaims:
    """The payload of a simulated token; the table above says what each claim means."""

    report_data: bytes
    nonce: bytes
    ueid: bytes
    oemid: bytes
    measurements: Mapping[str, bytes]
    sandbox: SandboxFacts
    debug: bool
    svn: int
    issued_at: datetime

    def encode(self) -> bytes:
        """The canonical claims set.

        Raises:
            ProtocolError: a claim has not the form that the profile asks for.
        """
        data = canonical.encode(
            {
                _IAT: int(self.issued_at.timestamp()),
                _NONCE: self.nonce,
                _UEID: self.ueid,
                _OEMID: self.oemid,
                _HWMODEL: HWMODEL,
                _DBGSTAT: _DEBUG_ENABLED if self.debug else _DEBUG_OFF_SINCE_BOOT,
                _PROFILE: PROFILE,
                _SUBMODS: {
                    "sandbox": {
                        _MODE: self.sandbox.mode,
                        _SECCOMP: self.sandbox.seccomp_digest,
                        _LANDLOCK: self.sandbox.landlock_digest,
                    }
                },
                _MEASUREMENTS: [[_CBOR_FORMAT, canonical.encode(dict(self.measurements))]],
                _REPORT_DATA: self.report_data,
                _SVN: self.svn,
            }
        )
        self.decode(data)
        return data

    @classmethod
    def decode(cls, data: bytes) -> SimulatedClaims:
        """Read exactly what `encode` gives.

        Raises:
            ProtocolError: a claim is missing, unknown, or has another form.
        """
        value = canonical.decode(data, max_bytes=_MAX_PAYLOAD, max_depth=4)
        if type(value) is not dict or set(value) != _KEYS:
            raise ProtocolError("The claims are not exactly those of the profile.")
        if value[_PROFILE] != PROFILE or value[_HWMODEL] != HWMODEL:
            raise ProtocolError("The claims are of another profile or hardware model.")
        if type(value[_DBGSTAT]) is not int or value[_DBGSTAT] not in (
            _DEBUG_ENABLED,
            _DEBUG_OFF_SINCE_BOOT,
        ):
            raise ProtocolError("The claim dbgstat is neither enabled nor disabled since boot.")
        if _bytes(value[_UEID], "ueid", UEID_BYTES)[0] != _UEID_RAND:
            raise ProtocolError("The claim ueid is not of type RAND.")
        return cls(
            report_data=_bytes(value[_REPORT_DATA], "report data", REPORT_DATA_BYTES),
            nonce=_bytes(value[_NONCE], "eat_nonce", NONCE_BYTES),
            ueid=value[_UEID],
            oemid=_bytes(value[_OEMID], "oemid", OEMID_BYTES),
            measurements=_measurements(value[_MEASUREMENTS]),
            sandbox=_sandbox(value[_SUBMODS]),
            debug=value[_DBGSTAT] == _DEBUG_ENABLED,
            svn=_uint(value[_SVN], "svn", _MAX_SVN),
            issued_at=datetime.fromtimestamp(_uint(value[_IAT], "iat", _MAX_TIME), UTC),
        )


def _bytes(value: Any, name: str, length: int) -> bytes:
    if type(value) is not bytes or len(value) != length:
        raise ProtocolError(f"The claim {name} is not {length} bytes.")
    return value


def _uint(value: Any, name: str, limit: int) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise ProtocolError(f"The claim {name} is not a number in range.")
    return value


def _measurements(value: Any) -> dict[str, bytes]:
    if (
        type(value) is not list
        or len(value) != 1
        or type(value[0]) is not list
        or len(value[0]) != 2
    ):
        raise ProtocolError("The claim measurements is not one set.")
    form, body = value[0]
    if type(form) is not int or form != _CBOR_FORMAT or type(body) is not bytes:
        raise ProtocolError("The claim measurements is not in application/cbor.")
    registers = canonical.decode(body, max_bytes=_MAX_PAYLOAD, max_depth=1)
    if type(registers) is not dict or set(registers) != _REGISTERS:
        raise ProtocolError("The claim measurements does not hold exactly the four registers.")
    return {name: _bytes(digest, f"measurements.{name}", 48) for name, digest in registers.items()}


def _sandbox(value: Any) -> SandboxFacts:
    if type(value) is not dict or set(value) != {"sandbox"}:
        raise ProtocolError("The claim submods is not exactly the sandbox.")
    claims = value["sandbox"]
    if type(claims) is not dict or set(claims) != {_MODE, _SECCOMP, _LANDLOCK}:
        raise ProtocolError("The sandbox's claims are not mode, seccomp and landlock.")
    if (
        type(claims[_MODE]) is not str
        or type(claims[_SECCOMP]) is not bytes
        or type(claims[_LANDLOCK]) is not bytes
    ):
        raise ProtocolError("The sandbox's claims have another form.")
    try:
        return SandboxFacts(claims[_MODE], claims[_SECCOMP], claims[_LANDLOCK])
    except ValueError as error:
        raise ProtocolError(f"The sandbox's claims are inconsistent: {error}.") from None
