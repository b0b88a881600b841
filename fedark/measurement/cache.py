"""Digests of files that have not changed, so that measuring a torch install again takes a fraction
of a second.

A digest is kept under (device, inode, size, mtime, ctime), both times in nanoseconds. A user cannot
set ctime, so an edit is always seen; except one that falls into the same clock tick as the hashing
before it, which is why a file that was changed less than two seconds before is never kept (the
"racy" entries of version control). The file is believed only if it and its folder belong to this
user and nobody else can write them. Whatever is odd about it costs time, never correctness.

So what a cached measurement trusts is: this user's account (which starts the enclave, and could
start another), the kernel's ctime, and, on file systems where root or a raw write to the disk can
change content without it, that nobody did. `cached=False` trusts none of the three.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fedark.measurement.elf import Linkage

__all__ = ["DigestCache", "FileFacts", "default_cache"]

_MAGIC = b"fedark digests 2\n"
_COUNT = struct.Struct("<I")
_KEY = struct.Struct("<QQQqq")
_RECORD = struct.Struct(f"<{_KEY.size}s48sI")
_RACY_NS = 2_000_000_000
_MAX_ENTRIES = 50_000
"""Four installations of torch; all are read at each measurement."""
_MAX_BYTES = 64 << 20
Identity = tuple[int, int, int, int, int]


class FileFacts(NamedTuple):
    """SHA-384 of a file's content, 48 bytes, and its linkage where it is an ELF file."""

    digest: bytes
    linkage: Linkage | None = None


_Facts = tuple[bytes, Linkage | None]
"""Those of one file; a `FileFacts` is one, and takes four times as long to make."""


def identity(status: os.stat_result) -> Identity:
    """What must be equal for a file to count as unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def default_cache() -> Path | None:
    """Where the cache is: `$XDG_CACHE_HOME/fedark` or `~/.cache/fedark`; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fedark" / "digests" if os.path.isabs(base) else None


class DigestCache:
    """Known digests; `save` writes back what was added.

    File: `_MAGIC`, CRC-32 of the rest, number of records, records of (identity, digest, place among
    the linkages or 0), and the linkages of ELF files as JSON. Records are of one size, so reading a
    torch install's takes a hundredth of a second.

    Args:
        path: its file; None keeps it in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[bytes, _Facts] = {}
        self._added = False
        if path is not None:
            with suppress(
                OSError, ValueError, TypeError, IndexError, KeyError, RecursionError, struct.error
            ):
                self._known = _read(path)

    def get(self, key: Identity) -> FileFacts | None:
        """The facts of the unchanged file with this identity."""
        known = self._known.get(_KEY.pack(*key))
        return None if known is None else FileFacts(*known)

    def put(self, key: Identity, facts: FileFacts, *, hashed_from_ns: int) -> None:
        """Keep `facts`, unless the file changed within two seconds before `hashed_from_ns` (wall
        clock).
        """
        if key[4] > hashed_from_ns - _RACY_NS:
            return
        self._known[_KEY.pack(*key)] = facts
        self._added = True

    def save(self) -> None:
        """Write back; a cache that cannot be written is only slower next time."""
        if self._path is None or not self._added:
            return
        folder = self._path.parent
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _ours_alone(folder.stat()):
                return
            descriptor, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_written(list(self._known.items())[-_MAX_ENTRIES:]))
                os.replace(name, self._path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        self._added = False


def _written(known: list[tuple[bytes, _Facts]]) -> bytes:
    linkages: list[Linkage] = []
    records = []
    for key, (digest, linked) in known:
        if linked is not None:
            linkages.append(linked)
        records.append(_RECORD.pack(key, digest, 0 if linked is None else len(linkages)))
    named = [[one.interpreter, one.needed, one.search] for one in linkages]
    body = b"".join([_COUNT.pack(len(records)), *records, json.dumps(named).encode("ascii")])
    return _MAGIC + _COUNT.pack(zlib.crc32(body)) + body


def _read(path: Path) -> dict[bytes, _Facts]:
    """What the file holds; empty, or an error, where it is not ours alone or anything in it is not
    as `_written` writes it.
    """
    if not _ours_alone(path.parent.stat()):
        return {}
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if (
            not stat.S_ISREG(status.st_mode)
            or not _ours_alone(status)
            or status.st_size > _MAX_BYTES
        ):
            return {}
        data = file.read()
    head = len(_MAGIC) + _COUNT.size
    body = memoryview(data)[head:]
    if (
        data[: len(_MAGIC)] != _MAGIC
        or zlib.crc32(body) != _COUNT.unpack_from(data, len(_MAGIC))[0]
    ):
        return {}
    end = _COUNT.size + _COUNT.unpack_from(body)[0] * _RECORD.size
    linkages = [
        Linkage(one[0], tuple(one[1]), tuple(one[2])) for one in json.loads(bytes(body[end:]))
    ]
    places = [None, *linkages]
    return {
        key: (digest, places[at])
        for key, digest, at in _RECORD.iter_unpack(body[_COUNT.size : end])
    }


def _ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def wall_clock_ns() -> int:
    return time.time_ns()
