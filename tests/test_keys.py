"""Signatures and sealed messages hold for one purpose, one key and one context."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedark.errors import InputError, ProtocolError, Refused
from fedark.keys import HpkeKey, PartyKeys, SigningKey, hpke_seal, verify_signature

CONTEXT = {"label": "test", "run": "one"}


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
        verify_signature(key.public, "lab", b"el\x00message", key.sign("label", b"message"), by="us")


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
