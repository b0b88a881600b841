"""A party's own log: appended to before anything leaves on the strength of an entry, and read by
whoever audits it.

One SQLite file; a row is an entry and the tree head that its owner signed with it, committed in one
transaction. The tree is never
stored: it is computed from the entries when the file is opened, so an altered entry does not fit
the signed heads, and neither does a dropped, repeated or re-ordered one. What was cut off at the
end shows against a head that somebody else, or the running process, remembers. Processes and
threads that append at once are kept apart by the database's lock.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedark.foundation.database import transaction
from fedark.foundation.errors import InputError, LogForked, LogRefused, printable
from fedark.foundation.keys import SigningKey
from fedark.translog._database import database_errors, open_database
from fedark.translog.entry import Entry, Fact, log_name, note_digest
from fedark.translog.head import TreeHead, log_id, sign_head
from fedark.translog.merkle import EMPTY_ROOT, Tree, leaf_hash

__all__ = ["MAX_NOTE", "LogContents", "Logged", "TransparencyLog", "read_log"]

MAX_NOTE = 2000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    number INTEGER PRIMARY KEY, entry BLOB NOT NULL, head BLOB NOT NULL,
    note TEXT NOT NULL DEFAULT ''
)
"""


@dataclass(frozen=True)
class Logged:
    """An entry that is on the disk.

    Attributes:
        index: 0 for the first.
        entry: what was logged.
        head: the head that was signed with it; `index + 1` entries are under it.
        note: for people, "" or a text whose digest is in the entry.
    """

    index: int
    entry: Entry
    head: TreeHead
    note: str


@dataclass(frozen=True)
class LogContents:
    """A whole log that was verified: entries, tree and every head. `read_log` and
    `TransparencyLog.verify` make one.

    Attributes:
        entries: in order.
        tree: over them.
        head: the latest, or None for an empty log.
    """

    log: bytes
    entries: tuple[Logged, ...]
    tree: Tree
    head: TreeHead | None

    def check(self, head: TreeHead) -> None:
        """Return if `head`, which somebody kept, is of this log's past.

        Raises:
            LogForked: this log was rewound, rewritten or forked since.
        """
        _check(self.tree, self.log, head, self.head)


class TransparencyLog:
    """The log at `path`, of the party whose key is `key`. Safe for threads and processes.

    Raises:
        InputError: the file is open to other users.
        StorageError: it cannot be opened.
        LogRefused: it was altered, or is another party's.
    """

    def __init__(self, path: Path, key: SigningKey) -> None:
        self.path = path
        self._key = key
        self._lock = threading.Lock()
        self._tree = Tree()
        self._head = sign_head(key, size=0, root=EMPTY_ROOT, time=0)
        self._counted, self._refusals = 0, Counter[tuple[Fact, Fact]]()
        open_database(path, _SCHEMA, create=True).close()
        self.head()

    def append(self, entry: Entry, note: str = "") -> Logged:
        """Log an entry; returns once it and the head over it are on the disk.

        Args:
            entry: a refusal carries the digest of `note`.
            note: see `Logged.note`; at most `MAX_NOTE` characters.

        Raises:
            LogRefused: the log was altered; a LogForked if it was cut or rewritten.
            StorageError: it cannot be written; the entry is not in it.
        """
        _check_note(entry, note)
        with self._lock:
            with self._writing() as database:
                self._catch_up(database)
                index = len(self._tree)
                self._tree.append(entry.leaf())
                # A clock that was set back does not show in heads.
                time = max(entry.time, self._head.time)
                head = sign_head(self._key, size=index + 1, root=self._tree.root(), time=time)
                database.execute(
                    "INSERT INTO log VALUES (?, ?, ?, ?)",
                    (index, entry.encode(), head.encoded, note),
                )
            self._head = head
        return Logged(index, entry, head, note)

    def refuse(
        self,
        *,
        party: str,
        run_id: str,
        contract: bytes,
        asked: str,
        evidence: bytes,
        reasons: str,
        now: datetime,
    ) -> Logged:
        """Log that something was refused; raises what `append` raises.

        Args:
            party: whose enclave asked.
            contract: digest of the contract, 48 bytes.
            asked: "admission", or "release:MODEL".
            evidence: digest of the evidence that was presented, 48 bytes.
            reasons: for people; the entry holds its digest, the text stays beside it.
        """
        note = printable(reasons, MAX_NOTE - 3)
        facts: dict[str, Fact] = {
            "party": log_name(party),
            "run_id": log_name(run_id),
            "contract": contract,
            "asked": log_name(asked),
            "evidence": evidence,
            "reasons": note_digest(note),
        }
        return self.append(Entry("refusal", int(now.timestamp()), facts), note)

    def refusals(self, *, contract: bytes, party: str) -> int:
        """How many refusals of `party` under the contract of that digest are in it.

        Raises:
            LogRefused: the log was altered.
            StorageError: it cannot be read.
        """
        with self._current() as database:
            for number, data in database.execute(
                "SELECT number, entry FROM log WHERE number >= ? ORDER BY number", (self._counted,)
            ):
                entry = Entry.decode(data)
                if entry.kind == "refusal":
                    self._refusals[entry.facts["contract"], entry.facts["party"]] += 1
                self._counted = number + 1
            return self._refusals[contract, log_name(party)]

    def leased(self, contract: bytes) -> Counter[str]:
        """How many tokens were given out under the lease of that digest, by the enclave's run id.

        Raises: as `refusals`.
        """
        with self._current() as database:
            rows = database.execute("SELECT entry FROM log ORDER BY number")
            entries = [Entry.decode(data) for (data,) in rows]
        given = Counter[str]()
        for entry in entries:
            if entry.kind == "lease" and entry.facts["contract"] == contract:
                given[str(entry.facts["run_id"])] += int(entry.facts["tokens"])
        return given

    def head(self) -> TreeHead:
        """The latest head."""
        with self._current():
            return self._head

    def entry(self, index: int) -> Entry:
        """One entry.

        Raises:
            LogRefused: there is none, or it was altered.
        """
        with self._current() as database:
            row = database.execute("SELECT entry FROM log WHERE number = ?", (index,)).fetchone()
            if row is None or not 0 <= index < len(self._tree):
                raise LogRefused(f"The log {self.path} has no entry {index}.")
            entry = Entry.decode(row[0])
            if entry.leaf() != self._tree.leaf(index):
                raise _altered(self.path, f"entry {index} is not what was logged")
            return entry

    def inclusion(self, index: int, head: TreeHead) -> tuple[bytes, ...]:
        """The proof that entry `index` is under `head`, a head of this log."""
        with self._current():
            _check(self._tree, self._head.log, head, self._head)
            return self._tree.inclusion(index, head.size)

    def consistency(self, earlier: TreeHead | None, head: TreeHead) -> tuple[bytes, ...]:
        """The proof that `head` goes on from `earlier`, both heads of this log."""
        with self._current():
            for one in filter(None, (earlier, head)):
                _check(self._tree, self._head.log, one, self._head)
            return self._tree.consistency(earlier.size if earlier is not None else 0, head.size)

    def check(self, head: TreeHead) -> None:
        """Return if `head`, a head of this log that somebody kept, is of its past.

        Raises:
            LogForked: the log was rewound or rewritten since.
        """
        with self._current():
            _check(self._tree, self._head.log, head, self._head)

    def verify(self, anchors: Iterable[tuple[int, bytes]] = ()) -> LogContents:
        """Check the whole log from the disk, and that it holds every anchor (index, leaf hash).

        Raises:
            LogRefused: it was altered; a LogForked if it was cut or rewritten.
            StorageError: it cannot be read.
        """
        head = self.head()
        contents = read_log(self.path, self._key.public)
        contents.check(head)
        for index, leaf in anchors:
            if not 0 <= index < len(contents.entries) or contents.tree.leaf(index) != leaf:
                raise LogForked(
                    f"The log {self.path} was rewritten: entry {index}, which others hold, is not"
                    " in it."
                )
        return contents

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation: a longer one would answer from its cache, or hold a file
        that was moved away.
        """
        try:
            database = open_database(self.path, _SCHEMA, create=False)
        except InputError:
            raise _cut(self.path, self._head) from None
        with closing(database):
            yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with (
                self._opened() as opened,
                transaction(opened, database_errors(self.path)) as database,
            ):
                yield database
        except BaseException:
            self._tree.truncate(self._head.size)
            raise

    @contextmanager
    def _current(self) -> Iterator[sqlite3.Connection]:
        """The database, read, with tree and head up to what stands in it."""
        with self._lock, self._opened() as database, database_errors(self.path):
            self._catch_up(database)
            yield database

    def _catch_up(self, database: sqlite3.Connection) -> None:
        """Follow the log from where this process last saw it."""
        known = self._head.size
        if known:
            row = database.execute("SELECT head FROM log WHERE number = ?", (known - 1,)).fetchone()
            if row is None or row[0] != self._head.encoded:
                raise _cut(self.path, self._head)
        head = self._head
        try:
            for number, data in database.execute(
                "SELECT number, entry FROM log WHERE number >= ? ORDER BY number", (known,)
            ):
                if type(data) is not bytes or number != len(self._tree):
                    raise _altered(self.path, f"entry {len(self._tree)} is missing or malformed")
                self._tree.append(leaf_hash(data))
            if len(self._tree) > known:
                # The last head commits to every entry before it; `verify` also checks the heads in
                # between.
                (signed,) = database.execute(
                    "SELECT head FROM log WHERE number = ?", (len(self._tree) - 1,)
                ).fetchone()
                head = _fitting_head(
                    self.path, signed, self._key.public, self._tree, self._head.time
                )
        except BaseException:
            self._tree.truncate(known)
            raise
        self._head = head


def read_log(path: Path, public: bytes) -> LogContents:
    """Verify a whole log for an audit. Nothing is written.

    Args:
        public: the signing key of the log's owner, 32 bytes, as the reader knows it.

    Raises:
        InputError: there is no log.
        LogRefused: it was altered, or is not that owner's.
        StorageError: it cannot be read.
    """
    with closing(open_database(path, _SCHEMA, create=False)) as database, database_errors(path):
        return _contents(database, path, public)


def _contents(database: sqlite3.Connection, path: Path, public: bytes) -> LogContents:
    tree, entries, time = Tree(), list[Logged](), 0
    for number, data, signed, note in database.execute(
        "SELECT number, entry, head, note FROM log ORDER BY number"
    ):
        index = len(entries)
        try:
            entry = Entry.decode(data)
            _check_note(entry, note)
        except (LogRefused, TypeError, ValueError):
            raise _altered(path, f"entry {index} is not what was logged") from None
        if number != index:
            raise _altered(path, f"entry {index} is missing")
        tree.append(entry.leaf())
        head = _fitting_head(path, signed, public, tree, time)
        entries.append(Logged(index, entry, head, note))
        time = head.time
    return LogContents(log_id(public), tuple(entries), tree, entries[-1].head if entries else None)


def _fitting_head(path: Path, signed: object, public: bytes, tree: Tree, time: int) -> TreeHead:
    """The head that was signed over exactly `tree`, not before `time`."""
    try:
        if type(signed) is not bytes:
            raise LogRefused("it is malformed")
        head = TreeHead.verify(signed, public, by="the log's owner")
    except LogRefused as error:
        raise _altered(
            path, f"the head over {len(tree)} entries is not the owner's ({error.what})"
        ) from None
    if (head.size, head.root) != (len(tree), tree.root()) or head.time < time:
        raise _altered(path, f"its {len(tree)} entries are not those that were signed")
    return head


def _check_note(entry: Entry, note: str) -> None:
    reasons = entry.facts.get("reasons")
    if type(note) is not str or len(note) > MAX_NOTE or note != printable(note, MAX_NOTE):
        raise ValueError("a note is a short printable text")
    if (note_digest(note) if note or reasons is not None else None) != reasons:
        raise ValueError("a note does not belong to its entry")


def _check(tree: Tree, log: bytes, head: TreeHead, latest: TreeHead | None) -> None:
    if head.log != log:
        raise LogRefused("A tree head is of another log.", safe="Nothing was concluded from it.")
    if head.size > len(tree):
        what = (
            f"A log was rewound: its owner signed a head over {head.size} entries, and it has"
            f" {len(tree)}."
        )
    elif tree.root(head.size) != head.root:
        what = (
            f"A log was rewritten or forked: the head that its owner signed over {head.size}"
            " entries is not of its past."
        )
    else:
        return
    raise LogForked(
        what,
        kept=tuple(one.encoded for one in (head, latest) if one is not None),
        fix=(
            "The owner of the log must restore it from a copy that has all its entries; nobody can"
            " vouch for this one."
        ),
    )


def _altered(path: Path, how: str) -> LogRefused:
    return LogRefused(
        f"The log {path} was altered: {how}.",
        safe="Nothing is released or concluded on the strength of it.",
        fix="Restore it, or find out who can write there.",
    )


def _cut(path: Path, head: TreeHead) -> LogForked:
    return LogForked(
        f"The log {path} was altered: its end was cut off or rewritten while this process was"
        " running.",
        kept=(head.encoded,),
        safe="Nothing is released on the strength of it.",
        fix="Restore it, or find out who can write there.",
    )
