"""A small lab: attested enclaves with session keys, a server, and a round between them, message by
message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedark.foundation.keys import SigningKey
from fedark.secagg import (
    Client,
    Contribution,
    Directory,
    Lane,
    Layout,
    Releases,
    RoundSum,
    Server,
    ServerRound,
    SessionTerms,
    wire,
)

CONTRACT = bytes(range(48))
RUN = "run-1"


@dataclass(frozen=True)
class Identity:
    """What attestation would have established."""

    party: str
    signing_public: bytes
    role: str = "trainer"
    contract_digest: bytes = CONTRACT
    run_id: str = RUN


@dataclass
class Lab:
    """One session of `size` clients."""

    size: int = 5
    length: int = 40
    bits: int = 16
    minimum: int = 0
    colluders: int = 0
    agreement: bool = False
    max_weight: int = 1
    metrics: tuple[Lane, ...] = ()
    noise_bound: int = 0
    clip_norm: float = 1e6
    value_range: float = 8.0
    threads: int = 1
    releases: dict[str, Releases] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parties = [f"c{i:04d}" for i in range(self.size)]
        layouts = (
            Layout(
                "m/update",
                self.length,
                self.bits,
                self.clip_norm,
                self.value_range,
                self.max_weight,
                self.metrics,
                self.noise_bound,
            ),
            Layout("m/evaluate", 0, metrics=(Lane("correct", 1000), Lane("loss", 1e6, 2.0**-16))),
        )
        self.terms = SessionTerms(
            CONTRACT,
            RUN,
            tuple(self.parties),
            self.minimum or max(3, -(-7 * self.size // 10)),
            self.colluders,
            layouts,
            self.agreement,
        )
        self.layout = layouts[0]
        self.signing = {p: SigningKey() for p in self.parties}
        self.identities = [Identity(p, self.signing[p].public) for p in self.parties]
        self.models = 0
        self.start()

    def start(self) -> None:
        """A new session: new keys, new directory."""
        self.clients = {
            p: Client(
                self.terms,
                p,
                self.signing[p],
                self.releases.setdefault(p, Releases()),
                self.threads,
            )
            for p in self.parties
        }
        self.hellos = {p: client.hello() for p, client in self.clients.items()}
        self.directory = Directory.verify(self.terms, self.identities, self.hellos.values())
        for client in self.clients.values():
            client.join(self.directory)
        self.server = Server(self.directory, self.threads)
        self.number = 0

    def open(
        self,
        participants: Iterable[str] | None = None,
        model: bytes = b"",
        layout: str = "m/update",
    ) -> ServerRound:
        """A round that every participant and committee member has begun; for a model of its own if
        none is given.
        """
        self.number, self.models = self.number + 1, self.models + 1
        model = model or self.models.to_bytes(48, "big")
        current = self.server.open(self.number, layout, list(participants or self.parties), model)
        for party in {*(participants or self.parties), *current.committee}:
            self.clients[party].begin(current.request, model)
        return current

    def vector(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).uniform(-1, 1, self.length).astype(np.float32)

    def upload(
        self, current: ServerRound, inputs: dict[str, Contribution], lost: Iterable[str] = ()
    ) -> dict[str, bytearray]:
        """Everybody's upload; those of `lost` do not arrive."""
        messages = {p: self.clients[p].upload(c) for p, c in inputs.items()}
        for party in messages.keys() - set(lost):
            current.receive(messages[party], party)
        return messages

    def unmask(
        self,
        current: ServerRound,
        silent: Iterable[str] = (),
        tamper: Callable[[str, bytes], bytes] | None = None,
    ) -> RoundSum:
        """Close the round and ask the committee; `silent` members do not answer."""
        current.close()
        members = [p for p in current.committee if p not in set(silent)]
        if current.needs_agreement:
            for party in members:
                current.endorse(self.clients[party].endorse(current.endorsement_request()), party)
        requests = current.unmask_requests()
        for party in members:
            reply = self.clients[party].unmask(requests[party])
            current.accept(tamper(party, reply) if tamper else reply, party)
        return current.finish()

    def run(
        self, inputs: dict[str, Contribution], lost: Iterable[str] = (), silent: Iterable[str] = ()
    ) -> RoundSum:
        """One whole round."""
        current = self.open(list(inputs))
        self.upload(current, inputs, lost)
        return self.unmask(current, silent)

    def uploaded(
        self, lost: Iterable[str] = (), model: bytes = b""
    ) -> tuple[ServerRound, dict[str, bytearray]]:
        """A round in which everybody has uploaded, and the uploads."""
        current = self.open(model=model)
        return current, self.upload(current, self.inputs(), lost)

    def survivors_request(
        self,
        current: ServerRound,
        survivors: list[int],
        kind: str = "survivors",
        body: bytes = b"",
        **more,
    ) -> bytes:
        """What a server that declares `survivors`, true or not, asks a member."""
        header = wire.unsigned(kind, {"ctx": current._ctx, "survivors": survivors, **more})
        return wire.message(header, body)

    def unmask_request(
        self,
        current: ServerRound,
        member: int,
        survivors: list[int],
        endorsements: Iterable[list] = (),
    ) -> bytes:
        """The same for an unmask request to `member`; the sealed shares are the uploads' own."""
        committee, body = self.directory.topology.committee, b""
        for sender in survivors:
            if sender != member:
                size = current._cohort.blob_bytes(sender)
                at = [m for m in committee if m != sender].index(member)
                body += current._uploads[sender].sealed[at * size : (at + 1) * size]
        return self.survivors_request(
            current, list(survivors), "unmask", body, endorsements=list(endorsements)
        )

    def inputs(self, parties: Iterable[str] | None = None) -> dict[str, Contribution]:
        """A contribution of random values for every party."""
        return {p: Contribution(self.vector(i)) for i, p in enumerate(parties or self.parties)}


@pytest.fixture(scope="session")
def lab() -> type[Lab]:
    return Lab


@pytest.fixture(scope="session")
def identity() -> type[Identity]:
    return Identity
