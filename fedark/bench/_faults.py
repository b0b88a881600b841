"""A host and nodes on this machine whose processes can be found by what they are, and killed:
`fedark bench recovery`, tests/chaos.

Recovery is counted from the SIGKILL to the first step that the job had not begun before: a new
stage that the coordinator tells of. So it holds the rest of the stage that was hit, done again
where it must be.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedark.contract.contract import Contract
from fedark.enclave.usage import processes_below
from fedark.operate.daemon import PROGRESS
from fedark.sandbox.monitor import MONITOR
from fedark.simulation.machine import Machine

__all__ = ["TARGETS", "Kill", "Victim", "run_with_kills", "step_of"]

TARGETS = (
    "host",
    "front",
    "SuperLink",
    "executor",
    "ServerApp",
    "aggregator host",
    "aggregator enclave",
    "provider node",
    "customer",
    "customer node",
    "node connection",
    "trainer enclave",
    "all at once",
)
"""`host` and `customer` are the supervisors: with one of them dies all that it has started."""
_STAGES = (
    "enrol",
    "attest",
    "release",
    "load",
    "round",
    "endorse",
    "unmask",
    "measure",
    "evaluate",
    "deliver",
)
_LINE = re.compile(r"^(\w+)(?: (\d+)(?:/\d+)?)?: ")


@dataclass(frozen=True)
class Kill:
    """One kill: what, in which step of the job, how many seconds until the job's next step, and how
    many processes died.
    """

    target: str
    during: str
    seconds: float
    processes: int


def step_of(line: str, rounds: int) -> tuple[int, int] | None:
    """Where the job is, in an order, after a line of the coordinator; None for other lines."""
    match = _LINE.match(line)
    if match is None or match[1] not in _STAGES:
        return None
    stage, number = match[1], int(match[2] or 0)
    if stage == "evaluate":
        number = rounds + 1
    if stage == "deliver":
        number = rounds + 2
    inner = (
        _STAGES.index(stage)
        if number == 0
        else {"endorse": 1, "unmask": 2, "measure": 3}.get(stage, 0)
    )
    return number, inner


class Victim:
    """The running host and nodes of a job.

    Args:
        machine: entered already.
        contract: of the job.
        seed: of the choice among equals.
    """

    def __init__(self, machine: Machine, contract: Contract, seed: int) -> None:
        self.machine, self.contract = machine, contract
        self._random = random.Random(seed)  # noqa: S311
        self._pool = contract.aggregator.name
        self._provider = contract.provider.name
        self._customers = [party.name for party in contract.customers]
        self._rounds = contract.rounds
        self._told = machine.folder(self._pool) / PROGRESS

    @property
    def report(self) -> Path | None:
        """The job's report, once it is there."""
        return next((self.machine.folder(self._pool) / "runs").glob("*/report.json"), None)

    @property
    def failed(self) -> Path | None:
        """The word that the job failed."""
        return next((self.machine.folder(self._pool) / "runs").glob("*/failed.json"), None)

    def steps(self) -> list[tuple[tuple[int, int], str]]:
        """Every step that the coordinator told of, in the order of the telling, with its line."""
        if not self._told.exists():
            return []
        lines = [line.partition(" ")[2] for line in self._told.read_text().splitlines()]
        return [(step, line) for line in lines if (step := step_of(line, self._rounds)) is not None]

    def furthest(self) -> tuple[int, int]:
        """The furthest step so far."""
        return max((step for step, _ in self.steps()), default=(-1, -1))

    def kill(self, target: str) -> tuple[str, int]:
        """Kill it, or several joined by " + " (SIGKILL).

        Returns:
            The line of the step that the job was in, and how many processes there were to kill.
        """
        pids = {pid for name in target.split(" + ") for pid in self.pids(name)}
        steps = self.steps()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return (steps[-1][1] if steps else "start"), len(pids)

    def pids(self, target: str) -> list[int]:
        """The processes that a target names now; of several alike one, at random."""
        if target == "all at once":
            tops = [self._top(name) for name in (self._pool, self._provider, *self._customers)]
            return [pid for top in tops if top for pid in (top, *processes_below(top))]
        customer = self._random.choice(self._customers)
        pid = {
            "host": lambda: self._top(self._pool),
            "front": lambda: self._below_with(self._pool, "operate.host.front"),
            "SuperLink": lambda: self._below_with(self._pool, " superlink --"),
            "executor": lambda: self._below_with(self._pool, " superexec --"),
            "ServerApp": lambda: self._below_with(self._pool, " serverapp --"),
            "aggregator host": lambda: self._below_with(self._pool, "operate.daemon"),
            "aggregator enclave": lambda: self._enclave(self._pool),
            "provider node": lambda: self._below_with(self._provider, "operate.daemon"),
            "customer": lambda: self._top(customer),
            "customer node": lambda: self._below_with(customer, "operate.daemon"),
            "node connection": lambda: self._below_with(customer, "flower.supernode"),
            "trainer enclave": lambda: self._enclave(customer),
        }[target]()
        return [pid] if pid else []

    def _top(self, party: str) -> int:
        return self.machine.process(party).pid

    def _enclave(self, party: str) -> int:
        # The enclave, which shows no command line, is below the monitor that stands between it and
        # its host, and leads a session.
        monitors = [
            pid
            for pid in self._below(party)
            if _read(pid, "comm").strip() == MONITOR and _leads(pid)
        ]
        return next((pid for monitor in reversed(monitors) for pid in processes_below(monitor)), 0)

    def _below_with(self, party: str, words: str) -> int:
        return next((pid for pid in self._below(party) if words in _read(pid, "cmdline")), 0)

    def _below(self, party: str) -> list[int]:
        top = self._top(party)
        return processes_below(top) if top else []


def _leads(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _read(pid: int, name: str) -> str:
    try:
        return (
            Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        )
    except OSError:
        return ""


def run_with_kills(
    victim: Victim,
    plan: Iterator[tuple[str, float]],
    *,
    timeout: float,
    say: Callable[[str], None] = lambda text: None,
) -> list[Kill]:
    """Bring the job to its end, killing what `plan` gives (target, seconds after the
    last recovery) on the way.

    Raises:
        FedarkError: the job failed or did not end in time.
    """
    done: list[Kill] = []
    following = next(plan, None)
    due = time.monotonic() + (following[1] if following else 0.0)
    pending: tuple[str, str, float, tuple[int, int], int] | None = None

    def look() -> None:
        nonlocal following, due, pending
        now = time.monotonic()
        if pending is not None and (victim.furthest() > pending[3] or victim.report is not None):
            target, during, since, _, count = pending
            done.append(Kill(target, during, now - since, count))
            say(f"{len(done):3} {target:20} {during:40} {now - since:6.1f} s")
            pending = None
            following = next(plan, None)
            due = now + (following[1] if following else 0.0)
        elif pending is None and following is not None and now >= due:
            if victim.report is not None:
                following = None
                return
            before = victim.furthest()
            during, count = victim.kill(following[0])
            if count:
                pending = following[0], during, now, before, count

    victim.machine.finish(victim.contract, timeout=timeout, on_look=look, pause=0.1)
    look()
    return done
