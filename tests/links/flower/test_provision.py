"""Certificates and keys of a deployment."""

from __future__ import annotations

import ipaddress
import os
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedark.foundation.errors import InputError, StorageError
from fedark.links.flower.provision import load_node_key, provision, provision_node_key, renew


def verify(files, name: x509.IPAddress | x509.DNSName) -> None:
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    PolicyBuilder().store(Store([ca])).build_server_verifier(name).verify(leaf, [])


def test_the_certificate_is_valid_for_loopback_and_for_every_given_name(tmp_path: Path) -> None:
    files = provision(tmp_path / "keys", ["aggregator.example", "192.0.2.7"])
    for name in (
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.DNSName("localhost"),
        x509.DNSName("aggregator.example"),
        x509.IPAddress(ipaddress.ip_address("192.0.2.7")),
    ):
        verify(files, name)
    with pytest.raises(VerificationError):
        verify(files, x509.DNSName("elsewhere.example"))


def test_every_file_is_private_and_every_directory_closed(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        provision(tmp_path / "keys")
        provision_node_key(tmp_path / "keys", "north")
    finally:
        os.umask(old)
    for path in (tmp_path / "keys").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    files = provision(tmp_path)
    _, public = provision_node_key(tmp_path, "north")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert provision(tmp_path) == files
    assert provision_node_key(tmp_path, "north")[1] == public
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_from_which_a_file_is_missing_is_not_filled_up(tmp_path: Path) -> None:
    files = provision(tmp_path)
    files.key.unlink()
    with pytest.raises(InputError, match=r"lacks server\.key"):
        provision(tmp_path)
    assert not files.key.exists()


def test_node_keys_have_the_form_that_flower_wants(tmp_path: Path) -> None:
    path, public = provision_node_key(tmp_path, "north")
    key = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    assert public.startswith(b"-----BEGIN PUBLIC KEY-----")


def test_two_nodes_have_two_keys(tmp_path: Path) -> None:
    assert provision_node_key(tmp_path, "north")[1] != provision_node_key(tmp_path, "south")[1]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path, _ = provision_node_key(tmp_path, "north")
    path.chmod(0o640)
    with pytest.raises(InputError, match="open to other users"):
        load_node_key(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a key",
        b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n",
    ],
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "k"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InputError, match="not a private key"):
        load_node_key(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
    )
    path.chmod(0o600)
    with pytest.raises(InputError, match="NIST curve"):
        load_node_key(path)


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        provision(tmp_path / "file" / "keys")


def test_a_server_certificate_is_renewed_in_its_last_two_months_for_the_same_key_and_names(
    tmp_path: Path,
) -> None:
    files = provision(tmp_path, ["agg.example", "192.0.2.7"])
    old = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert not renew(files, old.not_valid_after_utc - timedelta(days=61))
    assert files.certificate.read_bytes() == old.public_bytes(Encoding.PEM)
    assert renew(files, old.not_valid_after_utc - timedelta(days=59))
    new = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert new.serial_number != old.serial_number
    assert new.public_key() == old.public_key()
    assert new.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    ) == old.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    new.verify_directly_issued_by(x509.load_pem_x509_certificate(files.ca.read_bytes()))
    files.ca_key.unlink()
    with pytest.raises(InputError):
        renew(files, old.not_valid_after_utc)
