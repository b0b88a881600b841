"""SQLite files of this package: private to their owner, durable against a power cut, and errors told apart.

A full disk is a StorageError; a file that is not what was written is a LogRefused.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedark.errors import InputError, LogRefused, StorageError

__all__ = ["database_errors", "open_database", "transaction"]

_BUSY_SECONDS = 30.0


def open_database(path: Path, schema: str, *, create: bool) -> sqlite3.Connection:
    """The database at `path`; made with mode 0600 where it is missing and `create` is set.

    Raises:
        InputError: it is missing, or open to other users.
        StorageError: it cannot be opened.
        LogRefused: it is no such database.
    """
    try:
        descriptor = os.open(path, (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        if create:
            raise StorageError(f"{path} cannot be made: its folder is missing.", safe="Nothing was logged.") from None
        raise InputError(f"There is no log at {path}.") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}.", safe="Nothing was logged.") from None
    if create and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        raise InputError(f"{path} is open to other users.", safe="It was not used.", fix="Own it, and set its mode to 0600.")
    with database_errors(path):
        # Never "ro": a reader that comes after a crash has to roll the unfinished transaction back.
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            # EXTRA also syncs the folder after the journal is gone: without it a power cut can undo what was committed.
            database.execute("PRAGMA synchronous=EXTRA")
            if create:
                database.execute(schema)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def transaction(database: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """One write transaction: all of the block is on the disk when it ends well, and nothing of it otherwise."""
    with database_errors(path):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says into errors of fedark."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"{path} failed: {error}.", safe="Nothing was logged, and nothing left on the strength of it.", fix="Make room."
        ) from None
    except sqlite3.Error:
        raise LogRefused(
            f"{path} was altered: it is not a whole database any more.",
            safe="Nothing is released or concluded on the strength of it.",
            fix="Restore it, or find out who can write there.",
        ) from None
