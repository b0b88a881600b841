"""Challenges: each is issued for one purpose, counts once, and expires (RFC 9334, section 10.2).

Rules kept:
- A nonce that was spent, here or in another process on the same file, before or after a restart, is
  never accepted again. One SQLite write transaction decides; of two concurrent uses one wins.
- A nonce that this book did not issue, or issued for another purpose, is refused. An expired one is
  refused even where its row was pruned: it is then a stranger.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from fedark.attestation.binding import NONCE_BYTES
from fedark.foundation.database import BROKEN, open_private, transaction
from fedark.foundation.errors import EvidenceRefused, StorageError
from fedark.foundation.snapshot import Bytes32, Real, Snapshot

__all__ = ["NONCE_LIFETIME", "NonceBook", "NonceRow"]

NONCE_LIFETIME = timedelta(minutes=10)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS nonces (
    nonce BLOB NOT NULL, purpose TEXT NOT NULL, expires REAL NOT NULL,
    spent INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (nonce, purpose)
) WITHOUT ROWID
"""
_BUSY_SECONDS = 30.0


class NonceRow(Snapshot):
    """One nonce of a book.

    Attributes:
        expires: in seconds since 1970.
        spent: 0 while it is not, else the digest of what it was spent on, or 1.
    """

    nonce: Bytes32
    purpose: str
    expires: Real
    spent: int | bytes


class NonceBook:
    """Nonces issued and spent.

    Args:
        path: the SQLite file, made with mode 0600 if it is missing; None keeps the book in memory,
            where a restart forgets every nonce (and so refuses them all).

    Raises:
        InputError: the file belongs to someone else, or is open to other users.
        StorageError: it cannot be made or read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        with _storage():
            if path is None:
                self._database = sqlite3.connect(
                    ":memory:", isolation_level=None, check_same_thread=False
                )
            else:
                self._database = open_private(
                    path,
                    what="nonce book",
                    safe="No evidence was admitted.",
                    create=True,
                    busy_seconds=_BUSY_SECONDS,
                )
            # A spent nonce must still be spent after a power cut: EXTRA also syncs the folder after
            # the journal is gone.
            self._database.execute("PRAGMA synchronous=EXTRA")
            self._database.execute(_SCHEMA)

    def issue(self, purpose: str, *, now: datetime, ttl: timedelta = NONCE_LIFETIME) -> bytes:
        """A fresh nonce of 32 random bytes for `purpose`, good until `now + ttl`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        with self._transaction() as database:
            database.execute("DELETE FROM nonces WHERE expires < ?", (now.timestamp(),))
            row = (nonce, purpose, (now + ttl).timestamp())
            database.execute("INSERT INTO nonces (nonce, purpose, expires) VALUES (?, ?, ?)", row)
        return nonce

    def adopt(
        self, nonce: bytes, purpose: str, *, now: datetime, ttl: timedelta = NONCE_LIFETIME
    ) -> None:
        """Take a nonce for `purpose` that was derived from a fresh one of this book, good until
        `now + ttl`, once.

        One hash over the nonces of a whole cohort is as fresh to each of its members as its own
        nonce in it.

        Raises:
            EvidenceRefused: it was adopted for `purpose` before, whether spent or not.
        """
        with self._transaction() as database:
            row = (nonce, purpose, (now + ttl).timestamp())
            taken = database.execute(
                "INSERT OR IGNORE INTO nonces (nonce, purpose, expires) VALUES (?, ?, ?)", row
            ).rowcount
        if not taken:
            raise EvidenceRefused("a nonce", ["its nonce was adopted before: this is a replay"])

    def spend(
        self, nonce: bytes, purpose: str, *, now: datetime, by: bytes = b"", again: bool = False
    ) -> None:
        """Use `nonce` up.

        Args:
            by: digest of what it is spent on; kept with it.
            again: whoever repeats a step that a crash has interrupted may spend it once more, on
                the same thing alone and before it expires.

        Raises:
            EvidenceRefused: it was not issued here for `purpose`, was spent before, or has expired.
        """
        with self._transaction() as database:
            key = (nonce, purpose)
            row = database.execute(
                "SELECT expires, spent FROM nonces WHERE nonce = ? AND purpose = ?", key
            ).fetchone()
            if row is None:
                # A nonce of another purpose stays good for that one: a stranger must not be able to
                # burn it.
                reason = "its nonce was not issued here, for this peer, or has long expired"
            elif row[1] and not (again and by and row[1] == by):
                reason = "its nonce was used before: this is a replay"
            else:
                database.execute(
                    "UPDATE nonces SET spent = ? WHERE nonce = ? AND purpose = ?", (by or 1, *key)
                )
                reason = "its nonce has expired" if now.timestamp() > row[0] else ""
        if reason:
            raise EvidenceRefused("a nonce", [reason])

    def rows(self) -> list[NonceRow]:
        """All that this book knows, for a sealed checkpoint."""
        with self._transaction() as database:
            return [
                NonceRow(nonce=nonce, purpose=purpose, expires=expires, spent=spent)
                for nonce, purpose, expires, spent in database.execute(
                    "SELECT nonce, purpose, expires, spent FROM nonces"
                )
            ]

    def restore(self, rows: Iterable[NonceRow]) -> None:
        """Know what another book knew when it gave its `rows`."""
        with self._transaction() as database:
            database.execute("DELETE FROM nonces")
            database.executemany(
                "INSERT INTO nonces (nonce, purpose, expires, spent) VALUES (?, ?, ?, ?)",
                ((row.nonce, row.purpose, row.expires, row.spent) for row in rows),
            )

    def close(self) -> None:
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._database, _storage()) as database:
            yield database


@contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise StorageError(
            f"The nonce book failed: {error}.",
            safe="No evidence was admitted.",
            fix="See that its disk has room.",
        ) from None
