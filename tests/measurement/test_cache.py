"""The cache makes measuring fast; it must never make it wrong."""

from __future__ import annotations

import os
import stat
import time
import zlib
from pathlib import Path

import pytest

from fedark.measurement import tree
from fedark.measurement.cache import (
    _MAGIC,
    _RECORD,
    DigestCache,
    FileFacts,
    _read,
    _written,
    default_cache,
    identity,
)
from fedark.measurement.elf import Linkage
from fedark.measurement.tree import MeasuredPath, entries_of


def digests(folder: Path, cache: DigestCache) -> dict[str, bytes]:
    return {
        entry.label: entry.digest for entry in entries_of([MeasuredPath(str(folder), "t")], cache)
    }


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose files count as long unchanged: the clock that the cache goes by is a minute
    ahead.
    """
    monkeypatch.setattr(tree, "wall_clock_ns", lambda: time.time_ns() + 60_000_000_000)
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a").write_text("a" * 100)
    (folder / "b").write_text("b" * 100)
    return folder


def test_unchanged_files_are_not_read_again(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DigestCache(tmp_path / "cache" / "c.json")
    before = digests(settled, first)
    first.save()
    monkeypatch.setattr(tree, "_hash", lambda *_: pytest.fail("was read again"))
    assert digests(settled, DigestCache(tmp_path / "cache" / "c.json")) == before


def test_an_edit_with_the_old_modification_time_is_seen(settled: Path) -> None:
    cache = DigestCache(None)
    before, status = digests(settled, cache), (settled / "a").stat()
    (settled / "a").write_text("A" * 100)
    os.utime(settled / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests(settled, cache) != before


def test_a_file_replaced_by_another_of_the_same_size_and_time_is_seen(settled: Path) -> None:
    cache = DigestCache(None)
    before, status = digests(settled, cache), (settled / "a").stat()
    (settled / "new").write_text("A" * 100)
    os.utime(settled / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(settled / "new", settled / "a")
    assert digests(settled, cache) != before


def test_a_file_that_changed_just_before_it_was_hashed_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    cache, key = DigestCache(None), identity((tmp_path / "f").stat())
    facts = FileFacts(b"d" * 48)
    cache.put(key, facts, hashed_from_ns=key[4] + 1_999_999_999)
    assert cache.get(key) is None
    cache.put(key, facts, hashed_from_ns=key[4] + 2_000_000_001)
    assert cache.get(key) == facts


def test_the_cache_is_its_owners_alone(settled: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "c.json"
    cache = DigestCache(path)
    digests(settled, cache)
    cache.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def lying(settled: Path, path: Path) -> dict[str, bytes]:
    """Write a cache whose digests are all wrong; return the right ones."""
    cache = DigestCache(path)
    right = digests(settled, cache)
    cache.save()
    path.write_bytes(
        _written([(key, (bytes(48), linked)) for key, (_, linked) in _read(path).items()])
    )
    assert set(digests(settled, DigestCache(path)).values()) == {bytes(48)}
    return right


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_cache_that_others_can_write_is_not_believed(
    settled: Path, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    path.chmod(mode)
    assert digests(settled, DigestCache(path)) == right


def test_a_cache_in_a_folder_that_others_can_write_is_not_believed_nor_written(
    settled: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    path.parent.chmod(0o777)
    assert digests(settled, DigestCache(path)) == right
    path.unlink()
    cache = DigestCache(path)
    digests(settled, cache)
    cache.save()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_cache_of_another_user_is_not_believed(settled: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    os.chown(path, 12345, 12345)
    assert digests(settled, DigestCache(path)) == right


def test_a_link_in_place_of_the_cache_is_not_followed(settled: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    path.rename(tmp_path / "cache" / "real.json")
    path.symlink_to("real.json")
    assert digests(settled, DigestCache(path)) == right


def damaged(content: bytes) -> list[bytes]:
    """A whole cache file, cut, grown and altered: in its magic, its sum, its count, its records and
    its linkages.
    """
    places = (0, 17, 21, 25, 60, 100, len(content) - 1)
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places]
    return [b"", b"{", content[:-1], content + b"x", content[:20], *flipped]


def test_a_damaged_cache_costs_time_only(settled: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        assert digests(settled, DigestCache(path)) == right


@pytest.mark.parametrize(
    ("records", "linkages"),
    [(1, b"[]"), (0, b"{"), (0, b"[" * 99_999), (0, b'[["x"]]'), (2, b"[]"), (1 << 31, b"")],
)
def test_a_cache_whose_parts_do_not_fit_costs_time_only(
    settled: Path, tmp_path: Path, records: int, linkages: bytes
) -> None:
    path = tmp_path / "cache" / "c.json"
    right = lying(settled, path)
    body = records.to_bytes(4, "little") + _RECORD.pack(bytes(40), bytes(48), 7) + linkages
    path.write_bytes(_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body)
    assert digests(settled, DigestCache(path)) == right


def test_the_linkage_of_elf_files_comes_back(tmp_path: Path) -> None:
    cache, key = DigestCache(tmp_path / "c"), (1, 2, 3, 4, 5)
    facts = FileFacts(b"d" * 48, Linkage("/lib64/ld.so", ("libc.so.6",), ("$ORIGIN",)))
    cache.put(key, facts, hashed_from_ns=1 << 62)
    cache.save()
    assert DigestCache(tmp_path / "c").get(key) == facts


def test_a_home_is_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/fedark/digests")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() is None
