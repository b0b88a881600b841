"""SQLite files of this package (`fedark.foundation.database`): durable against a power cut, and
errors told apart.

A full disk is a StorageError; a file that is not what was written is a LogRefused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedark.foundation.database import BROKEN, open_private
from fedark.foundation.errors import LogRefused, StorageError

__all__ = ["database_errors", "open_database"]


def open_database(path: Path, schema: str, *, create: bool) -> sqlite3.Connection:
    """The database at `path`; made with mode 0600 where it is missing and `create` is set.

    Raises:
        InputError: it is missing, or open to other users.
        StorageError: it cannot be opened.
        LogRefused: it is no such database.
    """
    with database_errors(path):
        database = open_private(
            path, what="log", safe="Nothing was logged.", create=create, own=create
        )
        try:
            # EXTRA also syncs the folder after the journal is gone: without it a power cut can undo
            # what was committed.
            database.execute("PRAGMA synchronous=EXTRA")
            if create:
                database.execute(schema)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says into errors of fedark."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"{path} failed: {error}.",
            safe="Nothing was logged, and nothing left on the strength of it.",
            fix="Make room.",
        ) from None
    except BROKEN:
        raise LogRefused(
            f"{path} was altered: it is not a whole database any more.",
            safe="Nothing is released or concluded on the strength of it.",
            fix="Restore it, or find out who can write there.",
        ) from None
