"""A baseline that only some customers train: its figures stay with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import CUSTOMERS, write_job

from fedark.contract.job import Job
from fedark.report.outcome import local_reports, render
from fedark.simulation import simulate


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_figures_of_a_sampled_baseline_stay_with_the_customers_who_trained_it(
    tmp_path: Path, mode: str
) -> None:
    path = write_job(tmp_path / "job", rounds=1, minimum=3)
    overrides = ("models.0.training.baseline_share=0.5", f'protection.mode="{mode}"')
    with simulate(Job.load(path, overrides), tmp_path / "work") as running:
        report = running.run()
        contract = running.federation.contract
        local = local_reports(contract, tmp_path / "work", running.run_id)
    drawn = contract.alone(contract.models[0])
    assert len(drawn) == 2
    assert set(drawn) < set(CUSTOMERS)
    for name in CUSTOMERS:
        assert ("local/own" in local[name]["tiny"]) == (name in drawn)
    assert not any(key.startswith("local/") for key in report["models"]["tiny"]["metrics"])
    assert "by 2 of 3 customers" in report["models"]["tiny"]["alone"]
    assert json.dumps(report).count("before/own") == 1
    render(report, local)


def test_who_trains_the_baseline_follows_from_the_contract_and_its_seed(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", rounds=1)
    drawn = set()
    for seed in range(12):
        overrides = ("models.0.training.baseline_share=0.3", f"job.seed={seed}")
        with simulate(Job.load(path, overrides), tmp_path / "work") as running:
            contract = running.federation.contract
            again = type(contract).decode(contract.encode())
            assert again.alone(again.models[0]) == contract.alone(contract.models[0])
            drawn |= set(contract.alone(contract.models[0]))
    assert drawn == set(CUSTOMERS)
