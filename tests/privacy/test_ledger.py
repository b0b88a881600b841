"""The ledger: no trick with a file gives a new budget, nothing is charged twice or given back, and
an edit is seen.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sqlite3
from contextlib import closing

import pytest

from fedark.foundation.errors import (
    BudgetExceeded,
    FedarkError,
    InputError,
    Refused,
    StorageError,
    restore,
)
from fedark.privacy.accounting import Budget, Event, Spend, cost
from fedark.privacy.ledger import LEDGER, Head, Ledger, record_bytes

DELTA = 1e-5
JOB = Spend((Event(1.5, 0.1, 60),))  # epsilon 2.7
SMALL = Spend((Event(6.0, 0.1, 60),))
ONE, TWO, THREE = (cost([JOB] * jobs, DELTA)[0] for jobs in (1, 2, 3))
RECORDS = [record_bytes(f"sentence {number}", "label") for number in range(300)]


def contract(name):
    return hashlib.sha384(name.encode()).digest()


@pytest.fixture
def path(tmp_path):
    return tmp_path / LEDGER


@pytest.fixture
def ledger(path):
    with Ledger.open(path, create=True) as opened:
        yield opened


def charge(
    ledger, records=RECORDS, run="run-1", *, spend=JOB, epsilon=8.0, name="contract", releases=60
):
    return ledger.charge(
        records,
        contract_digest=contract(name),
        run_id=run,
        spend=spend,
        releases=releases,
        budget=Budget(epsilon, DELTA),
        now=1_700_000_000,
    )


def spent(ledger, records=RECORDS):
    return ledger.spent(records, DELTA).epsilon


def test_a_charge_is_what_the_accountant_says_and_jobs_compose(ledger):
    assert spent(ledger) == 0
    assert charge(ledger).spent.epsilon == ONE == spent(ledger)
    assert charge(ledger, run="run-2").spent.epsilon == TWO == spent(ledger)
    # The square root of composition: two jobs cost less than twice one.
    assert ONE < TWO < 2 * ONE
    ledger.verify()


def test_a_run_is_charged_once_however_often_it_is_asked_for(ledger):
    first = charge(ledger)
    again = [charge(ledger, random.sample(RECORDS, len(RECORDS))) for _ in range(3)]
    assert not first.resumed
    assert all(
        receipt.resumed and receipt.charge == first.charge and receipt.head == first.head
        for receipt in again
    )
    assert spent(ledger) == ONE
    assert ledger.head().sequence == 1


def test_a_run_is_not_charged_again_with_other_records_or_another_cost(ledger):
    charge(ledger)
    for records, spend, releases in (
        (RECORDS[:-1], JOB, 60),
        (RECORDS, SMALL, 60),
        (RECORDS, JOB, 61),
    ):
        with pytest.raises(Refused):
            charge(ledger, records, spend=spend, releases=releases)
    assert ledger.head().sequence == 1


def test_over_budget_is_refused_and_nothing_is_written(ledger, path):
    charge(ledger)
    before = ledger.head()
    with pytest.raises(BudgetExceeded) as caught:
        charge(ledger, run="run-2", epsilon=TWO - 0.01)
    assert "training does not start" in str(caught.value)
    assert ledger.head() == before
    assert charge(ledger, run="run-2", epsilon=TWO + 0.01).spent.epsilon == TWO
    ledger.verify()


def test_a_refusal_keeps_its_class_across_processes():
    assert isinstance(restore("BudgetExceeded", "x"), BudgetExceeded)
    assert issubclass(BudgetExceeded, Refused)


TRICKS = {
    "copied": lambda records: list(records),
    "re-ordered": lambda records: records[::-1],
    "duplicated": lambda records: records + records[:50] * 3,
    "first half": lambda records: records[:150],
    "one record": lambda records: records[7:8],
    "with new records": lambda records: (
        records[:1] + [record_bytes(f"new {number}", "label") for number in range(500)]
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_budget_comes_from_a_file_that_is(ledger, trick):
    charge(ledger)
    with pytest.raises(BudgetExceeded):
        charge(ledger, TRICKS[trick](RECORDS), "run-2", epsilon=TWO - 0.01)


def test_no_budget_comes_from_joining_and_splitting_over_and_over(ledger):
    """Overlap counts: whatever the cuts, no record is in more jobs than its budget has room for."""
    draw, jobs = random.Random(3), dict.fromkeys(range(60), 0)
    refused = 0
    for number in range(40):
        chosen = draw.sample(range(60), draw.randint(1, 40))
        try:
            charge(
                ledger,
                [RECORDS[index] for index in chosen],
                f"run-{number}",
                epsilon=(TWO + THREE) / 2,
            )
        except BudgetExceeded:
            refused += 1
            assert max(jobs[index] for index in chosen) == 2
        else:
            for index in chosen:
                jobs[index] += 1
    assert max(jobs.values()) == 2
    assert 0 < refused < 40
    for index, count in jobs.items():
        assert spent(ledger, [RECORDS[index]]) == [0, ONE, TWO][count]
    ledger.verify()


def test_untouched_records_keep_their_budget(ledger):
    charge(ledger, RECORDS[:150])
    assert spent(ledger, RECORDS[150:]) == 0
    assert spent(ledger, RECORDS[149:]) == ONE


def test_a_record_is_known_in_another_encoding_case_and_spacing():
    same = record_bytes("Straße \N{LATIN SMALL LETTER E WITH ACUTE}tude", "Label")
    assert same == record_bytes("  STRASSE\t e\N{COMBINING ACUTE ACCENT}tude\r\n", "label")
    assert record_bytes("a b", "c") != record_bytes("a", "b c")


def test_a_customers_jobs_compose_over_all_its_data_and_count_twice_for_its_records(ledger):
    whole = Spend((Event(10.0, 1.0, 5),), "customer")
    one, two = (cost([whole] * jobs, DELTA)[0] for jobs in (1, 2))
    assert charge(ledger, RECORDS[:10], spend=whole).spent.epsilon == one
    with pytest.raises(BudgetExceeded):
        charge(ledger, RECORDS[200:], "run-2", spend=whole, epsilon=two - 0.01)
    receipt = charge(ledger, RECORDS[200:], "run-2", spend=whole, epsilon=two + 0.01)
    assert (receipt.spent.unit, receipt.spent.epsilon) == ("customer", two)
    assert charge(ledger, RECORDS[200:], "run-2", spend=whole).spent.epsilon == two
    assert spent(ledger, RECORDS[:10]) == cost([whole.of_record()], DELTA)[0] > one
    assert (
        charge(ledger, RECORDS[:20], "run-3").spent.epsilon
        == cost([whole.of_record(), JOB], DELTA)[0]
    )
    ledger.verify()


def test_a_release_leaves_once_and_only_if_it_was_charged(ledger, path):
    receipt = charge(ledger, releases=3)
    ledger.release(receipt.charge, 0, 5)
    with pytest.raises(Refused):
        ledger.release(receipt.charge, 0, 5)
    ledger.release(receipt.charge, 2, 5)
    for number in (1, 2, 3, -1):
        with pytest.raises(Refused):
            ledger.release(receipt.charge, number, 5)
    with pytest.raises(FedarkError):
        ledger.release(ledger.head().sequence, 0, 5)
    with pytest.raises(InputError):
        ledger.release(99, 0, 5)
    with Ledger.open(path) as other:
        assert charge(other, releases=3).next_release == 3
    ledger.verify()


def test_charges_of_two_handles_do_not_get_lost(ledger, path):
    with Ledger.open(path) as other:
        charge(ledger)
        assert charge(other).resumed
        charge(other, run="run-2")
        assert spent(ledger) == TWO == spent(other)


def test_the_file_is_private_and_only_made_on_purpose(ledger, path, tmp_path):
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError):
        Ledger.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(FedarkError):
        Ledger.open(tmp_path / "no" / "folder", create=True)
    path.chmod(0o644)
    with pytest.raises(InputError):
        Ledger.open(path)


def test_a_full_disk_charges_nothing(ledger):
    ledger._database.execute("PRAGMA max_page_count = 20")
    with pytest.raises(StorageError):
        charge(ledger, [os.urandom(20) for _ in range(20_000)])
    assert ledger.head().sequence == 0
    ledger.verify()


def test_no_record_is_in_the_file(ledger, path):
    charge(ledger, [b"a very secret sentence indeed"])
    ledger.close()
    for file in path.parent.iterdir():
        assert b"secret sentence" not in file.read_bytes()
        assert (
            hashlib.blake2b(b"a very secret sentence indeed", digest_size=20).digest()
            not in file.read_bytes()
        )


def test_two_ledgers_know_a_record_by_different_digests(tmp_path):
    digests = set()
    for name in ("a", "b"):
        with Ledger.open(tmp_path / name, create=True) as one:
            digests.update(one._digests(RECORDS[:1]))
    assert len(digests) == 2


def test_a_charge_without_records_or_contract_is_refused(ledger):
    with pytest.raises(InputError):
        charge(ledger, [])
    with pytest.raises(InputError):
        charge(ledger, releases=0)
    with pytest.raises(InputError):
        ledger.charge(
            RECORDS,
            contract_digest=b"",
            run_id="r",
            spend=JOB,
            releases=1,
            budget=Budget(8.0, DELTA),
            now=1,
        )


# Edits.


def filled(path):
    """A ledger with three charges of overlapping records and two releases; its head."""
    with Ledger.open(path, create=True) as ledger:
        first = charge(ledger, RECORDS[:200])
        charge(ledger, RECORDS[100:], "run-2", spend=SMALL)
        ledger.release(first.charge, 0, 5)
        ledger.release(first.charge, 1, 6)
        charge(ledger, RECORDS[50:120], "run-3", spend=SMALL)
        return ledger.verify()


EDITS = {
    "the last entry deleted": "DELETE FROM entries WHERE sequence = 5",
    "an entry deleted": "DELETE FROM entries WHERE sequence = 2",
    "two entries swapped": (
        "UPDATE entries SET sequence = CASE sequence WHEN 3 THEN -4 WHEN 4 THEN -3 END WHERE"
        " sequence IN (3, 4);UPDATE entries SET sequence = -sequence WHERE sequence < 0"
    ),
    "a body copied from another entry": (
        "UPDATE entries SET body = (SELECT body FROM entries e WHERE e.sequence = 4)"
        " WHERE sequence = 3"
    ),
    "an entry's body edited": "UPDATE entries SET body = zeroblob(length(body)) WHERE sequence = 1",
    "a hash edited": "UPDATE entries SET hash = zeroblob(48) WHERE sequence = 5",
    "an entry appended": "INSERT INTO entries SELECT 6, body, hash FROM entries WHERE sequence = 5",
    "a record deleted": "DELETE FROM records WHERE digest = (SELECT digest FROM records LIMIT 1)",
    "a record deleted and its group's size with it": (
        "UPDATE teams SET size = size - 1"
        " WHERE team = (SELECT team FROM records LIMIT 1);"
        "DELETE FROM records WHERE digest = (SELECT digest FROM records LIMIT 1)"
    ),
    "a record's digest edited": (
        "UPDATE records SET digest = zeroblob(20) WHERE digest = (SELECT digest FROM records"
        " LIMIT 1)"
    ),
    "a record moved to another group": (
        "UPDATE records SET team = 1 + team % 3 WHERE digest = (SELECT digest FROM records LIMIT 1)"
    ),
    "a group's charge deleted": (
        "DELETE FROM charged WHERE charge = 2 AND team = (SELECT min(team) FROM charged WHERE"
        " charge = 2)"
    ),
    "a charge of a group added": "INSERT OR IGNORE INTO charged SELECT team, 5 FROM teams",
    "all records deleted": "DELETE FROM records; DELETE FROM teams; DELETE FROM charged",
    "a charge made findable no more": "DELETE FROM charges WHERE sequence = 1",
    "a run renamed": "UPDATE charges SET run = 'run-9' WHERE sequence = 1",
    "a release forgotten": "DELETE FROM releases WHERE number = 1",
    "a release added": "INSERT INTO releases VALUES (1, 7)",
    "the identifier edited": "UPDATE meta SET value = zeroblob(32) WHERE name = 'id'",
    "the key removed": "DELETE FROM meta WHERE name = 'secret'",
    "a table dropped": "DROP TABLE charged",
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_sees(path, edit):
    filled(path)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(EDITS[edit])
    with pytest.raises(Refused), Ledger.open(path) as ledger:
        ledger.verify()


def test_a_changed_byte_anywhere_in_an_entry_is_seen(path):
    filled(path)
    with closing(sqlite3.connect(path)) as database:
        body = database.execute("SELECT body FROM entries WHERE sequence = 1").fetchone()[0]
        for at in range(0, len(body), 7):
            edited = bytearray(body)
            edited[at] ^= 1
            database.execute("UPDATE entries SET body = ? WHERE sequence = 1", (bytes(edited),))
            database.commit()
            with pytest.raises(Refused):
                Ledger.open(path)


def test_an_altered_ledger_charges_nothing(path):
    filled(path)
    with closing(sqlite3.connect(path)) as database:
        database.executescript("UPDATE entries SET hash = zeroblob(48) WHERE sequence = 5")
    with pytest.raises(Refused):
        Ledger.open(path)


def test_a_ledger_rolled_back_to_a_copy_is_found_out_by_a_kept_head(path, tmp_path):
    old = filled(path)
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    with Ledger.open(path) as ledger:
        charge(ledger, run="run-4", spend=SMALL)
        kept = ledger.verify([old])
    shutil.copy(copy, path)
    with Ledger.open(path) as ledger:
        # By itself it is whole: this is what a local file cannot tell.
        assert ledger.verify() == old
        with pytest.raises(Refused, match="rolled back"):
            ledger.verify([old, kept])
        # Nor does it help to charge something else in its place.
        charge(ledger, run="run-5", spend=SMALL)
        with pytest.raises(Refused, match="rolled back"):
            ledger.verify([kept])


def test_another_ledger_is_not_taken_for_the_one_that_was_witnessed(path, tmp_path):
    kept = filled(path)
    with (
        Ledger.open(tmp_path / "new", create=True) as ledger,
        pytest.raises(Refused, match="another ledger"),
    ):
        ledger.verify([kept])


def test_heads_survive_their_form_and_nothing_else_is_read(path):
    head = filled(path)
    assert Head.from_dict(head.to_dict()) == head
    for wrong in (
        {},
        {**head.to_dict(), "hash": "00"},
        {**head.to_dict(), "sequence": "5"},
        {**head.to_dict(), "ledger": 7},
    ):
        with pytest.raises(InputError):
            Head.from_dict(wrong)


def test_what_is_no_ledger_is_refused(path):
    path.write_bytes(b"no database at all" * 100)
    path.chmod(0o600)
    with pytest.raises(FedarkError):
        Ledger.open(path)
