"""One honest run of a small job: what every node and enclave was asked, and what each of them was
when it was asked.

From that a node or an enclave is put back for every bent input, so that one stands as deep in its
run as the input needs. Clocks are those of the run, so that nothing expires however long the fuzzer
goes on, and nothing waits for the disk.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract, now
from fedark.enclave import session as session_module
from fedark.enclave import trainer
from fedark.enclave.curve import Curve
from fedark.enclave.masking import AggregatorMasks, TrainerMasks
from fedark.foundation import canonical
from fedark.foundation.snapshot import Snapshot
from fedark.links.hostlink import AggregatorClient
from fedark.links.link import Passed, named, stage_of
from fedark.operate.party import load_node
from fedark.secagg import Client, Server
from fedark.secagg.schedule import Chain
from fedark.simulation import Simulation, in_process_enclaves
from fedark.simulation.local import Federation
from fedark.stages import consent, customer, loading, provider, settings
from fedark.stages import node as node_module
from fedark.stages.coordinator import Coordinator
from fedark.stages.parties import CoordinatorState
from fedark.stages.runs import RunMemory
from fedark.v1 import enclave_pb2, node_pb2, stage_pb2

_CLOCKS = (
    *(node_module, settings, customer, loading, provider, consent),
    *(session_module, trainer),
)
_CHANGING = {kind.__module__ for kind in (TrainerMasks, Client, Server, Chain)}
_REBUILT_AFTER = 100  # its log grows


class _Careless(sqlite3.Connection):
    """Does not wait for the disk."""

    def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
        return super().execute(
            "PRAGMA synchronous=OFF" if sql.startswith("PRAGMA synchronous") else sql, *rest
        )


_connect = functools.partial(sqlite3.connect, factory=_Careless)


def _encoded_once() -> Callable[[Contract], bytes]:
    """`Contract.encode`, which a node calls several times a request, with the same result."""
    encode, known = Contract.encode, dict[int, tuple[Contract, bytes]]()

    def encoded(contract: Contract) -> bytes:
        if len(known) > _REBUILT_AFTER:
            known.clear()
        if id(contract) not in known:
            known[id(contract)] = (
                contract,
                encode(contract),
            )  # the contract is kept, so that no other gets its id
        return known[id(contract)][1]

    return encoded


class Recorded:
    """The run.

    Attributes:
        contract: of the run.
        requests: party -> stage -> StageRequest.
        replies: stage -> party -> StageReply.
        enclaves: party -> what its enclave was asked.
        at: when it ended.
    """

    def __init__(self, federation: Federation, reference: Any) -> None:
        self.requests: dict[str, dict[str, bytes]] = {}
        self.replies: dict[str, dict[str, bytes]] = {}
        self.enclaves: dict[str, Enclave] = {}
        self.contract = federation.contract
        self._federation, self._reference, self._encoded = federation, reference, _encoded_once()
        self._runs: dict[str, Any] = {}
        simulation = Simulation(federation, tap=self._see)
        self._nodes = simulation.nodes
        for name, node in simulation.nodes.items():
            if name != federation.contract.provider.name:
                node.settings = replace(node.settings, start_enclave=self._starter(name))  # type: ignore[attr-defined]
        pool = federation.contract.aggregator.name
        simulation.host._start_enclave = self._starter(pool)
        simulation.run()
        self.run_id = simulation.run_id
        self.at = now()

    def _see(self, passed: Passed) -> None:
        if passed.direction == "reply":
            self.replies.setdefault(passed.stage, {})[passed.party] = passed.data
            return
        self.requests.setdefault(passed.party, {}).setdefault(passed.stage, passed.data)
        if passed.stage == "deliver":  # which ends it
            node: Any = self._nodes[passed.party]
            self._runs[passed.party] = next(iter(node._runs.values()))

    def _starter(self, party: str) -> Any:
        start = in_process_enclaves(self._federation.folder(party), self._reference)

        def started(role: str, config: bytes, checkpoint: bytes = b"") -> Any:
            self.enclaves[party] = Enclave(start(role, config, checkpoint))
            return self.enclaves[party]

        return started

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Everything here happens at the end of the run."""
        changed: list[tuple[Any, str, Any]] = [
            (module, "now", lambda: self.at) for module in _CLOCKS
        ]
        changed += [
            (os, "fsync", lambda descriptor: None),
            (sqlite3, "connect", _connect),
            (Contract, "encode", self._encoded),
        ]
        before = [(place, name, getattr(place, name)) for place, name, _ in changed]
        try:
            for place, name, value in changed:
                setattr(place, name, value)
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)

    def coordinated(self) -> Callable[[bytes], bool]:
        """Gives each reply to a coordinator in the stage that it answers; whether that stage was
        gone through.
        """
        contract, run = self._federation.contract, self

        class Link:
            reply = b""

            def exchange(self, requests: Any, *, stage: str, timeout: float) -> dict[str, bytes]:
                return {
                    name: self.answer(name, stage)
                    for name in requests
                    if name in run.replies.get(stage, {})
                }

            def broadcast(
                self, request: bytes, *, expect: int, stage: str, timeout: float
            ) -> dict[str, Any]:
                given = {name: self.answer(name, stage) for name in run.replies[stage]}
                return {name: named(name, reply) for name, reply in given.items()}

            def answer(self, name: str, stage: str) -> bytes:
                return self.reply if (name, stage) == self.bent else run.replies[stage][name]

            bent = ("", "")

        def host(data: bytes) -> bytes:
            request, answer = node_pb2.AggregatorRequest.FromString(data), node_pb2.AggregatorReply
            match request.WhichOneof("body"):
                case "open":
                    return bytes(
                        answer(
                            opened=node_pb2.OpenedRun(run_id=run.run_id, contract=encoded)
                        ).SerializeToString()
                    )
                case "call":
                    pool = run.enclaves[contract.aggregator.name]
                    reply = enclave_pb2.Reply()
                    reply.CopyFrom(pool.replies[pool.kind(request.call)])
                    if request.call.close.round == contract.rounds:
                        reply.closed.ended = True  # the kept reply is of the first round
                    return bytes(answer(reply=reply).SerializeToString())
                case "sign":
                    return bytes(
                        answer(
                            signed=node_pb2.SignedReport(signature=bytes(64))
                        ).SerializeToString()
                    )
            return bytes(answer(stored=node_pb2.OutcomeStored()).SerializeToString())

        encoded, link = contract.encode(), Link()
        coordinator = Coordinator(link, AggregatorClient(host))  # type: ignore[arg-type]
        begun: dict[str, bytes] = {}
        while coordinator._at.phase != "deliver":
            begun.setdefault(coordinator._at.phase, coordinator._at.encode())
            getattr(coordinator, f"_{coordinator._at.phase}")()
        begun["deliver"] = coordinator._at.encode()
        phase = dict.fromkeys(("endorse", "unmask"), "round") | {stage: stage for stage in begun}

        def handle(data: bytes) -> bool:
            try:
                reply = stage_pb2.StageReply.FromString(data)
                body = reply.WhichOneof("body")
                stage, party = "unmask" if body == "forward" else str(body), reply.party
            except DecodeError:
                stage, party = "attest", "east"
            stage = stage if stage in phase else "attest"
            party = (
                party if party in run.replies[stage] else "maker" if stage == "release" else "east"
            )
            link.reply, link.bent = data, (party, stage)
            coordinator._parties.state = CoordinatorState.decode(begun[phase[stage]])
            getattr(coordinator, f"_{phase[stage]}")()
            return not coordinator._at.passed_over

        return handle

    def node(self, party: str) -> Callable[[bytes], stage_pb2.StageReply]:
        """Answers each request as the node of `party` did in the midst of the run; of what it is
        asked it remembers nothing.
        """
        folder = self._federation.folder(party)
        pristine, work = folder.with_name(f"{party}-recorded"), folder.with_name(f"{party}-again")
        shutil.copytree(folder, pristine)
        shutil.rmtree(pristine / "runs")
        for used in pristine.rglob("*.used"):
            used.unlink()
        run, before = self._runs[party], self._nodes[party]
        enclave = _Replaying(self.enclaves[party]) if party in self.enclaves else None
        node: Any = None
        tried = 0

        def rebuild() -> None:
            nonlocal node
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(pristine, work)
            with self.clock():
                node = load_node(
                    work, lambda role, config, checkpoint=b"": enclave, reference=self._reference
                )
            node._memory = _Memory(work, node.settings.keys.signing)

        def handle(data: bytes) -> stage_pb2.StageReply:
            nonlocal tried
            if tried % _REBUILT_AFTER == 0:
                rebuild()
            tried += 1
            node._admissions, node._proofs = dict(before._admissions), dict(before._proofs)
            again = copy.copy(run)
            if enclave is not None:
                again.enclave, again.log_agreed, again.local = enclave, False, {}
                again.number, again.base = 0, b""
            else:
                again.trainers, again.grants = dict(run.trainers), dict(run.grants)
            # A run is enrolled once.
            node._runs = {} if _stage(data) == "enrol" else {self.run_id: again}
            for used in work.glob("*/*.used"):
                used.unlink()
            with self.clock():
                if _stage(data) in ("endorse", "unmask"):  # which follow on the round
                    node.handle(self.requests[party]["round"])
                return stage_pb2.StageReply.FromString(node.handle(data))

        return handle


def _stage(data: bytes) -> str | None:
    try:
        return stage_of(stage_pb2.StageRequest.FromString(data))
    except Exception:
        return None


class _Memory(RunMemory):
    """Checks names as the real one does, and keeps nothing."""

    def open_runs(self) -> list[str]:
        return []

    def save(self, run_id: str, state: dict[str, Any]) -> None:
        self.folder(run_id)
        canonical.encode(state)

    def load(self, run_id: str) -> None:
        self.folder(run_id)

    def answer(self, run_id: str, request: bytes) -> None:
        self.folder(run_id)

    def keep(self, run_id: str, request: bytes, reply: bytes, *, once: str = "") -> None:
        self.folder(run_id)

    def begin(self, run_id: str, request: bytes) -> bool:
        """So that the nonce of the run counts once more, for the same evidence."""
        return True

    def forget(self, run_id: str) -> None:
        self.folder(run_id)


class Enclave:
    """An enclave of the run.

    Attributes:
        calls: kind -> the first call of that kind.
        replies: kind -> its reply.
    """

    def __init__(self, inner: Any) -> None:
        self.session = inner._session
        self.calls: dict[str, bytes] = {}
        self.replies: dict[str, enclave_pb2.Reply] = {}
        self._before: dict[str, _Snapshot] = {}
        self._inner = inner

    def call(self, call: enclave_pb2.Call, **options: Any) -> enclave_pb2.Reply:
        """See `EnclaveHandle`."""
        kind = self.kind(call)
        before = _Snapshot(self.session)
        reply: enclave_pb2.Reply = self._inner.call(call, **options)
        if kind == "vouch":  # evidence that came before serves for nothing else
            for kept in (self.calls, self.replies, self._before):
                kept.pop("attest", None)
        if kind not in self.calls:
            self.calls[kind], self.replies[kind], self._before[kind] = (
                call.SerializeToString(),
                reply,
                before,
            )
            if kind == "begin":  # asked again it does not measure again
                self._before[kind] = _Snapshot(self.session)
        return reply

    def close(self) -> None:
        """The session is kept."""

    def kind(self, call: enclave_pb2.Call) -> str:
        """What `calls` and `replies` name a call. Under masks a round takes several of some kinds,
        and loading is without masks.
        """
        kind = str(call.WhichOneof("body"))
        if getattr(self.session, "_masks", None) is None:
            return kind
        if kind == "submit" and call.submit.round:
            return f"submit {call.submit.part}"
        if (kind == "close" and call.close.round) or (
            kind == "survivors" and call.survivors.endorsed
        ):
            return f"{kind} again"
        return kind

    def handle(self, data: bytes) -> enclave_pb2.Reply:
        """The answer to a call, of the session as it was before the first call of that kind."""
        call = enclave_pb2.Call.FromString(data)
        kind = self.kind(call)
        before = self._before.get(kind) or self._before["attest"]
        if kind == "sealed" and "grant" in self.calls:  # an opener takes its bytes once
            self._before["grant"].restore(self.session)
            self.session.handle(
                enclave_pb2.Call.FromString(self.calls["grant"]), lambda progress: None
            )
        else:
            before.restore(self.session)
        reply: enclave_pb2.Reply = self.session.handle(call, lambda progress: None)
        return reply


class _Snapshot:
    """What a session is; the objects in its lists and maps are not copied, but for its end of the
    masks.
    """

    def __init__(self, session: Any) -> None:
        self._values = {name: _copied(value) for name, value in vars(session).items()}
        later = (datetime.now(UTC) + timedelta(days=1)).timestamp()
        self._nonces = [row.model_copy(update={"expires": later}) for row in session._nonces.rows()]

    def restore(self, session: Any) -> None:
        vars(session).clear()
        vars(session).update({name: _copied(value) for name, value in self._values.items()})
        session._nonces.restore(self._nonces)


def _copied(value: Any) -> Any:
    if isinstance(value, TrainerMasks | AggregatorMasks):
        return _deeply(value)
    if isinstance(value, Curve):
        new = copy.copy(value)
        vars(new).update({name: _copied(item) for name, item in vars(value).items()})
        return new
    if isinstance(value, dict | list | set):
        return copy.copy(value)
    if isinstance(value, Snapshot):
        return value.model_copy(deep=True)
    return value.copy() if type(value).__name__ == "HASH" else value


def _deeply(value: Any) -> Any:
    """A copy of whatever changes in an end of the masks, which itself refuses to be copied."""
    if isinstance(value, dict):
        return {key: _deeply(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deeply(item) for item in value]
    if isinstance(value, set):
        return set(value)
    if type(value).__module__ not in _CHANGING:
        return value
    new = object.__new__(type(value))
    for name in getattr(value, "__slots__", None) or list(vars(value)):
        object.__setattr__(new, name, _deeply(getattr(value, name)))
    return new


class _Replaying:
    """The trainer enclave beside a node: attests afresh, and gives to all else the answer of the
    run.
    """

    def __init__(self, enclave: Enclave) -> None:
        self._enclave = enclave

    def call(self, call: enclave_pb2.Call, **options: Any) -> enclave_pb2.Reply:
        """See `EnclaveHandle`."""
        kind = str(call.WhichOneof("body"))
        if kind == "attest":
            return self._enclave.handle(call.SerializeToString())
        return self._enclave.replies.get(kind, enclave_pb2.Reply())

    def peak_mib(self) -> float:
        """None that counts."""
        return 0.0

    def wake(self) -> None:
        """It is awake."""

    def close(self) -> None:
        """It stays."""

    discard = close
