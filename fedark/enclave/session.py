"""The state machine that runs inside an enclave: what is common to trainer and aggregator.

No sockets, no files, no clock but the host's: a session takes a `Call` and gives a `Reply`, so the same class runs in a sandboxed
process and in `fedark simulate`. The order that it enforces:

1. `create` decodes the run configuration, whose hash the launcher has measured, and makes the keys: after the sandbox is locked.
2. `Challenge` / `Attest` / `AdmitPeer`: mutual attestation. A peer's evidence counts for the nonce that this session gave out,
   once, and only together with the contract's signatures.
3. Whatever needs a verified peer takes the `AttestedPeer`, which only `Gate.admit` makes.

The host's clock is an input like any other: an enclave cannot know better. Turning it back keeps an expired contract alive on
that host alone; it does not weaken what the other parties check with their own clocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fedark import canonical
from fedark.attestation.binding import KeyBinding
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.trust import verifiers
from fedark.contract import Contract, SignedContract, now
from fedark.enclave.channel import message_limit
from fedark.errors import ProtocolError, Refused
from fedark.keys import HpkeKey, SigningKey
from fedark.measurement import run_config_register
from fedark.v1 import enclave_pb2 as pb

__all__ = ["ProgressSink", "Quote", "RunConfig", "Session", "SessionBase", "create"]

Quote = Callable[[bytes, bytes], tuple[str, bytes]]
"""(report_data, nonce) -> (platform, token): the launcher's quoting key signs; it is never inside the enclave."""

ProgressSink = Callable[[pb.Progress], None]


class Session(Protocol):
    """One enclave's side of one run.

    Attributes:
        message_bytes: the largest frame that its contract needs.
    """

    message_bytes: int

    def handle(self, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        """Answer one call.

        Raises:
            FedarkError: the call was refused; the session goes on in the state it had.
        """
        ...


class RunConfig:
    """What an enclave is started for. Its canonical form is measured into the "runconfig" register.

    Attributes:
        role: "trainer" or "aggregator".
        party: whose enclave it is.
        contract: the job's contract.
        run_id: of this run.
    """

    def __init__(self, *, role: str, party: str, contract: Contract, run_id: str) -> None:
        self.role, self.party, self.contract, self.run_id = role, party, contract, run_id

    def encode(self) -> bytes:
        return canonical.encode(
            {"role": self.role, "party": self.party, "contract": self.contract.encode(), "run_id": self.run_id}
        )

    def register(self) -> bytes:
        """The value of the "runconfig" register."""
        return run_config_register(self.encode())

    @property
    def message_bytes(self) -> int:
        """The largest frame that an enclave of this run may send or take."""
        return message_limit(sum(terms.travelling for terms in self.contract.models))

    @classmethod
    def decode(cls, data: bytes) -> RunConfig:
        """Read a run configuration.

        Raises:
            ProtocolError: malformed, or the party has not the role that it names.
            ContractError: the contract in it is not valid.
        """
        value = canonical.decode(data, max_bytes=8 << 20)
        match value:
            case {"role": str(role), "party": str(party), "contract": bytes(contract), "run_id": str(run_id)} if (
                len(value) == 4
            ):
                config = cls(role=role, party=party, contract=Contract.decode(contract), run_id=run_id)
            case _:
                raise ProtocolError("A run configuration is malformed.")
        member = config.contract.party(party)
        if member is None or {"customer": "trainer", "aggregator": "aggregator"}.get(member.role) != role:
            raise ProtocolError(f"The contract has no {role} of that name.")
        return config


class SessionBase:
    """Keys, evidence and the admission of peers."""

    def __init__(self, config: RunConfig, quote: Quote) -> None:
        self.config = config
        self.contract = config.contract
        self.digest = config.contract.digest()
        self.message_bytes = config.message_bytes
        self._quote = quote
        self._hpke = HpkeKey(kem=self.contract.attestation.kem)
        self._signing = SigningKey()
        self._nonces = NonceBook()
        self._answered: dict[str, tuple[bytes, bytes]] = {}

    def handle(self, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        """Answer one call; see `Session.handle`."""
        if self.contract.expired(now()):
            raise Refused(f"The contract of job {self.contract.job} is not valid now.", safe="The enclave did nothing.")
        kind = call.WhichOneof("body")
        match kind:
            case "start":
                if call.start.run_config != self.config.encode():
                    raise ProtocolError("An enclave takes one run configuration, once.")
                return pb.Reply(hello=pb.Hello(hpke_public=self._hpke.public, signing_public=self._signing.public))
            case "challenge":
                return pb.Reply(nonce=pb.Nonce(nonce=self._challenge(call.challenge.peer)))
            case "attest":
                return pb.Reply(evidence=pb.Evidence(evidence=self._attest(call.attest.peer, call.attest.nonce)))
        return self._handle(str(kind), call, progress)

    def _handle(self, kind: str, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        raise ProtocolError(f"An enclave of role {self.config.role} does not answer {kind!r}.")

    def _attest(self, peer: str, nonce: bytes) -> bytes:
        evidence = self._evidence(nonce)
        self._answered[peer] = nonce, evidence.digest()
        return evidence.encode()

    def _evidence(self, nonce: bytes) -> Evidence:
        if len(nonce) != 32:
            raise ProtocolError("A nonce has 32 bytes.")
        binding = KeyBinding(
            nonce=nonce,
            hpke_public=self._hpke.public,
            signing_public=self._signing.public,
            contract_digest=self.digest,
            run_id=self.config.run_id,
            role=self.config.role,
            party=self.config.party,
        )
        platform, token = self._quote(binding.report_data(), nonce)
        return Evidence(platform=platform, token=token, binding=binding)

    def _gate(self, collateral: Mapping[str, bytes]) -> Gate:
        return Gate(
            terms=self.contract.attestation,
            contract_digest=self.digest,
            run_id=self.config.run_id,
            verifiers=verifiers(self.contract.attestation, collateral),
            nonces=self._nonces,
        )

    def _challenge(self, peer: str) -> bytes:
        return self._gate({}).challenge(self._peer_role(peer), peer, now=now())

    def _admit(self, call: pb.AdmitPeer) -> AttestedPeer:
        """The peer, verified: contract signed by all, then evidence for our nonce."""
        role = self._peer_role(call.peer)
        SignedContract.verify(self.contract, dict(call.contract_signatures))
        return self._appraise(role, call.peer, call.evidence, self._gate(dict(call.collateral)))

    def _appraise(self, role: str, party: str, evidence: bytes, gate: Gate) -> AttestedPeer:
        expected = RunConfig(role=role, party=party, contract=self.contract, run_id=self.config.run_id)
        return gate.admit(evidence, role=role, party=party, run_config_digest=expected.register(), now=now())

    def _peer_role(self, peer: str) -> str:
        """The enclave role of a peer that this role talks to."""
        wanted, role = ("aggregator", "aggregator") if self.config.role == "trainer" else ("customer", "trainer")
        member = self.contract.party(peer)
        if member is None or member.role != wanted:
            raise ProtocolError(f"A {self.config.role} enclave has no such peer in its contract.")
        return role


def create(run_config: bytes, quote: Quote) -> Session:
    """The session for a run configuration. Call it after the sandbox is locked: it makes the keys.

    Raises:
        ProtocolError, ContractError: the run configuration is not usable.
    """
    config = RunConfig.decode(run_config)
    if config.role == "trainer":
        from fedark.enclave.trainer import TrainerSession  # torch: not for the aggregator

        return TrainerSession(config, quote)
    from fedark.enclave.aggregator import AggregatorSession

    return AggregatorSession(config, quote)


def reply_done() -> pb.Reply:
    """The empty answer."""
    return pb.Reply(done=pb.Done())


def seed_of(*parts: Any) -> int:
    """A 63-bit seed derived from canonical parts: the same on every machine."""
    return int.from_bytes(hashlib.sha256(canonical.encode(list(parts))).digest()[:8], "big") >> 1
