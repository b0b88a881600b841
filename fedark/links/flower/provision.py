"""Keys and certificates of a deployment: a certificate authority, the SuperLink's certificate, one
transport key a node.

    DIR/ca.pem  ca.key  server.pem  server.key  superexec.secret
    DIR/nodes/PARTY.key (OpenSSH, the form Flower wants)  PARTY.pub (PEM)

All on the P-384 curve (FIPS 186-5), files of mode 0600 in directories of mode 0700. Existing keys
are kept, never overwritten. The authority signs with the basic constraint "no further authorities";
the server's certificate carries every name and address that nodes may use to reach it (RFC 5280,
subjectAltName; RFC 9525).
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedark.foundation.errors import InputError, StorageError
from fedark.links.flower.configuration import write_private

__all__ = ["Provisioned", "load_node_key", "provision", "provision_node_key", "renew"]

_AUTHORITY_DAYS, _SERVER_DAYS, _RENEWED_DAYS = 3650, 397, 60
_NO_ENCRYPTION = NoEncryption()


@dataclass(frozen=True)
class Provisioned:
    """Where the files of the SuperLink's side are."""

    ca: Path
    ca_key: Path
    certificate: Path
    key: Path
    superexec_secret: Path


def _directory(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}.") from None
    return path


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _NO_ENCRYPTION)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _base(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - timedelta(minutes=5)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def provision(directory: Path, names: Iterable[str] = ()) -> Provisioned:
    """Make what the SuperLink needs, or keep what is there.

    Args:
        directory: where; made with mode 0700.
        names: further host names and addresses of the SuperLink, besides 127.0.0.1, ::1 and
            localhost.

    Raises:
        InputError: some of the files are there and some are not.
        StorageError: the disk cannot be written.
    """
    base = _directory(directory)
    files = Provisioned(
        *(base / n for n in ("ca.pem", "ca.key", "server.pem", "server.key", "superexec.secret"))
    )
    paths = (files.ca, files.ca_key, files.certificate, files.key, files.superexec_secret)
    present = [path for path in paths if path.exists()]
    if len(present) == len(paths):
        return files
    if present:
        missing = ", ".join(path.name for path in paths if path not in present)
        raise InputError(
            f"{directory} lacks {missing}.",
            safe="Nothing was changed.",
            fix="Restore them, or use an empty directory.",
        )

    authority = ec.generate_private_key(ec.SECP384R1())
    issuer = _name("fedark aggregator authority")
    root = (
        _base(issuer, issuer, authority.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    server = ec.generate_private_key(ec.SECP384R1())
    alternatives = list(dict.fromkeys(("127.0.0.1", "::1", "localhost", *names)))
    subject = x509.SubjectAlternativeName([_alternative(name) for name in alternatives])
    certificate = _server_certificate(authority, issuer, server.public_key(), subject)
    write_private(files.ca_key, _private(authority))
    write_private(files.key, _private(server))
    write_private(files.certificate, certificate.public_bytes(Encoding.PEM))
    write_private(files.superexec_secret, secrets.token_hex(32).encode())
    write_private(files.ca, root.public_bytes(Encoding.PEM))
    return files


def renew(files: Provisioned, now: datetime) -> bool:
    """Issue the server's certificate anew, for the same key and names, if it ends within two
    months; returns whether it was.

    Raises:
        InputError: the authority's key, or one of the certificates, is missing or malformed.
        StorageError: the disk cannot be written; the old certificate still stands.
    """
    try:
        old = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        issuer = x509.load_pem_x509_certificate(files.ca.read_bytes()).subject
        authority = load_pem_private_key(files.ca_key.read_bytes(), None)
        subject = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        public = old.public_key()
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise InputError(
            f"{files.ca.parent} does not hold an authority and its server's certificate."
        ) from None
    if not isinstance(authority, ec.EllipticCurvePrivateKey) or not isinstance(
        public, ec.EllipticCurvePublicKey
    ):
        raise InputError(
            f"{files.ca.parent} does not hold an authority and its server's certificate."
        )
    if old.not_valid_after_utc - now > timedelta(days=_RENEWED_DAYS):
        return False
    certificate = _server_certificate(authority, issuer, public, subject)
    write_private(files.certificate, certificate.public_bytes(Encoding.PEM))
    return True


def _server_certificate(
    authority: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    names: x509.SubjectAlternativeName,
) -> x509.Certificate:
    return (
        _base(_name("fedark aggregator"), issuer, public, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .sign(authority, hashes.SHA384())
    )


def provision_node_key(directory: Path, party: str) -> tuple[Path, bytes]:
    """Make a node's transport key, or keep the one that is there. Returns its file and the public
    key (PEM).

    The key authenticates the node to the SuperLink and nothing more; what a party says is signed
    with its own keys.
    """
    path = _directory(_directory(directory) / "nodes") / f"{party}.key"
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_private(
            path,
            key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, _NO_ENCRYPTION),
            replace=False,
        )
    public = (
        load_node_key(path)
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    write_private(path.with_suffix(".pub"), public)
    return path, public


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node's transport key (OpenSSH or PKCS#8 form).

    Raises:
        InputError: it is missing, open to other users, or not a key on a NIST curve.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(
                f"{path} is open to other users.", fix=f"Run: chmod 600 {shlex.quote(str(path))}"
            )
        data = path.read_bytes()
        key = (
            load_ssh_private_key(data, None)
            if b"OPENSSH" in data
            else load_pem_private_key(data, None)
        )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(f"{path} is not a private key.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} is not a key on a NIST curve.")
    return key
