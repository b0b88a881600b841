"""Digests of files that have not changed, so that measuring a torch install again takes a fraction of a second.

A digest is kept under (device, inode, size, mtime, ctime), both times in nanoseconds. A user cannot set ctime, so an edit is
always seen; except one that falls into the same clock tick as the hashing before it, which is why a file that was changed less
than two seconds before is never kept (the "racy" entries of version control). The file is believed only if it and its folder
belong to this user and nobody else can write them. Whatever is odd about it costs time, never correctness.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fedark.measurement.elf import Linkage

__all__ = ["DigestCache", "FileFacts", "default_cache"]

_VERSION = 1
_RACY_NS = 2_000_000_000
_MAX_ENTRIES = 200_000
_MAX_BYTES = 256 << 20
Identity = tuple[int, int, int, int, int]


class FileFacts(NamedTuple):
    """SHA-384 of a file's content, 48 bytes, and its linkage where it is an ELF file."""

    digest: bytes
    linkage: Linkage | None = None


def identity(status: os.stat_result) -> Identity:
    """What must be equal for a file to count as unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def default_cache() -> Path | None:
    """Where the cache is kept: `$XDG_CACHE_HOME/fedark` or `~/.cache/fedark`; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fedark" / "digests.json" if os.path.isabs(base) else None


class DigestCache:
    """Known digests; `save` writes back what was added.

    Args:
        path: its file; None keeps it in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._added = False
        if path is not None:
            self._load(path)

    def get(self, key: Identity) -> FileFacts | None:
        """The facts of the unchanged file with this identity."""
        row = self._known.get(f"{key[0]}:{key[1]}")
        if row is None or row[0] != key[2] or row[1] != key[3] or row[2] != key[4]:
            return None
        try:
            digest, elf = bytes.fromhex(row[3]), row[4]
            linked = None if elf is None else Linkage(elf[0], tuple(elf[1]), tuple(elf[2]))
        except (ValueError, TypeError, IndexError, KeyError):
            return None
        return FileFacts(digest, linked) if len(digest) == 48 else None

    def put(self, key: Identity, facts: FileFacts, *, hashed_from_ns: int) -> None:
        """Keep `facts`, unless the file changed within two seconds before `hashed_from_ns` (wall clock)."""
        if key[4] > hashed_from_ns - _RACY_NS:
            return
        elf = facts.linkage
        row = [key[2], key[3], key[4], facts.digest.hex(), None if elf is None else [elf.interpreter, elf.needed, elf.search]]
        self._known[f"{key[0]}:{key[1]}"] = row
        self._added = True

    def save(self) -> None:
        """Write back; a cache that cannot be written is only slower next time."""
        if self._path is None or not self._added:
            return
        rows = list(self._known.items())[-_MAX_ENTRIES:]
        folder = self._path.parent
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _ours_alone(folder.stat()):
                return
            descriptor, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    file.write(json.dumps({"version": _VERSION, "files": dict(rows)}, separators=(",", ":")))
                os.replace(name, self._path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        self._added = False

    def _load(self, path: Path) -> None:
        try:
            if not _ours_alone(path.parent.stat()):
                return
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or not _ours_alone(status) or status.st_size > _MAX_BYTES:
                    return
                value = json.loads(file.read())
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(value, dict) and value.get("version") == _VERSION and isinstance(value.get("files"), dict):
            self._known = {key: row for key, row in value["files"].items() if isinstance(row, list) and len(row) == 5}


def _ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def wall_clock_ns() -> int:
    return time.time_ns()
