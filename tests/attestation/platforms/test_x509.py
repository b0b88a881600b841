"""Certificates, revocation lists and DER: whatever the bytes are, a refusal or a list of problems
comes out.
"""

from __future__ import annotations

import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.attestation import _x509
from fedark.foundation.errors import EvidenceRefused

# `FEDARK_FUZZ` sets the number of inputs for each parser; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "200")),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)


@pytest.fixture(scope="session")
def path(authority):
    root = authority.issue("root", curve=ec.SECP256R1())
    middle = authority.issue("middle", root, path_length=0, curve=ec.SECP256R1())
    leaf = authority.issue(
        "leaf", middle, ca=False, curve=ec.SECP256R1(), extensions=[("1.2.3.4", b"\x05\x00", False)]
    )
    return [leaf, middle, root]


def mutated(data, mutations):
    changed = bytearray(data)
    for at, value in mutations:
        changed[int(at * len(changed))] = value
    return bytes(changed)


def test_a_good_path_has_no_problems(path, authority):
    assert _x509.path_problems([holder.cert for holder in path], now=authority.now) == []


def test_a_path_in_another_order_has_problems(path, authority):
    assert _x509.path_problems([holder.cert for holder in reversed(path)], now=authority.now)


def test_a_ca_that_may_not_sign_certificates_is_no_issuer(path, authority):
    mute = authority.issue("mute", path[2], may_sign=False)
    leaf = authority.issue("leaf", mute, ca=False)
    problems = _x509.path_problems([leaf.cert, mute.cert, path[2].cert], now=authority.now)
    assert problems == ["The key of the certificate mute may not sign certificates."]


def test_a_leaf_whose_key_may_not_sign_is_refused(path, authority):
    leaf = authority.issue("leaf", path[1], ca=False, may_sign=False)
    problems = _x509.path_problems([leaf.cert, path[1].cert, path[2].cert], now=authority.now)
    assert problems == ["The key of the certificate leaf may not sign evidence."]


def test_a_root_that_its_own_key_did_not_sign_is_not_self_signed(path):
    assert _x509.self_signature_problems(path[2].cert) == []
    assert _x509.self_signature_problems(path[1].cert)


def test_a_list_by_a_key_that_may_not_sign_lists_is_refused(path, authority):
    mute = authority.issue("mute", path[2], may_sign=False)
    crl = _x509.RevocationList(authority.revoke(mute), "The list", "a test")
    assert crl.signature_problems(mute.cert) == ["The key of mute may not sign revocation lists."]


def test_a_list_of_another_issuer_says_nothing_about_a_certificate(path, authority):
    crl = _x509.RevocationList(authority.revoke(path[2]), "The list", "a test")
    assert crl.problems(path[1].cert, now=authority.now) == []
    assert crl.problems(path[0].cert, now=authority.now) == [
        "The list is not of the issuer of leaf."
    ]


def test_a_list_under_rsa_pss_as_amd_signs_is_verified(authority):
    key = rsa.generate_private_key(65537, 2048)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ARK-Test")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(authority.now - authority.day)
        .not_valid_after(authority.now + authority.day)
        .add_extension(usage, True)
        .sign(key, hashes.SHA384(), rsa_padding=pss)
    )
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name)
        .last_update(authority.now - authority.day)
    )
    builder = builder.next_update(authority.now + authority.day)
    for signer, problems in ((key, 0), (rsa.generate_private_key(65537, 2048), 1)):
        der = builder.sign(signer, hashes.SHA384(), rsa_padding=pss).public_bytes(Encoding.DER)
        assert (
            len(_x509.RevocationList(der, "The list", "a test").signature_problems(root))
            == problems
        )


def test_certificates_and_lists_with_trailing_bytes_are_refused(path, authority):
    with pytest.raises(EvidenceRefused, match="malformed"):
        _x509.load_certificate(path[0].der + b"\x00", "The certificate", "a test")
    with pytest.raises(EvidenceRefused, match="malformed"):
        _x509.RevocationList(authority.revoke(path[1]) + b"\x00", "The list", "a test")


def test_no_bit_of_a_signatures_encoding_is_free(path, authority):
    # Half of all signatures end in a zero bit, which may be called unused without any other change.
    for _ in range(20):
        der = authority.issue("leaf", path[1], ca=False, curve=ec.SECP256R1()).der
        crl = authority.revoke(path[1])
        for encoded, load, signature in (
            (der, _x509.load_certificate, x509.load_der_x509_certificate(der).signature),
            (crl, _x509.RevocationList, x509.load_der_x509_crl(crl).signature),
        ):
            load(encoded, "It", "a test")
            for unused in range(1, 8):
                changed = encoded[: -len(signature) - 1] + bytes((unused,)) + signature
                with pytest.raises(EvidenceRefused, match="malformed"):
                    load(changed, "It", "a test")


def renamed(der):
    """With a country in place of the common name: one of more than two letters."""
    return der.replace(bytes.fromhex("0603550403"), bytes.fromhex("0603550406"))


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_name_that_is_only_warned_about_elsewhere_is_refused_here(path, authority, action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(EvidenceRefused, match="malformed"):
            _x509.load_certificate(renamed(path[0].der), "The certificate", "a test")
        with pytest.raises(EvidenceRefused, match="malformed"):
            _x509.RevocationList(renamed(authority.revoke(path[1])), "The list", "a test")


def with_serial(der, first):
    """`der` with another first byte of its serial number, which stands after the version."""
    at = der.index(bytes.fromhex("a00302010202")) + 7
    return der[:at] + bytes((first,)) + der[at + 1 :]


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_negative_serial_number_is_refused(path):
    with pytest.raises(EvidenceRefused, match="malformed"):
        _x509.load_certificate(with_serial(path[0].der, 0x80), "The certificate", "a test")
    assert (
        _x509.load_certificate(
            with_serial(path[0].der, 0x40), "The certificate", "a test"
        ).serial_number
        > 0
    )


def test_a_reading_leaves_the_processs_warnings_alone(path, monkeypatch):
    seen, real = [], x509.load_der_x509_certificate

    def load(der):
        seen.append(list(warnings.filters))
        return real(der)

    monkeypatch.setattr(x509, "load_der_x509_certificate", load)
    before = list(warnings.filters)
    _x509.load_certificate(path[0].der, "The certificate", "a test")
    assert seen == [before]


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_many_threads_refuse_each_strange_name_and_leave_the_processs_warnings_alone(path):
    good, strange, before = path[0].der, renamed(path[0].der), list(warnings.filters)

    def read(number):
        if number % 2:
            return bool(_x509.load_certificate(good, "The certificate", "a test"))
        with pytest.raises(EvidenceRefused, match="malformed"):
            _x509.load_certificate(strange, "The certificate", "a test")
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(2000)))
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


def test_an_oversized_certificate_is_refused_before_it_is_parsed():
    with pytest.raises(EvidenceRefused, match="over the limit"):
        _x509.load_certificate(bytes(8193), "The certificate", "a test")


@FUZZ
@given(st.integers(0, 2), MUTATIONS)
def test_a_mutated_certificate_is_refused_or_breaks_its_path_and_never_crashes(
    path, authority, which, mutations
):
    changed = mutated(path[which].der, mutations)
    try:
        certificate = _x509.load_certificate(changed, "The certificate", "a test")
    except EvidenceRefused:
        return
    certificates = [holder.cert for holder in path]
    certificates[which] = certificate
    problems = _x509.path_problems(certificates, now=authority.now) + _x509.self_signature_problems(
        certificates[2]
    )
    _x509.extension_bytes(certificate, "1.2.3.4")
    _x509.ec_point(certificate, ec.SECP256R1)
    assert bool(problems) == (changed != path[which].der)


@FUZZ
@given(MUTATIONS)
def test_a_mutated_revocation_list_is_refused_and_never_crashes(path, authority, mutations):
    good = authority.revoke(path[1], [path[0].cert])
    changed = mutated(good, mutations)
    try:
        crl = _x509.RevocationList(changed, "The list", "a test")
    except EvidenceRefused:
        return
    problems = crl.signature_problems(path[1].cert)
    crl.problems(path[0].cert, now=authority.now)
    assert bool(problems) == (changed != good)


@FUZZ
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_certificate_and_never_crash(data):
    for load in (
        lambda: _x509.load_certificate(data, "it", "a test"),
        lambda: _x509.RevocationList(data, "it", "a test"),
        lambda: _x509.load_pem_chain(data, 1, "it", "a test"),
        lambda: _x509.load_pem_chain(
            b"-----BEGIN CERTIFICATE-----\n" + data + b"\n-----END CERTIFICATE-----\n",
            1,
            "it",
            "a test",
        ),
    ):
        with pytest.raises(EvidenceRefused):
            load()


@FUZZ
@given(st.binary(max_size=60))
def test_der_elements_cover_their_bytes_exactly_or_are_refused(data):
    try:
        items = _x509.der_items(data)
    except ValueError:
        return
    assert sum(size for _, _, size in items) == len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x30",
        b"\x30\x80",
        b"\x30\x81\x01\x00",
        b"\x30\x82\x00\x80" + bytes(128),
        b"\x30\x05\x00",
        b"\x1f\x01\x00",
    ],
)
def test_der_in_any_but_its_shortest_form_is_refused(data):
    with pytest.raises(ValueError, match="DER"):
        _x509.der_items(data)


def test_the_common_name_of_a_name_with_two_is_none():
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text) for text in ("a", "b")])
    assert _x509.common_name(name) == ""
