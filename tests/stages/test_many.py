"""A simulation of many customers: what is the same for all of them is there once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import CUSTOMERS, write_job

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.simulation import SharedBases, simulate
from fedark.stages import roster
from fedark.tuning.task import TaskModel


def test_the_trainers_of_one_process_hold_a_base_once_and_train_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.load(write_job(tmp_path / "job", minimum=3))
    share, tasks = SharedBases.share, list[TaskModel]()

    def run(folder: str) -> object:
        with simulate(job, tmp_path / folder) as running:
            return running.run()["models"]["tiny"]["metrics"]

    def watched(self: SharedBases, task: TaskModel) -> None:
        share(self, task)
        tasks.append(task)

    monkeypatch.setattr(SharedBases, "share", watched)
    together = run("together")
    assert len(tasks) == len(CUSTOMERS)
    places: dict[str, set[int]] = {}
    for task in tasks:
        for name, tensor in task.scorer.named_parameters():
            places.setdefault(name, set()).add(tensor.data_ptr())
    for name, found in places.items():
        own = ".lora_" in name or "modules_to_save" in name or name.startswith("head.")
        if "original_module" not in name:  # a fresh head that PEFT keeps; no file holds it
            assert len(found) == (len(CUSTOMERS) if own else 1), name
    monkeypatch.setattr(SharedBases, "share", lambda self, task: None)
    assert run("apart") == together


def test_a_node_reads_its_roster_once_for_a_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Path] = []
    read = roster.read_roster

    def counting(folder: Path) -> dict[str, object]:
        counted.append(folder)
        return dict(read(folder))

    monkeypatch.setattr("fedark.operate.party.read_roster", counting)
    with simulate(Job.load(write_job(tmp_path / "job", minimum=3)), tmp_path / "work") as running:
        running.run()
    assert sorted(folder.name for folder in counted) == sorted([*CUSTOMERS, "maker"])


def test_a_changed_copy_of_a_contract_has_a_digest_of_its_own(tmp_path: Path) -> None:
    with simulate(Job.load(write_job(tmp_path / "job", minimum=3)), tmp_path / "work") as running:
        contract = running.federation.contract
    digest, encoded = contract.digest(), contract.encode()
    for deep in (False, True):
        changed = contract.model_copy(update={"rounds": contract.rounds + 1}, deep=deep)
        assert changed.digest() != digest
        assert Contract.decode(changed.encode()).rounds == contract.rounds + 1
        assert contract.model_copy(deep=deep) == contract
    assert (contract.digest(), contract.encode()) == (digest, encoded)
    assert Contract.decode(encoded) is Contract.decode(bytes(encoded))
