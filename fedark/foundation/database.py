"""SQLite files that something rests on: private to their owner, never reached through a link, and
changed whole or not at all.

What SQLite itself says is put into the words of whoever owns the file: each caller brings its own
translation.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from fedark.foundation.errors import InputError, StorageError

__all__ = ["BROKEN", "open_private", "transaction"]

# What Python raises for a file that is no whole database. The second where SQLite complains of a
# broken name, in whose bytes its own message is no UTF-8.
BROKEN: tuple[type[Exception], ...] = (sqlite3.Error, UnicodeDecodeError)
_MAKING = threading.Lock()  # until a file that was just made is closed, no other thread finds it


def open_private(
    path: Path, *, what: str, safe: str, create: bool, own: bool = True, busy_seconds: float = 30.0
) -> sqlite3.Connection:
    """A connection to the file at `path`, in which a statement stands alone unless `transaction`
    holds it.

    Args:
        what: such as "log", for people.
        safe: what did not happen, for people.
        create: make it (mode 0600) where it is missing.
        own: refuse a file of somebody else's, or one that others may open; reading alone can do
            without.
        busy_seconds: how long another process may hold it.

    Raises:
        InputError: it is missing, or open to other users.
        StorageError: it cannot be opened or made.
        BROKEN: as `sqlite3.connect`.
    """
    try:
        status = _made(path) if create else _status(path)
    except FileNotFoundError:
        if create:
            raise StorageError(
                f"The {what} {path} cannot be made: its folder is missing.", safe=safe
            ) from None
        raise InputError(f"There is no {what} at {path}.", safe=safe) from None
    except OSError as error:
        raise StorageError(
            f"The {what} {path} cannot be opened: {error.strerror}.", safe=safe
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no file"
        raise StorageError(f"The {what} {path} cannot be opened: it is {kind}.", safe=safe)
    if own and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
        raise InputError(
            f"The {what} {path} is open to other users.",
            safe="It was not used.",
            fix="Own it, and set its mode to 0600.",
        )
    # Never "ro": a reader that comes after a crash has to roll the unfinished transaction back.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(
        uri, uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False
    )


def _made(path: Path) -> os.stat_result:
    with _MAKING, suppress(FileExistsError):
        os.close(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        )
    return _status(path)


def _status(path: Path) -> os.stat_result:
    """Of the file itself. It is never opened but by SQLite: to close any descriptor of a file gives
    up all of this process's locks on it, those of a transaction in another thread too
    (fcntl(2))."""
    with _MAKING:
        return os.lstat(path)


@contextmanager
def transaction(
    database: sqlite3.Connection, errors: AbstractContextManager[None]
) -> Iterator[sqlite3.Connection]:
    """One write transaction: all of the block is on the disk when it ends well, and nothing of it
    otherwise.

    Args:
        errors: turns what SQLite raises into errors of fedark.
    """
    with errors:
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
