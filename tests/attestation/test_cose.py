"""COSE_Sign1 in its one strict form; `pycose` and `cwt` read our tokens, and we read theirs."""

from __future__ import annotations

import random
from typing import Any

import cbor2
import pytest
from attacks import refusing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedark.attestation import cose
from fedark.foundation import canonical
from fedark.foundation.errors import EvidenceRefused, ProtocolError

REPORT, NONCE = b"r" * 64, b"n" * 32


@pytest.fixture
def token(lab: Any) -> bytes:
    return lab.attester().quote(REPORT, NONCE)


def parts(token: bytes) -> list[Any]:
    return canonical.decode(token[1:])


def rebuilt(token: bytes, *, protected: Any = None, **changes: Any) -> bytes:
    fields = dict(
        zip(("protected", "unprotected", "payload", "signature"), parts(token), strict=True)
    )
    if protected is not None:
        fields["protected"] = cbor2.dumps(protected)
    return b"\xd2" + cbor2.dumps(list((fields | changes).values()))


def refused(lab: Any, token: bytes) -> str:
    with pytest.raises(EvidenceRefused) as caught:
        lab.verifier().verify(token, now=lab.now)
    return "; ".join(caught.value.reasons)


def header(token: bytes) -> dict[int, Any]:
    return canonical.decode(parts(token)[0])


def test_a_token_gives_its_claims_back(lab: Any, token: bytes) -> None:
    claims = lab.verifier().verify(token, now=lab.now)
    assert (claims.report_data, claims.nonce, claims.measurements) == (
        REPORT,
        NONCE,
        lab.measurements,
    )
    assert (claims.debug, claims.svn, claims.sandbox, claims.issued_at) == (
        False,
        1,
        "namespaces",
        lab.now,
    )


@pytest.mark.attack("algorithm substitution")
@pytest.mark.parametrize("algorithm", [-7, -36, -8, -38, 0, 5, -65535, "ES384", None, True])
def test_algorithm_substitution_is_refused(lab: Any, token: bytes, algorithm: Any) -> None:
    assert "algorithm is not ES384" in refused(
        lab, rebuilt(token, protected=header(token) | {1: algorithm})
    )


def test_a_token_without_an_algorithm_is_refused(lab: Any, token: bytes) -> None:
    assert "exactly alg and x5chain" in refused(
        lab, rebuilt(token, protected={33: header(token)[33]})
    )


@pytest.mark.attack("algorithm none")
def test_an_algorithm_none_with_an_empty_signature_is_refused(lab: Any, token: bytes) -> None:
    for changes in ({"signature": b""}, {}):
        with refusing():
            said = refused(
                lab, rebuilt(token, protected={1: None, 33: header(token)[33]}, **changes)
            )
        assert ("r || s" if changes else "algorithm is not ES384") in said


@pytest.mark.attack("unprotected algorithm")
def test_an_unprotected_algorithm_is_refused(lab: Any, token: bytes) -> None:
    assert "unprotected" in refused(lab, rebuilt(token, unprotected={1: -35}))
    assert "unprotected" in refused(
        lab, rebuilt(token, protected={33: header(token)[33]}, unprotected={1: -35})
    )


@pytest.mark.attack("bad length of r and s")
@pytest.mark.parametrize("length", [0, 1, 48, 95, 97, 104])
def test_a_signature_of_another_length_is_refused(lab: Any, token: bytes, length: int) -> None:
    assert "r || s" in refused(lab, rebuilt(token, signature=(parts(token)[3] * 2)[:length]))


def test_a_der_signature_is_refused(lab: Any, token: bytes) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    assert "r || s" in refused(
        lab, rebuilt(token, signature=key.sign(b"x", ec.ECDSA(hashes.SHA384())))
    )


@pytest.mark.parametrize("signature", [b"\0" * 96, b"\xff" * 96])
def test_a_signature_of_zeros_or_out_of_range_is_refused(
    lab: Any, token: bytes, signature: bytes
) -> None:
    assert (
        refused(lab, rebuilt(token, signature=signature)) == "the token is not signed by its device"
    )


def test_a_signature_by_another_key_is_refused(lab: Any, token: bytes) -> None:
    signed = cose.parse(token)
    forged = cose.sign(signed.payload, signed.chain, ec.generate_private_key(ec.SECP384R1()))
    assert refused(lab, forged) == "the token is not signed by its device"


@pytest.mark.attack("trailing bytes")
def test_trailing_bytes_are_refused(lab: Any, token: bytes) -> None:
    assert refused(lab, token + b"\0")


@pytest.mark.attack("duplicate CBOR key", mode="header")
def test_a_duplicate_key_in_the_header_is_refused(lab: Any, token: bytes) -> None:
    chain = cbor2.dumps(header(token)[33])
    protected = b"\xa3\x01\x38\x22\x01\x38\x22\x18\x21" + chain
    assert "malformed" in refused(lab, b"\xd2" + cbor2.dumps([protected, *parts(token)[1:]]))


@pytest.mark.attack("duplicate CBOR key", mode="claims")
def test_a_duplicate_claim_is_refused(lab: Any, token: bytes) -> None:
    payload = parts(token)[2]
    doubled = bytes([payload[0] + 1]) + payload[1:] + b"\x06\x00"
    assert refused(lab, lab.device.sign(doubled))


@pytest.mark.parametrize("tag", [b"", b"\xd1", b"\xd2\xd2", b"\xd8\x12", b"\xd8\x3d\xd2"])
def test_another_tag_or_none_is_refused(lab: Any, token: bytes, tag: bytes) -> None:
    assert refused(lab, tag + token[1:])


def test_a_detached_payload_is_refused(lab: Any, token: bytes) -> None:
    assert "not attached" in refused(lab, rebuilt(token, payload=None))


@pytest.mark.attack("oversized")
def test_an_oversized_token_is_refused_before_it_is_parsed(lab: Any, token: bytes) -> None:
    assert "over the limit" in refused(lab, token + b"\0" * cose.MAX_TOKEN_BYTES)


def nested(levels: int) -> Any:
    value: Any = b"x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.attack("nested too deep")
@pytest.mark.parametrize("levels", [2, 3, 10, 100])
def test_a_token_that_nests_too_deeply_is_refused_for_its_depth(
    lab: Any, token: bytes, levels: int
) -> None:
    """Each is canonical to its end: without the cap it would be refused for what it says, as the
    control at the cap is.
    """
    deep = b"\x81" * levels + cbor2.dumps(b"x")
    protected, *rest = (cbor2.dumps(part) for part in parts(token))
    in_header = cbor2.dumps(b"\xa2\x01" + cbor2.dumps(-35) + b"\x18\x21" + deep)
    for place in (b"".join((in_header, *rest)), b"".join((protected, deep, *rest[1:]))):
        with refusing():
            assert "A CBOR item is malformed" in refused(lab, b"\xd2\x84" + place)
    assert "x5chain is an array of fewer than two" in refused(
        lab, rebuilt(token, protected={1: -35, 33: nested(1)})
    )
    assert "unprotected headers" in refused(lab, rebuilt(token, unprotected=nested(1)))


@pytest.mark.parametrize(
    ("levels", "reason"),
    [(3, "not exactly those"), (4, "A CBOR item is malformed"), (5, "A CBOR item is malformed")],
)
def test_claims_that_nest_too_deeply_are_refused_for_their_depth(
    lab: Any, token: bytes, levels: int, reason: str
) -> None:
    claims = {**cbor2.loads(parts(token)[2]), "deep": nested(levels)}
    assert reason in refused(lab, lab.device.sign(canonical.encode(claims)))


def test_an_indefinite_length_is_refused(lab: Any, token: bytes) -> None:
    body = b"".join(cbor2.dumps(part) for part in parts(token))
    assert refused(lab, b"\xd2\x9f" + body + b"\xff")


def test_an_integer_longer_than_needed_is_refused(lab: Any, token: bytes) -> None:
    protected = parts(token)[0].replace(b"\x01\x38\x22", b"\x01\x39\x00\x22", 1)
    assert "canonical" in refused(lab, b"\xd2" + cbor2.dumps([protected, *parts(token)[1:]]))


def test_a_further_protected_header_is_refused(lab: Any, token: bytes) -> None:
    assert "exactly" in refused(
        lab, rebuilt(token, protected={1: -35, 2: [4], 33: header(token)[33]})
    )


@pytest.mark.parametrize("chain", [[], [b"x"], b"", b"x", [b"x"] * 5, "x", 5])
def test_a_malformed_chain_is_refused(lab: Any, token: bytes, chain: Any) -> None:
    assert refused(lab, rebuilt(token, protected={1: -35, 33: chain}))


def test_every_sampled_bit_flip_is_refused(lab: Any, token: bytes) -> None:
    verifier, chosen = lab.verifier(), random.Random(7)
    for position in chosen.sample(range(len(token) * 8), 600):
        flipped = bytearray(token)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(EvidenceRefused):
            verifier.verify(bytes(flipped), now=lab.now)


@pytest.mark.parametrize("key", [6, 10, 256, 258, 259, 263, 265, 266, 273, -70000, -70004])
def test_a_token_without_one_of_its_claims_or_with_a_strange_one_is_refused(
    lab: Any, token: bytes, key: int
) -> None:
    claims = canonical.decode(parts(token)[2])
    value = claims.pop(key)
    assert "exactly those of the profile" in refused(lab, lab.device.sign(canonical.encode(claims)))
    assert "exactly those of the profile" in refused(
        lab, lab.device.sign(canonical.encode(claims | {key + 5000: value}))
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (6, -1),
        (6, 1.5),
        (6, True),
        (6, 1 << 60),
        (10, b"n" * 31),
        (10, "n" * 32),
        (256, b"\x02" + b"u" * 16),
        (256, b"\x01" + b"u" * 16),
        (258, b"o" * 16),
        (259, b"fedark-real"),
        (263, 1),
        (263, False),
        (265, "tag:fedark.invalid,2026:eat/simulated/2"),
        (266, {}),
        (266, {"sandbox": {-70001: "landlock", -70002: b"s" * 48, -70003: b""}}),
        (266, {"sandbox": {-70001: "fortress", -70002: b"s" * 48, -70003: b"l" * 48}}),
        (273, []),
        (273, [[60, b"\xa0"]]),
        (273, [[61, b"\xa0"]]),
        (-70000, b"r" * 63),
        (-70004, -1),
    ],
)
def test_a_claim_of_another_form_is_refused_even_when_its_device_signed_it(
    lab: Any, token: bytes, key: int, value: Any
) -> None:
    claims = canonical.decode(parts(token)[2])
    assert refused(lab, lab.device.sign(canonical.encode(claims | {key: value})))


def test_pycose_verifies_our_token(lab: Any, token: bytes) -> None:
    pytest.importorskip("pycose")
    from pycose.keys import EC2Key
    from pycose.messages import Sign1Message

    # Both oracles were written for cbor2 5, which gave a list inside a tag: so the tag is taken off
    # here.
    message = Sign1Message.from_cose_obj(parts(token), allow_unknown_attributes=False)
    numbers = x509.load_der_x509_certificate(lab.device.chain[0]).public_key().public_numbers()
    message.key = EC2Key(
        crv="P_384", x=numbers.x.to_bytes(48, "big"), y=numbers.y.to_bytes(48, "big")
    )
    assert message.verify_signature()
    assert cbor2.loads(message.payload)[10] == NONCE


def test_we_verify_a_token_of_pycose(lab: Any, token: bytes) -> None:
    pytest.importorskip("pycose")
    from pycose.headers import Algorithm, X5chain
    from pycose.keys import EC2Key
    from pycose.messages import Sign1Message

    numbers = lab.device._key.private_numbers()
    key = EC2Key(
        crv="P_384",
        x=numbers.public_numbers.x.to_bytes(48, "big"),
        y=numbers.public_numbers.y.to_bytes(48, "big"),
        d=numbers.private_value.to_bytes(48, "big"),
    )
    message = Sign1Message(
        phdr={Algorithm: "ES384", X5chain: lab.device.chain[0]}, uhdr={}, payload=parts(token)[2]
    )
    message.key = key
    assert lab.verifier().verify(message.encode(), now=lab.now).report_data == REPORT


def test_cwt_verifies_our_token(lab: Any, token: bytes) -> None:
    cwt = pytest.importorskip("cwt")
    key = cwt.COSEKey.from_pem(_public_pem(lab), alg="ES384")
    payload = cwt.COSE.new().decode(cbor2.CBORTag(18, parts(token)), key)
    assert cbor2.loads(payload)[10] == NONCE


def test_we_verify_a_token_of_cwt(lab: Any, token: bytes) -> None:
    cwt = pytest.importorskip("cwt")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = lab.device._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    key = cwt.COSEKey.from_pem(pem, alg="ES384")
    theirs = cwt.COSE.new().encode_and_sign(
        parts(token)[2], key, protected={1: -35, 33: lab.device.chain[0]}, unprotected={}
    )
    assert lab.verifier().verify(theirs, now=lab.now).report_data == REPORT


def _public_pem(lab: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return lab.device._key.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )


def test_a_key_on_another_curve_cannot_sign() -> None:
    with pytest.raises(ValueError, match="P-384"):
        cose.sign(b"", [b"x"], ec.generate_private_key(ec.SECP256R1()))


def test_parse_is_total_on_empty_input() -> None:
    with pytest.raises(ProtocolError):
        cose.parse(b"")


# Of Wycheproof (C2SP, Apache-2.0), testvectors_v1/ecdsa_secp384r1_sha384_p1363_test.json, first
# group: key and cases 1 to 53.
WYCHEPROOF_KEY = (
    "042da57dda1089276a543f9ffdac0bff0d976cad71eb7280e7d9bfd9fee4bdb2f20f47ff888274389772d98cc5752138aa"
    "4b6d054d69dcf3e25ec49df870715e34883b1836197d76f8ad962e78f6571bbc7407b0d6091f9e4d88f014274406174f"
)
WYCHEPROOF_MESSAGE = b"123400"
WYCHEPROOF_R = int(
    "12b30abef6b5476fe6b612ae557c0425661e26b44b1bfe19"
    "daf2ca28e3113083ba8e4ae4cc45a0320abd3394f1c548d7",
    16,
)
WYCHEPROOF_S = int(
    "e7bf25603e2d07076ff30b7a2abec473da8b11c572b35fc6"
    "31991d5de62ddca7525aaba89325dfd04fecc47bff426f82",
    16,
)
N = int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16)
P = 2**384 - 2**128 - 2**96 + 2**32 - 1


def wycheproof(r: int, s: int, size: int = 48) -> bool:
    key = ec.EllipticCurvePublicKey.from_encoded_point(
        ec.SECP384R1(), bytes.fromhex(WYCHEPROOF_KEY)
    )
    return cose.es384_valid(
        key, WYCHEPROOF_MESSAGE, r.to_bytes(size, "big") + s.to_bytes(size, "big")
    )


def test_wycheproofs_signature_is_valid_with_either_sign_of_s() -> None:
    assert wycheproof(WYCHEPROOF_R, WYCHEPROOF_S)
    assert wycheproof(WYCHEPROOF_R, N - WYCHEPROOF_S)


@pytest.mark.parametrize("r", [0, 1, N, N - 1, N + 1, P, P + 1, N - WYCHEPROOF_R])
@pytest.mark.parametrize("s", [0, 1, N, N - 1, N + 1, P, P + 1, WYCHEPROOF_S])
def test_wycheproofs_special_values_of_r_and_s_are_no_signature(r: int, s: int) -> None:
    assert not wycheproof(r, s)


@pytest.mark.parametrize(
    ("added", "size"), [(N, 49), (256 * N, 50), (1 << 384, 49), (1 << 448, 57)]
)
def test_wycheproofs_values_beyond_the_order_are_no_signature(added: int, size: int) -> None:
    assert not wycheproof(WYCHEPROOF_R + added, WYCHEPROOF_S, size)
    assert not wycheproof(WYCHEPROOF_R, WYCHEPROOF_S + added, size)
    assert not wycheproof(WYCHEPROOF_R, WYCHEPROOF_S, size), "the right values, with leading zeros"
