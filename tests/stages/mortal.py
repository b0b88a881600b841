"""A federation in one process in which anything may be killed at any moment, and is started again
from what it wrote to disk.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedark.enclave import durable
from fedark.enclave.session import RunConfig
from fedark.foundation import files
from fedark.foundation.errors import EnclaveFailed, FedarkError
from fedark.links.link import InProcessLink, Outcome, failure, late, named
from fedark.operate.party import load_aggregator, load_node, reference_values
from fedark.simulation import InProcessEnclave, in_process_enclaves
from fedark.simulation.local import Federation
from fedark.stages import aggregator, runs
from fedark.stages.coordinator import coordinate
from fedark.v1 import stage_pb2


class Killed(BaseException):
    """SIGKILL, as far as one process can play it: nothing in the victim catches it."""


class Fate:
    """Who dies when. `chance`: that a call of an enclave, or a write of a host, is somebody's last,
    before it or right after.
    """

    def __init__(
        self, seed: int = 0, *, enclaves: float = 0.0, hosts: float = 0.0, coordinator: float = 0.0
    ) -> None:
        self._random = random.Random(seed)
        self._chances = {"enclave": enclaves, "host": hosts, "coordinator": coordinator}
        self.deaths: list[tuple[str, str]] = []
        self.calls: list[tuple[str, Any, Any]] = []
        """(party, call, reply with its checkpoint) of every enclave."""
        self.planned: dict[tuple[str, str, str], int] = {}
        """(party, kind of call, "before" or "after") -> how often that enclave dies there."""

    def strikes(self, what: str, who: str, where: str, when: str) -> bool:
        if self.planned.get((who, where, when), 0) > 0:
            self.planned[who, where, when] -= 1
        elif self._random.random() >= self._chances[what] / 2:
            return False
        self.deaths.append((who, f"{when} {where}"))
        return True


class MortalEnclave:
    def __init__(self, inner: Any, who: str, fate: Fate) -> None:
        self._inner, self._who, self._fate, self._dead = inner, who, fate, False

    def call(self, call: Any, **options: Any) -> Any:
        kind = call.WhichOneof("body")
        if self._dead or self._fate.strikes("enclave", self._who, kind, "before"):
            self._dead = True
            raise EnclaveFailed("The enclave was killed.")
        reply = self._inner.call(call, **options)
        self._fate.calls.append(
            (
                self._who,
                type(call).FromString(call.SerializeToString()),
                type(reply).FromString(reply.SerializeToString()),
            )
        )
        if self._fate.strikes("enclave", self._who, kind, "after"):
            self._dead = True
            raise EnclaveFailed("The enclave was killed.")
        return reply

    def close(self) -> None:
        self._dead = True


class World:
    """All parties of a prepared federation; `run` brings the job to its end, however often somebody
    dies.
    """

    def __init__(self, federation: Federation, fate: Fate, monkeypatch: Any) -> None:
        self.federation, self.fate = federation, fate
        self.said: list[str] = []
        self.away: dict[str, set[str]] = {}
        """Party -> stages, such as "round 2", in which it cannot be reached; "" for always."""
        self._reference = reference_values()
        self._acting = ""
        contract = federation.contract
        self._pool = contract.aggregator.name
        self.parties = [contract.provider.name, *(party.name for party in contract.customers)]
        real = files.write_atomic

        def write(path: Path, data: bytes, **options: Any) -> None:
            if self._acting and fate.strikes("host", self._acting, path.name, "before"):
                raise Killed(self._acting)
            real(path, data, **options)
            if self._acting and fate.strikes("host", self._acting, path.name, "after"):
                raise Killed(self._acting)

        for module in (durable, runs, aggregator):
            monkeypatch.setattr(module, "write_atomic", write)
        self.nodes = {name: self.start(name) for name in self.parties}
        self.host = self.start(self._pool)

    def start(self, name: str) -> Any:
        folder = self.federation.folder(name)
        real = in_process_enclaves(folder, self._reference) if name != self.parties[0] else None

        def enclaves(role: str, run_config: bytes, checkpoint: bytes = b"") -> MortalEnclave:
            return MortalEnclave(real(role, run_config, checkpoint), name, self.fate)

        def say(text: str) -> None:
            self.said.append(f"{name}: {text}")

        if name == self._pool:
            return load_aggregator(folder, self.federation.contract, enclaves, say)
        return load_node(folder, enclaves if real else None, say, reference=self._reference)

    def ask(self, name: str, request: bytes) -> bytes:
        """One stage, repeated by a patient relay until the node has lived to answer."""
        while True:
            self._acting, before = name, self._acting
            try:
                return self.nodes[name].handle(request)
            except Killed:
                self.nodes[name].close()
                self.nodes[name] = self.start(name)
            finally:
                self._acting = before

    def ask_host(self, request: bytes) -> bytes:
        if self.fate.strikes("coordinator", "coordinator", "call", "before"):
            raise Killed("coordinator")
        while True:
            self._acting = self._pool
            try:
                reply = self.host.handle(request)
                break
            except Killed:
                self.host.close()
                self.host = self.start(self._pool)
            finally:
                self._acting = ""
        if self.fate.strikes("coordinator", "coordinator", "call", "after"):
            raise Killed("coordinator")
        return reply

    def again(self, name: str, checkpoint: bytes) -> InProcessEnclave:
        """An enclave of this run from any checkpoint that the host ever had."""
        role = "aggregator" if name == self._pool else "trainer"
        config = RunConfig(
            role=role, party=name, contract=self.federation.contract, run_id=self.host.run_id
        ).encode()
        return in_process_enclaves(self.federation.folder(name), self._reference)(
            role, config, checkpoint
        )

    def link(self) -> InProcessLink:
        return _Sequential(self)

    def run(self) -> dict[str, Any]:
        """The report."""
        while True:
            try:
                report = coordinate(self.link(), self.ask_host)
            except Killed:
                continue
            if report:
                return report
            folders = self.federation.folder(self._pool) / "runs"
            return files_report(folders)

    def adapter(self, party: str = "north") -> dict[str, np.ndarray]:
        (path,) = (self.federation.folder(party) / "runs").glob(
            "*/adapter-tiny/adapter_model.safetensors"
        )
        return load_file(path)

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        self.host.close()


def files_report(folders: Path) -> dict[str, Any]:
    import json

    (path,) = folders.glob("*/report.json")
    return json.loads(path.read_bytes())


class _Sequential(InProcessLink):
    """Asks one party after the other, in this thread: a death is then where the test put it."""

    def __init__(self, world: World) -> None:
        super().__init__({})
        self._world = world

    def present(self) -> set[str]:
        return {
            party for party in self._world.parties if "" not in self._world.away.get(party, set())
        }

    def exchange(self, requests: Mapping[str, bytes], *, stage: str, timeout: float) -> Outcome:
        outcome: Outcome = {}
        for party, request in requests.items():
            message = stage_pb2.StageRequest.FromString(request)
            number = getattr(getattr(message, stage, None), "round", 0)
            if self._world.away.get(party, set()) & {"", f"{stage} {number}"}:
                outcome[party] = late(party, stage, timeout)
                continue
            try:
                outcome[party] = self._world.ask(party, request)
            except FedarkError as error:
                outcome[party] = failure(party, stage, error)
        return outcome

    def broadcast(self, request: bytes, *, expect: int, stage: str, timeout: float) -> Outcome:
        outcome = self.exchange(
            dict.fromkeys(self._world.parties, request), stage=stage, timeout=timeout
        )
        return {
            party: named(party, reply) if isinstance(reply, bytes) else reply
            for party, reply in outcome.items()
        }
