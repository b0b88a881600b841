"""An Intel TDX quote, version 4, parsed in full ("Intel TDX DCAP Quoting Library API", revision
0.8, appendices 3 and 5).

    header 48 | TD report body 584 | size | signature 64 | attestation key 64 | certification data
        type 6: QE report 384 | its signature 64 | size | QE authentication data | certification
        data type 5: PCK path in PEM

All numbers are little-endian. Every size must add up to exactly the bytes that are there, every
reserved field must be zero and the PEM must be in its one canonical form (with the one closing zero
byte that Intel's library writes), so that no bit is free.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography import x509

from fedark.attestation import _x509
from fedark.foundation.errors import EvidenceRefused

__all__ = [
    "SUBJECT",
    "PckIdentity",
    "QeReport",
    "TdxQuote",
    "exact_quote",
    "parse_quote",
    "pck_identity",
]

SUBJECT = "an Intel TDX guest"
_MAX_TOKEN = 1 << 14
_HEADER = 48
_SIGNED = _HEADER + 584
_ATTESTATION_KEY_P256 = 2
_TEE_TDX = 0x81
_QE_VENDOR_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_QE_REPORT_DATA = 6
_PCK_PATH = 5
# "Intel SGX PCK Certificate and CRL Profile Specification", section 1.3.5, in DER:
# 1.2.840.113741.1.13.1.
_SGX_EXTENSION = "1.2.840.113741.1.13.1"
_SGX_OID = bytes.fromhex("2a864886f84d010d01")


@dataclass(frozen=True)
class QeReport:
    """The SGX report of the quoting enclave. `raw` is what the PCK key signs; the rest as in SGX's
    report body.
    """

    raw: bytes
    miscselect: bytes
    attributes: bytes
    mrsigner: bytes
    isvprodid: int
    isvsvn: int
    report_data: bytes


@dataclass(frozen=True)
class TdxQuote:
    """One parsed quote; nothing of it is verified yet.

    Attributes:
        signed: header and TD report body, the bytes under `signature` (r || s, 64 bytes).
        tee_tcb_svn, mrseam, mrsignerseam, seamattributes, mrtd, mrconfigid, mrowner, mrownerconfig,
            rtmrs, report_data: as in the TD report body.
        td_attributes: as a 64-bit number.
        attestation_key: x || y, 64 bytes.
        qe_report, qe_signature, qe_auth: of the quoting enclave; the signature is r || s.
        pck_path: PCK certificate, its CA, Intel's root.
    """

    signed: bytes
    signature: bytes
    tee_tcb_svn: bytes
    mrseam: bytes
    mrsignerseam: bytes
    seamattributes: bytes
    td_attributes: int
    mrtd: bytes
    mrconfigid: bytes
    mrowner: bytes
    mrownerconfig: bytes
    rtmrs: tuple[bytes, ...]
    report_data: bytes
    attestation_key: bytes
    qe_report: QeReport
    qe_signature: bytes
    qe_auth: bytes
    pck_path: list[x509.Certificate]


@dataclass(frozen=True)
class PckIdentity:
    """What a PCK certificate says of its platform: PPID (16 bytes), FMSPC (6), PCE id (2), and its
    TCB.
    """

    ppid: bytes
    fmspc: bytes
    pceid: bytes
    component_svns: tuple[int, ...]
    pcesvn: int


def exact_quote(raw: bytes) -> bytes:
    """`raw` without the zero padding that quoting services leave behind a quote; anything else
    stays as it is.
    """
    if len(raw) < _SIGNED + 4:
        return raw
    end = _SIGNED + 4 + int.from_bytes(raw[_SIGNED : _SIGNED + 4], "little")
    return raw[:end] if not any(raw[end:]) else raw


class _Reader:
    """Takes fields off the front of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        field = self._data[self._at : self._at + size]
        if len(field) != size:
            raise _malformed("The quote is truncated.")
        self._at += size
        return field

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def sized(self, size_bytes: int) -> _Reader:
        """The field that a size stands before."""
        return _Reader(self.take(self.number(size_bytes)))

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _malformed("The quote has bytes that belong to no field.")


def parse_quote(data: bytes) -> TdxQuote:
    """A quote of exactly these bytes.

    Raises:
        EvidenceRefused: with the first fault of its form.
    """
    if len(data) > _MAX_TOKEN:
        raise _malformed(f"The quote has {len(data)} bytes, over the limit of {_MAX_TOKEN}.")
    reader = _Reader(data)
    _check_header(reader.take(_HEADER))
    tee_tcb_svn, mrseam, mrsignerseam, seamattributes = (
        reader.take(size) for size in (16, 48, 48, 8)
    )
    td_attributes = reader.number(8)
    reader.take(8)  # XFAM: the processor features that the guest may use
    mrtd, mrconfigid, mrowner, mrownerconfig, *rtmrs = (reader.take(48) for _ in range(8))
    report_data = reader.take(64)

    tail = reader.sized(4)
    reader.end()
    signature, attestation_key = tail.take(64), tail.take(64)
    if tail.number(2) != _QE_REPORT_DATA:
        raise _malformed("The certification data is not the QE's report (type 6).")
    certification = tail.sized(4)
    tail.end()
    qe_report = _qe_report(certification.take(384))
    qe_signature = certification.take(64)
    qe_auth = certification.sized(2).rest()
    if certification.number(2) != _PCK_PATH:
        raise _malformed("The QE's certification data is not a PCK path (type 5).")
    pem = certification.sized(4).rest()
    certification.end()
    return TdxQuote(
        signed=data[:_SIGNED],
        signature=signature,
        tee_tcb_svn=tee_tcb_svn,
        mrseam=mrseam,
        mrsignerseam=mrsignerseam,
        seamattributes=seamattributes,
        td_attributes=td_attributes,
        mrtd=mrtd,
        mrconfigid=mrconfigid,
        mrowner=mrowner,
        mrownerconfig=mrownerconfig,
        rtmrs=tuple(rtmrs),
        report_data=report_data,
        attestation_key=attestation_key,
        qe_report=qe_report,
        qe_signature=qe_signature,
        qe_auth=qe_auth,
        pck_path=_x509.load_pem_chain(pem.removesuffix(b"\x00"), 3, "The PCK path", SUBJECT),
    )


def _check_header(header: bytes) -> None:
    version, key_type, tee, reserved = struct.unpack_from("<HHII", header)
    if version != 4:
        raise _malformed(f"The quote has version {version}, not 4.")
    if key_type != _ATTESTATION_KEY_P256:
        raise _malformed(f"The attestation key is of type {key_type}, not ECDSA P-256.")
    if tee != _TEE_TDX:
        raise _malformed(f"The quote is of another kind of enclave ({tee:#x}) than TDX.")
    if reserved:
        raise _malformed("A reserved field of the header is not zero.")
    if header[12:28] != _QE_VENDOR_INTEL:
        raise _malformed("The quoting enclave is not Intel's.")


def _qe_report(raw: bytes) -> QeReport:
    isvprodid, isvsvn = struct.unpack_from("<HH", raw, 256)
    return QeReport(
        raw=raw,
        miscselect=raw[16:20],
        attributes=raw[48:64],
        mrsigner=raw[128:160],
        isvprodid=isvprodid,
        isvsvn=isvsvn,
        report_data=raw[320:384],
    )


def pck_identity(pck: x509.Certificate) -> PckIdentity:
    """The SGX extension of a PCK certificate.

    Raises:
        EvidenceRefused: it is missing or malformed.
    """
    extension = _x509.extension_bytes(pck, _SGX_EXTENSION)
    try:
        ((tag, content, _),) = _x509.der_items(extension or b"")
        if tag != 0x30:
            raise ValueError
        found = _pairs(content, _SGX_OID)
        tcb = _pairs(_value(found, 2, 0x30), _SGX_OID + b"\x02")
        svns = [int.from_bytes(_value(tcb, number, 0x02), signed=True) for number in range(1, 18)]
        identity = PckIdentity(
            ppid=_value(found, 1, 0x04),
            fmspc=_value(found, 4, 0x04),
            pceid=_value(found, 3, 0x04),
            component_svns=tuple(svns[:16]),
            pcesvn=svns[16],
        )
    except (ValueError, KeyError):
        raise _malformed("The PCK certificate's SGX extension is missing or malformed.") from None
    if [len(field) for field in (identity.ppid, identity.fmspc, identity.pceid)] != [
        16,
        6,
        2,
    ] or min(svns) < 0:
        raise _malformed("A field of the PCK certificate's SGX extension has a wrong size.")
    return identity


def _pairs(content: bytes, prefix: bytes) -> dict[int, tuple[int, bytes]]:
    """SEQUENCE OF SEQUENCE { OBJECT IDENTIFIER prefix.number, value }: number -> tag and content of
    the value.
    """
    found: dict[int, tuple[int, bytes]] = {}
    for tag, pair, _ in _x509.der_items(content):
        (oid_tag, oid, _), (value_tag, value, _) = _x509.der_items(pair)
        if tag != 0x30 or oid_tag != 0x06 or oid[:-1] != prefix or oid[-1] in found:
            raise ValueError
        found[oid[-1]] = (value_tag, value)
    return found


def _value(found: dict[int, tuple[int, bytes]], number: int, tag: int) -> bytes:
    value_tag, value = found[number]
    if value_tag != tag:
        raise ValueError
    return value


def _malformed(reason: str) -> EvidenceRefused:
    return EvidenceRefused(SUBJECT, [reason])
