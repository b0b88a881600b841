"""The path from a device to its manufacturer: every rule of RFC 5280 that matters here, and each
one broken.
"""

from __future__ import annotations

import os
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import NameOID

from fedark.attestation._x509 import read_crl
from fedark.attestation.certificates import chain_problems, load_certificate
from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot, SimulatedVerifier
from fedark.contract.contract import now
from fedark.foundation.errors import EvidenceRefused, InputError, ProtocolError

KEYS = {
    name: ec.generate_private_key(ec.SECP384R1()) for name in ("root", "middle", "leaf", "other")
}
DAY = timedelta(days=1)


def usage(*, sign: bool = False, issue: bool = False, crl: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(sign, False, False, False, False, issue, crl, False, False)


def certificate(
    subject: str,
    issuer: str,
    now: datetime,
    *,
    key: Any = None,
    by: Any = None,
    ca: bool | None = None,
    length: int | None = None,
    key_usage: x509.KeyUsage | None = None,
    start: timedelta = -DAY,
    end: timedelta = DAY,
    digest: Any = None,
    extra: Any = None,
) -> x509.Certificate:
    authority = subject != "leaf" if ca is None else ca
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key((key or KEYS[subject]).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(
            x509.BasicConstraints(authority, length if authority else None), critical=True
        )
        .add_extension(
            key_usage or (usage(issue=True, crl=True) if subject != "leaf" else usage(sign=True)),
            critical=True,
        )
    )
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return builder.sign(by or KEYS[issuer], digest or hashes.SHA384())


def crl(
    issuer: str,
    now: datetime,
    *,
    by: Any = None,
    revoked: tuple[int, ...] = (),
    start: timedelta = -DAY,
    end: timedelta = DAY,
) -> Any:
    builder = x509.CertificateRevocationListBuilder()
    builder = builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
    builder = builder.last_update(now + start).next_update(now + end)
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(by or KEYS[issuer], hashes.SHA384())


class Path3:
    """leaf <- middle <- root, all in order; each part can be replaced."""

    def __init__(self, now: datetime, **parts: Any) -> None:
        self.now = now
        self.root = parts.get("root") or certificate("root", "root", now, length=1)
        self.middle = parts.get("middle") or certificate("middle", "root", now, length=0)
        self.leaf = parts.get("leaf") or certificate("leaf", "middle", now)
        self.crls = parts.get("crls", [crl("root", now), crl("middle", now)])

    def problems(self, now: datetime | None = None) -> list[str]:
        return chain_problems([self.leaf, self.middle], self.root, self.crls, now or self.now)


def test_a_path_of_three_in_order_has_no_problem_and_an_independent_verifier_agrees(
    lab: Any,
) -> None:
    path = Path3(lab.now)
    assert path.problems() == []
    anything = verification.ExtensionPolicy.permit_all().require_present(
        x509.BasicConstraints, verification.Criticality.CRITICAL, None
    )
    builder = verification.PolicyBuilder().store(verification.Store([path.root])).time(lab.now)
    verifier = builder.extension_policies(
        ca_policy=anything, ee_policy=anything
    ).build_client_verifier()
    assert len(verifier.verify(path.leaf, [path.middle]).chain) == 3


@pytest.mark.attack("intermediate with CA:false", mode="simulated")
def test_an_intermediate_with_ca_false_is_refused(lab: Any, refusal: Any) -> None:
    path = Path3(lab.now, middle=certificate("middle", "root", lab.now, ca=False))
    (problem,) = path.problems()
    assert problem == "intermediate certificate 1 is not a certificate authority (CA:false)"
    refusal(problem)


def test_a_device_that_issues_devices_is_refused(lab: Any) -> None:
    below = certificate("leaf", "middle", lab.now, key=KEYS["other"], by=KEYS["leaf"])
    problems = chain_problems(
        [below, Path3(lab.now).leaf, Path3(lab.now).middle], Path3(lab.now).root, [], lab.now
    )
    assert "intermediate certificate 1 is not a certificate authority (CA:false)" in problems


def test_a_path_longer_than_the_root_admits_is_refused(lab: Any) -> None:
    path = Path3(lab.now, root=certificate("root", "root", lab.now, length=0))
    assert path.problems() == ["the path has 1 intermediates, the root admits 0"]


def test_a_path_longer_than_an_intermediate_admits_is_refused(lab: Any) -> None:
    root = certificate("root", "root", lab.now)
    upper = certificate("other", "root", lab.now, length=0)
    middle = certificate("middle", "other", lab.now)
    crls = [crl(name, lab.now) for name in ("root", "other", "middle")]
    problems = chain_problems(
        [certificate("leaf", "middle", lab.now), middle, upper], root, crls, lab.now
    )
    assert problems == [
        "intermediate certificate 2 admits 0 intermediates below it, the path has 1"
    ]


@pytest.mark.parametrize("part", ["root", "middle", "leaf"])
def test_an_expired_certificate_is_refused(lab: Any, part: str) -> None:
    issuer = {"root": "root", "middle": "root", "leaf": "middle"}[part]
    path = Path3(lab.now, **{part: certificate(part, issuer, lab.now, end=-timedelta(minutes=1))})
    (problem,) = path.problems()
    assert "expired at" in problem


def test_a_certificate_that_is_not_valid_yet_is_refused(lab: Any) -> None:
    (problem,) = Path3(
        lab.now, leaf=certificate("leaf", "middle", lab.now, start=timedelta(minutes=1))
    ).problems()
    assert "not valid before" in problem


@pytest.mark.parametrize(
    ("key_usage", "reason"),
    [
        (usage(), "does not admit signatures"),
        (usage(sign=True, issue=True), "admits issuing"),
        (usage(sign=True, crl=True), "admits issuing"),
    ],
)
def test_a_device_with_the_wrong_key_usage_is_refused(
    lab: Any, key_usage: x509.KeyUsage, reason: str
) -> None:
    (problem,) = Path3(
        lab.now, leaf=certificate("leaf", "middle", lab.now, key_usage=key_usage)
    ).problems()
    assert reason in problem


def test_an_intermediate_with_the_wrong_key_usage_is_refused(lab: Any) -> None:
    path = Path3(
        lab.now,
        middle=certificate(
            "middle", "root", lab.now, length=0, key_usage=usage(sign=True, crl=True)
        ),
    )
    assert path.problems() == [
        "intermediate certificate 1's key usage does not admit issuing certificates"
    ]


def test_a_device_marked_as_an_authority_is_refused(lab: Any) -> None:
    path = Path3(lab.now, leaf=certificate("leaf", "middle", lab.now, ca=True))
    assert path.problems() == ["the device certificate is not marked as an end entity"]


def test_a_foreign_root_of_the_same_name_is_refused(lab: Any) -> None:
    root = certificate("root", "root", lab.now, key=KEYS["other"], by=KEYS["other"], length=1)
    problems = Path3(lab.now, root=root).problems()
    assert "intermediate certificate 1 is not signed by the certificate above it" in problems


def test_a_root_that_did_not_sign_itself_is_refused(lab: Any) -> None:
    root = certificate("root", "root", lab.now, by=KEYS["other"], length=1)
    assert "the root certificate is not self-signed" in Path3(lab.now, root=root).problems()


def test_an_unknown_critical_extension_is_refused(lab: Any) -> None:
    extra = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00")
    (problem,) = Path3(lab.now, leaf=certificate("leaf", "middle", lab.now, extra=extra)).problems()
    assert "unknown critical extension 1.3.6.1.4.1.55555.1" in problem


def test_name_constraints_which_are_not_understood_here_are_refused(lab: Any) -> None:
    extra = x509.NameConstraints(
        permitted_subtrees=[x509.DNSName("example.invalid")], excluded_subtrees=None
    )
    path = Path3(lab.now, middle=certificate("middle", "root", lab.now, length=0, extra=extra))
    assert any("unknown critical extension" in problem for problem in path.problems())


def test_a_weaker_curve_or_hash_is_refused(lab: Any) -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    assert (
        "the device certificate has no P-384 key"
        in Path3(lab.now, leaf=certificate("leaf", "middle", lab.now, key=small)).problems()
    )
    weak = Path3(lab.now, leaf=certificate("leaf", "middle", lab.now, digest=hashes.SHA256()))
    assert weak.problems() == ["the device certificate is not signed with ECDSA and SHA-384"]


def test_a_revoked_device_and_a_revoked_intermediate_are_refused(lab: Any) -> None:
    path = Path3(lab.now)
    path.crls = [
        crl("root", lab.now, revoked=(path.middle.serial_number,)),
        crl("middle", lab.now, revoked=(path.leaf.serial_number,)),
    ]
    assert path.problems() == [
        "the device certificate is revoked",
        "intermediate certificate 1 is revoked",
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "there is no revocation list of the issuer of the device certificate"),
        ("stale", "the revocation list for the device certificate is out of date"),
        ("early", "the revocation list for the device certificate is out of date"),
        ("forged", "the revocation list for the device certificate is not signed by its issuer"),
    ],
)
def test_revocation_that_cannot_be_checked_is_refused(lab: Any, kind: str, reason: str) -> None:
    now = lab.now
    lists = {
        "missing": [],
        "stale": [crl("middle", now, end=-timedelta(minutes=1))],
        "early": [crl("middle", now, start=timedelta(minutes=1))],
        "forged": [crl("middle", now, by=KEYS["other"])],
    }[kind]
    assert Path3(now, crls=[crl("root", now), *lists]).problems() == [reason]


def test_an_issuer_that_may_not_sign_revocation_lists_is_refused(lab: Any) -> None:
    path = Path3(
        lab.now,
        middle=certificate("middle", "root", lab.now, length=0, key_usage=usage(issue=True)),
    )
    assert path.problems() == ["the issuer of the device certificate may not sign revocation lists"]


def test_malformed_certificates_and_lists_are_protocol_errors(lab: Any) -> None:
    der = lab.device.chain[0]
    for data in (b"", b"\x30\x00", der[:-1], der + b"\0", b"\x30" * 5000):
        with pytest.raises(ProtocolError):
            load_certificate(data)
    with pytest.raises(ProtocolError):
        read_crl(der)


@pytest.mark.attack("revoked certificate", mode="simulated")
def test_a_revoked_device_gives_no_claims(lab: Any) -> None:
    lab.root.revoke(lab.device, now=lab.now)
    verifier = SimulatedVerifier(lab.root.certificate, lab.root.crl(now=lab.now))
    with pytest.raises(EvidenceRefused, match="the device certificate is revoked"):
        verifier.verify(lab.attester().quote(b"r" * 64, b"n" * 32), now=lab.now)


def test_a_verifier_without_a_revocation_list_refuses_everything(lab: Any) -> None:
    verifier = SimulatedVerifier(lab.root.certificate, None)
    with pytest.raises(EvidenceRefused, match="no revocation list"):
        verifier.verify(lab.attester().quote(b"r" * 64, b"n" * 32), now=lab.now)


@pytest.mark.attack("expired certificate", mode="simulated")
def test_an_expired_device_gives_no_claims(lab: Any) -> None:
    token = lab.attester().quote(b"r" * 64, b"n" * 32)
    later = lab.now + timedelta(days=91)
    with pytest.raises(EvidenceRefused, match="the device certificate expired"):
        SimulatedVerifier(lab.root.certificate, lab.root.crl(now=later)).verify(token, now=later)


def test_a_device_with_an_intermediate_in_its_token_is_admitted(lab: Any) -> None:
    root = SimulatedRoot(now=lab.now)
    name = load_certificate(root.certificate).subject
    middle = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "middle")]))
        .issuer_name(name)
        .public_key(KEYS["middle"].public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(lab.now)
        .not_valid_after(lab.now + DAY)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(usage(issue=True, crl=True), critical=True)
        .sign(root._key, hashes.SHA384())
    )
    ueid = b"\x01" + os.urandom(16)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, ueid.hex())]))
        .issuer_name(middle.subject)
        .public_key(KEYS["leaf"].public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(lab.now)
        .not_valid_after(lab.now + DAY)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(usage(sign=True), critical=True)
        .sign(KEYS["middle"], hashes.SHA384())
    )
    chain = tuple(item.public_bytes(serialization.Encoding.DER) for item in (leaf, middle))
    device = SimulatedDevice(KEYS["leaf"], chain, root.certificate)
    verifier = SimulatedVerifier(root.certificate, root.crl(now=lab.now))
    verifier._crls.append(crl("middle", lab.now))
    assert (
        verifier.verify(lab.attester(device=device).quote(b"r" * 64, b"n" * 32), now=lab.now).ueid
        == ueid
    )


def test_a_saved_device_is_its_owners_alone_and_comes_back_the_same(
    lab: Any, tmp_path: Path
) -> None:
    lab.device.save(tmp_path / "device")
    assert stat.S_IMODE((tmp_path / "device" / "device.key").stat().st_mode) == 0o600
    loaded = SimulatedDevice.load(tmp_path / "device")
    assert (loaded.chain, loaded.root, loaded.ueid) == (
        lab.device.chain,
        lab.device.root,
        lab.device.ueid,
    )
    token = lab.attester(device=loaded).quote(b"r" * 64, b"n" * 32)
    assert lab.verifier().verify(token, now=lab.now).ueid == lab.device.ueid
    with pytest.raises(InputError, match="already"):
        lab.device.save(tmp_path / "device")


def test_a_device_key_that_others_can_read_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.device.save(tmp_path)
    (tmp_path / "device.key").chmod(0o640)
    with pytest.raises(InputError, match="other users"):
        SimulatedDevice.load(tmp_path)


def test_a_device_with_the_key_of_another_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.device.save(tmp_path / "one")
    lab.root.issue(now=lab.now).save(tmp_path / "two")
    (tmp_path / "one" / "device.key").write_bytes((tmp_path / "two" / "device.key").read_bytes())
    with pytest.raises(InputError, match="not that of its key"):
        SimulatedDevice.load(tmp_path / "one")


@pytest.mark.parametrize(
    "damage", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_device_is_an_input_error_without_its_key_in_the_text(
    lab: Any, tmp_path: Path, damage: bytes
) -> None:
    lab.device.save(tmp_path)
    (tmp_path / "device.key").write_bytes(damage)
    with pytest.raises(InputError, match="malformed"):
        SimulatedDevice.load(tmp_path)


def test_a_signatures_count_of_unused_bits_is_not_free() -> None:
    root = SimulatedRoot(now=now())
    der = bytearray(root.certificate)
    der[-len(load_certificate(root.certificate).signature) - 1] = 1
    with pytest.raises(ProtocolError):
        load_certificate(bytes(der))
