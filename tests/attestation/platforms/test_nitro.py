"""AWS Nitro: the real document verifies, and nothing else does."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedark.attestation.platforms.base import Attester, Verifier
from fedark.attestation.platforms.nitro import NitroAttester, NitroVerifier, parse_document
from fedark.attestation.platforms.roots import AWS_NITRO_ROOT_SHA256
from fedark.attestation.policy import NotDebug
from fedark.foundation.errors import EnclaveFailed, EvidenceRefused

REAL_NOW = datetime(2025, 1, 6, 16, 30, tzinfo=UTC)
# `FEDARK_FUZZ` sets the number of inputs for each parser; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "200")),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
PROTECTED = bytes.fromhex("a1013822")


@pytest.fixture(scope="session")
def real(shared):
    return (shared / "vectors" / "nitro.cose").read_bytes()


@pytest.fixture(scope="session")
def pki(authority):
    root = authority.issue("test.nitro-enclaves")
    zone = authority.issue("zone.test", root, path_length=0)
    leaf = authority.issue("enclave.test", zone, ca=False)
    return SimpleNamespace(
        root=root,
        zone=zone,
        leaf=leaf,
        now=authority.now,
        verifier=NitroVerifier(root_sha256=root.sha256),
    )


def fields(pki, **changed):
    values = {
        "module_id": "i-1-enc2",
        "digest": "SHA384",
        "timestamp": int(pki.now.timestamp() * 1000),
        "pcrs": {index: hashlib.sha384(b"%d" % index).digest() for index in range(4)},
        "certificate": pki.leaf.der,
        "cabundle": [pki.root.der, pki.zone.der],
        "public_key": None,
        "user_data": bytes(range(64)),
        "nonce": bytes(32),
    }
    values.update(changed)
    return values


def sign(pki, payload, *, key=None, protected=PROTECTED, digest=None):
    message = cbor2.dumps(["Signature1", protected, b"", payload])
    der = (key or pki.leaf.key).sign(message, ec.ECDSA(digest or hashes.SHA384()))
    return b"".join(number.to_bytes(48) for number in decode_dss_signature(der))


def open_map(values):
    """How current firmware writes the payload: a map of indefinite length."""
    members = (cbor2.dumps(key) + cbor2.dumps(value) for key, value in values.items())
    return b"\xbf" + b"".join(members) + b"\xff"


FORMS = {"definite": cbor2.dumps, "indefinite": open_map}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def signed(pki, payload):
    return cbor2.dumps([PROTECTED, {}, payload, sign(pki, payload)])


def document(
    pki, *, signature=None, protected=PROTECTED, unprotected=None, form=cbor2.dumps, **changed
):
    payload = form(fields(pki, **changed))
    return cbor2.dumps(
        [
            protected,
            unprotected or {},
            payload,
            signature or sign(pki, payload, protected=protected),
        ]
    )


def reasons(verifier, token, now):
    with pytest.raises(EvidenceRefused) as refused:
        verifier.verify(token, now=now)
    return " ".join(refused.value.reasons)


def test_the_real_document_verifies_under_the_pinned_aws_root(real):
    verifier: Verifier = NitroVerifier()
    claims = verifier.verify(real, now=REAL_NOW)
    assert claims.platform == "nitro"
    assert claims.hwmodel == "aws-nitro"
    assert claims.ueid == b"i-0bee92034f3d60691-enc01943c5eaab3ad6a"
    assert set(claims.measurements) == {f"pcr{index}" for index in range(16)}
    assert claims.measurements["pcr0"].hex().startswith("8bb159f202bb95d6")
    assert claims.debug is False
    assert claims.report_data == b""
    assert claims.nonce is None
    assert claims.issued_at == datetime(2025, 1, 6, 16, 7, 5, 472000, tzinfo=UTC)
    assert len(parse_document(real).public_key) == 294


def test_the_pinned_root_is_the_one_that_aws_publishes(shared):
    import io
    import zipfile

    from cryptography import x509

    archive = (shared / "vectors" / "AWS_NitroEnclaves_Root-G1.zip").read_bytes()
    root = x509.load_pem_x509_certificate(zipfile.ZipFile(io.BytesIO(archive)).read("root.pem"))
    assert root.fingerprint(hashes.SHA256()) == AWS_NITRO_ROOT_SHA256


def test_every_single_bit_flip_of_a_sample_of_the_real_document_is_refused(real, bit_flips):
    verifier = NitroVerifier()
    for flipped in bit_flips(real, 700):
        with pytest.raises(EvidenceRefused):
            verifier.verify(flipped, now=REAL_NOW)


def test_the_real_document_is_refused_after_its_certificates_expired(real):
    assert "valid from" in reasons(NitroVerifier(), real, REAL_NOW + timedelta(hours=4))


def test_the_real_document_is_refused_before_its_certificates_are_valid(real):
    assert "valid from" in reasons(NitroVerifier(), real, REAL_NOW - timedelta(days=5))


def test_a_document_carries_report_data_and_nonce(pki):
    claims = pki.verifier.verify(document(pki), now=pki.now)
    assert (claims.report_data, claims.nonce) == (bytes(range(64)), bytes(32))


@pytest.mark.attack("wrong root", mode="nitro")
def test_a_foreign_root_is_refused_however_well_the_path_holds(pki):
    assert "pinned AWS Nitro root" in reasons(NitroVerifier(), document(pki), pki.now)


def test_a_path_that_leaves_out_the_pinned_root_is_refused(pki):
    assert "pinned AWS Nitro root" in reasons(
        pki.verifier, document(pki, cabundle=[pki.zone.der]), pki.now
    )


@pytest.mark.attack("intermediate with CA:false", mode="nitro")
def test_an_intermediate_that_is_no_ca_is_refused(pki, authority):
    zone = authority.issue("zone.test", pki.root, ca=False)
    leaf = authority.issue("enclave.test", zone, ca=False)
    forged = SimpleNamespace(**{**vars(pki), "zone": zone, "leaf": leaf})
    assert "CA:false" in reasons(pki.verifier, document(forged), pki.now)


def test_a_ca_below_a_path_length_of_zero_is_refused(pki, authority):
    below = authority.issue("below.test", pki.zone)
    leaf = authority.issue("enclave.test", below, ca=False)
    forged = SimpleNamespace(**{**vars(pki), "leaf": leaf})
    token = document(forged, cabundle=[pki.root.der, pki.zone.der, below.der])
    assert "allows 0 CAs below it" in reasons(pki.verifier, token, pki.now)


def test_a_ca_certificate_may_not_sign_a_document(pki):
    forged = SimpleNamespace(**{**vars(pki), "leaf": pki.zone})
    assert "may not sign evidence" in reasons(
        pki.verifier, document(forged, cabundle=[pki.root.der]), pki.now
    )


def test_an_unknown_critical_extension_is_refused(pki, authority):
    leaf = authority.issue(
        "enclave.test", pki.zone, ca=False, extensions=[("1.2.3.4", b"\x05\x00", True)]
    )
    forged = SimpleNamespace(**{**vars(pki), "leaf": leaf})
    assert "unknown critical extension" in reasons(pki.verifier, document(forged), pki.now)


@pytest.mark.attack("expired certificate", mode="nitro")
def test_an_expired_signing_certificate_is_refused(pki, authority):
    leaf = authority.issue("enclave.test", pki.zone, ca=False, end=authority.now - authority.day)
    forged = SimpleNamespace(**{**vars(pki), "leaf": leaf})
    assert "valid from" in reasons(pki.verifier, document(forged), pki.now)


def test_a_certificate_that_its_issuer_did_not_sign_is_refused(pki, authority):
    zone = authority.issue("zone.test")  # the right name under a key of its own
    leaf = authority.issue("enclave.test", zone, ca=False)
    forged = SimpleNamespace(**{**vars(pki), "leaf": leaf})
    assert "was not signed by" in reasons(pki.verifier, document(forged), pki.now)


def test_another_key_than_the_certificate_names_is_refused(pki):
    payload = cbor2.dumps(fields(pki))
    signature = sign(pki, payload, key=ec.generate_private_key(ec.SECP384R1()))
    assert "does not verify" in reasons(pki.verifier, document(pki, signature=signature), pki.now)


def test_a_signing_key_on_another_curve_is_refused(pki, authority):
    leaf = authority.issue("enclave.test", pki.zone, ca=False, curve=ec.SECP256R1())
    forged = SimpleNamespace(**{**vars(pki), "leaf": leaf})
    assert "no P-384 key" in reasons(pki.verifier, document(forged, signature=bytes(96)), pki.now)


@pytest.mark.attack("debug mode", mode="nitro")
def test_a_debug_enclave_is_known_as_one_and_refused_by_policy(pki, refusal):
    claims = pki.verifier.verify(
        document(pki, pcrs=dict.fromkeys(range(16), bytes(48))), now=pki.now
    )
    assert claims.debug is True
    (reason,) = NotDebug().reasons(claims, now=pki.now)
    refusal(f"policy: {reason}")


@pytest.mark.parametrize("register", [0, 1, 2])
def test_one_empty_image_register_already_counts_as_debug(pki, register):
    pcrs = dict.fromkeys(range(16), b"\x01" * 48) | {register: bytes(48)}
    assert pki.verifier.verify(document(pki, pcrs=pcrs), now=pki.now).debug is True


def test_a_document_from_the_future_is_refused(pki):
    stamp = int((pki.now + timedelta(minutes=5)).timestamp() * 1000)
    assert "in the future" in reasons(pki.verifier, document(pki, timestamp=stamp), pki.now)


def test_a_document_older_than_its_certificate_is_refused(pki, authority):
    stamp = int((authority.now - 40 * authority.day).timestamp() * 1000)
    assert "outside the validity" in reasons(pki.verifier, document(pki, timestamp=stamp), pki.now)


@pytest.mark.parametrize(
    "protected",
    [
        bytes.fromhex("a10126"),  # ES256
        bytes.fromhex("a1013823"),  # ES512
        bytes.fromhex("a0"),  # none
        bytes.fromhex("a201382203183c"),  # with a content type
        bytes.fromhex("a101390022"),  # ES384 in a longer integer
    ],
)
def test_any_other_protected_header_is_refused_even_when_signed(pki, protected):
    assert "ES384" in reasons(pki.verifier, document(pki, protected=protected), pki.now)


def test_an_algorithm_in_the_unprotected_header_is_refused(pki):
    assert "unprotected" in reasons(pki.verifier, document(pki, unprotected={1: -35}), pki.now)


def test_a_tagged_structure_is_refused(pki):
    assert "form" in reasons(pki.verifier, b"\xd2" + document(pki), pki.now)


def test_trailing_bytes_are_refused(pki):
    assert reasons(pki.verifier, document(pki) + b"\x00", pki.now)


def test_every_truncation_is_refused(pki, form):
    token = document(pki, form=form)
    for size in range(0, len(token), 7):
        assert reasons(pki.verifier, token[:size], pki.now)


def test_an_oversized_document_is_refused_before_it_is_parsed(pki):
    assert "over the limit" in reasons(pki.verifier, document(pki) + bytes(0x3000), pki.now)


@pytest.mark.parametrize("size", [0, 64, 95, 97, 104, 144])
def test_a_signature_of_another_length_is_refused(pki, size):
    token = cbor2.dumps([PROTECTED, {}, cbor2.dumps(fields(pki)), bytes(size)])
    assert "wrong form" in reasons(pki.verifier, token, pki.now)


@pytest.mark.parametrize("zero", ["r", "s", "both"])
def test_a_signature_with_a_zero_number_is_refused(pki, zero):
    good = sign(pki, cbor2.dumps(fields(pki)))
    bad = {"r": bytes(48) + good[48:], "s": good[:48] + bytes(48), "both": bytes(96)}[zero]
    assert "does not verify" in reasons(pki.verifier, document(pki, signature=bad), pki.now)


def test_a_signature_in_der_is_refused(pki):
    payload = cbor2.dumps(fields(pki))
    der = pki.leaf.key.sign(
        cbor2.dumps(["Signature1", PROTECTED, b"", payload]), ec.ECDSA(hashes.SHA384())
    )
    assert "wrong form" in reasons(
        pki.verifier, cbor2.dumps([PROTECTED, {}, payload, der]), pki.now
    )


def test_a_duplicate_field_is_refused(pki):
    payload = cbor2.dumps(fields(pki))
    doubled = bytes([payload[0] + 1]) + payload[1:] + cbor2.dumps("nonce") + cbor2.dumps(b"other")
    token = cbor2.dumps([PROTECTED, {}, doubled, sign(pki, doubled)])
    assert reasons(pki.verifier, token, pki.now)


def test_a_payload_of_current_firmware_says_the_same_as_one_of_definite_length(pki):
    definite, current = (document(pki, form=form) for form in FORMS.values())
    assert definite != current
    assert pki.verifier.verify(current, now=pki.now) == pki.verifier.verify(definite, now=pki.now)


def test_the_real_document_written_by_current_firmware_is_read_alike(real):
    protected, _, payload, signature = cbor2.loads(real)
    current = cbor2.dumps([protected, {}, open_map(cbor2.loads(payload)), signature])
    ours, theirs = parse_document(current), parse_document(real)
    assert (ours.pcrs, ours.cabundle, ours.module_id) == (
        theirs.pcrs,
        theirs.cabundle,
        theirs.module_id,
    )
    assert "does not verify" in reasons(NitroVerifier(), current, REAL_NOW)  # other bytes, signed


@pytest.mark.parametrize(
    "bend",
    [
        lambda p: p[:-1],  # no end
        lambda p: p + b"\xff",  # two ends
        lambda p: p + b"\x00",
        lambda p: p[:-1] + b"\x00\xff",  # a key without a value
        lambda p: p[:-1] + cbor2.dumps("nonce") + cbor2.dumps(b"other") + b"\xff",  # twice
        lambda p: p[:-1] + cbor2.dumps("nonce") + cbor2.dumps(bytes(32)) + b"\xff",
        lambda p: p[:-1] + cbor2.dumps("extra") + b"\x01\xff",
        lambda p: b"\xb9\x00\x09" + p[1:-1],  # a count in more bytes than it needs
        lambda p: b"\xaa" + p[1:-1],  # a count too high
        lambda p: b"\xa8" + p[1:-1],  # a count too low
        lambda p: b"\xa9" + p[1:],  # counted, with an end
        lambda p: b"\xbf" + p + b"\xff",
        lambda p: b"\xd9\xd9\xf7" + p,  # tagged
        lambda p: b"\x9f" + p[1:],  # a list
        lambda p: b"\xbf\xff",
        lambda p: b"\xbf",
        # Inside, nothing is of indefinite length: the registers, the bundle, a text, a byte string.
        lambda p: p.replace(b"dpcrs\xa4", b"dpcrs\xbf").replace(
            b"kcertificate", b"\xffkcertificate"
        ),
        lambda p: p.replace(b"hcabundle\x82", b"hcabundle\x9f").replace(
            b"jpublic_key", b"\xffjpublic_key"
        ),
        lambda p: p.replace(b"iuser_data\x58\x40", b"iuser_data\x5f\x58\x40").replace(
            b"enonce", b"\xffenonce"
        ),
        lambda p: p.replace(b"fdigestfSHA384", b"fdigest\x7ffSHA384\xff"),
        lambda p: p.replace(b"fdigest", b"\x7ffdigest\xff"),
        lambda p: p.replace(b"fdigestf", b"\x78\x06digestf"),  # a longer length than needed
        lambda p: p.replace(b"jpublic_key\xf6", b"jpublic_key\xf7"),  # undefined, not null
    ],
)
def test_a_signed_payload_that_is_bent_in_either_form_is_refused(pki, bend):
    payload = open_map(fields(pki))
    bent = bend(payload)
    assert bent != payload
    assert reasons(pki.verifier, signed(pki, bent), pki.now)


@pytest.mark.parametrize("place", range(4))
def test_only_the_payload_may_be_of_indefinite_length(pki, place):
    payload = open_map(fields(pki))
    parts = [cbor2.dumps(part) for part in (PROTECTED, {}, payload, sign(pki, payload))]
    parts[place] = (b"\xbf" if place == 1 else b"\x5f" + parts[place]) + b"\xff"
    assert reasons(pki.verifier, b"\x84" + b"".join(parts), pki.now)
    assert reasons(pki.verifier, b"\x9f" + document(pki)[1:] + b"\xff", pki.now)


def test_every_single_bit_flip_of_a_sample_of_a_current_document_is_refused(pki, bit_flips):
    for flipped in bit_flips(document(pki, form=open_map), 700):
        with pytest.raises(EvidenceRefused):
            pki.verifier.verify(flipped, now=pki.now)


def test_deep_nesting_is_refused(pki):
    payload = b"\x81" * 1000 + b"\x00"
    assert reasons(pki.verifier, cbor2.dumps([PROTECTED, {}, payload, sign(pki, payload)]), pki.now)


@pytest.mark.parametrize(
    "changed",
    [
        {"module_id": ""},
        {"module_id": "a\x1b[2J"},
        {"module_id": b"i-1"},
        {"digest": "SHA256"},
        {"timestamp": 0},
        {"timestamp": -1},
        {"timestamp": 1 << 63},
        {"timestamp": True},
        {"timestamp": None},
        {"pcrs": {}},
        {"pcrs": {0: bytes(48)}},
        {"pcrs": {0: bytes(48), 1: bytes(48), 2: bytes(48), 32: bytes(48)}},
        {"pcrs": {0: bytes(48), 1: bytes(48), 2: bytes(32)}},
        {"pcrs": {"0": bytes(48), 1: bytes(48), 2: bytes(48)}},
        {"pcrs": [bytes(48)] * 3},
        {"certificate": b""},
        {"certificate": bytes(1025)},
        {"certificate": None},
        {"certificate": b"\x30\x00"},
        {"cabundle": []},
        {"cabundle": None},
        {"cabundle": [b""] * 9},
        {"cabundle": [b"\x30\x03\x02\x01\x00"]},
        {"user_data": bytes(513)},
        {"user_data": "text"},
        {"nonce": bytes(513)},
        {"public_key": bytes(1025)},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_signed_document_with_a_malformed_field_is_refused(pki, changed, form):
    assert reasons(pki.verifier, document(pki, form=form, **changed), pki.now)


def test_a_missing_field_is_refused(pki, form):
    for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
        values = fields(pki)
        del values[name]
        assert "missing" in reasons(pki.verifier, signed(pki, form(values)), pki.now)


@FUZZ
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_and_never_crash(data):
    with pytest.raises(EvidenceRefused):
        NitroVerifier().verify(data, now=REAL_NOW)


_ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=60),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=5)
    ),
    max_leaves=12,
)


@FUZZ
@given(
    _ITEMS,
    st.fixed_dictionaries(
        dict.fromkeys(
            ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"], _ITEMS
        )
    ),
)
def test_arbitrary_structures_are_refused_and_never_crash(item, payload):
    for value in (
        item,
        [PROTECTED, {}, cbor2.dumps(item), bytes(96)],
        [PROTECTED, {}, cbor2.dumps(payload), bytes(96)],
    ):
        with pytest.raises(EvidenceRefused):
            NitroVerifier().verify(cbor2.dumps(value), now=REAL_NOW)


@FUZZ
@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_an_edited_document_is_refused_and_never_crashes(pki, edits):
    for form in FORMS.values():
        token = document(pki, form=form, timestamp=int(pki.now.timestamp() * 1000))
        changed = token
        for at, cut, put in edits:
            changed = changed[:at] + put + changed[at + cut :]
        assume(changed != token)
        with pytest.raises(EvidenceRefused):
            pki.verifier.verify(changed, now=pki.now)


class FakeModule:
    """The Nitro Secure Module's side of the exchange."""

    def __init__(self, pki, form):
        self.pki, self.form = pki, form
        self.requests = []

    def __call__(self, request):
        self.requests.append(cbor2.loads(request))
        asked = self.requests[-1]["Attestation"]
        return cbor2.dumps(
            {"Attestation": {"document": document(self.pki, form=self.form, **asked)}}
        )


def test_the_attester_asks_the_module_and_its_answer_verifies(pki, form):
    module = FakeModule(pki, form)
    attester: Attester = NitroAttester(exchange=module)
    claims = pki.verifier.verify(attester.quote(b"\x07" * 64, b"\x08" * 32), now=pki.now)
    assert (claims.report_data, claims.nonce) == (b"\x07" * 64, b"\x08" * 32)
    assert module.requests == [
        {"Attestation": {"user_data": b"\x07" * 64, "nonce": b"\x08" * 32, "public_key": None}}
    ]


def test_the_attester_says_plainly_that_there_is_no_nitro_module(tmp_path):
    with pytest.raises(EnclaveFailed, match="Only an enclave on AWS Nitro has this device"):
        NitroAttester(tmp_path / "nsm").quote(bytes(64), bytes(32))


@pytest.mark.parametrize(
    "answer",
    [b"", b"\xff", cbor2.dumps({"Error": "InvalidArgument"}), cbor2.dumps([1]), cbor2.dumps({})],
)
def test_the_attester_refuses_whatever_is_no_document(answer):
    with pytest.raises(EnclaveFailed, match="no attestation document"):
        NitroAttester(exchange=lambda request: answer).quote(bytes(64), bytes(32))


def test_the_attester_refuses_a_document_over_other_data(pki):
    answer = cbor2.dumps({"Attestation": {"document": document(pki)}})
    with pytest.raises(EnclaveFailed, match="other data"):
        NitroAttester(exchange=lambda request: answer).quote(b"\x09" * 64, bytes(32))
