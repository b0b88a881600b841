"""A weight key shows itself to nobody: not printed, not pickled, not in an error, not in a
traceback's frames.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from fedark.foundation import files
from fedark.foundation.errors import (
    FedarkError,
    InputError,
    Refused,
    ReleaseRefused,
    SealBroken,
    StorageError,
)
from fedark.foundation.keys import PUBLIC_HPKE_BYTES, HpkeKey, hpke_seal
from fedark.vault.opener import Opener
from fedark.vault.weightkey import KeyStore, WeightKey

CONTEXT = {"label": "test"}


def secret_of(key: WeightKey) -> bytes:
    return bytes(key._secret)


def frames(error: BaseException) -> list[dict[str, Any]]:
    """Local variables of every frame that an error, its causes and its contexts left by."""
    found, todo, seen = list[dict[str, Any]](), [error], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        traceback: TracebackType | None = one.__traceback__
        while traceback is not None:
            found.append(traceback.tb_frame.f_locals)
            traceback = traceback.tb_next
        todo += [linked for linked in (one.__cause__, one.__context__) if linked is not None]
    return found


def assert_silent(error: BaseException, secret: bytes) -> None:
    assert secret.hex() not in str(error) + repr(error)
    for place in frames(error)[1:]:  # the first is the test's own
        for name, value in place.items():
            raw = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""
            assert secret not in raw, name
            assert secret.hex().encode() not in raw, name
            assert secret.hex() not in repr(value), name


def test_a_key_does_not_print() -> None:
    key = WeightKey.generate()
    for text in (str(key), repr(key), f"{key}", f"{key!r}", repr([key]), repr({"key": key})):
        assert secret_of(key).hex() not in text
        assert repr(secret_of(key))[2:-1] not in text
    assert not hasattr(key, "__dict__")


def test_a_key_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    key = WeightKey.generate()
    logging.getLogger("test").warning("key %s", key)
    assert "hidden" in caplog.text


@pytest.mark.parametrize("action", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_not_pickled_or_copied(action: Callable[[object], object]) -> None:
    with pytest.raises(TypeError):
        action(WeightKey.generate())


def test_a_key_is_made_by_its_own_ways_alone() -> None:
    with pytest.raises(TypeError):
        WeightKey()


def test_a_wiped_key_is_zero_and_of_no_use() -> None:
    key = WeightKey.generate()
    buffer = key._secret
    key.wipe()
    assert buffer == bytes(32)
    with pytest.raises(SealBroken, match="wiped"):
        key.commitment(b"i" * 32, 1024)
    with pytest.raises(SealBroken, match="wiped"):
        key.wrap(HpkeKey().public, CONTEXT)


def test_a_wrapped_key_opens_for_its_recipient_in_its_context_alone() -> None:
    key, recipient, other = WeightKey.generate(), HpkeKey(), HpkeKey()
    wrapped = key.wrap(recipient.public, CONTEXT)
    assert secret_of(WeightKey.unwrap(wrapped, recipient, CONTEXT)) == secret_of(key)
    for hpke, context in ((other, CONTEXT), (recipient, {"label": "other"})):
        with pytest.raises(Refused):
            WeightKey.unwrap(wrapped, hpke, context)


def test_what_is_wrapped_but_no_key_is_refused() -> None:
    recipient = HpkeKey()
    for size in (0, 16, 31, 33):
        with pytest.raises(ReleaseRefused, match="no weight key"):
            WeightKey.unwrap(hpke_seal(bytes(size), recipient.public, CONTEXT), recipient, CONTEXT)


def test_a_malformed_recipient_key_ends_in_an_error_whose_frames_do_not_hold_the_weight_key() -> (
    None
):
    key = WeightKey.generate()
    for public in (b"", b"\xff" * PUBLIC_HPKE_BYTES):
        with pytest.raises(ReleaseRefused) as caught:
            key.wrap(public, CONTEXT)
        assert_silent(caught.value, secret_of(key))


def test_the_commitment_depends_on_key_bundle_and_chunk_size() -> None:
    key = WeightKey.generate()
    made = {
        key.commitment(b"i" * 32, 1024),
        key.commitment(b"j" * 32, 1024),
        key.commitment(b"i" * 32, 2048),
        WeightKey.generate().commitment(b"i" * 32, 1024),
    }
    assert len(made) == 4


def test_a_stored_key_comes_back_from_a_file_that_its_owner_alone_reads(
    world: Any, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "keys")
    path = store.put(world.manifest, world.key)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert secret_of(store.get(world.manifest)) == secret_of(world.key)
    assert list(path.parent.iterdir()) == [path]


def test_a_stored_key_is_never_overwritten(world: Any, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    path = store.put(world.manifest, world.key)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        store.put(world.manifest, WeightKey.generate())
    assert path.read_bytes() == before


def test_a_missing_open_or_malformed_key_file_is_refused(world: Any, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    with pytest.raises(InputError, match="No weight key"):
        store.get(world.manifest)
    path = store.put(world.manifest, world.key)
    good = path.read_bytes()
    path.chmod(0o640)
    with pytest.raises(InputError, match="open to other users"):
        store.get(world.manifest)
    path.chmod(0o600)
    for text in (
        b"",
        good[:-1],
        good + b"x",
        good.replace(b"1\n", b"2\n", 1),
        good[:-3] + b"zz\n",
        b"\xff" * 85,
    ):
        path.write_bytes(text)
        with pytest.raises(InputError, match="not a weight key file") as caught:
            store.get(world.manifest)
        assert_silent(caught.value, secret_of(world.key))


def test_a_key_file_that_is_a_link_is_not_followed(world: Any, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    path = store.put(world.manifest, world.key)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="cannot be read"):
        store.get(world.manifest)


def test_a_stored_key_of_another_bundle_is_refused(world: Any, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    store.put(world.manifest, WeightKey.generate())
    with pytest.raises(SealBroken, match="commits to"):
        store.get(world.manifest)


def test_a_full_disk_leaves_no_key_file_and_no_key_in_the_error(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        KeyStore(tmp_path / "keys").put(world.manifest, world.key)
    assert list((tmp_path / "keys").iterdir()) == []
    assert_silent(caught.value, secret_of(world.key))


def test_no_error_of_opening_holds_the_key(world: Any) -> None:
    def broken_payload() -> None:
        Opener(world.manifest, world.key, lambda name, part: None).feed(bytes(2000))

    def wrong_key() -> None:
        Opener(world.manifest, WeightKey.generate(), lambda name, part: None)

    def cut() -> None:
        Opener(world.manifest, world.key, lambda name, part: None).finish()

    for action in (broken_payload, wrong_key, cut):
        with pytest.raises(FedarkError) as caught:
            action()
        assert_silent(caught.value, secret_of(world.key))
