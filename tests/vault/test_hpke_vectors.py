"""HPKE against published vectors: the hybrid KEM, the key schedule, and with both fedark's own
suite end to end.

The published hybrid vector ends in ChaCha20-Poly1305, fedark's suite in AES-256-GCM. So the
vector's shared secret goes through a key schedule written down here from RFC 9180, section 5.1,
which first reproduces the keys of both published vectors.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedark.foundation import canonical
from fedark.foundation.errors import Refused
from fedark.foundation.keys import HpkeKey, hpke_seal
from fedark.vault.weightkey import WeightKey

VECTORS = json.loads(Path(__file__).with_name("hpke_vectors.json").read_text(encoding="utf-8"))
AES_256_GCM = 2


def vector(name: str) -> dict[str, Any]:
    def raw(value: Any) -> Any:
        return bytes.fromhex(value) if isinstance(value, str) else value

    one = VECTORS[name]
    return {key: raw(value) for key, value in one.items() if key != "encryption"} | {
        key: raw(value) for key, value in one["encryption"].items()
    }


def schedule(suite: tuple[int, int, int], shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and base nonce of mode_base with HKDF-SHA256 (RFC 9180, section 5.1)."""
    suite_id = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in suite)

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm, "sha256")

    def expand(prk: bytes, label: bytes, context: bytes, length: int) -> bytes:
        return HKDFExpand(
            SHA256(), length, length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + context
        ).derive(prk)

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)


def hybrid_key(published: dict[str, Any]) -> HpkeKey:
    """The recipient of the vector: its 32-byte seed expands to the seeds of both halves
    (SHAKE-256).
    """
    return HpkeKey(hashlib.shake_256(published["skRm"]).digest(96))


def test_the_hybrid_key_pair_is_the_published_one() -> None:
    published = vector("hybrid")
    assert published["kem_id"] == 0x647A
    assert hybrid_key(published).public == published["pkRm"]


def test_the_published_hybrid_ciphertext_opens() -> None:
    published = vector("hybrid")
    suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    plain = openssl.hpke._decrypt_with_aad(
        suite,
        published["enc"] + published["ct"],
        hybrid_key(published)._key,
        info=published["info"],
        aad=published["aad"],
    )
    assert plain == published["pt"]


def test_the_published_aes_256_gcm_ciphertext_opens() -> None:
    published = vector("classical")
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    key = X25519PrivateKey.from_private_bytes(published["skRm"])
    sealed = published["enc"] + published["ct"]
    assert (
        openssl.hpke._decrypt_with_aad(
            suite, sealed, key, info=published["info"], aad=published["aad"]
        )
        == published["pt"]
    )


@pytest.mark.parametrize("name", ["hybrid", "classical"])
def test_the_key_schedule_written_down_here_gives_the_published_keys(name: str) -> None:
    published = vector(name)
    suite = (published["kem_id"], published["kdf_id"], published["aead_id"])
    assert schedule(suite, published["shared_secret"], published["info"]) == (
        published["key"],
        published["base_nonce"],
    )


def test_fedarks_suite_opens_what_the_published_encapsulation_and_the_rfcs_key_schedule_make() -> (
    None
):
    published, context = vector("hybrid"), {"label": "fedark/release/1", "terms": b"t" * 48}
    suite = (published["kem_id"], published["kdf_id"], AES_256_GCM)
    info = canonical.encode(context | {"suite": "mlkem768-x25519/hkdf-sha256/aes-256-gcm"})
    key, nonce = schedule(suite, published["shared_secret"], info)
    sealed = published["enc"] + AESGCM(key).encrypt(nonce, b"k" * 32, b"")
    assert hybrid_key(published).open(sealed, context) == b"k" * 32
    assert WeightKey.unwrap(sealed, hybrid_key(published), context)._secret == b"k" * 32


@pytest.mark.parametrize("half", ["ml-kem", "x25519", "tag"])
def test_a_change_in_either_half_of_the_encapsulation_is_refused(half: str) -> None:
    key, context = HpkeKey(), {"label": "test"}
    sealed = bytearray(hpke_seal(b"k" * 32, key.public, context))
    sealed[{"ml-kem": 0, "x25519": 1088, "tag": -1}[half]] ^= 1
    with pytest.raises(Refused):
        key.open(bytes(sealed), context)


@pytest.mark.parametrize("point", [0, 1])
def test_an_x25519_share_of_small_order_does_not_open(point: int) -> None:
    key, context = HpkeKey(), {"label": "test"}
    sealed = bytearray(hpke_seal(b"k" * 32, key.public, context))
    sealed[1088:1120] = point.to_bytes(32, "little")
    with pytest.raises(Refused):
        key.open(bytes(sealed), context)
