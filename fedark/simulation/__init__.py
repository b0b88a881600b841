"""`fedark simulate`: the same stages, messages and enclave state machines in one process.

What is the same as in a deployment: the job file, the parties' folders and keys, sealed bundles,
contract, evidence and appraisal, every message as bytes, and the enclaves' sessions. What is not:
enclaves share this process, so their evidence says sandbox "none", and the contract that `fedark
simulate` makes admits that mode by name. A node that asks for a sandbox refuses such a contract.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedark.attestation.claims import RUN_CONFIG, SandboxFacts
from fedark.attestation.platforms.base import EnclavePlatform
from fedark.contract.job import Job
from fedark.enclave.roles import create
from fedark.foundation.errors import (
    FedarkError,
    FederationError,
    InputError,
    ProtocolError,
    restore,
)
from fedark.links.link import Handler, InProcessLink, Tap
from fedark.measurement import run_config_register
from fedark.operate.party import load_aggregator, load_machine, load_node, reference_values
from fedark.simulation.local import Federation, prepare
from fedark.stages.coordinator import coordinate
from fedark.stages.settings import EnclaveFactory
from fedark.v1 import enclave_pb2, stage_pb2

if TYPE_CHECKING:
    from fedark.tuning.task import TaskModel  # torch: not for who only starts real processes

__all__ = ["InProcessEnclave", "SharedBases", "Simulation", "in_process_enclaves", "simulate"]

Say = Callable[[str], None]


class InProcessEnclave:
    """An enclave's session without a process around it; every call and reply still crosses as
    bytes.

    Args:
        role: "trainer" or "aggregator".
        run_config: canonical form, measured like that of a real one.
        device: what makes the evidence, which says sandbox "none".
        measured: register -> SHA-384 of this installation.
        checkpoint: of an enclave of this run that has ended, which this one continues.
        bases: shared by the trainers of this process.
    """

    def __init__(
        self,
        role: str,
        run_config: bytes,
        device: EnclavePlatform,
        measured: Mapping[str, bytes],
        checkpoint: bytes = b"",
        bases: SharedBases | None = None,
    ) -> None:
        registers, sandbox = (
            {**measured, RUN_CONFIG: run_config_register(run_config)},
            SandboxFacts.none(),
        )
        attester = device.attester(measurements=registers, sandbox=sandbox)
        self._session = create(
            run_config,
            lambda report, nonce: (attester.platform, attester.quote(report, nonce)),
            lambda: device.sealing_key(registers, sandbox),
            bases.share if bases is not None else None,
        )
        self.call(enclave_pb2.Call(start=enclave_pb2.Start(run_config=run_config)))
        if checkpoint:
            self.call(enclave_pb2.Call(resume=enclave_pb2.Resume(checkpoint=checkpoint)))

    def call(
        self,
        call: enclave_pb2.Call,
        *,
        on_progress: Callable[[enclave_pb2.Progress], None] | None = None,
        timeout: float | None = None,
    ) -> enclave_pb2.Reply:
        """See `fedark.enclave.host.EnclaveHandle`; a call in this process cannot be timed out."""
        report = on_progress or (lambda progress: None)
        self._check(call)
        try:
            answer = self._session.handle(
                enclave_pb2.Call.FromString(call.SerializeToString()), report
            )
        except FedarkError as error:
            raise restore(
                type(error).__name__, error.what, safe=error.safe, fix=error.fix
            ) from None
        self._check(answer)
        reply = enclave_pb2.Reply()
        reply.ParseFromString(answer.SerializeToString())
        return reply

    def _check(self, message: enclave_pb2.Call | enclave_pb2.Reply) -> None:
        if message.ByteSize() > self._session.message_bytes:
            raise ProtocolError(
                f"A message of {message.ByteSize()} bytes is too large for an enclave.",
                safe="It was not sent.",
            )

    def close(self) -> None:
        """Drop the session: weights and records go with it."""
        del self._session


class SharedBases:
    """Lets the trainers of one process hold each base model once, however many they are."""

    def __init__(self) -> None:
        self._first: dict[str, TaskModel] = {}
        self._lock = threading.Lock()

    def share(self, task: TaskModel) -> None:
        """Give `task` the frozen weights of the first model that was opened from its bundle."""
        with self._lock:
            first = self._first.setdefault(task.terms.bundle, task)
        if first is not task:
            task.share_frozen(first)


def in_process_enclaves(
    folder: Path, reference: Mapping[str, Mapping[str, bytes]], bases: SharedBases | None = None
) -> EnclaveFactory:
    """Starts enclaves for the party whose folder this is, in this process."""
    device = load_machine(folder)

    def start(role: str, run_config: bytes, checkpoint: bytes = b"") -> InProcessEnclave:
        return InProcessEnclave(role, run_config, device, reference[role], checkpoint, bases)

    return start


class Simulation:
    """All parties of a job in this process.

    Attributes:
        federation: what was prepared.
        nodes: provider and customers, by name.
        host: the aggregator's.
        report: of the aggregator, after `run`.
    """

    def __init__(
        self,
        federation: Federation,
        *,
        say: Say = lambda text: None,
        tap: Tap | None = None,
        drop: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.federation = federation
        self.report: dict[str, Any] = {}
        contract = federation.contract
        names = (contract.provider.name, *(party.name for party in contract.customers))
        reference, bases = reference_values(), SharedBases()
        self.nodes = {}
        for name in names:
            folder = federation.folder(name)
            enclaves = (
                in_process_enclaves(folder, reference, bases)
                if name != contract.provider.name
                else None
            )
            self.nodes[name] = load_node(
                folder, enclaves, _prefixed(say, name), reference=reference
            )
        folder = federation.folder(contract.aggregator.name)
        enclaves = in_process_enclaves(folder, reference)
        self.host = load_aggregator(
            folder, contract, enclaves, _prefixed(say, contract.aggregator.name)
        )
        # One thread a node: small models gain little from sharing a matrix product, and the sums
        # come out the same every time. Two nodes a core, since they take turns in the interpreter.
        import torch  # here: who only starts real processes needs none

        torch.set_num_threads(1)
        parallel = 2 * len(os.sched_getaffinity(0))
        handlers = {name: _until(drop.get(name), node.handle) for name, node in self.nodes.items()}
        self._link = InProcessLink(handlers, tap=tap, parallel=parallel)

    @property
    def run_id(self) -> str:
        return self.host.run_id

    def run(self) -> dict[str, Any]:
        """Run all stages; returns the aggregator's report.

        Raises:
            FedarkError: the job was aborted.
        """
        self.report = coordinate(self._link, self.host.handle)
        return self.report

    def close(self) -> None:
        """End every enclave."""
        for node in self.nodes.values():
            node.close()
        self.host.close()


def _until(round_number: int | None, handle: Handler) -> Handler:
    """`handle`, which fails from that round on."""
    if round_number is None:
        return handle
    gone = threading.Event()

    def answer(request: bytes) -> bytes:
        message = stage_pb2.StageRequest.FromString(request)
        if message.HasField("round") and message.round.round >= round_number:
            gone.set()
        if gone.is_set():
            raise FederationError("It was dropped, as the simulation asked.")
        return handle(request)

    return answer


def _prefixed(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")


@contextlib.contextmanager
def simulate(
    job: Job,
    work: Path | None = None,
    *,
    say: Say = lambda text: None,
    tap: Tap | None = None,
    drop: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Simulation]:
    """Prepare a job in `work` (or in a folder that is removed afterwards) and hold all its parties.

    Args:
        drop: customer -> the round from which on it answers nothing.

    Raises:
        FederationError: another simulation runs in `work`; it is left alone.
    """
    strangers = sorted(set(drop) - set(job.customer_names))
    if strangers:
        raise InputError(
            f"These are no customers of the job: {', '.join(strangers)}.",
            safe="Nothing was started.",
        )
    with contextlib.ExitStack() as stack:
        folder = (
            work
            if work is not None
            else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedark-")))
        )
        simulation = Simulation(
            prepare(job, folder, sandbox="none", say=say, hold=stack), say=say, tap=tap, drop=drop
        )
        stack.callback(simulation.close)
        yield simulation
