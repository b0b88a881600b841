"""A host and nodes as their operators run them: real processes, each party's own folder, and people
who compare fingerprints.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from namespaces import Machine

from fedark.contract.contract import Contract, fingerprint
from fedark.contract.job import DataSpec, Job
from fedark.foundation.files import write_atomic
from fedark.operate.host.admission import approve, invite, request_of
from fedark.operate.host.folder import HostFolder, init_host
from fedark.operate.host.jobs import propose
from fedark.operate.host.store import JOB_ENDS, JobRecord
from fedark.operate.node.folder import NodeFolder, begin_join
from fedark.operate.node.hostsync import OFFERS
from fedark.operate.offer import make_offer
from fedark.operate.party import DataConfig
from fedark.operate.processes import child_environment, session_members, sessions_below
from fedark.sandbox import survey
from fedark.stages.consent import Consent

T = TypeVar("T")
COMMAND = "import sys; from fedark.cli import main; sys.argv[0] = 'fedark'; main()"


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen: {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class World:
    """`machines`: where each party is; none: all on this machine's loopback."""

    def __init__(self, root: Path, machines: Mapping[str, Machine] | None = None) -> None:
        self.root = root
        self.machines = machines or {}
        self.address = (
            f"{machines['pool'].address}:8443" if machines else f"127.0.0.1:{free_port()}"
        )
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._sandbox = survey().mode()
        self.metrics = free_port()
        self.host = init_host(
            root / "host",
            name="pool",
            listen=self.address,
            address=self.address,
            sandbox=self._sandbox,
            metrics=self.metrics,
        )

    def start(self, name: str, *arguments: str) -> None:
        """Start `fedark ARGUMENTS`, in the namespace of `name`."""
        log = (self.root / f"{name}.log").open("ab")
        enter = self.machines[name].enter if self.machines else ()
        command = [*enter, sys.executable, "-P", "-c", COMMAND, *arguments]
        environment = child_environment({"OMP_NUM_THREADS": "1"})
        self._running[name] = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        log.close()

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Call a function on the machine of `name`."""
        return self.machines[name].call(function) if self.machines else function()

    def start_host(self) -> None:
        self.start("pool", "aggregator", "up", str(self.host.path))

    def join(
        self, name: str, role: str, data: DataConfig | None = None, *, metrics: int = 0
    ) -> NodeFolder:
        """An invitation, a folder, the running node's request; then the host's operator approves
        what the node's told.
        """
        invitation = invite(self.host, name, role)  # type: ignore[arg-type]
        node = begin_join(
            self.root / name, invitation, data=data, sandbox=self._sandbox, minimum_cohort=2
        )
        self.start(
            name, "node", "up", str(node.path), *(("--metrics", str(metrics)) if metrics else ())
        )
        return node

    def admit(self, name: str) -> None:
        until(lambda: self.host.store.node(name), f"{name} asks to join")
        row = self.host.store.node(name)
        assert row is not None
        assert row.status == "pending"
        approve(self.host, name, fingerprint(NodeFolder(self.root / name).request.party))
        assert request_of(row).party == NodeFolder(self.root / name).request.party

    def offer(self, provider: str, job: Path) -> None:
        data, _ = make_offer(
            self.root / provider, parsed := Job.load(job, role="provider"), lambda text: None
        )
        write_atomic(self.root / provider / OFFERS / f"{parsed.name}.offer", data)

    def propose(self, job: Path) -> Contract:
        found: list[Contract] = []

        def proposed() -> bool:
            if self.host.store.offer(Job.load(job, role="host").name) is not None:
                found.append(propose(self.host, Job.load(job, role="host")))
            return bool(found)

        until(proposed, "the offer reaches the host")
        return found[0]

    def agree(self, name: str, contract: Contract) -> None:
        consent = Consent(self.root / name)
        until(lambda: contract in consent.proposed(), f"{name} is asked")
        consent.approve(contract)

    def job(self, contract: Contract) -> JobRecord:
        digest = contract.digest().hex()
        return next(job for job in self.host.store.jobs() if job.digest == digest)

    def ended(self, contract: Contract, seconds: float = 150.0) -> JobRecord:
        until(lambda: self.job(contract).status in JOB_ENDS, "the job ends", seconds)
        return self.job(contract)

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return self._running[name]

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def close(self) -> None:
        sessions = sessions_below(
            process.pid for process in self._running.values() if process.poll() is None
        )
        for process in reversed(self._running.values()):
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        until(lambda: not session_members(sessions), "everything ends")


def records(file: Path, fraction: float = 0.25) -> DataConfig:
    return DataConfig(
        file=str(file),
        spec=DataSpec(prompt="{desk}: {message}", answer="action", test_fraction=fraction),
    )


__all__ = ["HostFolder", "World", "free_port", "records", "until"]
