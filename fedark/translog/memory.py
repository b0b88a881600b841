"""What a party remembers of other parties' logs: the latest head of each, durably, so that a log
which was forked or rewound meets its past, also after a restart.

A head is remembered only after it was shown to go on from the one before. Where it does not, the
earlier one stays, and both are written to a file: two signed statements of one owner that cannot
both be true.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedark.foundation.database import transaction
from fedark.foundation.errors import LogForked, LogRefused
from fedark.foundation.files import write_atomic
from fedark.translog._database import database_errors, open_database
from fedark.translog.entry import Entry, Fact
from fedark.translog.head import TreeHead, log_id
from fedark.translog.merkle import EMPTY_ROOT, verify_consistency, verify_inclusion
from fedark.translog.update import LogUpdate

__all__ = ["HeadMemory", "Witnessed"]

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS heads (log BLOB PRIMARY KEY, head BLOB NOT NULL) WITHOUT ROWID"
)


class Witnessed:
    """A head that goes on from all that this party saw of a log, and entries that are under it.
    Only `HeadMemory.take` makes one.

    Attributes:
        head: now remembered.
        entries: index -> entry.
    """

    __slots__ = ("entries", "head")

    head: TreeHead
    entries: Mapping[int, Entry]

    def __init__(self) -> None:
        raise TypeError("use HeadMemory.take")

    @classmethod
    def _of(cls, head: TreeHead, entries: dict[int, Entry]) -> Witnessed:
        witnessed = object.__new__(cls)
        witnessed.head, witnessed.entries = head, MappingProxyType(entries)
        return witnessed

    def find(self, kind: str, **facts: Fact) -> tuple[int, Entry]:
        """Index and entry of the one of that kind with those facts.

        Raises:
            LogRefused: there is none.
        """
        for index, entry in self.entries.items():
            if entry.kind == kind and all(
                entry.facts.get(name) == value for name, value in facts.items()
            ):
                return index, entry
        raise LogRefused(
            f"The log does not show the {kind} that it must hold.",
            safe="Nothing was done on the strength of it.",
        )


class HeadMemory:
    """The heads that a party remembers, in the SQLite file at `path`. Safe for threads and
    processes.

    Raises:
        InputError, StorageError, LogRefused: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._database = open_database(path, _SCHEMA, create=True)

    def last(self, public: bytes, *, by: str) -> TreeHead | None:
        """The latest head seen of the log whose owner `by` has the signing key `public`."""
        with self._lock, database_errors(self.path):
            return self._last(public, by)

    def take(
        self,
        data: bytes,
        public: bytes,
        *,
        by: str,
        party: str,
        run_id: str,
        asked: TreeHead | None = None,
    ) -> Witnessed:
        """Verify a log's update and remember its head.

        Args:
            data: as `make_update` gives it.
            party, run_id: who is asking, and in which run.
            asked: the head that was sent with the question, where others may have learnt a later
                one in the meantime: an answer that they have overtaken is then no sign of a fork.

        Raises:
            LogForked: the log was forked or rewound; the proof was kept.
            LogRefused: the update is malformed, not from that owner, for someone else, or proves
                less than it says.
            StorageError: the head cannot be remembered.
        """
        update = LogUpdate.verify(data, public, by=by)
        if (update.party, update.run_id) != (party, run_id):
            raise LogRefused(
                f"The word of {by}'s log is for another party or run.",
                safe="Nothing was concluded from it.",
            )
        with self._lock, transaction(self._database, database_errors(self.path)):
            known = self._last(public, by)
            self._goes_on(update, known, data, by, asked.size if asked is not None else 0)
            if known is None or update.head.size > known.size:
                self._database.execute(
                    "INSERT OR REPLACE INTO heads VALUES (?, ?)",
                    (update.head.log, update.head.encoded),
                )
        for shown in update.entries:
            verify_inclusion(
                shown.entry.leaf(), shown.index, update.head.size, shown.path, update.head.root
            )
        return Witnessed._of(update.head, {shown.index: shown.entry for shown in update.entries})

    def fork(self, earlier: bytes, later: bytes, *, by: str, how: str) -> LogForked:
        """Keep the proof of a fork in a file; the error that names it."""
        proof = {"log_of": by, "how": how, "earlier": earlier.hex(), "later": later.hex()}
        name = hashlib.sha256(earlier + later).hexdigest()[:16]
        path = self.path.parent / "forked-logs" / f"{by}-{name}.json"
        write_atomic(path, json.dumps(proof, indent=1).encode(), mode=0o600)
        return LogForked(
            f"The log of {by} was forked or rewound: {how}.",
            kept=(earlier, later),
            safe="Nothing of this party was released, opened or stored on the strength of it.",
            fix=(
                f"The two signed statements that contradict each other are in {path}: show them to"
                f" {by} and to the other parties, and take part in nothing under its key until it"
                " is explained."
            ),
        )

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _last(self, public: bytes, by: str) -> TreeHead | None:
        row = self._database.execute(
            "SELECT head FROM heads WHERE log = ?", (log_id(public),)
        ).fetchone()
        return TreeHead.verify(row[0], public, by=by) if row is not None else None

    def _goes_on(
        self, update: LogUpdate, known: TreeHead | None, data: bytes, by: str, asked: int
    ) -> None:
        head, seen = update.head, known.size if known is not None else 0
        if known is not None and head.encoded == known.encoded:
            return  # the same word again, to a party that was interrupted
        if 0 < asked < seen and update.since == asked <= head.size != seen:
            raise LogRefused(
                f"The word of {by}'s log was overtaken: meanwhile another answer told of {seen}"
                " entries.",
                safe="Nothing was concluded from it.",
                fix="Ask again.",
            )
        if known is not None and head.size < seen:
            how = f"it now has {head.size} entries and had {seen}"
            raise self.fork(known.encoded, data, by=by, how=how)
        if known is not None and head.size == seen and head.root != known.root:
            raise self.fork(
                known.encoded, head.encoded, by=by, how=f"it signed two trees of {seen} entries"
            )
        if known is not None and head.time < known.time:
            raise self.fork(
                known.encoded, head.encoded, by=by, how="its later head is of an earlier time"
            )
        if update.since != seen:
            raise LogRefused(
                f"The word of {by}'s log starts from {update.since} entries; this party has seen"
                f" {seen}.",
                safe="Nothing was concluded from it.",
                fix=(
                    "The head that this party sent was lost or replaced on its way: submit the job"
                    " again."
                ),
            )
        root = known.root if known is not None else EMPTY_ROOT
        try:
            verify_consistency(seen, root, head.size, head.root, update.consistency)
        except LogRefused:
            if known is None:
                raise
            how = f"the tree of {head.size} entries does not go on from that of {seen}"
            raise self.fork(known.encoded, data, by=by, how=how) from None
