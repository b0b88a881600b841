"""kill -9 at any moment: a charge is made whole or not at all, is never forgotten once it returned,
and is never made twice.
"""

from __future__ import annotations

import os
import random
import select
import signal

import pytest

from fedark.privacy.accounting import Budget, Event, Spend, cost
from fedark.privacy.ledger import Ledger, record_bytes

DELTA = 1e-5
JOB = Spend((Event(1.5, 1.0, 1),))
ONE, TWO = (cost([JOB] * jobs, DELTA)[0] for jobs in (1, 2))
RECORDS = [record_bytes(f"record {number}") for number in range(12)]


def charge(ledger, run, records=RECORDS):
    budget = Budget(1e6, DELTA)
    return ledger.charge(
        records,
        contract_digest=b"c" * 48,
        run_id=run,
        spend=JOB,
        releases=1000,
        budget=budget,
        now=1,
    )


def in_child(work):
    """Fork, run `work(write_end)`, and return its pid and the end to read from. The child never
    returns.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return child, read


def killed(child):
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def dying(path, step, at, count_after):
    """A child that makes `step` and kills itself before the statement number `at`, or after it
    returned from SQLite.
    """

    def work(_):
        with Ledger.open(path) as ledger:
            seen = 0

            def trace(_):
                nonlocal seen
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

            ledger._database.set_trace_callback(trace)
            step(ledger)
            if count_after:
                os.kill(os.getpid(), signal.SIGKILL)

    child, read = in_child(work)
    os.close(read)
    return killed(child)


@pytest.mark.parametrize("kind", ["first charge", "charge that splits", "release"])
def test_a_kill_before_every_statement_leaves_all_or_nothing(tmp_path, kind):
    statement = 0
    while True:
        path = tmp_path / f"{statement}.sqlite"
        with Ledger.open(path, create=True) as ledger:
            if kind != "first charge":
                charge(ledger, "old", RECORDS[:6])
            start = ledger.head().sequence
        records = RECORDS[3:9] if kind == "charge that splits" else RECORDS

        def step(ledger, records=records):
            return ledger.release(1, 0, 1) if kind == "release" else charge(ledger, "new", records)

        died = dying(path, step, statement, count_after=False)
        with Ledger.open(path) as ledger:
            ledger.verify()
            done = ledger.head().sequence - start
            assert done in (0, 1)
            if kind == "release":
                assert charge(ledger, "old", RECORDS[:6]).next_release == done
                if not done:
                    step(ledger)
            else:
                receipt = step(ledger)
                assert receipt.resumed == bool(done)
                assert receipt.spent.epsilon == (TWO if kind == "charge that splits" else ONE)
            assert ledger.head().sequence == start + 1
            ledger.verify()
        if not died:
            assert done == 1
            break
        assert done == 0
        statement += 1
    # Otherwise the trace saw nothing, and nothing was tested.
    assert statement >= (5 if kind == "release" else 10)


def test_a_charge_that_returned_survives_a_kill(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, create=True).close()
    assert dying(path, lambda ledger: charge(ledger, "run"), -1, count_after=True)
    with Ledger.open(path) as ledger:
        assert charge(ledger, "run").resumed
        ledger.verify()


def test_kills_at_random_moments_lose_nothing_that_was_reported(tmp_path):
    """A child charges and releases without end and reports each success; whatever was reported is
    there afterwards.
    """
    path, draw = tmp_path / "ledger.sqlite", random.Random(11)
    Ledger.open(path, create=True).close()
    reported = 0
    for trial in range(12):

        def work(write, trial=trial):
            random.seed(trial)
            with Ledger.open(path) as ledger:
                for number in range(10_000):
                    receipt = charge(ledger, f"run-{trial}-{number}", random.sample(RECORDS, 5))
                    os.write(write, b"c")
                    ledger.release(receipt.charge, 0, 1)
                    os.write(write, b"r")

        child, read = in_child(work)
        wanted, seen = draw.randint(1, 25), b""
        # Die at a moment counted in successes, and a random bit later.
        while len(seen) < wanted:
            seen += os.read(read, 1)
        for _ in range(draw.randint(0, 20_000)):
            pass
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        while select.select([read], [], [], 0)[0] and (more := os.read(read, 4096)):
            seen += more
        os.close(read)
        with Ledger.open(path) as ledger:
            entries = ledger.verify().sequence
            # One more than was reported may have been written: killed between the commit and the
            # report.
            assert reported + len(seen) <= entries <= reported + len(seen) + 1
            reported = entries


def test_a_kill_while_the_ledger_is_made_leaves_none_or_an_empty_one(tmp_path):
    for trial in range(10):
        path = tmp_path / f"{trial}.sqlite"

        def work(write, path=path):
            os.write(write, b"x")
            Ledger.open(path, create=True)

        child, read = in_child(work)
        os.read(read, 1)
        for _ in range(trial * 3000):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        with Ledger.open(path, create=True) as ledger:
            assert ledger.verify().sequence == 0
