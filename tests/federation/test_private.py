"""Whole jobs under the privacy mechanisms: what leaves is noised as accounted, and nothing leaves beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import write_job

from fedark.job import Job
from fedark.simulation import simulate

TERMS = {
    "example-distributed": ("privacy.epsilon=8.0", "privacy.records=90", "privacy.sampling_rate=0.5"),
    "example-local": (
        "privacy.epsilon=8.0",
        "privacy.records=90",
        "privacy.sampling_rate=0.5",
        "privacy.local_steps=2",
    ),
    "customer-level": ("privacy.epsilon=8.0",),
}


def _job(folder: Path, mechanism: str, *more: str) -> Job:
    path = write_job(folder, minimum=3)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    return Job.load(path, (f'privacy.mechanism="{mechanism}"', *TERMS[mechanism], *more))


@pytest.mark.parametrize("mode", ["sealed", "masked"])
@pytest.mark.parametrize("mechanism", TERMS)
def test_each_mechanism_runs_under_each_protection_and_says_what_it_guarantees(
    mechanism: str, mode: str, tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", mechanism, f'protection.mode="{mode}"')
    with simulate(job, tmp_path / "work") as running:
        report: dict[str, Any] = running.run()
    privacy = report["privacy"]
    assert privacy["mechanism"] == mechanism
    assert all(0 < entry["epsilon"] <= 8.001 and entry["delta"] == 1e-5 for entry in privacy["guarantees"])
    metrics = report["models"]["tiny"]["metrics"]
    assert set(metrics) == {"before/acceptance/north", "federated/acceptance/north"}
    assert report["models"]["tiny"]["train_loss"] == []
