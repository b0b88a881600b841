"""The durable log: what stands in it stays, or it shows; and what could not be made durable is not
in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedark.translog.log as log_module
from fedark.foundation.errors import FedarkError, InputError, LogForked, LogRefused, StorageError
from fedark.foundation.keys import SigningKey
from fedark.translog.entry import Entry, note_digest
from fedark.translog.head import sign_head
from fedark.translog.log import MAX_NOTE, TransparencyLog, read_log
from fedark.translog.merkle import Tree, verify_consistency, verify_inclusion

Make = Callable[..., Any]
NOW = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)


def sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def refuse(log: TransparencyLog, reasons: str, party: str = "north") -> Any:
    digests = {"contract": bytes(48), "evidence": bytes(48)}
    return log.refuse(
        party=party, run_id="run-1", asked="admission", reasons=reasons, now=NOW, **digests
    )


# -- the good way


def test_entries_read_back_in_order_each_under_a_head_of_its_owner(
    make_log: Make, make_entry: Make, key: SigningKey
) -> None:
    log = make_log(count=5)
    assert log.path.stat().st_mode & 0o777 == 0o600
    contents = read_log(log.path, key.public)
    assert [logged.entry for logged in contents.entries] == [
        make_entry(number) for number in range(5)
    ]
    assert [(logged.index, logged.head.size) for logged in contents.entries] == [
        (n, n + 1) for n in range(5)
    ]
    assert contents.head == log.head() == contents.entries[-1].head
    assert TransparencyLog(log.path, key).append(make_entry(5)).index == 5


def test_an_empty_log_has_a_head_of_no_entries_and_a_missing_one_is_said_to_be_missing(
    make_log: Make, key: SigningKey, tmp_path: Path
) -> None:
    log = make_log()
    assert (log.head().size, log.verify().entries, read_log(log.path, key.public).head) == (
        0,
        (),
        None,
    )
    with pytest.raises(InputError, match="no log"):
        read_log(tmp_path / "nowhere", key.public)
    assert not (tmp_path / "nowhere").exists()


def test_every_entry_is_under_every_later_head_and_every_head_goes_on_from_every_earlier_one(
    make_log: Make, make_entry: Make
) -> None:
    log = make_log()
    heads = [log.append(make_entry(number)).head for number in range(9)]
    for later in heads:
        for index in range(later.size):
            verify_inclusion(
                make_entry(index).leaf(), index, later.size, log.inclusion(index, later), later.root
            )
        for earlier in heads[: later.size]:
            path = log.consistency(earlier, later)
            verify_consistency(earlier.size, earlier.root, later.size, later.root, path)


def test_a_refusal_holds_the_digest_of_its_reasons_and_the_text_stays_beside_it(
    make_log: Make, key: SigningKey
) -> None:
    log = make_log()
    refuse(log, "  - it is bound to another run\n  - debug \x1b[2J" + "y" * 5000, party="two words")
    (logged,) = read_log(log.path, key.public).entries
    assert logged.entry.facts["reasons"] == note_digest(logged.note)
    assert logged.entry.facts["party"] == "two?words"
    assert "bound to another run" in logged.note
    assert len(logged.note) <= MAX_NOTE
    assert "\x1b" not in logged.note
    assert b"another run" not in logged.entry.encode()


def test_a_clock_that_was_set_back_does_not_show_in_heads(make_log: Make, make_entry: Make) -> None:
    log = make_log()
    first, second = log.append(make_entry(100)), log.append(make_entry(0))
    assert first.head.time == second.head.time
    assert len(log.verify().entries) == 2


# -- others that append


def test_another_process_goes_on_where_this_one_stopped(make_log: Make, make_entry: Make) -> None:
    one = make_log(count=2)
    two = make_log()
    assert two.append(make_entry(2)).index == 2
    assert one.append(make_entry(3)).index == 3
    assert one.head() == two.head()
    assert len(two.verify().entries) == 4


def _append_many(path: Path, secret: bytes, entries: list[bytes]) -> None:
    log = TransparencyLog(path, SigningKey(secret))
    for data in entries:
        log.append(Entry.decode(data))


@pytest.mark.slow
def test_processes_and_threads_that_append_at_once_keep_one_log(
    make_log: Make, make_entry: Make, key: SigningKey
) -> None:
    context, log = multiprocessing.get_context("spawn"), make_log()
    batches = [[make_entry(100 * worker + number) for number in range(8)] for worker in range(5)]
    workers: list[Any] = [
        context.Process(
            target=_append_many,
            args=(log.path, key.secret_bytes(), [one.encode() for one in batch]),
        )
        for batch in batches[:2]
    ]
    workers += [
        threading.Thread(target=lambda batch=batch: [log.append(one) for one in batch])
        for batch in batches[2:]
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers[:2])
    kept = [logged.entry for logged in log.verify().entries]
    assert len(kept) == 40
    for batch in batches:
        assert [one for one in kept if one in batch] == batch


class _Handed:
    """A lock that another thread takes the moment it is free: `then` is what that thread does."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._lock, self._then, self.after = threading.Lock(), then, list[object]()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if not self.after:
            self.after.append(None)
            self.after[0] = self._then()


def test_who_comes_the_moment_an_entry_is_in_finds_it_there(
    make_log: Make, make_entry: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_log(count=1)
    lock = _Handed(log.head)
    monkeypatch.setattr(log, "_lock", lock)
    logged = log.append(make_entry(1))
    assert lock.after == [logged.head]
    assert len(log.verify().entries) == 2


# -- crashes

_WRITER = """
import sys
from pathlib import Path
from fedark.foundation.keys import SigningKey
from fedark.translog.entry import Entry
from fedark.translog.log import TransparencyLog
log = TransparencyLog(Path(sys.argv[1]), SigningKey(bytes.fromhex(sys.argv[2])))
entry = Entry.decode(bytes.fromhex(sys.argv[3]))
while True:
    logged = log.append(entry)
    sys.stdout.write(logged.head.encoded.hex() + "\\n")
    sys.stdout.flush()
"""


@pytest.mark.slow
@pytest.mark.parametrize("announced", [1, 4, 9])
def test_a_log_whose_writer_was_killed_holds_every_entry_whose_head_went_out_and_goes_on(
    announced: int, make_log: Make, make_entry: Make, key: SigningKey
) -> None:
    path = make_log(count=2).path
    arguments = [
        sys.executable,
        "-c",
        _WRITER,
        str(path),
        key.secret_bytes().hex(),
        make_entry(9).encode().hex(),
    ]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as writer:
        assert writer.stdout is not None
        heads = [bytes.fromhex(writer.stdout.readline().decode()) for _ in range(announced)]
        writer.send_signal(signal.SIGKILL)
        heads += [bytes.fromhex(line.decode()) for line in writer.stdout if line.endswith(b"\n")]
    contents = read_log(path, key.public)
    assert [logged.head.encoded for logged in contents.entries[2 : 2 + len(heads)]] == heads
    log = TransparencyLog(path, key)
    assert log.append(make_entry(10)).index == len(contents.entries)
    assert len(log.verify().entries) == len(contents.entries) + 1


def test_a_transaction_that_a_crash_cut_short_is_as_if_it_never_was(
    make_log: Make, make_entry: Make, key: SigningKey
) -> None:
    log = make_log(count=3)
    dying = f"""
import os, sqlite3
database = sqlite3.connect({str(log.path)!r}, isolation_level=None)
database.execute("PRAGMA cache_size=1"); database.execute("PRAGMA cache_spill=1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE log SET head = zeroblob(200000)")  # spills: the file is half changed
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", dying], check=True)
    assert log.path.with_name(log.path.name + "-journal").stat().st_size > 0
    assert len(read_log(log.path, key.public).entries) == 3
    assert log.append(make_entry(3)).index == 3


class Failing:
    """A database whose disk fails at one kind of statement."""

    def __init__(self, database: sqlite3.Connection, at: str) -> None:
        self._database, self._at = database, at

    def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
        if statement.startswith(self._at):
            raise sqlite3.OperationalError("database or disk is full")
        return self._database.execute(statement, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


@pytest.mark.parametrize("at", ["BEGIN", "INSERT", "COMMIT"])
def test_an_entry_that_cannot_be_made_durable_is_not_in_the_log(
    at: str, make_log: Make, make_entry: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make_log(count=3)
    before = log.head()
    with monkeypatch.context() as patch:
        opened = log_module.open_database
        patch.setattr(
            log_module,
            "open_database",
            lambda *args, **options: Failing(opened(*args, **options), at),
        )
        with pytest.raises(StorageError, match="disk is full"):
            log.append(make_entry(3))
    assert log.head() == before
    assert log.append(make_entry(4)).index == 3
    assert [logged.entry for logged in log.verify().entries] == [
        *map(make_entry, range(3)),
        make_entry(4),
    ]


def test_a_log_without_a_folder_is_a_storage_error(tmp_path: Path, key: SigningKey) -> None:
    with pytest.raises(StorageError, match="folder is missing"):
        TransparencyLog(tmp_path / "none" / "log.sqlite", key)


# -- what was altered


def both_refuse(path: Path, key: SigningKey, why: str = "altered") -> None:
    """Neither an auditor nor a restarted owner takes the log."""
    for action in (lambda: read_log(path, key.public), lambda: TransparencyLog(path, key)):
        with pytest.raises(LogRefused, match=why):
            action()


def test_an_altered_leaf_is_seen(make_log: Make, make_entry: Make, key: SigningKey) -> None:
    log = make_log(count=5)
    sql(log.path, f"UPDATE log SET entry = X'{make_entry(77).encode().hex()}' WHERE number = 2")
    both_refuse(log.path, key)
    with pytest.raises(LogRefused, match="altered"):
        log.verify()
    with pytest.raises(LogRefused, match="entry 2 is not what was logged"):
        log.entry(2)


def test_reordered_entries_are_seen(make_log: Make, key: SigningKey) -> None:
    log = make_log(count=5)
    sql(
        log.path,
        "UPDATE log SET number = 99 WHERE number = 1",
        "UPDATE log SET number = 1 WHERE number = 2",
        "UPDATE log SET number = 2 WHERE number = 99",
    )
    both_refuse(log.path, key)


def test_a_dropped_entry_is_seen(make_log: Make, key: SigningKey) -> None:
    log = make_log(count=5)
    sql(log.path, "DELETE FROM log WHERE number = 2")
    both_refuse(log.path, key)


def test_an_entry_that_was_dropped_and_the_gap_closed_is_seen(
    make_log: Make, key: SigningKey
) -> None:
    log = make_log(count=5)
    sql(
        log.path,
        "DELETE FROM log WHERE number = 2",
        "UPDATE log SET number = 2 WHERE number = 3",
        "UPDATE log SET number = 3 WHERE number = 4",
    )
    both_refuse(log.path, key)


def test_an_inserted_entry_is_seen(make_log: Make, make_entry: Make, key: SigningKey) -> None:
    log = make_log(count=3)
    head = sign_head(SigningKey(), size=4, root=bytes(32), time=2_000_000_000)
    sql(
        log.path,
        f"INSERT INTO log VALUES (3, X'{make_entry(9).encode().hex()}',"
        f" X'{head.encoded.hex()}', '')",
    )
    both_refuse(log.path, key)
    with pytest.raises(LogRefused, match="altered"):
        log.append(make_entry(4))


def test_a_head_in_the_middle_that_was_replaced_is_seen_by_an_audit(
    make_log: Make, key: SigningKey
) -> None:
    log = make_log(count=4)
    head = sign_head(key, size=2, root=bytes(32), time=2_000_000_000)  # even if the owner signed it
    sql(log.path, f"UPDATE log SET head = X'{head.encoded.hex()}' WHERE number = 1")
    with pytest.raises(LogRefused, match="not those that were signed"):
        read_log(log.path, key.public)


def test_an_altered_reason_is_seen(make_log: Make, key: SigningKey) -> None:
    log = make_log()
    refuse(log, "its nonce was used before")
    for note in ("'it was friendly'", "''", "NULL", "X'00'"):
        try:
            sql(log.path, f"UPDATE log SET note = {note}")
        except sqlite3.IntegrityError:
            continue
        with pytest.raises(LogRefused, match="not what was logged"):
            read_log(log.path, key.public)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE log SET entry = X'00' WHERE number = 1",
        "UPDATE log SET entry = 'text' WHERE number = 1",
        "UPDATE log SET head = 5 WHERE number = 3",
        "UPDATE log SET head = X'A0' WHERE number = 3",
        "UPDATE log SET number = -1 WHERE number = 0",
        "DELETE FROM log WHERE number = 0",
    ],
)
def test_rows_that_are_no_entries_are_seen(damage: str, make_log: Make, key: SigningKey) -> None:
    log = make_log(count=4)
    sql(log.path, damage)
    both_refuse(log.path, key)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path, key: SigningKey) -> None:
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at" * 40)
    path.chmod(0o600)
    both_refuse(path, key, "not a whole database")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 8191), mask=st.integers(1, 255))
@example(
    place=4019, mask=128
)  # a name that is no UTF-8 in SQLite's own message, which Python cannot put into words
def test_a_file_with_any_byte_changed_is_refused_or_holds_the_same_entries(
    place: int, mask: int, tmp_path: Path, make_entry: Make
) -> None:
    key, path = SigningKey(bytes(32)), tmp_path / "whole.sqlite"
    if not path.exists():
        log = TransparencyLog(path, key)
        for number in range(6):
            log.append(make_entry(number))
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= mask
    changed = tmp_path / "changed.sqlite"
    changed.write_bytes(raw)
    changed.chmod(0o600)
    try:
        entries = read_log(changed, key.public).entries
    except FedarkError:
        return
    # What is left is a past of the log: nothing was altered, at most its end is gone (which a kept
    # head gives away).
    assert [logged.entry for logged in entries] == [
        make_entry(number) for number in range(len(entries))
    ]


def test_a_log_of_another_owner_is_refused(make_log: Make) -> None:
    both_refuse(make_log(count=2).path, SigningKey())


def test_a_log_that_others_can_write_is_not_used(make_log: Make, key: SigningKey) -> None:
    path = make_log(count=1).path
    path.chmod(0o666)
    with pytest.raises(InputError, match="open to other users"):
        TransparencyLog(path, key)


# -- what was rewound or forked


def test_a_log_that_was_truncated_is_seen_by_the_process_that_wrote_it(
    make_log: Make, make_entry: Make
) -> None:
    log = make_log(count=5)
    sql(log.path, "DELETE FROM log WHERE number > 2")
    for action in (log.verify, log.head, lambda: log.append(make_entry(5))):
        with pytest.raises(LogForked, match="cut off"):
            action()


def test_a_log_that_was_truncated_is_seen_after_a_restart_by_whoever_remembers_an_old_head(
    make_log: Make, key: SigningKey
) -> None:
    log = make_log(count=5)
    kept = log.head()
    sql(log.path, "DELETE FROM log WHERE number > 2")
    again = TransparencyLog(log.path, key)  # on its own it is a whole log of three entries
    assert len(again.verify().entries) == 3
    for check in (again.check, read_log(log.path, key.public).check):
        with pytest.raises(LogForked, match="rewound") as caught:
            check(kept)
        assert kept.encoded in caught.value.kept
        assert "restore" in caught.value.fix


def test_a_log_that_was_rewritten_is_seen_by_whoever_remembers_an_old_head(make_log: Make) -> None:
    log, other = make_log(count=5), make_log("other", count=7, party="south")
    with pytest.raises(LogForked, match="rewritten or forked"):
        other.check(log.head())
    with pytest.raises(LogForked):
        other.consistency(log.head(), other.head())
    with pytest.raises(LogForked):
        other.inclusion(0, log.head())


def test_a_log_that_was_swapped_for_another_of_its_owner_is_seen_by_the_running_process(
    make_log: Make, make_entry: Make
) -> None:
    log, other = make_log(count=5), make_log("other", count=5, party="south")
    log.path.write_bytes(other.path.read_bytes())
    for action in (log.verify, lambda: log.append(make_entry(5))):
        with pytest.raises(LogForked):
            action()


def test_a_log_that_was_moved_away_under_a_running_process_takes_no_entry(
    make_log: Make, make_entry: Make, tmp_path: Path
) -> None:
    log, other = make_log(count=5), make_log("other", count=2)
    other.path.rename(log.path)
    with pytest.raises(LogForked):
        log.append(make_entry(5))
    with pytest.raises(LogForked):
        log.verify()


def test_a_log_that_was_deleted_under_a_running_process_takes_no_entry(
    make_log: Make, make_entry: Make
) -> None:
    log = make_log(count=2)
    log.path.unlink()
    for action in (log.verify, lambda: log.append(make_entry(2))):
        with pytest.raises(LogForked, match="cut off"):
            action()
    assert not log.path.exists()


def test_an_anchor_that_is_not_in_the_log_is_a_fork(make_log: Make, make_entry: Make) -> None:
    log = make_log(count=3)
    assert len(log.verify([(1, make_entry(1).leaf())]).entries) == 3
    for anchor in (
        (1, make_entry(2).leaf()),
        (3, make_entry(3).leaf()),
        (-1, make_entry(2).leaf()),
    ):
        with pytest.raises(LogForked, match="others hold"):
            log.verify([anchor])


def test_a_head_of_another_log_says_nothing_about_this_one(make_log: Make) -> None:
    log = make_log(count=3)
    with pytest.raises(LogRefused, match="another log"):
        log.check(sign_head(SigningKey(), size=1, root=bytes(32), time=0))


def test_proofs_are_over_the_entries_that_are_on_the_disk(make_log: Make, make_entry: Make) -> None:
    log, tree = make_log(count=6), Tree()
    for number in range(6):
        tree.append(make_entry(number).leaf())
    assert log.head().root == tree.root()
    assert log.inclusion(4, log.head()) == tree.inclusion(4, 6)
    with pytest.raises(LogRefused, match="has no entry 6"):
        log.entry(6)
