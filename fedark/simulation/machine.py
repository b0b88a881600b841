"""A host and its nodes on this machine, made and run by what their operators use: `fedark
aggregator up` and `fedark node up` as processes, and the functions behind `init`, `invite`, `join`,
`approve`, `offer`, `jobs submit` and `node approve`. For `fedark demo`, benchmarks and tests.

    ROOT/host/           the host's folder (`fedark.operate.host.folder`)
    ROOT/parties/NAME/   a node's folder (`fedark.operate.node.folder`)
    ROOT/records/        the parts of records that the job file deals out
    ROOT/logs/           what the processes said

    with Machine(root) as machine:
        report = machine.finish(machine.begin(job, sandbox=sandbox), timeout=240)

Here one person plays all operators, so fingerprints are compared by the machine and every contract
is agreed to; nothing else is different. A folder that was used before is used on: keys, ledgers and
earlier runs stay. Leaving the `with` block, in whatever way (end, exception, Ctrl-C, SIGTERM,
SIGHUP), ends every process. If this process itself is killed, the kernel ends the rest.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from fedark.contract.contract import Contract, fingerprint
from fedark.contract.job import Job
from fedark.foundation.errors import FederationError, restore
from fedark.foundation.files import private_directory, write_atomic
from fedark.foundation.keys import HYBRID, Kem
from fedark.operate.daemon import PROGRESS
from fedark.operate.host.admission import approve, invite
from fedark.operate.host.folder import HostFolder, init_host
from fedark.operate.host.jobs import propose
from fedark.operate.host.store import JOB_ENDS, JobRecord
from fedark.operate.node.folder import NodeFolder, begin_join
from fedark.operate.node.hostsync import OFFERS
from fedark.operate.node.queries import NodeQueries
from fedark.operate.offer import make_offer
from fedark.operate.party import POLICY, BudgetConfig, DataConfig, PartyConfig
from fedark.operate.processes import child_environment, console_script
from fedark.operate.progress import Tail
from fedark.operate.state import STATE
from fedark.operate.supervisor import Supervised, Supervisor
from fedark.sandbox.confine import Mode
from fedark.simulation.local import checked_records, customer_data, policy_of
from fedark.stages.consent import Consent

__all__ = ["Machine", "free_port"]

HOST_UP = console_script("fedark", "aggregator", "up")
NODE_UP = console_script("fedark", "node", "up")
_ATTEMPTS, _LONGEST_PAUSE = 5, 4.0
_GRACE = 20.0
_STEP_SECONDS = 120.0
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
Say = Callable[[str], None]


class Machine:
    """See the module's docstring. Use it as a context manager, in a thread that stays.

    Args:
        root: folder of everything; made if missing.
        say: told of what goes on at every party.
        host_up, node_up: commands that run a host's and a node's folder, which is added.
    """

    def __init__(
        self,
        root: Path,
        say: Say = lambda text: None,
        *,
        host_up: Sequence[str] = HOST_UP,
        node_up: Sequence[str] = NODE_UP,
    ) -> None:
        self.root = root.resolve()
        self.left_out: dict[str, str] = {}
        self._say = say
        self._up = {"host": host_up, "node": node_up}
        self._host: HostFolder | None = None
        self._tails: list[Tail] = []
        self._handlers: dict[signal.Signals, Any] = {}
        for folder in (self.root, self.root / "parties", self.root / "logs"):
            private_directory(folder)
        self._children = Supervisor(self.root / "logs", say, longest=_LONGEST_PAUSE)

    @property
    def host(self) -> HostFolder:
        """The host's folder."""
        if self._host is None:
            raise FederationError("The host is not there yet.")
        return self._host

    def folder(self, party: str) -> Path:
        """The folder of a party; of the aggregator, that in the host's."""
        if party == self.host.config.name:
            return self.host.party_folder
        return self.root / "parties" / party

    def process(self, party: str) -> Supervised:
        """The process that runs a party: the host's for the aggregator."""
        return self._children[party]

    def processes(self) -> tuple[Supervised, ...]:
        """All of them, in the order of their starts."""
        return self._children.all

    # -- operators

    def start_host(
        self, name: str, *, sandbox: Mode, port: int = 0, kem: Kem = HYBRID
    ) -> HostFolder:
        """Make a host, or take the one that is here, and run it.

        Args:
            port: of a new one on loopback; 0 takes a free one.
        """
        folder = self.root / "host"
        if (folder / STATE).exists():
            self._host = HostFolder.open(folder)
        else:
            address = f"127.0.0.1:{port or free_port()}"
            self._host = init_host(
                folder, name=name, listen=address, address=address, sandbox=sandbox, kem=kem
            )
        self._say(f"the host listens on {self._host.config.listen}")
        self._start(name, [*self._up["host"], str(folder)], self._host.party_folder)
        return self._host

    def join(
        self,
        name: str,
        role: str,
        *,
        data: DataConfig | None = None,
        accepts: Mapping[str, Any],
        kem: Kem = HYBRID,
        host: HostFolder | None = None,
    ) -> NodeFolder:
        """Make a node by invitation, or take the one that is here, and run it.

        Args:
            accepts: what its `party.toml` shall say besides.
            host: who invites; this machine's by default.
        """
        folder = self.root / "parties" / name
        if not (folder / STATE).exists():
            begin_join(
                folder,
                invite(host or self.host, name, role),  # type: ignore[arg-type]
                data=data,
                sandbox=accepts["sandbox"],
                minimum_cohort=accepts["minimum_cohort"],
                kem=kem,
            )
        config = PartyConfig.read(folder)
        config.model_copy(update={**accepts, "data": data}).write(folder)
        self._start(name, [*self._up["node"], str(folder)], folder)
        return NodeFolder(folder)

    def admit(self, names: Sequence[str], host: HostFolder | None = None) -> None:
        """Compare fingerprints and approve who has asked; ends when all have joined."""
        store = self.host.store
        for name in names:
            self.until(partial(store.node, name), f"{name} asks to join")
            row = store.node(name)
            if row is not None and row.status == "pending":
                asked = NodeFolder(self.folder(name)).request
                approve(host or self.host, name, fingerprint(asked.party))
        for name in names:
            node = NodeFolder(self.folder(name))
            self.until(partial(getattr, node, "joined"), f"{name} has joined")
            self._say(f"{name} has joined")

    def offer(self, job: Job) -> None:
        """Seal the job's models for the provider, and have its node bring them to the host."""
        self._say("the provider seals its models")
        folder = self.folder(job.provider)
        data, self.left_out = make_offer(folder, job, self._say)
        offers = private_directory(folder / OFFERS)
        write_atomic(offers / f"{job.name}.offer", data, mode=0o600)
        store = self.host.store
        self.until(lambda: store.offer(job.name) == data, "the offer reaches the host", 600.0)

    def agree(self, contract: Contract) -> None:
        """Agree to a contract at every node."""
        for party in (contract.provider, *contract.customers):
            folder = self.folder(party.name)
            # What this machine measures of itself says nothing of a guest's image.
            if contract.attestation.hardware.tables() or (folder / POLICY).exists():
                write_atomic(folder / POLICY, policy_of(contract))
            consent = Consent(folder)
            asked = partial(_was_asked, consent, contract)
            self.until(asked, f"{party.name} is asked")
            consent.approve(contract)

    # -- a job

    def begin(self, job: Job, *, sandbox: Mode, port: int = 0) -> Contract:
        """Everything from the first invitation to the last approval of a job.

        Raises:
            ContractError: records, labels or models do not fit, with every problem at once; nothing
                was started.
        """
        parts = checked_records(job, self._say).dealt
        kem = job.attestation.kem
        accepts = {
            "sandbox": sandbox,
            "minimum_cohort": job.protection.minimum_cohort,
            "platforms": job.attestation.platforms,
            "kem": (kem,),
        }
        self.start_host(job.aggregator, sandbox=sandbox, port=port, kem=kem)
        self.join(job.provider, "provider", accepts=accepts, kem=kem)
        for name in job.customer_names:
            records = private_directory(self.root / "records") / f"{name}.jsonl"
            data = customer_data(job, name, parts, records)
            budget = _budget(self.root / "parties" / name, job)
            self.join(name, "customer", data=data, accepts={**accepts, "budget": budget}, kem=kem)
        self.admit([job.provider, *job.customer_names])
        self.offer(job)
        self._say("measuring the enclaves, for the contract")
        contract = propose(self.host, job)
        self.agree(contract)
        return contract

    def finish(
        self,
        contract: Contract,
        *,
        timeout: float,
        on_look: Callable[[], None] = lambda: None,
        pause: float = 0.3,
    ) -> dict[str, Any]:
        """Wait for the end of a job; returns the aggregator's report.

        Args:
            timeout: seconds.
            on_look: called at every look.
            pause: seconds between two looks.

        Raises:
            FedarkError: why the job ended without a report, or did not end in time.
        """

        def ended() -> bool:
            on_look()
            return self.job(contract).status in JOB_ENDS

        self.until(ended, "the job ends", timeout, pause)
        record = self.job(contract)
        outcome = self.host.party_folder / "runs" / record.run
        if record.status == "done":
            report: dict[str, Any] = json.loads((outcome / "report.json").read_bytes())
            return report
        if record.run and (outcome / "failed.json").is_file():
            # The coordinator's own words say more.
            failed = json.loads((outcome / "failed.json").read_bytes())
            raise restore(failed["code"], failed["what"], safe=failed["safe"], fix=failed["fix"])
        raise FederationError(
            f"The job is {record.status}: {record.reason}",
            fix=f"See the logs in {self.host.supervisor / 'logs'} and {self.root / 'logs'}.",
        )

    def job(self, contract: Contract) -> JobRecord:
        """What the host knows of a job."""
        digest = contract.digest().hex()
        return next(job for job in self.host.store.jobs() if job.digest == digest)

    # -- processes

    def look(self) -> None:
        """Start again what has ended, and tell what is new.

        Raises:
            FederationError: a host or node has ended too often in a row.
        """
        self._children.look()
        for tail in self._tails:
            for line in tail.lines():
                self._say(f"{tail.party}: {line}")
        for kept in self._children.all:
            if kept.failures >= _ATTEMPTS:
                raise FederationError(
                    f"{kept.name} has ended {kept.failures} times in a row and is not started any"
                    f" more. {kept.last_end}",
                    safe="What the parties keep of the run is on their disks.",
                    fix=f"Logs are in {self.root / 'logs'}.",
                )

    def until(
        self,
        condition: Callable[[], object],
        what: str,
        seconds: float = _STEP_SECONDS,
        pause: float = 0.2,
    ) -> None:
        """Ask until it is so.

        Raises:
            FederationError: it was not within `seconds`; or a process kept ending.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.look()
            if time.monotonic() > deadline:
                raise FederationError(
                    f"It did not happen within {seconds:g} s: {what}.",
                    fix=f"Look into {self.host.supervisor / 'logs'} and {self.root / 'logs'}.",
                )
            time.sleep(pause)
        self.look()

    def close(self) -> None:
        """End every process; signals wait until it is done.

        Raises:
            FederationError: a process is left.
        """
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)
        try:
            self._children.close(grace=_GRACE)
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()

    def __enter__(self) -> Machine:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, _leave)
            self._handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, name: str, command: Sequence[str], folder: Path) -> None:
        self._tails.append(Tail(name, folder / PROGRESS))
        self._children.keep(name, command, child_environment({}))


def _budget(folder: Path, job: Job) -> BudgetConfig:
    """Whoever runs all parties on one machine has agreed to a job's own epsilon, besides what
    earlier jobs in the folder have spent.
    """
    budget = BudgetConfig(epsilon=job.privacy.epsilon, delta=job.privacy.delta)
    spent = 0.0
    if (folder / STATE).exists():
        PartyConfig.read(folder).model_copy(update={"budget": budget}).write(folder)
        spent = max(value for of, value in NodeQueries(folder).budget().items() if of != "limit")
    return budget.model_copy(update={"epsilon": (spent + job.privacy.epsilon) * (1 + 1e-6)})


def _was_asked(consent: Consent, contract: Contract) -> bool:
    return contract in consent.proposed()


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
