"""The AMD SEV-SNP attestation report, versions 2 to 5, parsed in full (SEV-SNP Firmware ABI, 56860,
table "ATTESTATION_REPORT").

1184 bytes, little-endian: 0x2A0 signed bytes and a 512-byte signature field. Whatever the
specification calls reserved must be zero here, in the signature field too, so that no bit of a
report is free. Milan and Genoa only: Turin lays its TCB out otherwise. PLATFORM_INFO says how the
host set the machine up; bits that a later firmware adds there are signed, and not read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

from fedark.foundation.errors import EvidenceRefused

__all__ = ["PLATFORM_FACTS", "REPORT_BYTES", "SUBJECT", "SnpReport", "SnpTcb", "parse_report"]

REPORT_BYTES = 0x4A0
SUBJECT = "an AMD SEV-SNP guest"
_SIGNED = 0x2A0
_ECDSA_P384_SHA384 = 1
_VCEK = 0
_SIGNERS = {1: "a VLEK", 7: "no key"}
# Guest policy bits ("Guest Policy" in the ABI): 17 must be one, those above 25 zero.
_POLICY_MUST_BE_ONE = 1 << 17
_POLICY_MIGRATE_MA = 1 << 18
_POLICY_DEBUG = 1 << 19
_POLICY_RESERVED = ~((1 << 26) - 1)
_SMT, _CIPHERTEXT_HIDING, _ALIAS_CHECKED = 1 << 0, 1 << 4, 1 << 5
PLATFORM_FACTS = {
    "no-smt": "simultaneous multithreading is on",
    "ciphertext-hiding": "the host can read the ciphertext of the guest's memory",
    "alias-check": "no check for aliased memory was completed since the last reset",
}
"""What a relying party may ask of PLATFORM_INFO, and what is so where it does not hold."""


@dataclass(frozen=True)
class SnpTcb:
    """Security versions of a Milan or Genoa platform's parts; higher is newer, part by part."""

    bootloader: int
    tee: int
    snp: int
    microcode: int

    @classmethod
    def decode(cls, data: bytes, what: str) -> SnpTcb:
        """Of the 8 bytes of a TCB_VERSION.

        Raises:
            EvidenceRefused: a reserved part is not zero.
        """
        if data[2:6] != bytes(4):
            raise EvidenceRefused(SUBJECT, [f"The {what} TCB has reserved parts."])
        return cls(data[0], data[1], data[6], data[7])

    def below(self, minimum: SnpTcb) -> list[str]:
        """The parts that are older than in `minimum`, in words."""
        return [
            f"{part.name} {getattr(self, part.name)} < {getattr(minimum, part.name)}"
            for part in fields(self)
            if getattr(self, part.name) < getattr(minimum, part.name)
        ]


@dataclass(frozen=True)
class SnpReport:
    """One parsed report; nothing of it is verified yet.

    Attributes:
        version: 2 to 5.
        guest_svn: set by the guest's owner at launch.
        vmpl: privilege level that asked, 0 (most) to 3.
        debug: the host may read the guest's memory.
        migratable: a migration agent may move the guest.
        platform: the keys of `PLATFORM_FACTS` that hold.
        report_data, measurement, host_data, id_key_digest, author_key_digest, report_id, chip_id:
        as in the specification. current, reported, committed, launch: the four TCBs; the signing
        key is derived from `reported`.
        signed: the bytes under the signature.
        r, s: of the signature, big-endian, 48 bytes each.
    """

    version: int
    guest_svn: int
    vmpl: int
    debug: bool
    migratable: bool
    platform: frozenset[str]
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    chip_id: bytes
    current: SnpTcb
    reported: SnpTcb
    committed: SnpTcb
    launch: SnpTcb
    signed: bytes
    r: bytes
    s: bytes


def parse_report(data: bytes) -> SnpReport:
    """A report of exactly 1184 bytes.

    Raises:
        EvidenceRefused: with the first fault of its form.
    """
    if len(data) != REPORT_BYTES:
        raise _malformed(f"The report has {len(data)} bytes, not {REPORT_BYTES}.")
    version, guest_svn, policy = struct.unpack_from("<IIQ", data, 0x00)
    vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
    (signer,) = struct.unpack_from("<I", data, 0x48)
    if not 2 <= version <= 5:
        raise _malformed(f"The report has version {version}, not 2 to 5.")
    _reserved_are_zero(data, version)
    if not policy & _POLICY_MUST_BE_ONE or policy & _POLICY_RESERVED:
        raise _malformed("The guest policy has unknown bits.")
    if vmpl > 3:
        raise _malformed("The report was not asked for by the guest itself (no VMPL from 0 to 3).")
    if algorithm != _ECDSA_P384_SHA384:
        raise _malformed(f"The signature algorithm is {algorithm}, not ECDSA P-384 with SHA-384.")
    if signer >> 5:
        raise _malformed("The report has unknown key flags.")
    if signer >> 2 & 7 != _VCEK:
        raise _malformed(
            f"The report was signed by {_SIGNERS.get(signer >> 2 & 7, 'an unknown key')}, not by a"
            " VCEK."
        )
    return SnpReport(
        version=version,
        guest_svn=guest_svn,
        vmpl=vmpl,
        debug=bool(policy & _POLICY_DEBUG),
        migratable=bool(policy & _POLICY_MIGRATE_MA),
        platform=_platform(data),
        report_data=data[0x50:0x90],
        measurement=data[0x90:0xC0],
        host_data=data[0xC0:0xE0],
        id_key_digest=data[0xE0:0x110],
        author_key_digest=data[0x110:0x140],
        report_id=data[0x140:0x160],
        chip_id=data[0x1A0:0x1E0],
        current=SnpTcb.decode(data[0x38:0x40], "current"),
        reported=SnpTcb.decode(data[0x180:0x188], "reported"),
        committed=SnpTcb.decode(data[0x1E0:0x1E8], "committed"),
        launch=SnpTcb.decode(data[0x1F0:0x1F8], "launch"),
        signed=data[:_SIGNED],
        r=_big_endian(data[0x2A0:0x2E8]),
        s=_big_endian(data[0x2E8:0x330]),
    )


def _platform(data: bytes) -> frozenset[str]:
    (info,) = struct.unpack_from("<Q", data, 0x40)
    holds = {
        "no-smt": not info & _SMT,
        "ciphertext-hiding": info & _CIPHERTEXT_HIDING,
        "alias-check": info & _ALIAS_CHECKED,
    }
    return frozenset(name for name, value in holds.items() if value)


def _reserved_are_zero(data: bytes, version: int) -> None:
    reserved = [
        (0x4C, 0x50),
        (0x18B, 0x1A0),
        (0x1EB, 0x1EC),
        (0x1EF, 0x1F0),
        (0x208, _SIGNED),
        (0x330, REPORT_BYTES),
    ]
    if version < 3:
        reserved.append((0x188, 0x18B))  # from version 3: family, model and stepping
    if version < 5:
        reserved.append((0x1F8, 0x208))  # from version 5: mitigation vectors
    if any(any(data[start:end]) for start, end in reserved):
        raise _malformed(f"A reserved field is not zero in a report of version {version}.")


def _big_endian(field: bytes) -> bytes:
    """Of a 72-byte little-endian field with a 48-byte number."""
    if any(field[48:]):
        raise _malformed("A number of the signature is larger than P-384 allows.")
    return field[47::-1]


def _malformed(reason: str) -> EvidenceRefused:
    return EvidenceRefused(SUBJECT, [reason])
