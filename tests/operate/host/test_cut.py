"""A job between machines whose network fails: one is cut off in the midst of a round, one sends
slowly all the time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from namespaces import network, obstacle
from small import write_job
from world import World, records, until

from fedark.operate.daemon import PROGRESS

CUSTOMERS = ("north", "east")
OUTAGE = 8.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_a_machine_that_is_cut_off_and_one_that_is_slow_cost_a_job_time_and_nothing_else(
    tmp_path: Path,
) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    parties = ("maker", *CUSTOMERS)
    job = write_job(tmp_path / "job", minimum=2, rounds=3, customers=CUSTOMERS)
    with network(("pool", *parties)) as machines:
        world = World(tmp_path, machines)
        try:
            machines["north"].slow("2mbit")
            world.start_host()
            world.join("maker", "provider")
            for name in CUSTOMERS:
                world.join(name, "customer", records(tmp_path / "job" / f"{name}.csv"))
            for name in parties:
                world.admit(name)
            world.offer("maker", job)
            contract = world.propose(job)
            for name in parties:
                world.agree(name, contract)

            told = world.host.party_folder / PROGRESS
            until(
                lambda: told.exists() and "round 1/3" in told.read_text(),
                "the first round begins",
                90,
            )
            machines["east"].cut()
            time.sleep(OUTAGE)
            assert world.job(contract).status == "running"
            assert "round 3/3" not in told.read_text(), "it needs both customers"
            machines["east"].mend()
            assert world.ended(contract).status == "done", (world.log("pool"), world.log("east"))

            report = json.loads(
                next(world.host.party_folder.glob("runs/*/report.json")).read_bytes()
            )
            assert report["passed_over"] == {}
            assert sorted(report["customers"]) == sorted(CUSTOMERS)
            assert all(
                next((tmp_path / name).glob("runs/*/adapter-tiny/adapter_model.safetensors"))
                for name in CUSTOMERS
            )
        finally:
            world.close()
