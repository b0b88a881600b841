"""The SQLite file of a privacy ledger: its tables, private to their owner, and durable at every
commit.

Write-ahead log with synchronous=FULL: a commit that returned is on the disk, and whatever was not
committed is rolled back by whoever opens the file next. Every change of a ledger is one
transaction.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedark.foundation.database import BROKEN, open_private, transaction
from fedark.foundation.errors import Refused, StorageError

__all__ = ["altered", "ledger_errors", "open_file"]

_BUSY_SECONDS = 60.0
_TABLES = (
    # format, id (32 bytes, public), secret (32 bytes: the key of the records' digests).
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    # The chain. `body` is canonical CBOR, `hash` covers it and the entry before.
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL)",
    # Which entry is the charge of a run, and which releases it has made: read from the chain, here
    # to be found and unique.
    (
        "CREATE TABLE charges (contract BLOB, run TEXT, sequence INTEGER NOT NULL UNIQUE, PRIMARY"
        " KEY (contract, run)) WITHOUT ROWID"
    ),
    (
        "CREATE TABLE releases (charge INTEGER, number INTEGER, PRIMARY KEY (charge, number))"
        " WITHOUT ROWID"
    ),
    # Records that were charged for exactly the same runs form one group: a charge of a known data
    # set then writes one row.
    "CREATE TABLE records (digest BLOB PRIMARY KEY, team INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE teams (team INTEGER PRIMARY KEY, size INTEGER NOT NULL)",
    "CREATE TABLE charged (team INTEGER, charge INTEGER, PRIMARY KEY (team, charge)) WITHOUT ROWID",
)
_FORMAT = b"fedark/privacy-ledger/1"


def open_file(path: Path, *, create: bool) -> sqlite3.Connection:
    """The database at `path`; made with mode 0600 where it is missing and `create` is set.

    Raises:
        InputError: it is missing, or open to other users.
        StorageError: it cannot be opened or made.
        Refused: it is no ledger.
    """
    with ledger_errors(path):
        database = open_private(
            path,
            what="privacy ledger",
            safe="Nothing was charged.",
            create=create,
            busy_seconds=_BUSY_SECONDS,
        )
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            database.execute("PRAGMA temp_store=MEMORY")
            if create:
                _make(database, path)
            row = database.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
            if row is None or row[0] != _FORMAT:
                raise altered(path, "it has another format")
        except BaseException:
            database.close()
            raise
    return database


def _make(database: sqlite3.Connection, path: Path) -> None:
    with transaction(database, ledger_errors(path)):
        if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return
        for table in _TABLES:
            database.execute(table)
        values = [("format", _FORMAT), ("id", os.urandom(32)), ("secret", os.urandom(32))]
        database.executemany("INSERT INTO meta VALUES (?, ?)", values)


@contextmanager
def ledger_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite says into errors of fedark."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such" in str(error):
            raise altered(path, "a table is missing") from None
        raise StorageError(
            f"{path} failed: {error}.", safe="Nothing was charged or released.", fix="Make room."
        ) from None
    except BROKEN:
        raise altered(path, "it is not a whole database any more") from None


def altered(path: Path, how: str) -> Refused:
    """The error for a ledger that is not what was written."""
    return Refused(
        f"The privacy ledger {path} was altered: {how}.",
        safe="Nothing is charged or released on the strength of it.",
        fix="Restore it, or find out who can write there.",
    )
