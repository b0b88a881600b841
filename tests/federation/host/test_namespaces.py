"""The deployment test: a host, a provider and two customers on machines of their own, each with its own address."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import network, obstacle
from small import write_job
from world import World, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PARTIES = ("pool", "maker", "north", "east")
LISTENING = """
import sys
table = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").read().splitlines()[1:]]
print(sorted({fields[1] for fields in table if fields[3] == "0A"}))
"""


def listening(enter: tuple[str, ...]) -> str:
    return subprocess.run([*enter, sys.executable, "-c", LISTENING], check=True, capture_output=True, text=True).stdout


def test_a_job_over_four_machines_delivers_the_adapter_and_only_the_hosts_front_can_be_reached(tmp_path: Path) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    customers = ("north", "east")
    job = write_job(tmp_path / "job", minimum=2, rounds=1, customers=customers)
    with network(PARTIES) as machines:
        world = World(
            tmp_path, address=f"{machines['pool'][1]}:8443", inside={name: enter for name, (enter, _) in machines.items()}
        )
        try:
            world.start_host()
            world.join("maker", "provider")
            for name in customers:
                world.join(name, "customer", records(tmp_path / "job" / f"{name}.csv"))
            for name in ("maker", *customers):
                world.admit(name)
            world.offer("maker", job)
            contract = world.propose(job)
            for name in ("maker", *customers):
                world.agree(name, contract)
            record = world.ended(contract, 120)
            assert record.status == "done", (record.reason, world.log("pool"), world.log("north"))
            for name in contract.deliver_to:
                assert list((tmp_path / name).glob("runs/*/adapter-tiny/adapter_model.safetensors")), name
            for name in ("maker", *customers):
                assert listening(machines[name][0]) == "[]\n", "a node makes outbound connections only"
            ports = listening(machines["pool"][0])
            assert ports.count(":20FB") == 1
            assert all(
                entry.strip(" '").startswith("0100007F:") for entry in ports.strip("[]\n").split(",") if ":20FB" not in entry
            )
        finally:
            world.close()
