"""AWS Nitro Enclaves: verify an attestation document (COSE_Sign1, ES384) offline, and ask the Nitro
Secure Module for one.

Follows "Nitro Enclaves Attestation Process" (github.com/aws/aws-nitro-enclaves-nsm-api,
docs/attestation_process.md), in its
order: syntax, certificate path, signature. Quirks of the format that are kept, and nothing beyond
them: map keys stand in the order in which the module writes them (not canonical), an absent
optional field is null, the root comes first in the bundle, and the COSE tag 18 is missing.
The payload is a map of definite length (firmware until 2025) or of indefinite length (0xBF, the
members, 0xFF: current firmware); its members have the same one form in both. Everything else is
strict: shortest integers, definite lengths, no duplicate or unknown key. AWS asks that revocation
lists are not consulted for this path; its certificates live for hours.

In fedark's use `user_data` is the 64-byte report data of `KeyBinding` and `nonce` the verifier's
nonce.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedark.attestation import _x509
from fedark.attestation.claims import Claims
from fedark.attestation.platforms.roots import AWS_NITRO_ROOT_SHA256
from fedark.foundation.errors import EnclaveFailed, EvidenceRefused, printable

__all__ = ["NitroAttester", "NitroDocument", "NitroVerifier", "parse_document"]

PLATFORM = "nitro"
CLOCK_SKEW = timedelta(minutes=1)
_SUBJECT = "an AWS Nitro enclave"
_MAX_TOKEN = 0x3000  # the module's own limit for a response
_MAX_CERTIFICATE = 1024
_MAX_BUNDLE = 8
_MAX_DEPTH = 4
_OPEN_MAP, _BREAK = b"\xbf", b"\xff"
_ES384_PROTECTED = bytes.fromhex("a1013822")  # {1: -35}
_MANDATORY = {"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"}
_OPTIONAL = {"public_key": 1024, "user_data": 512, "nonce": 512}  # and the most bytes of each
_IMAGE_REGISTERS = (0, 1, 2)  # image, kernel with bootstrap, application: zero in a debug enclave


@dataclass(frozen=True)
class NitroDocument:
    """The fields of an attestation document whose syntax was checked, and nothing more.

    Attributes:
        module_id: names the enclave and its parent instance.
        timestamp: when the module made the document.
        pcrs: index -> 48 bytes.
        certificate, cabundle: DER; the bundle starts with the root.
        public_key, user_data, nonce: what the enclave asked to have signed.
        signed, signature: the COSE `Sig_structure`, and r || s, 96 bytes.
    """

    module_id: str
    timestamp: datetime
    pcrs: dict[int, bytes]
    certificate: bytes
    cabundle: list[bytes]
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None
    signed: bytes
    signature: bytes


class NitroVerifier:
    """Verifies attestation documents under one pinned root.

    Args:
        root_sha256: SHA-256 of the DER form of the root certificate.
    """

    platform = PLATFORM

    def __init__(self, *, root_sha256: bytes = AWS_NITRO_ROOT_SHA256) -> None:
        self._root_sha256 = root_sha256

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """The claims of an attestation document whose whole path and signature hold at `now`
        (aware).

        A document of a debug enclave verifies and says `debug`; to refuse it is the policy's part.

        Raises:
            EvidenceRefused: with every reason found.
        """
        document = parse_document(token)
        leaf = _x509.load_certificate(document.certificate, "The signing certificate", _SUBJECT)
        bundle = [
            _x509.load_certificate(der, "A certificate of the bundle", _SUBJECT)
            for der in document.cabundle
        ]

        problems: list[str] = []
        if _x509.fingerprint(bundle[0]) != self._root_sha256:
            problems.append("The certificate path does not start at the pinned AWS Nitro root.")
        problems += _x509.path_problems([leaf, *reversed(bundle)], now=now)
        if not leaf.not_valid_before_utc <= document.timestamp <= leaf.not_valid_after_utc:
            problems.append(
                "The document was made outside the validity of the certificate that signs it."
            )
        if document.timestamp > now + CLOCK_SKEW:
            problems.append("The document was made in the future.")
        point = _x509.ec_point(leaf, ec.SECP384R1)
        if point is None:
            problems.append("The signing certificate has no P-384 key.")
        elif not _x509.verifies(
            point,
            ec.SECP384R1(),
            hashes.SHA384(),
            document.signed,
            document.signature[:48],
            document.signature[48:],
        ):
            problems.append("The signature of the document does not verify.")
        if problems:
            raise EvidenceRefused(_SUBJECT, problems)

        return Claims(
            platform=PLATFORM,
            hwmodel="aws-nitro",
            ueid=document.module_id.encode(),
            report_data=document.user_data or b"",
            measurements=MappingProxyType(
                {f"pcr{index}": value for index, value in sorted(document.pcrs.items())}
            ),
            debug=any(document.pcrs[index] == bytes(48) for index in _IMAGE_REGISTERS),
            svn=0,
            sandbox="",
            seccomp_digest=b"",
            landlock_digest=b"",
            issued_at=document.timestamp,
            nonce=document.nonce,
        )


def parse_document(token: bytes) -> NitroDocument:
    """The fields of a COSE_Sign1 attestation document, its syntax checked in full and its signature
    not at all.

    Raises:
        EvidenceRefused: with the first fault of the syntax.
    """
    if len(token) > _MAX_TOKEN:
        raise _malformed(f"The document has {len(token)} bytes, over the limit of {_MAX_TOKEN}.")
    cose = _strict_cbor(token)
    if type(cose) is not list or len(cose) != 4:
        raise _malformed("The document is not an untagged COSE_Sign1 structure.")
    protected, unprotected, payload, signature = cose
    if protected != _ES384_PROTECTED:
        raise _malformed("The protected header does not say ES384 and nothing else.")
    if unprotected != {}:
        raise _malformed("The unprotected header is not empty.")
    if type(payload) is not bytes or type(signature) is not bytes or len(signature) != 96:
        raise _malformed("The payload or the signature has a wrong form.")
    fields = _strict_cbor(payload, open_ended=payload[:1] == _OPEN_MAP)
    if type(fields) is not dict or not _MANDATORY <= fields.keys() <= _MANDATORY | _OPTIONAL.keys():
        raise _malformed("The payload has missing or unknown fields.")
    return NitroDocument(
        module_id=_module_id(fields["module_id"]),
        timestamp=_timestamp(fields["timestamp"]),
        pcrs=_registers(fields["digest"], fields["pcrs"]),
        certificate=_certificate(fields["certificate"]),
        cabundle=_bundle(fields["cabundle"]),
        public_key=_optional(fields, "public_key"),
        user_data=_optional(fields, "user_data"),
        nonce=_optional(fields, "nonce"),
        signed=cbor2.dumps(["Signature1", protected, b"", payload]),
        signature=signature,
    )


def _malformed(reason: str) -> EvidenceRefused:
    return EvidenceRefused(_SUBJECT, [reason])


def _strict_cbor(data: bytes, *, open_ended: bool = False) -> Any:
    """The value of the one encoding of an item in this format: as `canonical.decode`, but maps keep
    their own order. `open_ended`: the item is a map of indefinite length; nothing inside it is.
    """
    try:
        value = cbor2.loads(
            data, max_depth=_MAX_DEPTH, allow_indefinite=open_ended, allow_duplicate_keys=False
        )
        # Comparing with the one encoding also refuses what lies deeper and is of indefinite length.
        exact = _plain(value) and (_open_map(value) if open_ended else cbor2.dumps(value)) == data
    except (
        cbor2.CBORError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
        EOFError,
    ):
        raise _malformed("The document is not well-formed CBOR.") from None
    if not exact:
        raise _malformed(
            "The document is not in the format's one form: a tag, a type, a length or trailing"
            " bytes are wrong."
        )
    return value


def _open_map(value: dict[Any, Any]) -> bytes:
    members = (cbor2.dumps(key) + cbor2.dumps(item) for key, item in value.items())
    return _OPEN_MAP + b"".join(members) + _BREAK


def _plain(value: Any) -> bool:
    if type(value) is list:
        return all(_plain(item) for item in value)
    if type(value) is dict:
        return all(type(key) in (str, int) and _plain(item) for key, item in value.items())
    return value is None or type(value) in (int, str, bytes)


def _module_id(value: Any) -> str:
    if (
        type(value) is not str
        or not 1 <= len(value) <= 256
        or not value.isascii()
        or not value.isprintable()
    ):
        raise _malformed("The module id is malformed.")
    return value


def _timestamp(value: Any) -> datetime:
    if type(value) is not int or not 0 < value < 1 << 45:
        raise _malformed("The timestamp is malformed.")
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=value)


def _registers(digest: Any, value: Any) -> dict[int, bytes]:
    if digest != "SHA384":
        raise _malformed("The registers are not SHA-384.")
    if type(value) is not dict or not 1 <= len(value) <= 32:
        raise _malformed("The registers are malformed.")
    for index, register in value.items():
        if (
            type(index) is not int
            or not 0 <= index < 32
            or type(register) is not bytes
            or len(register) != 48
        ):
            raise _malformed("A register is malformed.")
    if any(index not in value for index in _IMAGE_REGISTERS):
        raise _malformed("A register of the image (PCR 0, 1 or 2) is missing.")
    return value


def _certificate(value: Any) -> bytes:
    if type(value) is not bytes or not 1 <= len(value) <= _MAX_CERTIFICATE:
        raise _malformed("A certificate has a wrong type or size.")
    return value


def _bundle(value: Any) -> list[bytes]:
    if type(value) is not list or not 1 <= len(value) <= _MAX_BUNDLE:
        raise _malformed("The certificate bundle is empty, too long or malformed.")
    return [_certificate(der) for der in value]


def _optional(fields: dict[Any, Any], name: str) -> bytes | None:
    value = fields.get(name)
    if value is not None and (type(value) is not bytes or len(value) > _OPTIONAL[name]):
        raise _malformed(f"The field {name} has a wrong type or size.")
    return value


class NitroAttester:
    """Asks the Nitro Secure Module of this enclave for an attestation document.

    It speaks the module's documented interface and was tested against a fake module only: no Nitro
    machine was at hand. The ioctl needs CAP_SYS_ADMIN (linux/nsm.h), so it runs in the launcher and
    never in the confined enclave process.

    Args:
        device: the module's device file.
        exchange: CBOR request -> CBOR response; by default an ioctl on `device`.
    """

    platform = PLATFORM

    def __init__(
        self, device: Path = Path("/dev/nsm"), *, exchange: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._exchange = exchange or (lambda request: _nsm_exchange(device, request))

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """A document with `report_data` (64 bytes) as user data and `nonce` (32 bytes).

        Raises:
            EnclaveFailed: this is not a Nitro enclave, or the module refused or answered nonsense.
            EvidenceRefused: the module's document is malformed.
        """
        request = cbor2.dumps(
            {"Attestation": {"user_data": report_data, "nonce": nonce, "public_key": None}}
        )
        try:
            response = cbor2.loads(self._exchange(request), max_depth=_MAX_DEPTH)
        except (cbor2.CBORError, ValueError, EOFError):
            response = None
        answer = response.get("Attestation") if isinstance(response, dict) else None
        document = answer.get("document") if isinstance(answer, dict) else None
        if not isinstance(document, bytes):
            code = response.get("Error") if isinstance(response, dict) else None
            raise EnclaveFailed(
                "The Nitro Secure Module made no attestation document"
                f" ({printable(str(code or 'no answer'), 40)}).",
                safe="No evidence left the enclave.",
            )
        parsed = parse_document(document)
        if parsed.user_data != report_data or parsed.nonce != nonce:
            raise EnclaveFailed(
                "The Nitro Secure Module signed other data than was asked.",
                safe="No evidence left the enclave.",
            )
        return document


class _IoVec(ctypes.Structure):
    _fields_ = (("addr", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _NsmRaw(ctypes.Structure):
    _fields_ = (("request", _IoVec), ("response", _IoVec))


_NSM_IOCTL_RAW = (
    0xC0000000 | ctypes.sizeof(_NsmRaw) << 16 | 0x0A << 8
)  # _IOWR(0x0A, 0, struct nsm_raw)


def _nsm_exchange(device: Path, request: bytes) -> bytes:
    sent = ctypes.create_string_buffer(request, len(request))
    received = ctypes.create_string_buffer(_MAX_TOKEN)
    message = _NsmRaw(
        _IoVec(ctypes.addressof(sent), len(request)), _IoVec(ctypes.addressof(received), _MAX_TOKEN)
    )
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _NSM_IOCTL_RAW, message)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EnclaveFailed(
            f"{device} cannot be asked for evidence: {error.strerror}.",
            safe="No evidence left the enclave.",
            fix=(
                "Only an enclave on AWS Nitro has this device, and only a process with"
                " CAP_SYS_ADMIN may use it; elsewhere choose the platform that the machine has."
            ),
        ) from None
    return received.raw[: min(message.response.len, _MAX_TOKEN)]
