"""Signatures and sealed messages hold for one purpose, one key and one context."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedark.foundation import keys
from fedark.foundation.errors import InputError, ProtocolError, Refused
from fedark.foundation.keys import HpkeKey, PartyKeys, SigningKey, hpke_seal, verify_signature

CONTEXT = {"label": "test", "run": "one"}
WYCHEPROOF = [
    line.split(" ", 6)
    for line in (
        (Path(__file__).parent / "ed25519_wycheproof.txt").read_text(encoding="utf-8").splitlines()
    )
    if not line.startswith("#")
]
FIELD, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493


def test_a_signature_holds_for_its_label_and_message_alone() -> None:
    key = SigningKey()
    signature = key.sign("label", b"message")
    verify_signature(key.public, "label", b"message", signature, by="us")
    for public, label, message, altered in (
        (key.public, "other", b"message", signature),
        (key.public, "label", b"other", signature),
        (SigningKey().public, "label", b"message", signature),
        (key.public, "label", b"message", signature[:-1]),
        (key.public, "label", b"message", signature[:-1] + bytes([signature[-1] ^ 1])),
        (b"short", "label", b"message", signature),
    ):
        with pytest.raises(Refused):
            verify_signature(public, label, message, altered, by="us")


def test_a_label_and_a_message_cannot_be_split_in_two_ways() -> None:
    key = SigningKey()
    with pytest.raises(Refused):
        verify_signature(
            key.public, "lab", b"el\x00message", key.sign("label", b"message"), by="us"
        )


def test_a_sealed_message_opens_for_its_key_and_context_alone() -> None:
    key = HpkeKey()
    sealed = hpke_seal(b"secret", key.public, CONTEXT)
    assert key.open(sealed, CONTEXT) == b"secret"
    for other, data, context in (
        (HpkeKey(), sealed, CONTEXT),
        (key, sealed, {**CONTEXT, "run": "two"}),
        (key, sealed[:-1], CONTEXT),
        (key, sealed[:-1] + bytes([sealed[-1] ^ 1]), CONTEXT),
        (key, b"", CONTEXT),
    ):
        with pytest.raises(Refused) as caught:
            other.open(data, context)
        assert "secret" not in str(caught.value)


def test_each_half_of_the_hybrid_key_is_needed() -> None:
    key, other = HpkeKey(), HpkeKey()
    for mixed in (key.public[:1184] + other.public[1184:], other.public[:1184] + key.public[1184:]):
        with pytest.raises(Refused):
            key.open(hpke_seal(b"secret", mixed, CONTEXT), CONTEXT)


def test_a_malformed_public_key_is_named() -> None:
    with pytest.raises(ProtocolError):
        hpke_seal(b"secret", b"short", CONTEXT)


def test_party_keys_survive_their_file_and_are_closed_to_others(tmp_path: Path) -> None:
    keys, path = PartyKeys(), tmp_path / "party.keys"
    keys.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = PartyKeys.load(path)
    assert (loaded.signing.public, loaded.hpke.public) == (keys.signing.public, keys.hpke.public)
    with pytest.raises(InputError, match="exists already"):
        PartyKeys().save(path)
    os.chmod(path, 0o644)
    with pytest.raises(InputError, match="chmod 600"):
        PartyKeys.load(path)


def test_a_broken_key_file_is_refused_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "party.keys"
    path.write_text("fedark-party-keys-1\nnothex\nnothex\n")
    path.chmod(0o600)
    with pytest.raises(InputError) as caught:
        PartyKeys.load(path)
    assert "nothex" not in str(caught.value)


def test_keys_do_not_show_their_secrets() -> None:
    keys = PartyKeys()
    for key in (keys.signing, keys.hpke):
        assert key.secret_bytes().hex()[:16] not in repr(key)


# -- Ed25519


@pytest.mark.parametrize("vector", WYCHEPROOF, ids=lambda vector: f"{vector[0]}-{vector[1]}")
def test_signatures_of_project_wycheproof_hold_or_are_refused_as_it_says(
    vector: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, flag, result, public, message, signature, comment = vector
    monkeypatch.setattr(
        keys, "_framed", lambda label, message: message
    )  # its messages have no label
    parts = [bytes.fromhex("" if part == "-" else part) for part in (public, message, signature)]
    if result == "valid":
        verify_signature(parts[0], "", parts[1], parts[2], by="us")
        return
    assert (result == "acceptable") == (flag == "SmallOrderPublicKey"), comment
    with pytest.raises(Refused):
        verify_signature(parts[0], "", parts[1], parts[2], by="us")


BASE = bytes.fromhex("5866666666666666666666666666666666666666666666666666666666666666")
ONE = (1).to_bytes(32, "little")


@pytest.mark.attack("a signing key of small order")
@pytest.mark.parametrize(
    "public", [1, 1 | 1 << 255, FIELD + 1, FIELD + 1 | 1 << 255], ids=["1", "-1", "p+1", "-(p+1)"]
)
def test_a_forgery_for_every_message_that_needs_no_secret_is_refused(public: int) -> None:
    """Constructed: A = 0, R = B, S = 1 fulfil SB = R + kA for every k. A is in each of the forms
    that OpenSSL reads.
    """
    key, forged = public.to_bytes(32, "little"), BASE + ONE
    for message in (b"one", b"another"):
        Ed25519PublicKey.from_public_bytes(key).verify(forged, b"label\0" + message)
        with pytest.raises(Refused):
            verify_signature(key, "label", message, forged, by="us")


def test_keys_of_small_order_are_refused_whatever_they_have_signed() -> None:
    """Constructed: for a point T of order 8 some k of a few is a multiple of 8, and then kT = 0."""
    (eight,) = {vector[3] for vector in WYCHEPROOF if vector[0] == "153"}
    other = bytes.fromhex(eight)
    for public in (
        other,
        other[:31] + bytes((other[31] ^ 0x80,)),
        (FIELD - 1).to_bytes(32, "little"),
        bytes(32),
    ):
        held = 0
        for number in range(200):
            try:
                Ed25519PublicKey.from_public_bytes(public).verify(BASE + ONE, b"label\0%d" % number)
            except InvalidSignature:
                continue
            held += 1
            with pytest.raises(Refused):
                verify_signature(public, "label", b"%d" % number, BASE + ONE, by="us")
        assert held


def test_of_a_signature_with_our_label_no_second_form_holds() -> None:
    """Constructed: S + L, S + 2L, R in a form above the field, and every other length."""
    key = SigningKey()
    good = key.sign("label", b"message")
    verify_signature(key.public, "label", b"message", good, by="us")
    scalar = int.from_bytes(good[32:], "little")
    others = [good[:32] + (scalar + factor * ORDER).to_bytes(32, "little") for factor in (1, 2, 8)]
    others += [
        (FIELD + 1).to_bytes(32, "little") + good[32:],
        ONE + good[32:],
        bytes(64),
        b"",
        good[:63],
        good + b"\0",
        good * 2,
    ]
    for signature in others:
        with pytest.raises(Refused):
            verify_signature(key.public, "label", b"message", signature, by="us")
    for public in (b"", key.public[:31], key.public + b"\0", b"\xff" * 32):
        with pytest.raises(Refused):
            verify_signature(public, "label", b"message", good, by="us")


# -- X25519 and ML-KEM

EIGHT = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
)
LOW = [
    0,
    1,
    FIELD - 1,
    FIELD,
    FIELD + 1,
    *((1 + y) * pow(1 - y, -1, FIELD) % FIELD for y in (EIGHT, FIELD - EIGHT)),
]


@pytest.mark.parametrize("kem", keys.KEMS)
@pytest.mark.parametrize("u", LOW)
def test_a_point_of_low_order_is_neither_sealed_to_nor_opened(kem: keys.Kem, u: int) -> None:
    """Constructed: every u of curve25519 whose order divides 8, two of them in a second form; u =
    (1 + y) / (1 - y).
    """
    key, low = HpkeKey(kem=kem), u.to_bytes(32, "little")
    sealed = hpke_seal(b"secret", key.public, CONTEXT, kem=kem)
    end = {"x25519": 32, "mlkem768-x25519": 1088 + 32}[kem]
    with pytest.raises(Refused):
        key.open(sealed[: end - 32] + low + sealed[end:], CONTEXT)
    with pytest.raises(ProtocolError):
        hpke_seal(b"secret", key.public[:-32] + low, CONTEXT, kem=kem)


@pytest.mark.parametrize(
    "head", [b"\xff" * 1184, b"\x01\x0d\x00", b"\xff\xff\xff"], ids=["all", "q", "4095"]
)
def test_an_ml_kem_key_with_a_coefficient_beyond_the_modulus_is_refused(head: bytes) -> None:
    """Constructed: FIPS 203, section 7.2, modulus check; 3329 is the smallest coefficient that is
    too large.
    """
    public = HpkeKey().public
    with pytest.raises(ProtocolError):
        hpke_seal(b"secret", head + public[len(head) :], CONTEXT)


@pytest.mark.parametrize("at", [0, 543, 1087, 1088, 1119, 1120, 1125, -1])
def test_an_encapsulation_or_ciphertext_with_one_bit_changed_does_not_open(at: int) -> None:
    key = HpkeKey()
    sealed = bytearray(hpke_seal(b"secret", key.public, CONTEXT))
    for bit in (0x01, 0x80):
        sealed[at] ^= bit
        with pytest.raises(Refused):
            key.open(bytes(sealed), CONTEXT)
        sealed[at] ^= bit
