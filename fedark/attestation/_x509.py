"""X.509 as every platform needs it: certificates and CRLs read strictly; paths and raw signatures
of hardware (RFC 5280, section 6).

Stricter than a web verifier, because a vendor's attestation hierarchy is small and known: a path is
exactly the certificates that were given, in their order; every certificate above the leaf is a CA
that may sign certificates; an unknown critical extension refuses; nothing is fetched. Every failure
is a sentence, and all failures of one path are returned together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedark.foundation.errors import EvidenceRefused, ProtocolError, printable

__all__ = [
    "MALFORMED",
    "RevocationList",
    "common_name",
    "current",
    "date_problems",
    "der_items",
    "ec_point",
    "extension_bytes",
    "fingerprint",
    "link_problems",
    "load_certificate",
    "load_pem_chain",
    "path_problems",
    "read_certificate",
    "read_crl",
    "self_signature_problems",
    "verifies",
]

_MAX_CERTIFICATE = 8192
_UNDERSTOOD = {x509.BasicConstraints.oid, x509.KeyUsage.oid}
_Value = TypeVar("_Value")
# AMD's real VCEKs have serial number 0. The filter is set once, for all threads: to set and undo
# one around every reading would let threads undo each other's, so nothing below depends on what
# happens to a warning.
warnings.filterwarnings(
    "ignore", message="Parsed a serial number which wasn't positive", category=UserWarning
)
# All that a strange certificate or list can make `cryptography` raise when its parts are looked at;
# a warning where the process was told to raise them.
MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UserWarning,
)


def _parsed(parse: Callable[[], _Value], what: str) -> _Value:
    """`parse()`, where whatever `cryptography` says of malformed input becomes a protocol error."""
    try:
        return parse()
    except MALFORMED:
        raise ProtocolError(f"{what} is malformed.") from None


def _strict(name: x509.Name) -> x509.Name:
    """`name`, if every text in it has a length that X.520 allows: of one that has not,
    `cryptography` only warns.

    Raises:
        ValueError: it has not.
    """
    for attribute in name:
        if isinstance(attribute.value, str):
            x509.NameAttribute(attribute.oid, attribute.value)
    return name


def _not_negative(serial: int) -> int:
    if serial < 0:
        raise ValueError("negative serial number")  # another that `cryptography` only warns about
    return serial


def read_certificate(
    der: bytes, what: str = "A certificate", *, limit: int = _MAX_CERTIFICATE
) -> x509.Certificate:
    """The certificate whose DER encoding is exactly `der`, all that is looked at later looked at
    once: `cryptography` is lazy.

    Raises:
        ProtocolError: it is larger than `limit` bytes, or malformed.
    """
    if len(der) > limit:
        raise ProtocolError(f"{what} has {len(der)} bytes, over the limit of {limit}.")
    certificate = _parsed(lambda: x509.load_der_x509_certificate(der), what)
    _parsed(
        lambda: (
            certificate.extensions,
            certificate.public_key(),
            _strict(certificate.subject),
            _strict(certificate.issuer),
            certificate.version,
            _not_negative(certificate.serial_number),
            certificate.signature_algorithm_oid,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
        ),
        what,
    )
    return _whole(certificate, der, what)


def read_crl(
    der: bytes, what: str = "A certificate revocation list"
) -> x509.CertificateRevocationList:
    """The revocation list whose DER encoding is exactly `der`.

    Raises:
        ProtocolError: it is malformed.
    """
    crl = _parsed(lambda: x509.load_der_x509_crl(der), what)
    _parsed(
        lambda: (
            _strict(crl.issuer),
            crl.last_update_utc,
            crl.next_update_utc,
            crl.signature_algorithm_oid,
            [extension.critical for extension in crl.extensions],
            [entry.serial_number for entry in crl],
        ),
        what,
    )
    return _whole(crl, der, what)


_Signed = TypeVar("_Signed", x509.Certificate, x509.CertificateRevocationList)


def _whole(signed: _Signed, der: bytes, what: str) -> _Signed:
    """Refuse a signature that says that its last bits are unused.

    The signature is the last element of both, and the count of unused bits is the byte before it;
    `cryptography` ignores the count, so without this check it would be free to change.
    """
    if der[-len(signed.signature) - 1] != 0:
        raise ProtocolError(f"{what} is malformed.")
    return signed


def _refusing(read: Callable[[], _Value], subject: str) -> _Value:
    try:
        return read()
    except ProtocolError as error:
        raise EvidenceRefused(subject, [error.what]) from None


def load_certificate(der: bytes, what: str, subject: str) -> x509.Certificate:
    """`read_certificate` of a vendor's certificate.

    Raises:
        EvidenceRefused: it is too large or malformed; `what` names it and `subject` names the
            evidence.
    """
    return _refusing(lambda: read_certificate(der, what), subject)


def load_pem_chain(pem: bytes, count: int, what: str, subject: str) -> list[x509.Certificate]:
    """Exactly `count` certificates in exactly the PEM form that encodes them, so that no byte of it
    is free.

    Raises:
        EvidenceRefused: it is anything else.
    """
    if len(pem) > count * 2 * _MAX_CERTIFICATE:
        raise EvidenceRefused(subject, [f"{what} is too large."])
    chain = _refusing(lambda: _parsed(lambda: x509.load_pem_x509_certificates(pem), what), subject)
    if len(chain) != count:
        raise EvidenceRefused(subject, [f"{what} has {len(chain)} certificates, not {count}."])
    if b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain) != pem:
        raise EvidenceRefused(subject, [f"{what} is not in canonical PEM form."])
    return [
        load_certificate(certificate.public_bytes(Encoding.DER), what, subject)
        for certificate in chain
    ]


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the DER form, 32 bytes."""
    return certificate.fingerprint(hashes.SHA256())


def common_name(name: x509.Name) -> str:
    """The one common name of a distinguished name, or "" where there is not exactly one."""
    found = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def ec_point(certificate: x509.Certificate, curve: type[ec.EllipticCurve]) -> bytes | None:
    """The uncompressed public point of a certificate on `curve`, or None if its key is of another
    kind.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, curve):
        return None
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def extension_bytes(certificate: x509.Certificate, oid: str) -> bytes | None:
    """The value of a vendor's own extension, or None if the certificate has none."""
    for extension in certificate.extensions:
        if extension.oid.dotted_string == oid and isinstance(
            extension.value, x509.UnrecognizedExtension
        ):
            return extension.value.value
    return None


def verifies(
    point: bytes,
    curve: ec.EllipticCurve,
    digest: hashes.HashAlgorithm,
    message: bytes,
    r: bytes,
    s: bytes,
) -> bool:
    """Whether big-endian `(r, s)` is an ECDSA signature of `message` under the uncompressed public
    `point`.
    """
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
        key.verify(
            encode_dss_signature(int.from_bytes(r), int.from_bytes(s)), message, ec.ECDSA(digest)
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def path_problems(path: Sequence[x509.Certificate], *, now: datetime) -> list[str]:
    """What is wrong with a path from a leaf (first) to a root (last) at `now` (aware); empty if
    nothing is.

    Whether the root is the one that is pinned, and what the leaf must be beyond an end entity that
    may sign, is for the caller.
    """
    return link_problems(path) + date_problems(path, now=now)


def current(
    first: datetime, last: datetime, *, now: datetime, admitted: datetime | None = None
) -> bool:
    """Whether what counts from `first` to `last` counts at `now` or, for a token that was admitted
    before, was not yet out of date when it was `admitted`: what was renewed since then counts as
    well."""
    return first <= now and (admitted or now) <= last


def date_problems(
    path: Sequence[x509.Certificate], *, now: datetime, admitted: datetime | None = None
) -> list[str]:
    """The certificates of a path that are not valid at `now` (aware), root included; `admitted` as
    in `current`.
    """
    return [
        f"The certificate {_name(certificate)} is valid from"
        f" {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to"
        f" {certificate.not_valid_after_utc:%Y-%m-%d %H:%M}, not at {now:%Y-%m-%d %H:%M}."
        for certificate in path
        if not current(
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            now=now,
            admitted=admitted,
        )
    ]


def link_problems(path: Sequence[x509.Certificate], *, first_is_ca: bool = False) -> list[str]:
    """What is wrong with a path at any time: a signature, a CA bit, a path length, a key usage, an
    unknown extension.
    """
    problems: list[str] = []
    for depth, certificate in enumerate(path):
        problems += _constraint_problems(certificate, depth + first_is_ca, _name(certificate))
        if depth + 1 < len(path):
            problems += _issue_problems(certificate, path[depth + 1])
    return problems


def self_signature_problems(root: x509.Certificate) -> list[str]:
    """Whether a root that is pinned by its key, and not by its fingerprint, is what that key
    signed.
    """
    return _issue_problems(root, root)


def _issue_problems(certificate: x509.Certificate, issuer: x509.Certificate) -> list[str]:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return [f"The certificate {_name(certificate)} was not signed by {_name(issuer)}."]
    return []


def _name(certificate: x509.Certificate) -> str:
    return printable(common_name(certificate.subject) or "without a name", 64)


def _constraint_problems(certificate: x509.Certificate, depth: int, name: str) -> list[str]:
    problems: list[str] = []
    constraints: x509.BasicConstraints | None = None
    usage: x509.KeyUsage | None = None
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.BasicConstraints):
            constraints = extension.value
        elif isinstance(extension.value, x509.KeyUsage):
            usage = extension.value
        if extension.critical and extension.oid not in _UNDERSTOOD:
            problems.append(
                f"The certificate {name} has an unknown critical extension"
                f" {extension.oid.dotted_string}."
            )
    if depth == 0:
        if constraints is not None and constraints.ca:
            problems.append(f"The certificate {name} is a CA and may not sign evidence.")
        if usage is not None and not usage.digital_signature:
            problems.append(f"The key of the certificate {name} may not sign evidence.")
        return problems
    if constraints is None or not constraints.ca:
        problems.append(f"The certificate {name} is not a CA (CA:false) but is used as one.")
    # RFC 5280, 4.2.1.9: how many intermediate CAs may stand between this one and the leaf.
    elif constraints.path_length is not None and depth - 1 > constraints.path_length:
        problems.append(
            f"The certificate {name} allows {constraints.path_length} CAs below it, not"
            f" {depth - 1}."
        )
    if usage is None or not usage.key_cert_sign:
        problems.append(f"The key of the certificate {name} may not sign certificates.")
    return problems


class RevocationList:
    """One X.509 CRL. It counts for nothing before `signature_problems` of an issuer with a verified
    path is empty.

    Raises:
        EvidenceRefused: `der` is malformed, has an unknown critical extension, or has no next
            update.
    """

    def __init__(self, der: bytes, what: str, subject: str) -> None:
        self._crl = _refusing(lambda: read_crl(der, what), subject)
        self._what = what
        self.issuer: x509.Name = self._crl.issuer
        self._last_update: datetime = self._crl.last_update_utc
        if self._crl.next_update_utc is None:
            raise EvidenceRefused(subject, [f"{what} has no next update."])
        self._next_update: datetime = self._crl.next_update_utc
        # A critical extension (a delta CRL, an indirect or partial one) means that the list is not
        # the whole truth.
        if any(extension.critical for extension in self._crl.extensions):
            raise EvidenceRefused(subject, [f"{what} has an unknown critical extension."])
        self._serials = frozenset(entry.serial_number for entry in self._crl)

    def signature_problems(self, issuer: x509.Certificate) -> list[str]:
        """Empty if `issuer` signed this list and may sign lists."""
        problems = []
        usage = [
            extension.value
            for extension in issuer.extensions
            if isinstance(extension.value, x509.KeyUsage)
        ]
        if issuer.subject != self.issuer:
            problems.append(f"{self._what} is not of {_name(issuer)}.")
        if not usage or not usage[0].crl_sign:
            problems.append(f"The key of {_name(issuer)} may not sign revocation lists.")
        key = issuer.public_key()
        try:
            signed = isinstance(
                key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey
            ) and self._crl.is_signature_valid(key)
        except (TypeError, ValueError, UnsupportedAlgorithm):
            signed = False
        if not signed:
            problems.append(f"{self._what} was not signed by {_name(issuer)}.")
        return problems

    def problems(
        self, certificate: x509.Certificate, *, now: datetime, admitted: datetime | None = None
    ) -> list[str]:
        """Empty if the list is `current` and `certificate`, which must be of its issuer, is not on
        it.
        """
        problems = []
        if not current(self._last_update, self._next_update, now=now, admitted=admitted):
            problems.append(
                f"{self._what} is current from {self._last_update:%Y-%m-%d %H:%M} "
                f"to {self._next_update:%Y-%m-%d %H:%M}, not at {now:%Y-%m-%d %H:%M}."
            )
        if certificate.issuer != self.issuer:
            problems.append(f"{self._what} is not of the issuer of {_name(certificate)}.")
        elif certificate.serial_number in self._serials:
            problems.append(f"The certificate {_name(certificate)} was revoked.")
        return problems


def der_items(data: bytes) -> list[tuple[int, bytes, int]]:
    """The DER elements that `data` consists of: tag, content and the element's whole length, for
    one-byte tags.

    Raises:
        ValueError: it is not a whole number of elements, or a length is not in its shortest form.
    """
    items: list[tuple[int, bytes, int]] = []
    at = 0
    while at < len(data):
        if len(data) - at < 2 or data[at] & 0x1F == 0x1F:
            raise ValueError("not DER")
        size, start = data[at + 1], at + 2
        if size >= 0x80:
            octets = size & 0x7F
            size = int.from_bytes(data[start : start + octets])
            if not 1 <= octets <= 3 or size < (0x80 if octets == 1 else 1 << 8 * (octets - 1)):
                raise ValueError("not DER")
            start += octets
        if start + size > len(data):
            raise ValueError("truncated DER")
        items.append((data[at], data[start : start + size], start + size - at))
        at = start + size
    return items
