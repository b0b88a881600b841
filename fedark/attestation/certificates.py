"""A device certificate's way up to its manufacturer's root (RFC 5280, section 6, for one given
path; RFC 9360 order).

No path is searched and no certificate is fetched: the token brings the path, the verifier brings
the root and the CRLs. Only ECDSA with SHA-384 on P-384 counts. Every certificate is checked for
validity, signature, name, basic constraints, path length and key usage; an unknown critical
extension refuses it. A CRL that is missing, stale or wrongly signed refuses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from fedark.attestation._x509 import MALFORMED, current, read_certificate

__all__ = ["chain_problems", "load_certificate", "p384_key", "root_problems"]

_MAX_DER = 4096
_KNOWN_CRITICAL = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}


def load_certificate(der: bytes) -> x509.Certificate:
    """Parse one certificate of the simulated platform.

    Raises:
        ProtocolError: it is malformed, or larger than 4096 bytes.
    """
    return read_certificate(der, limit=_MAX_DER)


def p384_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    """The certificate's public key if it is on P-384, else None."""
    try:
        key = certificate.public_key()
    except MALFORMED:
        return None
    return (
        key
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)
        else None
    )


def root_problems(root: x509.Certificate, now: datetime) -> list[str]:
    """Why `root` cannot be a trust anchor at `now`; empty if it can."""
    problems = [
        *_own_problems(root, "the root certificate", now),
        *_issuer_problems(root, "the root certificate", None),
    ]
    if root.subject != root.issuer or not _issued_by(root, root):
        problems.append("the root certificate is not self-signed")
    return problems


def chain_problems(
    chain: Sequence[x509.Certificate],
    root: x509.Certificate,
    crls: Sequence[x509.CertificateRevocationList],
    now: datetime,
    admitted: datetime | None = None,
) -> list[str]:
    """Why `chain` (the device's certificate first, the root left out) does not lead to `root` at
    `now`; empty if it does.

    Args:
        crls: one for every issuer on the path; where one is missing, that is a problem.
        admitted: when this chain was found good, for whoever asks again: the certificates are
            judged as of then, and the lists may have been renewed since.
    """
    path = [*chain, root]
    at = admitted or now
    problems = root_problems(root, at)
    for depth, certificate in enumerate(chain):
        name = "the device certificate" if depth == 0 else f"intermediate certificate {depth}"
        issuer = path[depth + 1]
        problems += _own_problems(certificate, name, at)
        problems += (
            _leaf_problems(certificate)
            if depth == 0
            else _issuer_problems(certificate, name, depth - 1)
        )
        if certificate.issuer != issuer.subject:
            problems.append(f"{name} names another issuer than the certificate above it")
        elif not _issued_by(certificate, issuer):
            problems.append(f"{name} is not signed by the certificate above it")
        problems += _revocation_problems(certificate, name, issuer, crls, now, admitted)
    length = _path_length(root)
    if length is not None and len(chain) - 1 > length:
        problems.append(f"the path has {len(chain) - 1} intermediates, the root admits {length}")
    return problems


def _own_problems(certificate: x509.Certificate, name: str, now: datetime) -> list[str]:
    problems = []
    if certificate.version != x509.Version.v3:
        problems.append(f"{name} is not X.509 version 3")
    if certificate.serial_number <= 0:
        problems.append(f"{name} has no positive serial number")
    if now < certificate.not_valid_before_utc:
        problems.append(
            f"{name} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )
    if now > certificate.not_valid_after_utc:
        problems.append(f"{name} expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA384:
        problems.append(f"{name} is not signed with ECDSA and SHA-384")
    if p384_key(certificate) is None:
        problems.append(f"{name} has no P-384 key")
    problems += [
        f"{name} has an unknown critical extension {extension.oid.dotted_string}"
        for extension in certificate.extensions
        if extension.critical and extension.oid not in _KNOWN_CRITICAL
    ]
    return problems


def _leaf_problems(certificate: x509.Certificate) -> list[str]:
    constraints, usage = _constraints(certificate), _usage(certificate)
    problems = []
    if constraints is None or constraints.ca:
        problems.append("the device certificate is not marked as an end entity")
    if usage is None or not usage.digital_signature:
        problems.append("the device certificate's key usage does not admit signatures")
    if usage is not None and (usage.key_cert_sign or usage.crl_sign):
        problems.append("the device certificate's key usage admits issuing")
    return problems


def _issuer_problems(certificate: x509.Certificate, name: str, below: int | None) -> list[str]:
    """`below`: how many intermediates stand between this certificate and the device's; None for the
    root.
    """
    constraints, usage = _constraints(certificate), _usage(certificate)
    problems = []
    if constraints is None or not constraints.ca:
        problems.append(f"{name} is not a certificate authority (CA:false)")
    length = _path_length(certificate)
    if below is not None and length is not None and below > length:
        problems.append(f"{name} admits {length} intermediates below it, the path has {below}")
    if usage is None or not usage.key_cert_sign:
        problems.append(f"{name}'s key usage does not admit issuing certificates")
    return problems


def _revocation_problems(
    certificate: x509.Certificate,
    name: str,
    issuer: x509.Certificate,
    crls: Sequence[x509.CertificateRevocationList],
    now: datetime,
    admitted: datetime | None,
) -> list[str]:
    crl = next((crl for crl in crls if crl.issuer == issuer.subject), None)
    if crl is None:
        return [f"there is no revocation list of the issuer of {name}"]
    problems = []
    usage = _usage(issuer)
    if not _listed_by(crl.public_bytes(Encoding.DER), issuer):
        problems.append(f"the revocation list for {name} is not signed by its issuer")
    if usage is None or not usage.crl_sign:
        problems.append(f"the issuer of {name} may not sign revocation lists")
    if any(extension.critical for extension in crl.extensions):
        problems.append(f"the revocation list for {name} has an unknown critical extension")
    if crl.next_update_utc is None or not current(
        crl.last_update_utc, crl.next_update_utc, now=now, admitted=admitted
    ):
        problems.append(f"the revocation list for {name} is out of date")
    # A serial that is not positive is a problem of its own, and the lookup does not take one.
    if (
        certificate.serial_number > 0
        and crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
    ):
        problems.append(f"{name} is revoked")
    return problems


def _constraints(certificate: x509.Certificate) -> x509.BasicConstraints | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return None


def _path_length(certificate: x509.Certificate) -> int | None:
    constraints = _constraints(certificate)
    return constraints.path_length if constraints is not None else None


def _usage(certificate: x509.Certificate) -> x509.KeyUsage | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return None


# A pure function of two certificates; roots and devices come again and again, and a P-384
# verification costs most of a check.
@lru_cache(maxsize=256)
def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


@lru_cache(maxsize=16)
def _listed_by(crl: bytes, issuer: x509.Certificate) -> bool:
    """Whether the issuer signed this revocation list (DER); one list stands for many devices."""
    key, listed = p384_key(issuer), x509.load_der_x509_crl(crl)
    return (
        key is not None
        and listed.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA384
        and listed.is_signature_valid(key)
    )
