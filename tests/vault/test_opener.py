"""A payload opens to exactly what was sealed, in one way, or not at all."""

from __future__ import annotations

import hashlib
import secrets
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from attacks import refusing
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import SealBroken
from fedark.foundation.keys import SigningKey
from fedark.vault.manifest import (
    TAG_BYTES,
    FileEntry,
    Manifest,
    ModelCard,
    ReleasePolicy,
    VerifiedManifest,
)
from fedark.vault.opener import OpenedBundle, Opener, associated_data, nonce, open_to_memory
from fedark.vault.weightkey import WeightKey

CHUNK = 1024
SEALED = CHUNK + TAG_BYTES
PROVIDER = SigningKey()
CARD = ModelCard(name="m", title="M", licence="none", task="classification")
POLICY = ReleasePolicy(expires="2999-01-01T00:00:00+00:00", platforms=("simulated",))


@dataclass
class Sealed:
    manifest: VerifiedManifest
    key: WeightKey
    payload: bytes
    files: dict[str, bytes]

    def chunks(self) -> list[bytes]:
        return [
            self.payload[start : start + SEALED] for start in range(0, len(self.payload), SEALED)
        ]


def sealed(sizes: list[int], *, key: WeightKey | None = None) -> Sealed:
    """The format, written down a second time, straight from its description."""
    files = {f"f{index:02}.txt": secrets.token_bytes(size) for index, size in enumerate(sizes)}
    key, bundle_id = key or WeightKey.generate(), secrets.token_bytes(32)
    commitment = key.commitment(bundle_id, CHUNK)
    cipher, plain = key.cipher(bundle_id, CHUNK, commitment), b"".join(files.values())
    starts = range(0, len(plain), CHUNK)
    payload = b"".join(
        cipher.encrypt(
            nonce(index),
            plain[start : start + CHUNK],
            associated_data(bundle_id, index, index == len(starts) - 1),
        )
        for index, start in enumerate(starts)
    )
    entries = tuple(
        FileEntry(name, len(data), hashlib.sha384(data).digest()) for name, data in files.items()
    )
    digest = hashlib.sha384(payload).digest()
    body = Manifest(PROVIDER.public, bundle_id, CHUNK, commitment, digest, entries, CARD, POLICY)
    return Sealed(body.sign(PROVIDER), key, payload, files)


def opens(
    manifest: VerifiedManifest, key: WeightKey, payload: bytes, step: int = 0
) -> dict[str, bytes]:
    step = step or max(1, len(payload))
    files, proof = open_to_memory(
        manifest, key, (payload[at : at + step] for at in range(0, len(payload), step))
    )
    assert proof.bundle == manifest.digest()
    return {name: bytes(data) for name, data in files.items()}


def refused(sealed: Sealed, payload: bytes) -> None:
    for step in (0, 1000, SEALED):
        with pytest.raises(SealBroken):
            opens(sealed.manifest, sealed.key, payload, step)


around = st.sampled_from(
    [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 17]
) | st.integers(0, 5000)


@settings(max_examples=120)
@given(
    sizes=st.lists(around, min_size=1, max_size=6).filter(any),
    steps=st.lists(
        st.sampled_from([1, 15, 16, 17, CHUNK, SEALED - 1, SEALED, SEALED + 1, 3 * SEALED + 5]),
        min_size=1,
    ),
)
def test_what_was_sealed_opens_whatever_the_sizes_of_files_and_pieces(
    sizes: list[int], steps: list[int]
) -> None:
    one = sealed(sizes)
    got = {name: bytearray() for name in one.files}
    opener = Opener(one.manifest, one.key, lambda name, part: got[name].extend(part))
    at, turn = 0, 0
    while at < len(one.payload):
        step = steps[turn % len(steps)]
        opener.feed(one.payload[at : at + step])
        at, turn = at + step, turn + 1
    assert opener.finish().bundle == one.manifest.digest()
    assert got == one.files


def test_files_come_in_the_order_of_the_manifest_and_never_before_their_chunk_is_complete() -> None:
    one, seen = sealed([10, 2000, 5]), list[str]()
    opener = Opener(one.manifest, one.key, lambda name, part: seen.append(name))
    opener.feed(one.payload[: SEALED - 1])
    assert seen == []
    opener.feed(one.payload[SEALED - 1 :])
    assert seen == ["f00.txt", "f01.txt", "f01.txt", "f02.txt"]


@pytest.mark.attack("chunk truncation")
@pytest.mark.parametrize("size", [3 * CHUNK, 3 * CHUNK + 100, 100])
def test_a_payload_cut_at_any_border_is_refused(size: int) -> None:
    one = sealed([size])
    length = len(one.payload)
    borders = {0, 1, length - 1, length - TAG_BYTES, length - TAG_BYTES - 1}
    borders |= {
        at + off
        for at in range(0, length, SEALED)
        for off in (-1, 0, 1, TAG_BYTES, CHUNK)
        if 0 <= at + off < length
    }
    for cut in sorted(borders):
        refused(one, one.payload[:cut])


def test_a_payload_that_goes_on_is_refused() -> None:
    one = sealed([3 * CHUNK])
    for more in (b"\0", bytes(TAG_BYTES), one.chunks()[-1], one.payload):
        refused(one, one.payload + more)


@pytest.mark.attack("chunks reordered")
def test_chunks_in_another_order_are_refused() -> None:
    one = sealed([4 * CHUNK])
    a, b, c, d = one.chunks()
    for order in ([b, a, c, d], [a, c, b, d], [d, b, c, a], [a, b, d, c]):
        with refusing():
            refused(one, b"".join(order))


@pytest.mark.attack("chunk repeated or left out")
def test_a_chunk_that_is_repeated_or_left_out_is_refused() -> None:
    one = sealed([4 * CHUNK])
    a, b, c, d = one.chunks()
    for chunks in (
        [a, a, b, c, d],
        [a, a, c, d],
        [a, b, d],
        [b, c, d],
        [a, b, c, c],
        [a, b, c, d, d],
    ):
        with refusing():
            refused(one, b"".join(chunks))


def test_a_chunk_of_another_bundle_is_refused_even_under_the_same_key() -> None:
    key = WeightKey.generate()
    one, other = sealed([3 * CHUNK], key=key), sealed([3 * CHUNK], key=key)
    for index in range(3):
        mixed = one.chunks()
        mixed[index] = other.chunks()[index]
        refused(one, b"".join(mixed))
    refused(one, other.payload)


def test_a_shorter_bundle_of_the_same_key_cannot_stand_for_the_beginning_of_a_longer_one() -> None:
    # The final chunk of one is not a middle chunk of the other: the final flag is authenticated.
    one = sealed([3 * CHUNK])
    cipher = one.key.cipher(one.manifest.bundle_id, CHUNK, one.manifest.commitment)
    early_end = cipher.encrypt(
        nonce(0), bytes(CHUNK), associated_data(one.manifest.bundle_id, 0, True)
    )
    refused(one, early_end + b"".join(one.chunks()[1:]))


@settings(max_examples=200)
@given(data=st.data())
def test_any_flipped_bit_is_refused_and_nothing_from_its_chunk_on_is_handed_out(
    data: st.DataObject,
) -> None:
    one = sealed([2 * CHUNK + 300])
    bit = data.draw(st.integers(0, 8 * len(one.payload) - 1))
    flipped = bytearray(one.payload)
    flipped[bit // 8] ^= 1 << bit % 8
    got = bytearray()
    opener = Opener(one.manifest, one.key, lambda name, part: got.extend(part))
    with pytest.raises(SealBroken, match="not what was sealed"):
        opener.feed(flipped)
    before = bit // 8 // SEALED * CHUNK
    assert got == one.files["f00.txt"][:before]


def test_nonce_and_associated_data_say_bundle_index_and_end() -> None:
    # Pinned: the content key is the bundle's own already, so no attack here shows whether the id is
    # in the data as well.
    assert nonce(0x0102) == bytes(10) + b"\x01\x02"
    assert associated_data(b"i" * 32, 0x0102, True) == b"i" * 32 + bytes(6) + b"\x01\x02" + b"\x01"
    assert associated_data(b"i" * 32, 0, False) == b"i" * 32 + bytes(9)


def test_a_broken_opener_stays_broken() -> None:
    one = sealed([2 * CHUNK])
    opener = Opener(one.manifest, one.key, lambda name, part: None)
    with pytest.raises(SealBroken):
        opener.feed(bytes(SEALED))
    with pytest.raises(SealBroken):
        opener.feed(one.payload)
    with pytest.raises(SealBroken):
        opener.finish()


def test_a_finished_opener_takes_and_finishes_nothing_more() -> None:
    one = sealed([100])
    opener = Opener(one.manifest, one.key, lambda name, part: None)
    opener.feed(one.payload)
    opener.finish()
    with pytest.raises(SealBroken):
        opener.feed(b"x")
    with pytest.raises(SealBroken):
        opener.finish()


def test_a_sink_that_fails_leaves_an_opener_that_proves_nothing() -> None:
    one = sealed([2 * CHUNK])

    def sink(name: str, part: memoryview) -> None:
        raise OSError

    opener = Opener(one.manifest, one.key, sink)
    with pytest.raises(OSError):  # noqa: PT011
        opener.feed(one.payload)
    with pytest.raises(SealBroken):
        opener.finish()


def test_another_bundles_key_is_refused_before_anything_is_decrypted() -> None:
    one, other = sealed([100]), sealed([100])
    with pytest.raises(SealBroken, match="commits to"):
        Opener(one.manifest, other.key, lambda name, part: None)


def test_a_payload_made_to_open_under_a_second_key_still_has_one_admissible_key() -> None:
    # AES-GCM commits to no key, so a provider can make such payloads; the commitment in the
    # manifest names one of the keys.
    one, second = sealed([100]), WeightKey.generate()
    assert second.commitment(one.manifest.bundle_id, CHUNK) != one.manifest.commitment
    with pytest.raises(SealBroken, match="commits to"):
        open_to_memory(one.manifest, second, [one.payload])


def test_only_an_opener_that_reached_the_end_makes_a_proof_of_opening() -> None:
    with pytest.raises(TypeError):
        OpenedBundle()


def test_opening_needs_the_same_memory_for_one_chunk_and_for_many() -> None:
    def peak(chunks: int) -> int:
        one = sealed([chunks * CHUNK])

        def pieces() -> Iterator[memoryview]:
            view = memoryview(one.payload)
            for at in range(0, len(view), 700):
                yield view[at : at + 700]

        opener = Opener(one.manifest, one.key, lambda name, part: None)
        tracemalloc.start()
        for piece in pieces():
            opener.feed(piece)
        opener.finish()
        grown = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return grown

    peak(2)
    assert peak(2000) - peak(2) < 4 * CHUNK
