"""What a host remembers: one SQLite file, written by its commands and its supervisor, read by its
front.

Each call is one transaction on a connection of its own, so commands, supervisor and front need no
other lock. Nothing in it is
secret: tokens are kept as their SHA-256.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from fedark.contract.contract import now
from fedark.foundation.database import BROKEN
from fedark.foundation.errors import FederationError, InputError, StorageError

__all__ = ["JOB_ENDS", "HostStore", "JobRecord", "NodeRow"]

_VERSION = 1
_SHOWN_JOBS = 200
_SCHEMA = """
CREATE TABLE invitations (token BLOB PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL,
    expires TEXT NOT NULL,
    used INTEGER NOT NULL DEFAULT 0);
CREATE TABLE nodes (name TEXT PRIMARY KEY, role TEXT NOT NULL, request BLOB NOT NULL,
    transport TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL, since TEXT NOT NULL, bundle BLOB, node_id TEXT);
CREATE TABLE offers (job TEXT PRIMARY KEY, provider TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE jobs (digest TEXT PRIMARY KEY, name TEXT NOT NULL, contract BLOB NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '', created TEXT NOT NULL, changed TEXT NOT NULL,
    session TEXT NOT NULL DEFAULT '',
    run TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0);
CREATE TABLE parties (party TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (party, digest));
CREATE TABLE answers (digest TEXT NOT NULL, party TEXT NOT NULL, answer TEXT NOT NULL,
    reason TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (digest, party));
"""

NodeStatus = Literal["pending", "approved", "revoked"]
JobStatus = Literal["proposed", "running", "done", "failed", "refused", "stopped", "expired"]
JOB_ENDS = ("done", "failed", "refused", "stopped", "expired")


@dataclass(frozen=True)
class NodeRow:
    """A node that asked to join. `request`: its JoinRequest; `transport`: PEM; `node_id`: at the
    SuperLink, or "".
    """

    name: str
    role: str
    status: str
    since: str
    request: bytes
    transport: str
    bundle: bytes
    node_id: str


@dataclass(frozen=True)
class JobRecord:
    """A job. `session`: of its run at the SuperLink; `run`: the folder with its outcome."""

    digest: str
    name: str
    contract: bytes
    status: str
    reason: str
    created: str
    changed: str
    session: str
    run: str
    attempts: int


class HostStore:
    """See the module's docstring.

    Args:
        path: the file.
        create: make it.

    Raises:
        InputError: it is missing, or of another version.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._path = path
        if not create and not path.is_file():
            raise InputError(
                f"{path} is missing.", fix="Make a host's folder with: fedark aggregator init"
            )
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if create and version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise InputError(
                    f"{path} is of version {version}; this release reads {_VERSION}.",
                    safe="Nothing was changed.",
                    fix="Use the release of fedark that wrote it.",
                )
        path.chmod(0o600)

    @contextmanager
    def _transaction(
        self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE"
    ) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._path, timeout=20, isolation_level=None)
        except BROKEN as error:
            raise StorageError(f"{self._path} cannot be opened ({error}).") from None
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA synchronous=EXTRA")  # a revocation stands after a power cut
            db.execute(f"BEGIN {kind}")
            yield db
            db.execute("COMMIT")
        except BROKEN as error:
            raise StorageError(
                f"{self._path} cannot be written ({error}).", safe="Nothing was changed."
            ) from None
        finally:
            db.close()  # rolls back what was not committed

    # -- who may join

    def invite(self, token: str, name: str, role: str, expires: str) -> None:
        """Remember an invitation."""
        row = (_hashed(token), name, role, expires)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO invitations (token, name, role, expires) VALUES (?, ?, ?, ?)", row
            )

    def file_request(
        self, token: str, name: str, role: str, request: bytes, transport: str
    ) -> None:
        """Take a join request; the same one may come again.

        Raises:
            InputError: the token is not one for this name and role, is used, or is too old; or the
                name is taken.
        """
        with self._transaction() as db:
            known = db.execute("SELECT request FROM nodes WHERE name = ?", (name,)).fetchone()
            if known is not None and bytes(known["request"]) == request:
                return
            found = db.execute(
                "SELECT * FROM invitations WHERE token = ?", (_hashed(token),)
            ).fetchone()
            valid = (
                found is not None
                and not found["used"]
                and (found["name"], found["role"]) == (name, role)
            )
            if not valid or datetime.fromisoformat(found["expires"]) <= now():
                raise InputError(
                    "The invitation is not valid: used, too old, or for another name or role.",
                    safe="The request was not filed.",
                    fix="Ask the host for a new one: fedark aggregator invite",
                )
            if known is not None:
                raise InputError(
                    f"{name} has joined already, with other keys.",
                    fix="The host revokes the old node first.",
                )
            if db.execute("SELECT 1 FROM nodes WHERE transport = ?", (transport,)).fetchone():
                raise InputError(
                    "Another node has this transport key.", safe="The request was not filed."
                )
            db.execute("UPDATE invitations SET used = 1 WHERE token = ?", (_hashed(token),))
            db.execute(
                "INSERT INTO nodes (name, role, request, transport, status, since) VALUES (?, ?, ?,"
                " ?, 'pending', ?)",
                (name, role, request, transport, _stamp()),
            )

    def approve(self, name: str, bundle: bytes) -> None:
        """Admit a node, with the bundle for it.

        Raises:
            InputError: it was revoked meanwhile, or forgotten.
        """
        change = (
            "UPDATE nodes SET status = 'approved', since = ?, bundle = ? WHERE name = ? AND status"
            " != 'revoked'"
        )
        with self._transaction() as db:
            if not db.execute(change, (_stamp(), bundle, name)).rowcount:
                raise InputError(f"{name} was revoked meanwhile.", safe="It was not admitted.")

    def revoke(self, name: str) -> None:
        """Close a node out."""
        with self._transaction() as db:
            db.execute(
                "UPDATE nodes SET status = 'revoked', since = ? WHERE name = ?", (_stamp(), name)
            )

    def forget(self, name: str) -> None:
        """Drop a revoked or pending node, so that the name may join anew."""
        with self._transaction() as db:
            db.execute("DELETE FROM nodes WHERE name = ? AND status != 'approved'", (name,))

    def set_node_id(self, name: str, node_id: str) -> None:
        """The node's id at the SuperLink, or "" when it was unregistered."""
        with self._transaction() as db:
            db.execute("UPDATE nodes SET node_id = ? WHERE name = ?", (node_id, name))

    def nodes(self) -> tuple[NodeRow, ...]:
        """All that ever asked."""
        with self._transaction("DEFERRED") as db:
            rows = db.execute("SELECT * FROM nodes ORDER BY name").fetchall()
        return tuple(_node(row) for row in rows)

    def node(self, name: str) -> NodeRow | None:
        """One of them."""
        with self._transaction("DEFERRED") as db:
            row = db.execute("SELECT * FROM nodes WHERE name = ?", (name,)).fetchone()
        return _node(row) if row is not None else None

    def admits(self, transport: str) -> bool:
        """Whether this transport key (PEM) is an approved node's."""
        with self._transaction("DEFERRED") as db:
            row = db.execute(
                "SELECT 1 FROM nodes WHERE transport = ? AND status = 'approved'", (transport,)
            ).fetchone()
        return row is not None

    # -- offers and jobs

    def put_offer(self, job: str, provider: str, data: bytes) -> None:
        """Keep a provider's latest offer for a job.

        Raises:
            InputError: another provider made one.
        """
        with self._transaction() as db:
            known = db.execute("SELECT provider FROM offers WHERE job = ?", (job,)).fetchone()
            if known is not None and known["provider"] != provider:
                raise InputError(
                    f"Another provider has made an offer for job {job}.", safe="It stands."
                )
            db.execute("INSERT OR REPLACE INTO offers VALUES (?, ?, ?)", (job, provider, data))

    def offer(self, job: str) -> bytes | None:
        """The offer for a job."""
        with self._transaction("DEFERRED") as db:
            row = db.execute("SELECT data FROM offers WHERE job = ?", (job,)).fetchone()
        return bytes(row["data"]) if row is not None else None

    def propose(self, digest: str, name: str, contract: bytes, parties: Iterable[str]) -> None:
        """Add a job, to be shown to these parties.

        Raises:
            InputError: it is there already.
        """
        stamp = _stamp()
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM jobs WHERE digest = ?", (digest,)).fetchone():
                raise InputError(f"This contract of job {name} was proposed already.")
            db.execute(
                "INSERT INTO jobs (digest, name, contract, status, created, changed) VALUES (?, ?,"
                " ?, 'proposed', ?, ?)",
                (digest, name, contract, stamp, stamp),
            )
            db.executemany(
                "INSERT INTO parties VALUES (?, ?)", [(party, digest) for party in parties]
            )

    def set_job(
        self,
        digest: str,
        status: JobStatus,
        reason: str = "",
        *,
        session: str | None = None,
        run: str = "",
    ) -> None:
        """Change a job that has not ended. A `session` begins an attempt."""
        with self._transaction() as db:
            row = db.execute("SELECT status FROM jobs WHERE digest = ?", (digest,)).fetchone()
            if row is None or row["status"] in JOB_ENDS:
                raise FederationError(
                    f"Job {digest[:16]} has ended or never was.", safe="It was left as it is."
                )
            db.execute(
                "UPDATE jobs SET status = ?, reason = ?, changed = ? WHERE digest = ?",
                (status, reason, _stamp(), digest),
            )
            if session is not None:
                db.execute(
                    "UPDATE jobs SET session = ?, attempts = attempts + 1 WHERE digest = ?",
                    (session, digest),
                )
            if run:
                db.execute("UPDATE jobs SET run = ? WHERE digest = ?", (run, digest))

    def jobs(self) -> tuple[JobRecord, ...]:
        """All jobs, oldest first."""
        return self._jobs("SELECT * FROM jobs ORDER BY created, name")

    def open_jobs(self) -> tuple[JobRecord, ...]:
        """Those that have not ended."""
        return self._jobs(
            "SELECT * FROM jobs WHERE status IN ('proposed', 'running') ORDER BY created, name"
        )

    def jobs_of(self, party: str) -> tuple[JobRecord, ...]:
        """The latest jobs of a party, oldest first."""
        query = (
            "SELECT jobs.* FROM jobs JOIN parties USING (digest) WHERE party = ? ORDER BY created"
            " DESC, name LIMIT ?"
        )
        return self._jobs(query, party, _SHOWN_JOBS)[::-1]

    def job_of(self, party: str, digest: str) -> JobRecord | None:
        """One of them."""
        query = "SELECT jobs.* FROM jobs JOIN parties USING (digest) WHERE party = ? AND digest = ?"
        return next(iter(self._jobs(query, party, digest)), None)

    def runs(self) -> set[str]:
        """The folders with outcomes that belong to a job."""
        with self._transaction("DEFERRED") as db:
            return {row["run"] for row in db.execute("SELECT run FROM jobs WHERE run != ''")}

    def _jobs(self, query: str, *values: object) -> tuple[JobRecord, ...]:
        with self._transaction("DEFERRED") as db:
            rows = db.execute(query, values).fetchall()
        return tuple(JobRecord(**{**dict(row), "contract": bytes(row["contract"])}) for row in rows)

    def answer(self, digest: str, party: str, answer: str, reason: str) -> None:
        """What a party says to a proposed contract; the last word counts."""
        with self._transaction() as db:
            row = (digest, party, answer, reason, _stamp())
            db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)

    def answers(self, digest: str) -> dict[str, tuple[str, str]]:
        """party -> (answer, reason)."""
        with self._transaction("DEFERRED") as db:
            rows = db.execute("SELECT * FROM answers WHERE digest = ?", (digest,)).fetchall()
        return {row["party"]: (row["answer"], row["reason"]) for row in rows}


def _hashed(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _stamp() -> str:
    return now().isoformat(timespec="milliseconds")


def _node(row: sqlite3.Row) -> NodeRow:
    return NodeRow(
        name=row["name"],
        role=row["role"],
        status=row["status"],
        since=row["since"],
        request=bytes(row["request"]),
        transport=row["transport"],
        bundle=bytes(row["bundle"] or b""),
        node_id=row["node_id"] or "",
    )
