"""Faults that are no death: a full disk, a damaged checkpoint, a clock that jumps, a second node, a
network that is cut or slow.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mortal import Fate, World
from proxy import Wire
from small import write_job

from fedark.bench._echo import NODE_UP, host_up
from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation.errors import FederationError
from fedark.links.flower import configuration
from fedark.operate.host.folder import host_of, port_of
from fedark.operate.host.jobs import propose
from fedark.operate.node.folder import NodeFolder
from fedark.operate.processes import Child, flower_environment, module
from fedark.sandbox import survey
from fedark.simulation.local import Federation, customer_data, prepare
from fedark.simulation.machine import Machine
from fedark.stages import customer, node

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("prepared")
    path = write_job(folder / "job", rounds=3, minimum=2, records=16)
    return prepare(Job.load(path), folder / "work", sandbox="none")


@pytest.fixture
def world(prepared: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[World] = []

    def make(fate: Fate) -> World:
        shutil.copytree(prepared.work, tmp_path / "work")
        made.append(World(Federation(tmp_path / "work", prepared.contract, {}), fate, monkeypatch))
        return made[-1]

    yield make
    for one in made:
        one.close()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def at_round(running: World, name: str, number: int, then: Any) -> None:
    """Do something when the node `name` is asked for that round, before it begins."""
    real = running.ask

    def ask(party: str, request: bytes) -> bytes:
        from fedark.v1 import stage_pb2

        message = stage_pb2.StageRequest.FromString(request)
        if (
            party == name
            and message.WhichOneof("body") == "round"
            and message.round.round == number
        ):
            then()
        return real(party, request)

    running.ask = ask  # type: ignore[method-assign]


def test_a_damaged_checkpoint_costs_its_owner_the_run_and_nobody_else(world) -> None:
    fate = Fate()
    fate.planned = {("north", "round", "before"): 1}
    running = world(fate)
    folder = running.federation.folder("north") / "runs"
    at_round(running, "north", 2, lambda: damage(next(folder.glob("*/enclave/state"))))

    def killed_again() -> None:
        running.nodes["north"].close()
        running.nodes["north"] = running.start("north")

    at_round(running, "north", 2, killed_again)
    report = running.run()
    assert "is damaged or of another version" in report["passed_over"]["north"]
    assert report["customers"] == ["east", "south"]
    assert running.adapter("east")


def test_a_nodes_damaged_state_is_refused_by_name(world) -> None:
    running = world(Fate())
    folder = running.federation.folder("north") / "runs"

    def restart() -> None:
        damage(next(folder.glob("*/state")))
        running.nodes["north"].close()
        running.nodes["north"] = running.start("north")

    at_round(running, "north", 2, restart)
    report = running.run()
    assert "damaged or was altered" in report["passed_over"]["north"]


def test_a_disk_that_is_full_stops_its_owner_with_a_clear_word_and_leaves_what_stood(
    world, tmp_path: Path
) -> None:
    running = world(Fate())
    runs = running.federation.folder("north") / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(runs)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        filler = runs / "filler"

        def fill() -> None:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        at_round(running, "north", 2, fill)
        report = running.run()
        why = report["passed_over"]["north"]
        assert "could not be written" in why
        assert report["customers"] == ["east", "south"]
        assert not [path for path in runs.rglob(".*") if path.is_file()], (
            "nothing half-written is left"
        )
    finally:
        running.close()
        subprocess.run(["umount", str(runs)], check=True)


@pytest.mark.parametrize("jump", [timedelta(hours=-3), timedelta(hours=3)], ids=["back", "ahead"])
def test_a_clock_that_jumps_in_the_midst_of_a_run_does_not_end_it(
    world, monkeypatch: pytest.MonkeyPatch, jump
) -> None:
    running = world(Fate())
    # The contract is valid for days, from a moment ago: a clock that is back before it is out of
    # the contract.
    if jump < timedelta():
        earlier = datetime.fromisoformat(running.federation.contract.created) - datetime.now(UTC)
        jump = max(jump, earlier / 2)

    def moved() -> None:
        for one in (customer, node):
            monkeypatch.setattr(one, "now", lambda: datetime.now(UTC) + jump)

    at_round(running, "north", 2, moved)
    assert running.run()["passed_over"] == {}


def test_a_clock_beyond_the_contract_is_a_refusal_that_says_so(
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = world(Fate())
    at_round(
        running,
        "north",
        2,
        lambda: monkeypatch.setattr(node, "now", lambda: datetime.now(UTC) + timedelta(days=999)),
    )
    with pytest.raises(FederationError) as caught:
        running.run()
    assert "The contract is not valid any more" in str(caught.value)


# -- real processes


@dataclass
class Wired:
    """A host and its nodes, of which `south` reaches the host through a wire of the test's."""

    machine: Machine
    wire: Wire
    seconds: Path

    def run(self, job: Job) -> Contract:
        """Every step up to a running job."""
        machine, sandbox = self.machine, survey().mode()
        accepts = {"sandbox": sandbox, "minimum_cohort": 2}
        through = replace(
            machine.host,
            config=machine.host.config.model_copy(
                update={"address": f"127.0.0.1:{self.wire.port}"}
            ),
        )
        machine.join("maker", "provider", accepts=accepts)
        for name in job.customer_names:
            machine.join(
                name,
                "customer",
                data=customer_data(job, name, {}, Path()),
                accepts=accepts,
                host=through if name == "south" else None,
            )
        machine.admit(["south"], through)
        machine.admit(["maker", *job.customer_names])
        machine.offer(job)
        contract = propose(machine.host, job)
        machine.agree(contract)
        return contract


@contextlib.contextmanager
def wired_machine(root: Path, sizes: list[int]) -> Iterator[tuple[Wired, Job]]:
    job = Job.load(write_job(root / "job", minimum=2, records=16))
    seconds = root / "seconds.json"
    settings = {
        "parties": list(job.customer_names),
        "expect": 1 + len(job.customers),
        "sizes": sizes,
        "out": str(seconds),
    }
    with Machine(root / "machine", host_up=host_up(settings), node_up=NODE_UP) as machine:
        machine.start_host("pool", sandbox=survey().mode())
        listen = machine.host.config.listen
        wire = Wire((host_of(listen), port_of(listen)))
        try:
            yield Wired(machine, wire, seconds), job
        finally:
            wire.close()


@slow
def test_a_network_that_is_cut_and_mended_costs_time_and_nothing_else(tmp_path: Path) -> None:
    with wired_machine(tmp_path, [100_000] * 8) as (wired, job):
        contract = wired.run(job)
        cuts = threading.Thread(target=_cut_thrice, args=(wired.wire,))
        cuts.start()
        wired.machine.finish(contract, timeout=200)
        cuts.join()
    assert wired.seconds.exists(), "every stage was answered with its own bytes"


def _cut_thrice(wire: Wire) -> None:
    seen = wire.carried
    for _ in range(3):
        while wire.carried < seen + 300_000:  # so much has passed since the last time
            time.sleep(0.02)
        wire.sever()
        time.sleep(1.0)  # the length of the outage, not a wait for something
        wire.cut, seen = False, wire.carried


@slow
def test_a_slow_network_carries_large_messages_in_pieces(tmp_path: Path) -> None:
    with wired_machine(tmp_path, [1000] * 2 + [3_000_000]) as (wired, job):
        contract = wired.run(job)
        wired.wire.rate = 1_000_000
        wired.machine.finish(contract, timeout=200)
    assert wired.seconds.exists()


@slow
def test_a_second_node_with_the_same_key_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with wired_machine(tmp_path, [1000] * 8) as (wired, job):
        contract = wired.run(job)
        north = NodeFolder(wired.machine.folder("north"))
        connection = configuration.Connection(
            north.admission.address,
            str(north.ca),
            str(north.path / "transport.key"),
            str(tmp_path / "none.sock"),
        )
        file = configuration.write(tmp_path / "second.json", connection)
        second = Child(
            "second",
            module("fedark.links.flower.supernode", str(file)),
            environment=flower_environment(tmp_path / "second"),
            log=tmp_path / "second.log",
        )
        assert second.wait(60)
        assert second.exit_code != 0
        assert "Failed to activate" in second.log.read_text()
        wired.machine.finish(contract, timeout=200)
