"""Jobs that run one after the other in the same folder: nothing of a former one is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import CUSTOMERS, write_job

from fedark.contract.job import Job
from fedark.contract.privacy import strongest_spend
from fedark.foundation.errors import FederationError, InputError
from fedark.privacy.accounting import cost
from fedark.privacy.ledger import LEDGER, Ledger
from fedark.simulation import simulate
from fedark.simulation.local import prepare


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_leaves_what_the_first_and_others_made(tmp_path: Path) -> None:
    job, work = Job.load(write_job(tmp_path / "job", minimum=3)), tmp_path / "work"
    with simulate(job, work) as running:
        first = running.run()["run_id"]
    foreign = [work / "parties" / "notes.txt", work / "parties" / "north" / "mine.txt"]
    for path in foreign:
        path.write_text("kept")
    before = _files(work)
    with simulate(job, work) as running:
        second = running.run()["run_id"]
    after = _files(work)
    lasting = {
        path
        for path in before
        if path in foreign or {"runs", "catalogue", "party.keys"} & set(path.parts)
    }
    changed = {path for path in lasting if after.get(path) != before[path]}
    # Where an aggregator's run goes on; it names the latest.
    assert changed <= {work / "parties" / "pool" / "run"}
    assert before.keys() - after.keys() == set()
    for party in ("maker", *CUSTOMERS):
        for run in (first, second):
            folder = work / "parties" / party / "runs" / run
            assert json.loads((folder / "report.json").read_bytes())["run_id"] == run


def test_repeated_private_runs_are_charged_to_one_ledger_and_the_total_is_said(
    tmp_path: Path,
) -> None:
    path, work = write_job(tmp_path / "job", minimum=3, rounds=1), tmp_path / "work"
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    job = Job.load(
        path,
        ('privacy.mechanism="customer-level"', "privacy.epsilon=4.0", "privacy.accept_noise=true"),
    )
    for number in (1, 2, 3):
        with simulate(job, work) as running:
            running.run()
            federation = running.federation
        spend = strongest_spend(federation.contract)
        assert spend is not None
        with Ledger.open(work / "parties" / "north" / LEDGER) as ledger:
            ledger.verify()
            charges = [entry for entry in ledger.entries() if entry["kind"] == "charge"]
        assert len(charges) == number
        epsilon = cost([spend] * number, 1e-5)[0]
        if number == 1:
            assert federation.spent == ""
            assert epsilon == pytest.approx(4.0, rel=1e-3)
        else:
            assert f"{number - 1} earlier private" in federation.spent
            assert f"epsilon {epsilon:.3g} at delta 1e-05" in federation.spent


def test_a_folder_of_something_else_and_keys_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    job, other = Job.load(write_job(tmp_path / "job", minimum=3)), tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("kept")
    with pytest.raises(InputError, match="not a former federation"):
        prepare(job, other, sandbox="none")
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    work = tmp_path / "work"
    prepare(job, work, sandbox="none")
    before = _files(work)
    classical = Job.load(job.path, ('attestation.kem="x25519"',))
    with pytest.raises(InputError, match="has keys for"):
        prepare(classical, work, sandbox="none")
    assert _files(work) == before


def test_of_two_simulations_in_one_folder_at_once_the_second_is_refused(tmp_path: Path) -> None:
    job, work = Job.load(write_job(tmp_path / "job", minimum=3)), tmp_path / "work"
    with simulate(job, work) as running:
        before = _files(work)
        with (
            pytest.raises(FederationError, match="Another process runs") as refused,
            simulate(job, work),
        ):
            pass
        assert "--work" in str(refused.value)
        assert _files(work) == before
        assert running.run()["models"]["tiny"]
    with simulate(job, work) as running:  # it is free again
        assert running.run()["models"]["tiny"]
