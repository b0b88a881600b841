"""Configuration that one of our processes writes for another: a JSON file that only its user can
read.

These files never come from another party. They may name a function ("module:function") of the
installed package.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedark.foundation.errors import InputError, StorageError

__all__ = ["Connection", "read", "resolve", "write", "write_private"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Connection:
    """A node's way to the SuperLink: its address (host:port), its authority's certificate, the
    node's transport key, and the socket of the node's daemon."""

    superlink: str
    ca: str
    key: str
    socket: str


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file of mode 0600, whole or not at all.

    Raises:
        InputError: it exists and `replace` is false.
        StorageError: the disk is full or cannot be written.
    """
    if not replace and path.exists():
        raise InputError(f"{path} exists already.", safe="It was left as it is.")
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb"
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error.strerror}.",
            safe="What stood there before still stands.",
        ) from None


def write(path: Path, settings: Any) -> Path:
    """Write a settings dataclass; returns `path`."""
    write_private(path, json.dumps(dataclasses.asdict(settings), indent=1).encode())
    return path


def read(path: Path, kind: type[T]) -> T:
    """Read a settings dataclass.

    Raises:
        InputError: the file is missing, open to other users, or not what `kind` needs.
    """
    try:
        status = path.stat()
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise InputError(
                f"{path} is open to other users.", fix=f"Run: chmod 600 {shlex.quote(str(path))}"
            )
        return kind(**json.loads(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError):
        raise InputError(f"{path} is not a valid {kind.__name__} file.") from None


def resolve(reference: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    Raises:
        InputError: there is none.
    """
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{reference} cannot be loaded ({type(error).__name__}).") from None
    if not callable(found):
        raise InputError(f"{reference} is not a function.")
    return found  # type: ignore[no-any-return]
