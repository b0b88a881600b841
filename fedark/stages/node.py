"""What the nodes of providers and customers have in common: consent, the order of stages, and
answers that are always bytes.

A node trusts its own configuration: its keys, its roster of the other parties' keys, its own
measurement of the enclaves that it installed, its platform roots. Whatever the aggregator brings is
compared with these, and nothing is run, released or opened before it agrees. A stage that is
brought twice gets the answer it got, also after the node was killed and started again
(`fedark.stages.runs`), so a relay that repeats itself changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError

from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.trust import verifiers
from fedark.contract.contract import CONTRACT_LABEL, Contract, SignedContract, now
from fedark.contract.lease import Lease
from fedark.enclave.protection import open_delivery
from fedark.enclave.session import RunConfig, encode_config
from fedark.foundation import canonical
from fedark.foundation.errors import (
    ContractError,
    EnclaveFailed,
    EvidenceRefused,
    FedarkError,
    ProtocolError,
    Refused,
    StorageError,
)
from fedark.foundation.files import write_atomic
from fedark.foundation.logs import explain
from fedark.links.faults import fault_of
from fedark.links.link import VERSION
from fedark.measurement import run_config_register
from fedark.stages.consent import Consent
from fedark.stages.dossier import DOSSIER
from fedark.stages.report import read_report, require_curve
from fedark.stages.runs import REPORT, RunMemory
from fedark.stages.settings import NodeSettings, node_problems
from fedark.translog.entry import Entry, Fact
from fedark.translog.log import TransparencyLog
from fedark.tuning.export import export_peft
from fedark.v1 import stage_pb2

__all__ = ["LOG", "SEEN_LOGS", "Node", "NodeBase", "NodeRun", "Proof"]

LOG = "log.sqlite"
"""In every node's folder: its transparency log."""
_log = logging.getLogger(__name__)
SEEN_LOGS = "seen-logs.sqlite"
"""In a customer's and an aggregator's folder: the latest head that it saw of every provider's log.
"""
_NOT_THE_SAME_TWICE = ("attest", "release")
"""Stages that spend nonces: repeated after a crash, they may spend the same ones on the same
evidence. Once answered, they are answered the same until the run ends."""


RunT = TypeVar("RunT", bound="NodeRun")
Proof = Callable[["AttestedPeer | None"], "list[Any] | None"]
"""By what a peer was admitted, for the run's state."""


class Node(Protocol):
    """A party's end of the link."""

    party: str
    role: str

    def handle(self, request: bytes) -> bytes:
        """Answer one serialised StageRequest with one serialised StageReply; never raises for what
        the request holds.
        """
        ...

    def wake(self) -> None:
        """After a restart: go on with the runs that were open, so that the next request finds their
        enclaves ready.
        """
        ...

    def close(self) -> None:
        """End every enclave that the node has started."""
        ...


@dataclass(kw_only=True)
class NodeRun(ABC):
    """One run of a job at a node. A field is set only by the stage that earns it."""

    run_id: str
    contract: Contract
    nonces: dict[str, bytes]
    signed: SignedContract | None = None
    aggregator: AttestedPeer | None = None

    def state(self, proof: Proof) -> dict[str, Any]:
        """What the node must not forget of it."""
        return {
            "contract": self.contract.encode(),
            "nonces": self.nonces,
            "signatures": self.signed.signatures if self.signed is not None else None,
            "aggregator": proof(self.aggregator),
        }


class NodeBase(ABC, Generic[RunT]):
    """Consent, dispatch and delivery; `customer` and `provider` add their stages."""

    role = ""
    _not_after_expiry: frozenset[str] = frozenset()
    """Stages that are not answered once the contract has expired."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.party = settings.party
        self._nonces = NonceBook(settings.state / "nonces.sqlite")
        self._log = TransparencyLog(settings.state / LOG, settings.keys.signing)
        self._admissions: dict[bytes, int] = {}  # digest of evidence -> its entry in the log
        self._proofs: dict[
            bytes, list[Any]
        ] = {}  # digest of evidence -> the evidence, and when it was admitted
        self._consent = Consent(settings.state)
        self._memory = RunMemory(settings.state, settings.keys.signing)
        self._runs: dict[str, RunT] = {}
        self._repeated = False
        self._one_at_a_time = threading.Lock()

    # -- one request, one reply

    def handle(self, request: bytes) -> bytes:
        """See `Node.handle`."""
        with self._one_at_a_time:
            run_id = ""
            try:
                message = stage_pb2.StageRequest()
                try:
                    message.ParseFromString(request)
                except DecodeError:
                    raise ProtocolError(
                        "A stage request is malformed.", safe="The node did nothing."
                    ) from None
                if message.version != VERSION:
                    raise ProtocolError(
                        f"The aggregator speaks version {message.version} of the stages, this node"
                        f" version {VERSION}.",
                        safe="The node did nothing.",
                        fix="Bring both to the same release of fedark.",
                    )
                if len(message.contract_digest) != hashlib.sha384().digest_size:
                    raise ProtocolError(
                        "A stage request names no contract.", safe="The node did nothing."
                    )
                run_id = message.run_id
                self._require_standing(message)
                answer = self._memory.answer(run_id, request)
                if answer is not None:
                    return answer
                stage = message.WhichOneof("body")
                once = stage if stage in _NOT_THE_SAME_TWICE else ""
                self._repeated = bool(once) and self._memory.begin(run_id, request)
                reply = self._dispatch(message)
                reply.version, reply.run_id, reply.party = VERSION, run_id, self.party
                answer = bytes(reply.SerializeToString())
                self._memory.keep(run_id, request, answer, once=once)
                return answer
            except FedarkError as error:
                own = isinstance(error, StorageError | EnclaveFailed)  # this machine's own trouble
                _log.log(logging.ERROR if own else logging.WARNING, "refused: %s", error.what)
                reply = stage_pb2.StageReply(fault=self._fault(error))
            except Exception as error:
                _log.error("a stage failed: %s", explain(error))
                # The text of a foreign exception may hold a record or a key: only its type goes
                # out.
                what = f"The node of {self.party} failed ({type(error).__name__})."
                reply = stage_pb2.StageReply(
                    fault=stage_pb2.StageFault(code="FederationError", what=what)
                )
            reply.version, reply.run_id, reply.party = VERSION, run_id, self.party
            return bytes(reply.SerializeToString())

    def _fault(self, error: FedarkError) -> stage_pb2.StageFault:
        """An error for the others. Where things lie here is for the node's own people."""
        fault = fault_of(error)
        for folder in (
            str(path)
            for path in (self.settings.state, self.settings.catalogue)
            if path.is_absolute()
        ):
            fault.what, fault.safe, fault.fix = (
                text.replace(folder, "") for text in (fault.what, fault.safe, fault.fix)
            )
            fault.reasons[:] = [reason.replace(folder, "") for reason in fault.reasons]
        if fault != fault_of(error):
            self.settings.on_progress(str(error))
        return fault

    def _dispatch(self, message: stage_pb2.StageRequest) -> stage_pb2.StageReply:
        """Answer a well-formed request; a FedarkError becomes a StageFault."""
        stage = message.WhichOneof("body")
        if stage == "enrol":
            return stage_pb2.StageReply(enrol=self._enrol(message.run_id, message.enrol))
        run = self._run(message.run_id)
        if run is None and stage == "deliver" and self._memory.delivered(message.run_id):
            return stage_pb2.StageReply(deliver=stage_pb2.DeliverReply(stored=True))
        if run is None or message.contract_digest != run.contract.digest():
            raise ProtocolError(
                f"{self.party} has not enrolled in this run.", safe="The node did nothing."
            )
        answer = self._answers().get(stage or "")
        if answer is None:
            raise ProtocolError(
                f"A {self.role} does not answer stage {stage!r}.", safe="The node did nothing."
            )
        if stage in self._not_after_expiry and run.contract.expired(now()):
            raise ProtocolError("The contract is not valid any more.", safe="The node did nothing.")
        reply = answer(run, getattr(message, stage or ""))
        if run.run_id in self._runs:
            self._memory.save(run.run_id, run.state(self._proof))
        return stage_pb2.StageReply(**{stage: reply})

    @abstractmethod
    def _answers(self) -> dict[str, Callable[[RunT, Any], Any]]:
        """Stage -> what answers it, but for enrol."""

    def _enrol(self, run_id: str, request: stage_pb2.EnrolRequest) -> stage_pb2.EnrolReply:
        run = self._run(run_id)
        if run is None:
            run = self._runs[run_id] = self._begin(run_id, self._agree(request.contract))
            self._memory.save(run_id, run.state(self._proof))
        elif run.contract.encode() != request.contract:
            raise ProtocolError("This run has enrolled already.", safe="It goes on as it is.")
        return stage_pb2.EnrolReply(signature=self._sign(run.contract), nonces=run.nonces)

    @abstractmethod
    def _begin(self, run_id: str, contract: Contract) -> RunT:
        """A new run of a contract that this node agrees to."""

    def _run(self, run_id: str) -> RunT | None:
        """The run, as this node remembers it."""
        if run_id not in self._runs and (state := self._memory.load(run_id)) is not None:
            self._runs[run_id] = self._recall(run_id, Contract.decode(state["contract"]), state)
        return self._runs.get(run_id)

    @abstractmethod
    def _recall(self, run_id: str, contract: Contract, state: dict[str, Any]) -> RunT:
        """The run that `state` was kept of."""

    def _abort(self, run: RunT, request: stage_pb2.AbortRequest) -> stage_pb2.AbortReply:
        self._end(run.run_id)
        return stage_pb2.AbortReply()

    def _end(self, run_id: str) -> None:
        self._runs.pop(run_id, None)
        self._memory.forget(run_id)

    def wake(self) -> None:
        """See `Node.wake`."""

    @abstractmethod
    def close(self) -> None:
        """See `Node.close`."""

    # -- consent

    def _require_standing(self, message: stage_pb2.StageRequest) -> None:
        """Return unless the operator has taken the approval back: then this node ends the run, and
        says so.

        Raises:
            Refused: it has.
        """
        if message.WhichOneof("body") == "abort":
            return
        try:
            self._consent.require_standing(message.contract_digest, self.party)
        except Refused as error:
            self.settings.on_progress(error.what)
            end = stage_pb2.StageRequest(
                run_id=message.run_id, contract_digest=message.contract_digest
            )
            end.abort.reason = error.what
            with contextlib.suppress(ProtocolError):  # it may not have enrolled
                self._dispatch(end)
            raise

    def _agree(self, data: bytes, run_id: str | None = None) -> Contract:
        """The contract, if nothing in it contradicts what this node knows itself.

        Args:
            run_id: a run that may have begun already.

        Raises:
            ContractError: with everything that does.
        """
        settings = self.settings
        contract = Contract.decode(data, f"contract for {self.party}")
        self._consent.require(contract, self.party, run_id)
        problems = node_problems(contract, settings, self.role) + self._own_problems(contract)
        if problems:
            raise ContractError(
                f"contract of job {contract.job}", problems, safe=f"{self.party} did not sign it."
            )
        return contract

    def _own_problems(self, contract: Contract) -> list[str]:
        return []

    def _sign(self, contract: Contract) -> bytes:
        return self.settings.keys.signing.sign(CONTRACT_LABEL, contract.digest())

    # -- attestation

    def _gate(self, contract: Contract | Lease, run_id: str) -> Gate:
        return Gate(
            terms=contract.attestation,
            contract_digest=contract.digest(),
            run_id=run_id,
            verifiers=verifiers(contract.attestation, self.settings.collateral, self.settings.own),
            nonces=self._nonces,
            hosts=contract.signing_keys,
            own=self.settings.own,
        )

    def _admit(
        self, contract: Contract | Lease, run_id: str, evidence: bytes, *, role: str, party: str
    ) -> AttestedPeer:
        """The enclave that `evidence` proves; both outcomes are in this node's log before anything
        follows from them.
        """
        register = run_config_register(encode_config(role, party, contract, run_id))
        at = now()
        try:
            peer = self._gate(contract, run_id).admit(
                evidence,
                role=role,
                party=party,
                run_config_digest=register,
                now=at,
                again=self._repeated,
            )
        except EvidenceRefused as error:
            error.logged = self._log_refusal(
                contract, run_id, evidence, error, party=party, asked="admission"
            )
            raise
        facts: dict[str, Fact] = {
            "party": party,
            "run_id": run_id,
            "contract": peer.contract_digest,
            "role": role,
            "platform": peer.claims.platform,
            "evidence": peer.evidence_digest,
            "measurements": canonical.digest(dict(peer.claims.measurements)),
            "signing": peer.signing_public,
        }
        self._admissions[peer.evidence_digest] = self._log.append(
            Entry("attestation", int(now().timestamp()), facts)
        ).index
        self._proofs[peer.evidence_digest] = [evidence, at.timestamp()]
        return peer

    def _proof(self, peer: AttestedPeer | None) -> list[Any] | None:
        """By what `peer` was admitted, for the run's state."""
        return self._proofs[peer.evidence_digest] if peer is not None else None

    def _readmit(
        self, contract: Contract, run_id: str, proof: list[Any] | None, *, role: str, party: str
    ) -> AttestedPeer | None:
        """The peer of a `_proof` in a run's state."""
        if proof is None:
            return None
        evidence, at = proof
        config = RunConfig(role=role, party=party, contract=contract, run_id=run_id)
        peer = self._gate(contract, run_id).readmit(
            evidence,
            role=role,
            party=party,
            run_config_digest=config.register(),
            admitted=datetime.fromtimestamp(at, UTC),
            now=now(),
        )
        self._proofs[peer.evidence_digest] = proof
        return peer

    def _log_refusal(
        self,
        contract: Contract | Lease,
        run_id: str,
        evidence: bytes,
        error: FedarkError,
        *,
        party: str,
        asked: str,
    ) -> int | None:
        """Log it; the index of its entry."""
        done = self._log.refuse(
            party=party,
            run_id=run_id,
            contract=contract.digest(),
            asked=asked,
            evidence=hashlib.sha384(evidence).digest(),
            reasons=error.what,
            now=now(),
        )
        return done.index

    # -- delivery

    def _store(
        self, signed: SignedContract, aggregator: AttestedPeer, request: stage_pb2.DeliverRequest
    ) -> Path:
        """Write the report and, if there is a delivery for this party, one PEFT adapter folder a
        model.
        """
        folder = self.settings.state / "runs" / aggregator.run_id
        report = read_report(
            request.report, request.report_signature, signed.contract, aggregator.run_id
        )
        if request.delivery:
            delivery = open_delivery(
                request.delivery,
                hpke=self.settings.keys.hpke,
                party=self.party,
                aggregator=aggregator,
            )
            require_curve(report, delivery.curve)
            vectors = delivery.vectors
            for terms in signed.contract.models:
                vector = vectors.get(terms.name)
                if vector is None or vector.shape != (terms.travelling,):
                    raise ProtocolError(
                        f"The delivered adapter for {terms.name} has not the shape of the contract."
                    )
                export_peft(terms, vector, folder / f"adapter-{terms.name}")
        write_atomic(folder / DOSSIER, request.dossier)
        write_atomic(folder / REPORT, json.dumps(report, indent=2).encode())
        return folder
