"""Measuring files: which ones there are, what is in them, and one register over all of it.

register = SHA-384( "fedark/measurement/1" 00 name 00, then for each entry by path: kind, x-bit,
length of path, path, digest )

- kind "f": a regular file; digest is the SHA-384 of its content. x-bit: whether its owner may
  execute it.
- kind "l": a symbolic link that stays inside what is measured, or leads nowhere; digest is the
  SHA-384 of its target's text.
- kind "o": a symbolic link to a file outside; digest is over the target's text and the file's
  content.
- Devices, sockets, pipes, and links to folders outside are refused. Folders `__pycache__` are left
  out: an enclave runs with `-X pycache_prefix`, and Python then never looks into them. A `.pyc`
  elsewhere can be imported, and is measured.
- Paths are labels, free of where anything is installed: equal trees in two places have equal
  registers.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from fedark.foundation.errors import InputError, Refused
from fedark.measurement.cache import DigestCache, FileFacts, identity, wall_clock_ns
from fedark.measurement.elf import linkage

__all__ = ["TreeEntry", "MeasuredPath", "entries_of", "facts_of", "register"]

_LABEL = b"fedark/measurement/1"
_BYTECODE = "__pycache__"
_CHUNK = 1 << 20
_WORKERS = 4
_HEADS = {
    (kind, bit): f"{kind}{int(bit)}".encode("ascii") for kind in "flo" for bit in (False, True)
}


@dataclass(frozen=True)
class MeasuredPath:
    """A file, or a folder with everything in it, and the label under which it is measured. `path`
    has no symlink in it.
    """

    path: str
    label: str


class TreeEntry(NamedTuple):
    """One measured path.

    Attributes:
        label: the path as it goes into the register.
        kind: "f", "l" or "o".
        executable: the owner's x-bit.
        digest: SHA-384, 48 bytes.
        path: where it was found; not measured.
        outside: for kind "o", the file that the link leads to.
        facts: of a regular file.
    """

    label: str
    kind: str
    executable: bool
    digest: bytes
    path: str
    outside: str = ""
    facts: FileFacts | None = None


def entries_of(roots: Sequence[MeasuredPath], cache: DigestCache) -> list[TreeEntry]:
    """Every file and link under `roots`, sorted by label.

    Raises:
        InputError: something is neither file, folder nor link, or cannot be read, or two paths
            share one label.
        Refused: a file changed while it was read.
    """
    inside = tuple(root.path for root in roots)
    entries: list[TreeEntry] = []
    unknown: list[tuple[str, str, os.stat_result]] = []
    try:
        for root in roots:
            for label, path, status in _walk(root.path, root.label):
                if not stat.S_ISREG(status.st_mode):
                    entries.append(_other(label, path, status, inside, cache))
                elif (facts := cache.get(identity(status))) is not None:
                    entries.append(
                        TreeEntry(
                            label,
                            "f",
                            bool(status.st_mode & stat.S_IXUSR),
                            facts.digest,
                            path,
                            "",
                            facts,
                        )
                    )
                else:
                    unknown.append((label, path, status))
        hashed = facts_of([(path, status) for _, path, status in unknown], cache)
        entries += [
            TreeEntry(
                label, "f", bool(status.st_mode & stat.S_IXUSR), facts.digest, path, "", facts
            )
            for (label, path, status), facts in zip(unknown, hashed, strict=True)
        ]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be measured: {error.strerror}.") from None
    entries.sort(key=attrgetter("label"))
    for one, other in pairwise(entries):
        if one.label == other.label:
            raise InputError(f"{one.path} and {other.path} would be measured under one name.")
    return entries


def register(name: str, entries: Iterable[TreeEntry]) -> bytes:
    """The register `name` over `entries`, which are sorted: SHA-384, 48 bytes."""
    parts = [_LABEL, b"\0", name.encode("ascii"), b"\0"]
    for entry in entries:
        path = entry.label.encode("utf-8", "surrogateescape")
        parts += (
            _HEADS[entry.kind, entry.executable],
            len(path).to_bytes(4, "big"),
            path,
            entry.digest,
        )
    return hashlib.sha384(b"".join(parts)).digest()


def facts_of(files: Sequence[tuple[str, os.stat_result]], cache: DigestCache) -> list[FileFacts]:
    """Content digest and linkage of regular files, from the cache where they are unchanged.

    Raises:
        OSError: one cannot be read.
        Refused: one changed while it was read.
    """
    facts = [cache.get(identity(status)) for _, status in files]
    missing = [index for index, known in enumerate(facts) if known is None]
    if missing:
        started = wall_clock_ns()
        with ThreadPoolExecutor(_WORKERS) as pool:
            for index, fresh in zip(
                missing, pool.map(lambda index: _hash(*files[index]), missing), strict=True
            ):
                facts[index] = fresh
                cache.put(identity(files[index][1]), fresh, hashed_from_ns=started)
    return [known for known in facts if known is not None]


def _walk(path: str, label: str) -> Iterator[tuple[str, str, os.stat_result]]:
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        yield label, path, status
        return
    stack = [(path, label)]
    while stack:
        folder, prefix = stack.pop()
        with os.scandir(folder) as items:
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    if item.name != _BYTECODE:
                        stack.append((item.path, f"{prefix}/{item.name}"))
                else:
                    yield f"{prefix}/{item.name}", item.path, item.stat(follow_symlinks=False)


def _other(
    label: str, path: str, status: os.stat_result, inside: tuple[str, ...], cache: DigestCache
) -> TreeEntry:
    """The entry of what is no regular file."""
    if not stat.S_ISLNK(status.st_mode):
        raise InputError(f"{path} is neither a file nor a link, and cannot be part of an enclave.")
    text = os.fsencode(os.readlink(path))
    target = os.path.realpath(path)
    if not os.path.lexists(target) or _measured(target, inside):
        return TreeEntry(label, "l", False, hashlib.sha384(text).digest(), path)
    outside = os.stat(target)
    if not stat.S_ISREG(outside.st_mode):
        raise InputError(
            f"{path} leads to {target}, which is not measured.",
            fix="Replace the link by what it leads to.",
        )
    (content,) = facts_of([(target, outside)], cache)
    return TreeEntry(
        label,
        "o",
        bool(outside.st_mode & stat.S_IXUSR),
        hashlib.sha384(text + b"\0" + content.digest).digest(),
        path,
        target,
    )


def _measured(path: str, inside: tuple[str, ...]) -> bool:
    for root in inside:
        if path == root:
            return True
        if path.startswith(root + "/"):
            return _BYTECODE not in path[len(root) :].split("/")
    return False


def _hash(path: str, status: os.stat_result) -> FileFacts:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        hasher = hashlib.sha384()
        buffer = bytearray(min(_CHUNK, status.st_size + 1))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
        linked = linkage(descriptor) if status.st_size > 64 else None
        if identity(os.fstat(descriptor)) != identity(status):
            raise Refused(
                f"{path} changed while it was measured.",
                safe="Nothing was started.",
                fix="Measure again.",
            )
    return FileFacts(hasher.digest(), linked)
