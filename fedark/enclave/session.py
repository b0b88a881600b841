"""The state machine that runs inside an enclave: what is common to trainer and aggregator.

No sockets, no files, no clock but the host's: a session takes a `Call` and gives a `Reply`, so the
same class runs in a sandboxed process and in `fedark simulate`. Which call is legal when stands in
`fedark.enclave.order`. What holds beside that:

1. `create` decodes the run configuration, whose hash the launcher has measured, and makes the keys:
   after the sandbox is locked.
2. `Challenge` / `Attest` / `AdmitPeer`: mutual attestation. A peer's evidence counts for the nonce
   that this session gave out, once, and only together with the contract's signatures.
   A call that is repeated after a crash gets the same answer; it changes nothing.
3. Whatever needs a verified peer takes the `AttestedPeer`, which only `Gate.admit` makes.

The host's clock is an input like any other: an enclave cannot know better. Turning it back keeps an
expired contract alive on that host alone; it does not weaken what the other parties check with
their own clocks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

from fedark.attestation.binding import NONCE_BYTES, KeyBinding
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook, NonceRow
from fedark.attestation.trust import verifiers
from fedark.contract.contract import Contract, SignedContract, now
from fedark.contract.lease import INFERENCE, Lease
from fedark.enclave.channel import message_limit
from fedark.enclave.checkpoint import Sealer, SealingKey
from fedark.enclave.order import TABLES, If, State, Step, find, name_of, start
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused, printable
from fedark.foundation.keys import HpkeKey, SigningKey
from fedark.foundation.snapshot import Bytes32, Bytes48, Real, Snapshot
from fedark.measurement import run_config_register
from fedark.v1 import enclave_pb2 as pb

__all__ = [
    "LeaseConfig",
    "ProgressSink",
    "Quote",
    "RunConfig",
    "Session",
    "SessionBase",
    "SessionState",
    "encode_config",
    "prove",
    "reply_done",
    "role_of",
    "seed_of",
]

Quote = Callable[[bytes, bytes], tuple[str, bytes]]
"""(report_data, nonce) -> (platform, token): the launcher's quoting key signs; it is never inside
the enclave.
"""

ProgressSink = Callable[[pb.Progress], None]
_MAX_COLLATERAL = 64 << 20
_MAX_CONFIG = 8 << 20


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


@dataclass(frozen=True)
class LeaseConfig:
    """What an inference enclave is started for; measured as a `RunConfig` is.

    Attributes:
        party: the lease's customer, whose enclave it is.
        contract: the lease.
        run_id: of this enclave's life: one that is started anew has another.
    """

    party: str
    contract: Lease
    run_id: str
    role: str = INFERENCE

    def encode(self) -> bytes:
        return encode_config(self.role, self.party, self.contract, self.run_id)

    def register(self) -> bytes:
        """The value of the "runconfig" register."""
        return run_config_register(self.encode())

    @property
    def message_bytes(self) -> int:
        """The largest frame that the enclave may send or take."""
        return message_limit(self.contract.terms.travelling)

    @classmethod
    def decode(cls, data: bytes) -> LeaseConfig:
        """Read the configuration of an inference enclave.

        Raises:
            ProtocolError: malformed, or the party is not the lease's customer.
            ContractError: the lease in it is not valid.
        """
        match canonical.decode(data, max_bytes=_MAX_CONFIG):
            case {
                "role": "inference",
                "party": str(party),
                "contract": bytes(lease),
                "run_id": str(run_id),
            } as value if len(value) == 4:
                config = cls(party, Lease.decode(lease), run_id)
            case _:
                raise ProtocolError("A run configuration is malformed.")
        if config.contract.customer.name != party:
            raise ProtocolError(f"The lease is not one of {printable(party)}.")
        return config


def encode_config(role: str, party: str, contract: Contract | Lease, run_id: str) -> bytes:
    """The canonical form of what an enclave is started for."""
    return canonical.encode(
        {"role": role, "party": party, "contract": contract.encode(), "run_id": run_id}
    )


def role_of(run_config: bytes) -> str:
    """The role that a run configuration names, before anything else of it is read."""
    value = canonical.decode(run_config, max_bytes=_MAX_CONFIG)
    return str(value.get("role")) if isinstance(value, dict) else ""


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
        return encode_config(self.role, self.party, self.contract, self.run_id)

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
        value = canonical.decode(data, max_bytes=_MAX_CONFIG)
        match value:
            case {
                "role": str(role),
                "party": str(party),
                "contract": bytes(contract),
                "run_id": str(run_id),
            } if len(value) == 4:
                config = cls(
                    role=role, party=party, contract=Contract.decode(contract), run_id=run_id
                )
            case _:
                raise ProtocolError("A run configuration is malformed.")
        member = config.contract.party(party)
        if (
            member is None
            or {"customer": "trainer", "aggregator": "aggregator"}.get(member.role) != role
        ):
            raise ProtocolError(f"The contract has no {role} of that name.")
        return config


class Answer(Snapshot):
    """This enclave's last proof to one peer: the peer's nonce, and the evidence's digest."""

    nonce: Bytes32
    evidence: Bytes48


class Proof(Snapshot):
    """By what a peer was admitted: its evidence, the collateral that it was appraised with
    (canonical), and when (s since 1970).
    """

    evidence: bytes
    collateral: bytes
    at: Real


class ProofRow(Snapshot):
    """A `Proof` in a checkpoint: collateral, which many peers share, by its place in a list."""

    evidence: bytes
    collateral: int
    at: Real


class SessionState(Snapshot):
    """What a session of either role must not forget.

    Attributes:
        at: the state of every region of the table that outlives the process.
    """

    hpke: bytes
    signing: Bytes32
    nonces: list[NonceRow]
    at: dict[str, str]
    answered: dict[str, Answer]
    host: bytes
    collateral: list[bytes]
    proofs: dict[str, ProofRow]


class SessionBase(ABC):
    """Keys, evidence, the admission of peers, and the order of calls (`fedark.enclave.order`).

    Where the table says so, the reply to a call carries the session's state, sealed
    (`fedark.enclave.checkpoint`). A call that changes nothing else than what its repetition would
    set right needs no checkpoint.
    """

    _kept: ClassVar[type[SessionState]]

    def __init__(
        self, config: RunConfig, quote: Quote, sealing_key: SealingKey | None = None
    ) -> None:
        self.config = config
        self.contract = config.contract
        self.digest = config.contract.digest()
        self.message_bytes = config.message_bytes
        self._table = TABLES[config.role, self.contract.protection.mode]
        self._at = start(self._table)
        self._steps: dict[str, Step] = {}
        self._report: ProgressSink = lambda progress: None
        self._quote = quote
        self._hpke = HpkeKey(kem=self.contract.attestation.kem)
        self._signing = SigningKey()
        self._nonces = NonceBook()
        self._answered: dict[str, Answer] = {}
        self._host = b""
        self._proofs: dict[str, Proof] = {}
        self._sealer = Sealer(sealing_key) if sealing_key is not None else None
        self._number = 0

    def handle(self, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        """Answer one call; see `Session.handle`."""
        if self.contract.expired(now()):
            raise Refused(
                f"The contract of job {self.contract.job} is not valid now.",
                safe="The enclave did nothing.",
            )
        body = getattr(call, str(call.WhichOneof("body")), None)
        steps = find(
            self._table,
            self._at,
            name_of(call),
            role=self.config.role,
            number=getattr(body, "round", 0),
            round=self._number,
        )
        handler = next(step.handler for step in steps.values() if step.handler)
        self._steps, self._report = steps, progress
        reply: pb.Reply = getattr(self, handler)(body)
        self._enter()
        if self._sealer is not None and any(step.seals for step in steps.values()):
            reply.checkpoint = self._sealer.seal(self._snapshot())
        return reply

    def _enter(self) -> None:
        """Enter the states that follow the call. A handler that cannot undo what it is about to do
        calls this before; else it happens when the handler is through without an error.
        """
        for region, step in self._steps.items():
            following = step.next
            if isinstance(following, If):
                met = getattr(self, f"_{following.test}")()
                following = following.then if met else following.otherwise
            self._at[region] = following or self._at[region]
        self._steps = {}

    # -- calls that both roles answer

    def _start(self, call: pb.Start) -> pb.Reply:
        if call.run_config != self.config.encode():
            raise ProtocolError("An enclave takes one run configuration, once.")
        return self._hello()

    def _hello(self) -> pb.Reply:
        return pb.Reply(
            hello=pb.Hello(hpke_public=self._hpke.public, signing_public=self._signing.public)
        )

    def _challenge(self, call: pb.Challenge) -> pb.Reply:
        nonce = self._gate({}).challenge(self._peer_role(call.peer), call.peer, now=now())
        return pb.Reply(nonce=pb.Nonce(nonce=nonce))

    def _attest(self, call: pb.Attest) -> pb.Reply:
        evidence = self._evidence(call.nonce)
        self._answered[call.peer] = Answer(nonce=call.nonce, evidence=evidence.digest())
        return pb.Reply(evidence=pb.Evidence(evidence=evidence.encode()))

    def _vouch(self, call: pb.Vouch) -> pb.Reply:
        self._host = call.signature
        return reply_done()

    def _resume(self, call: pb.Resume) -> pb.Reply:
        if self._sealer is None:
            raise ProtocolError(
                "This enclave has no key for checkpoints.", safe="The enclave goes on as it is."
            )
        state = self._sealer.open(call.checkpoint, self._kept)
        at = {name: State.__members__.get(kept) for name, kept in state.at.items()}
        lasting = {name: region for name, region in self._table.items() if region.lasts}
        if at.keys() != lasting.keys() or any(
            at[name] not in region.steps for name, region in lasting.items()
        ):
            raise ProtocolError("A checkpoint names no state of this session.")
        self._hpke = HpkeKey(state.hpke, kem=self._hpke.kem)
        self._signing = SigningKey(state.signing)
        self._nonces.restore(state.nonces)
        self._answered, self._host = state.answered, state.host
        self._proofs = {
            party: Proof(
                evidence=row.evidence, collateral=state.collateral[row.collateral], at=row.at
            )
            for party, row in state.proofs.items()
        }
        self._restore(state)
        self._at |= {name: found for name, found in at.items() if found is not None}
        return self._hello()

    # -- state

    @abstractmethod
    def _snapshot(self) -> SessionState:
        """What this session must not forget."""

    @abstractmethod
    def _restore(self, state: Any) -> None:
        """Go on from what `_snapshot` gave. Keys, nonces and `_readmitted` are there already."""

    def _common(self) -> dict[str, Any]:
        """The fields of `SessionState`."""
        collateral = list(dict.fromkeys(proof.collateral for proof in self._proofs.values()))
        return {
            "hpke": self._hpke.secret_bytes(),
            "signing": self._signing.secret_bytes(),
            "nonces": self._nonces.rows(),
            "at": {
                name: self._at[name].name for name, region in self._table.items() if region.lasts
            },
            "answered": self._answered,
            "host": self._host,
            "collateral": collateral,
            "proofs": {
                party: ProofRow(
                    evidence=proof.evidence,
                    collateral=collateral.index(proof.collateral),
                    at=proof.at,
                )
                for party, proof in self._proofs.items()
            },
        }

    # -- evidence

    def _evidence(self, nonce: bytes) -> Evidence:
        return prove(self._quote, nonce, self._hpke, self._signing, self.config, self._host)

    def _gate(self, collateral: Mapping[str, bytes]) -> Gate:
        return Gate(
            terms=self.contract.attestation,
            contract_digest=self.digest,
            run_id=self.config.run_id,
            verifiers=verifiers(self.contract.attestation, collateral),
            nonces=self._nonces,
            hosts=self.contract.signing_keys,
        )

    def _admit(self, call: pb.AdmitPeer) -> AttestedPeer:
        """The peer, verified: contract signed by all, then evidence for our nonce."""
        role = self._peer_role(call.peer)
        SignedContract.verify(self.contract, dict(call.contract_signatures))
        return self._appraise(role, call.peer, call.evidence, dict(call.collateral))

    def _appraise(
        self, role: str, party: str, evidence: bytes, collateral: Mapping[str, bytes]
    ) -> AttestedPeer:
        at = now()
        peer = self._gate(collateral).admit(
            evidence,
            role=role,
            party=party,
            run_config_digest=self._register_of(role, party),
            now=at,
        )
        self._proofs[party] = Proof(
            evidence=evidence, collateral=canonical.encode(dict(collateral)), at=at.timestamp()
        )
        return peer

    def _known(self, party: str, evidence: bytes) -> bool:
        """Whether this very evidence was admitted before."""
        return party in self._proofs and self._proofs[party].evidence == evidence

    def _readmitted(self, role: str, party: str) -> AttestedPeer:
        """The peer whose admission is in the state that this session went on from."""
        proof = self._proofs[party]
        return self._gate(canonical.decode(proof.collateral, max_bytes=_MAX_COLLATERAL)).readmit(
            proof.evidence,
            role=role,
            party=party,
            run_config_digest=self._register_of(role, party),
            admitted=datetime.fromtimestamp(proof.at, UTC),
            now=now(),
        )

    def _register_of(self, role: str, party: str) -> bytes:
        return RunConfig(
            role=role, party=party, contract=self.contract, run_id=self.config.run_id
        ).register()

    def _peer_role(self, peer: str) -> str:
        """The enclave role of a peer that this role talks to."""
        wanted, role = (
            ("aggregator", "aggregator")
            if self.config.role == "trainer"
            else ("customer", "trainer")
        )
        member = self.contract.party(peer)
        if member is None or member.role != wanted:
            raise ProtocolError(f"A {self.config.role} enclave has no such peer in its contract.")
        return role


def prove(
    quote: Quote,
    nonce: bytes,
    hpke: HpkeKey,
    signing: SigningKey,
    config: RunConfig | LeaseConfig,
    host: bytes,
) -> Evidence:
    """The evidence of an enclave with these keys, for a peer's nonce.

    Raises:
        ProtocolError: it is no nonce.
    """
    if len(nonce) != NONCE_BYTES:
        raise ProtocolError(f"A nonce has {NONCE_BYTES} bytes.")
    binding = KeyBinding(
        nonce=nonce,
        hpke_public=hpke.public,
        signing_public=signing.public,
        contract_digest=config.contract.digest(),
        run_id=config.run_id,
        role=config.role,
        party=config.party,
    )
    platform, token = quote(binding.report_data(), nonce)
    return Evidence(platform=platform, token=token, binding=binding, host=host)


def reply_done() -> pb.Reply:
    """The empty answer."""
    return pb.Reply(done=pb.Done())


def seed_of(*parts: Any) -> int:
    """A 63-bit seed derived from canonical parts: the same on every machine."""
    return int.from_bytes(hashlib.sha256(canonical.encode(list(parts))).digest()[:8], "big") >> 1
