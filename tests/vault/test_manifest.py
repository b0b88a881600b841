"""A manifest is the provider's word, in one form, and its names cannot be turned against whoever
opens the bundle.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, ProtocolError, Refused, SealBroken
from fedark.foundation.keys import SigningKey
from fedark.vault.manifest import (
    FileEntry,
    Manifest,
    ModelCard,
    ReleasePolicy,
    VerifiedManifest,
    name_problems,
)

PROVIDER = SigningKey()
LABEL = "fedark/bundle/1"
POLICY = ReleasePolicy(expires="2999-01-01T00:00:00+00:00", platforms=("simulated",))
MANIFEST = Manifest(
    provider=PROVIDER.public,
    bundle_id=b"i" * 32,
    chunk_size=1 << 20,
    commitment=b"c" * 48,
    payload_sha384=b"p" * 48,
    files=(
        FileEntry("config.json", 2, b"1" * 48),
        FileEntry("model.safetensors", 5 << 20, b"2" * 48),
    ),
    card=ModelCard(name="m", title="M", licence="none", task="classification"),
    policy=POLICY,
)
SIGNED = MANIFEST.sign(PROVIDER)


def resigned(change: dict[str, Any], signer: SigningKey = PROVIDER) -> bytes:
    body = canonical.decode(canonical.decode(SIGNED.encode())["body"]) | change
    raw = canonical.encode(body)
    return canonical.encode({"body": raw, "signature": signer.sign(LABEL, raw)})


def test_a_signed_manifest_reads_back_as_it_was() -> None:
    again = Manifest.verify(SIGNED.encode(), PROVIDER.public)
    assert again == SIGNED
    assert again.digest() == SIGNED.digest()
    assert (again.total, again.chunks, again.payload_size) == (
        (5 << 20) + 2,
        6,
        (5 << 20) + 2 + 6 * 16,
    )


def test_a_verified_manifest_is_made_by_verification_alone() -> None:
    with pytest.raises(TypeError):
        VerifiedManifest()


def test_a_manifest_of_another_provider_is_refused() -> None:
    other = SigningKey()
    with pytest.raises(Refused, match="does not verify"):
        Manifest.verify(SIGNED.encode(), other.public)
    with pytest.raises(Refused, match="names another provider"):
        Manifest.verify(resigned({}, other), other.public)


def test_a_signature_for_another_purpose_does_not_sign_a_manifest() -> None:
    body = canonical.decode(SIGNED.encode())["body"]
    forged = canonical.encode({"body": body, "signature": PROVIDER.sign("fedark/contract/1", body)})
    with pytest.raises(Refused, match="does not verify"):
        Manifest.verify(forged, PROVIDER.public)


@settings(max_examples=300)
@given(bit=st.integers(0, 8 * len(SIGNED.encode()) - 1))
def test_any_flipped_bit_of_a_manifest_is_refused(bit: int) -> None:
    flipped = bytearray(SIGNED.encode())
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FedarkError):
        Manifest.verify(bytes(flipped), PROVIDER.public)


@settings(max_examples=300)
@given(data=st.binary(max_size=400))
def test_bytes_of_a_stranger_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises((ProtocolError, Refused)):
        Manifest.verify(data, PROVIDER.public)
    with pytest.raises((ProtocolError, Refused)):
        Manifest.claimed_provider(data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "fedark/bundle/2"}, "form"),
        ({"surplus": 1}, "form"),
        ({"chunk_size": 0}, "chunk size"),
        ({"chunk_size": 1 << 30}, "chunk size"),
        ({"chunk_size": True}, "chunk size"),
        ({"bundle_id": b"short"}, "bundle_id"),
        ({"commitment": b""}, "commitment"),
        ({"files": []}, "empty"),
        ({"files": "config.json"}, "empty"),
        ({"files": [["config.json", 0, b"1" * 48]]}, "empty"),
        ({"files": [["config.json", -1, b"1" * 48]]}, "negative"),
        ({"files": [["config.json", True, b"1" * 48]]}, "malformed"),
        ({"files": [["config.json", 1 << 50, b"1" * 48]]}, "too large"),
        ({"files": [["config.json", 1, b"1" * 47]]}, "malformed"),
        ({"files": [["config.json", 1]]}, "malformed"),
        ({"files": [["b.json", 1, b"1" * 48], ["a.json", 1, b"1" * 48]]}, "order"),
        ({"files": [["a.json", 1, b"1" * 48], ["a.json", 1, b"1" * 48]]}, "twice"),
        ({"files": [["../a.json", 1, b"1" * 48]]}, "plain relative name"),
        ({"files": [["model.py", 1, b"1" * 48]]}, "code"),
        (
            {"files": [[f"{index:05}.json", 1, b"1" * 48] for index in range(1025)]},
            "more than 1024",
        ),
        ({"card": {"name": "m"}}, "title: missing"),
        ({"card": "m"}, "dictionary"),
        ({"policy": {"expires": "soon", "platforms": ["simulated"]}}, "expires"),
        ({"policy": {"expires": "2999-01-01T00:00:00", "platforms": ["simulated"]}}, "time zone"),
        ({"policy": {"expires": "2999-01-01T00:00:00+00:00", "platforms": []}}, "platforms"),
    ],
)
def test_a_signed_manifest_that_breaks_a_rule_is_refused_and_says_which(
    change: dict[str, Any], why: str
) -> None:
    with pytest.raises(SealBroken, match=why):
        Manifest.verify(resigned(change), PROVIDER.public)


def test_every_broken_rule_is_named_in_one_answer() -> None:
    with pytest.raises(SealBroken) as caught:
        Manifest.verify(resigned({"chunk_size": 0, "commitment": b"", "card": {}}), PROVIDER.public)
    assert caught.value.what.count("\n  - ") >= 4


@pytest.mark.parametrize(
    "name",
    [
        "../a.json",
        "a/../b.json",
        "/etc/a.json",
        "a//b.json",
        "./a.json",
        ".hidden.json",
        "a/.git/b.json",
        "a\\b.json",
        "a\x00.json",
        "a\n.json",
        "-rf.json",
        "é.json",
        "a.json/",
        "",
        "C:a.json",
        "a/b/c/d/e/f.json",
        "a" * 200 + ".json",
    ],
)
def test_a_name_that_could_leave_its_folder_or_be_read_in_two_ways_is_no_name(name: str) -> None:
    assert name_problems([name])


def test_names_that_meet_on_a_disk_are_refused() -> None:
    assert name_problems(["a.json", "A.JSON"])
    assert name_problems(["a.json", "a.json/b.json"])
    assert not name_problems(
        ["a.json", "b/a.json", "extra/replay.csv", "tokenizer.model", "vocab.txt"]
    )


@pytest.mark.parametrize(
    "suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py", ".so", ".exe", ".csv", ""]
)
def test_pickles_code_and_unknown_kinds_are_refused(suffix: str) -> None:
    assert name_problems([f"pytorch_model{suffix}"])
