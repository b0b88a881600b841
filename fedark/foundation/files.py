"""Files that are there whole or not at all: a new file or directory appears by one rename, after
its bytes are on the disk.

Whatever fails on the way (a full disk, an interrupt, a refused chunk) leaves nothing behind, and
what stood before still stands.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedark.foundation.errors import InputError, StorageError

__all__ = [
    "disk_errors",
    "new_directory",
    "os_problem",
    "private_directory",
    "sync_directory",
    "write_atomic",
    "write_new",
]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says about `path` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or type(error).__name__}.",
            safe="What stood there before still stands, and nothing half-written was left.",
            fix="Make room or mend the permissions, then start again.",
        ) from None


def os_problem(error: OSError) -> str:
    """What the system says, and about which file: for the people of this machine alone."""
    what = error.strerror or type(error).__name__
    return f"{error.filename}: {what}" if error.filename else what


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A private directory to fill; when the block ends well it is made durable and renamed to
    `out`, otherwise removed.

    Raises:
        InputError: `out` exists; nothing is overwritten.
        StorageError: it cannot be written.
    """
    if os.path.lexists(out):
        raise InputError(
            f"{out} exists already.",
            safe="It was left as it is.",
            fix="Name another place, or move it away.",
        )
    with disk_errors(out):
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        yield work
        with disk_errors(out):
            for folder, _, _ in os.walk(work):
                sync_directory(Path(folder))
            work.rename(out)
            sync_directory(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def private_directory(path: Path) -> Path:
    """Make a directory of mode 0700, or set its mode; returns it.

    Raises:
        StorageError: it cannot be made.
    """
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    return path


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Make a new file of mode 0600, durably; `fill` writes it, so that no frame here holds what may
    be a key.

    Raises:
        InputError: `path` exists.
        StorageError: it cannot be written.
    """
    with disk_errors(path):
        try:
            descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except FileExistsError:
            raise InputError(f"{path} exists already.", safe="It was left as it is.") from None
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            sync_directory(path.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path`, replacing what stands there: durably, and whole or not at all. Makes
    missing folders.

    Raises:
        StorageError: it cannot be written; the old file still stands.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
