"""With proxies named for everything and none that answers, what stays on this machine works."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedark.contract.job import Job
from fedark.operate.processes import child_environment, flower_environment
from fedark.simulation import simulate

pytestmark = pytest.mark.usefixtures("dead_proxy")


@pytest.mark.usefixtures("measured_once")
def test_a_simulation_needs_no_network(small_job: Path, tmp_path: Path) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        assert running.run()["models"]["tiny"]["metrics"]


def test_no_child_inherits_a_proxy(tmp_path: Path) -> None:
    for environment in (child_environment({}), flower_environment(tmp_path)):
        assert not [name for name in environment if name.lower().endswith("_proxy")]
