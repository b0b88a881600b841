"""A customer's node: it owns the records and the trainer enclave, and opens the first to the second
only when both ends are proven.

The order is that of the stages. The data file is read and checked at enrolment, so that a bad
record is found before anything is signed; it goes into the trainer enclave at `load`, after this
node has appraised its own enclave and the aggregator's. Whenever it is read, what is wrong with it
is told to this node's own people alone.

The enclave and the node itself may be killed at any moment: the enclave goes on from its
checkpoint, the node from the run's state, and weights and records are brought to the enclave again.
Every step here finds done what was done before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, SignedContract, now
from fedark.contract.protection import CURVE, kind_of, makes_personal
from fedark.enclave.durable import DurableEnclave
from fedark.enclave.host import EnclaveHandle
from fedark.enclave.protection import Context, ProtectedUpdate
from fedark.enclave.session import RunConfig
from fedark.enclave.usage import peak_mib
from fedark.enclave.vouching import vouch
from fedark.foundation import canonical
from fedark.foundation.errors import (
    ContractError,
    EnclaveFailed,
    FedarkError,
    FederationError,
    ProtocolError,
)
from fedark.foundation.files import write_atomic
from fedark.records.reading import one_answer
from fedark.stages.budget import ledger_bodies, release, show_head
from fedark.stages.dossier import OWN, OwnDossier
from fedark.stages.loading import CustomerData, CustomerRun, Loader
from fedark.stages.node import SEEN_LOGS, NodeBase
from fedark.stages.personal import SEALED, gain_lines, write_personal
from fedark.stages.report import spared_lines
from fedark.stages.runs import MEMORY
from fedark.stages.settings import NodeSettings
from fedark.stages.shown_log import ShownLog, provider_key
from fedark.translog.head import TreeHead
from fedark.translog.memory import HeadMemory
from fedark.translog.view import sign_view
from fedark.v1 import enclave_pb2, stage_pb2

__all__ = ["CustomerNode"]

_FORWARDED: Mapping[str, str] = {"measure": CURVE, "endorse": "endorsement", "unmask": "shares"}
"""Calls that the aggregator may have passed to the trainer enclave, and what answers each."""
_SHOW_EVERY = 3.0  # seconds
_LOAD_ATTEMPTS = 5


class CustomerNode(NodeBase[CustomerRun]):
    """See the module's docstring."""

    role = "customer"
    _not_after_expiry = frozenset({"attest", "load", "round", "evaluate", "forward", "deliver"})

    def __init__(self, settings: NodeSettings, data: CustomerData) -> None:
        super().__init__(settings)
        self._loader = Loader(settings, data)
        self._heads = HeadMemory(settings.state / SEEN_LOGS)
        self._told = 0.0

    def close(self) -> None:
        """End the trainer enclaves."""
        for run in self._runs.values():
            run.enclave.close()
        self._runs.clear()

    def wake(self) -> None:
        """See `Node.wake`."""
        with self._one_at_a_time:
            for run_id in self._memory.open_runs():
                try:
                    run = self._run(run_id)
                    if run is not None and not run.contract.expired(now()):
                        run.enclave.wake()
                        self.settings.on_progress("went on with the run that was under way")
                except FedarkError as error:
                    self.settings.on_progress(f"could not go on with a run: {error.what}")

    def _recall(self, run_id: str, contract: Contract, state: dict[str, Any]) -> CustomerRun:
        provider, enclave = contract.provider, self._enclave(run_id, contract)
        run = CustomerRun(run_id=run_id, contract=contract, enclave=enclave, nonces=state["nonces"])
        if state["signatures"] is not None:
            run.signed = SignedContract.verify(contract, state["signatures"])
        name = contract.aggregator.name
        run.aggregator = self._readmit(
            contract, run.run_id, state["aggregator"], role="aggregator", party=name
        )
        run.trainer = self._readmit(
            contract, run.run_id, state["trainer"], role="trainer", party=self.party
        )
        if state["log_head"] is not None:
            run.log_head = TreeHead.verify(
                state["log_head"], provider_key(contract), by=provider.name
            )
        run.evidence, run.log_agreed, run.loaded = (
            state["evidence"],
            state["log_agreed"],
            state["loaded"],
        )
        run.number, run.base = state["number"], state["base"]
        run.local, run.own = state["local"], state["own"]
        return run

    def _enclave(self, run_id: str, contract: Contract) -> DurableEnclave:
        start = self.settings.start_enclave
        if start is None:
            raise FederationError("This node has no way to start an enclave.")
        config = self._config(run_id, contract).encode()
        return DurableEnclave(
            lambda checkpoint: start("trainer", config, checkpoint),
            self._memory.enclave(run_id),
            refeed=lambda enclave: self._loader.refeed(self._runs.get(run_id), enclave),
            say=self.settings.on_progress,
        )

    def _config(self, run_id: str, contract: Contract) -> RunConfig:
        return RunConfig(role="trainer", party=self.party, contract=contract, run_id=run_id)

    def _answers(self) -> dict[str, Callable[[CustomerRun, Any], Any]]:
        return {
            "attest": self._attest,
            "load": self._load,
            "round": self._round,
            "evaluate": self._evaluate,
            "forward": self._forward,
            "deliver": self._deliver,
            "abort": self._abort,
        }

    # -- stages

    def _begin(self, run_id: str, contract: Contract) -> CustomerRun:
        train, test = self._loader.read(contract, self.settings.on_progress)
        if contract.models[0].labels and one_answer(train):
            self.settings.on_progress(
                "warning: all training records here have the same answer: alone they teach nothing"
            )
        masked = contract.protection.mode == "masked"
        if masked and contract.evaluation.own and not test:
            raise ContractError(
                f"contract of job {contract.job}",
                [
                    f"it sums figures on held-out records under masks, and {self.party} holds"
                    " none out"
                ],
                safe=f"{self.party} did not sign it.",
            )
        enclave = self._enclave(run_id, contract)
        for other in {*self._runs, *self._memory.open_runs()}:  # a node serves one run at a time
            self._end(other)
        vouch(enclave.call, self._config(run_id, contract), self.settings.keys.signing)
        nonce = enclave.call(
            enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer=contract.aggregator.name))
        ).nonce.nonce
        gate = self._gate(contract, run_id)
        mine = gate.challenge("aggregator", contract.aggregator.name, now=now())
        nonces = {"node": mine, "trainer": nonce}
        if masked:
            nonces["peers"] = enclave.call(
                enclave_pb2.Call(peer_nonce=enclave_pb2.PeerNonce())
            ).nonce.nonce
        self.settings.on_progress(
            f"signed the contract of job {contract.job}; {len(train)} records stay here"
        )
        return CustomerRun(run_id=run_id, contract=contract, enclave=enclave, nonces=nonces)

    def _own_problems(self, contract: Contract) -> list[str]:
        return self._loader.bundle_problems(contract)

    def _attest(self, run: CustomerRun, request: stage_pb2.AttestRequest) -> stage_pb2.AttestReply:
        contract, enclave = run.contract, run.enclave
        run.signed = SignedContract.verify(contract, dict(request.contract_signatures))
        name = contract.aggregator.name
        run.aggregator = self._admit(
            contract, run.run_id, request.aggregator_evidence["node"], role="aggregator", party=name
        )
        gate = self._gate(contract, run.run_id)
        nonce = gate.challenge("trainer", self.party, now=now())
        run.trainer = self._admit(
            contract,
            run.run_id,
            self._evidence(enclave, self.party, nonce),
            role="trainer",
            party=self.party,
        )
        enclave.call(
            enclave_pb2.Call(
                admit_peer=enclave_pb2.AdmitPeer(
                    peer=name,
                    evidence=request.aggregator_evidence["trainer"],
                    contract_signatures=request.contract_signatures,
                    collateral=dict(self.settings.collateral.items()),
                )
            )
        )
        self.settings.on_progress(
            "trainer and aggregator enclaves are proven to be what the contract names"
        )
        evidence = self._evidence(enclave, contract.provider.name, request.provider_nonce)
        run.evidence = hashlib.sha384(evidence).digest()
        run.asked = self._heads.last(provider_key(contract), by=contract.provider.name)
        announced = None
        if contract.protection.mode == "masked":
            call = enclave_pb2.Call(announce=enclave_pb2.Announce(nonces=dict(request.peer_nonces)))
            announcement = enclave.call(call).announcement
            announced = stage_pb2.PeerAnnouncement(
                evidence=announcement.evidence, hello=announcement.hello
            )
        return stage_pb2.AttestReply(
            provider_evidence=evidence,
            aggregator_evidence=self._evidence(enclave, name, request.aggregator_nonce),
            log_head=run.asked.encoded if run.asked is not None else b"",
            announced=announced,
        )

    def _evidence(self, enclave: EnclaveHandle, peer: str, nonce: bytes) -> bytes:
        return bytes(
            enclave.call(
                enclave_pb2.Call(attest=enclave_pb2.Attest(peer=peer, nonce=nonce))
            ).evidence.evidence
        )

    def _load(self, run: CustomerRun, request: stage_pb2.LoadRequest) -> stage_pb2.LoadReply:
        if run.trainer is None or run.aggregator is None:
            raise ProtocolError(
                "The enclaves are not proven yet.", safe="No record was opened to the trainer."
            )
        run.log_head = self._shown(run).check_grants(
            request.grants, signing=run.trainer.signing_public, hpke=run.trainer.hpke_public
        )
        run.loaded = False  # a node that was killed right here does it again
        for attempt in range(1, _LOAD_ATTEMPTS + 1):
            try:
                receipts, measured = self._loader.fill(run, request, self._show)
                break
            except EnclaveFailed as error:
                if attempt == _LOAD_ATTEMPTS:
                    raise
                self.settings.on_progress(f"loading begins again: {error.what}")
        self._keep(run, measured)
        self._consent.use(run.contract, run.run_id)
        run.loaded = True
        protected = self._own(run, run.trainer, "loaded", measured.protected)
        view = sign_view(
            self.settings.keys.signing,
            party=self.party,
            run_id=run.run_id,
            contract=run.contract.digest(),
            head=run.log_head,
        )
        shown = (
            show_head(self.settings.keys.signing, run.charge, run.run_id, run.contract)
            if run.charge is not None
            else b""
        )
        return stage_pb2.LoadReply(
            receipts=receipts, protected_metrics=protected.wire, log_view=view, ledger_head=shown
        )

    def _round(self, run: CustomerRun, request: stage_pb2.RoundRequest) -> stage_pb2.RoundReply:
        trainer = self._loaded(run)
        if not run.log_agreed:
            if run.log_head is None:
                raise ProtocolError("The provider's log was not shown yet.", safe="No update left.")
            self._shown(run).agree(run.log_head, request.log_views)
            run.log_agreed = True
        self.settings.on_progress(f"round {request.round} of {run.contract.rounds}")
        call = enclave_pb2.Round(round=request.round, state=request.state, masked=request.masked)
        reply = run.enclave.call(enclave_pb2.Call(round=call), on_progress=self._show)
        run.number, run.base = request.round, _base(request.state)
        kind = kind_of(run.contract, request.round)
        protected = self._own(run, trainer, kind, reply.update.protected)
        if run.contract.privacy.mechanism != "none":
            if (
                run.charge is None
            ):  # this node was started again meanwhile; the ledger knows the charge
                self._loader.charge(run, self._loader.read(run.contract)[0])
            again = self._memory.begin(run.run_id, protected.wire)
            if run.charge is not None:
                release(self.settings.state, run.charge, request.round, again=again, now=now())
        return stage_pb2.RoundReply(protected_update=protected.wire)

    def _evaluate(
        self, run: CustomerRun, request: stage_pb2.EvaluateRequest
    ) -> stage_pb2.EvaluateReply:
        trainer = self._loaded(run)
        call = enclave_pb2.Evaluate(round=request.round, state=request.state, masked=request.masked)
        reply = run.enclave.call(enclave_pb2.Call(evaluate=call), on_progress=self._show)
        self._keep(run, reply.measured)
        run.number, run.base = request.round, _base(request.state)
        protected = self._own(run, trainer, "evaluated", reply.measured.protected)
        return stage_pb2.EvaluateReply(protected_metrics=protected.wire)

    def _forward(
        self, run: CustomerRun, request: stage_pb2.ForwardRequest
    ) -> stage_pb2.ForwardReply:
        """A call of the aggregator enclave to the trainer enclave, in which this node decides
        nothing but that it is one of those.
        """
        trainer, call = self._loaded(run), request.call.WhichOneof("body")
        if call not in _FORWARDED:
            raise ProtocolError(
                f"A node does not pass on the call {call!r}.", safe="The trainer did nothing."
            )
        reply = run.enclave.call(request.call, on_progress=self._show)
        kind, number, base = _FORWARDED[call], run.number, run.base
        if call == "measure":
            number, base = request.call.measure.round, _base(request.call.measure.state)
        context = Context(run.contract.digest(), run.run_id, kind, number, self.party, base)
        protected = ProtectedUpdate.verify(reply.update.protected, sender=trainer, context=context)
        return stage_pb2.ForwardReply(protected=protected.wire)

    def _abort(self, run: CustomerRun, request: stage_pb2.AbortRequest) -> stage_pb2.AbortReply:
        try:
            if request.HasField("refused"):
                path = self.settings.state / "runs" / run.run_id / "refused.json"
                self._shown(run).keep_refusal(request.refused, path, self.settings.on_progress)
        finally:
            super()._abort(run, request)
        return stage_pb2.AbortReply()

    def _deliver(
        self, run: CustomerRun, request: stage_pb2.DeliverRequest
    ) -> stage_pb2.DeliverReply:
        if run.signed is None or run.aggregator is None:
            raise ProtocolError("The enclaves are not proven yet.", safe="Nothing was stored.")
        folder = self._store(run.signed, run.aggregator, request)
        write_atomic(folder / "local.json", json.dumps(run.local, indent=2).encode())
        self._take_personal(run, request.delivery, folder)
        own = OwnDossier(
            party=self.party,
            dossier=request.dossier,
            figures=canonical.encode(run.local),
            statement=run.own,
            ledger=ledger_bodies(self.settings.state, run.contract, run.run_id),
        )
        write_atomic(folder / OWN, own.sign(self.settings.keys.signing), mode=0o600)
        memory = {"node": round(peak_mib(), 1), "enclave": round(run.enclave.peak_mib(), 1)}
        write_atomic(folder / MEMORY, json.dumps({"peak_mib": memory}).encode())
        for line in spared_lines(run.local):
            self.settings.on_progress(line)
        self.settings.on_progress(f"adapter and report are in {folder}")
        self._end(run.run_id)
        return stage_pb2.DeliverReply(stored=True)

    def _take_personal(self, run: CustomerRun, delivery: bytes, folder: Path) -> None:
        """Fetch the personal adapters from this node's own enclave, and write them beside the
        shared ones. Whatever becomes of it stays here: the answer to the aggregator is the same.
        """
        contract, key = run.contract, self.settings.personal_key
        wanted = any(makes_personal(contract, terms) for terms in contract.models)
        if not (delivery and wanted and run.number > contract.rounds):
            return
        call = enclave_pb2.Personal(delivery=delivery, seal_to=key)
        try:
            reply = run.enclave.call(enclave_pb2.Call(personal=call)).personal.adapters
            if key:
                write_atomic(folder / SEALED, reply)
            else:
                write_personal(contract, run.run_id, reply, folder)
        except FedarkError as error:
            self.settings.on_progress(f"no personal adapter was stored: {error.told}")
        for line in gain_lines(run.local):
            self.settings.on_progress(line)

    # -- helpers

    def _shown(self, run: CustomerRun) -> ShownLog:
        """What the provider's log shows of this run's trainer enclave."""
        return ShownLog(
            self._heads,
            run.contract,
            party=self.party,
            run_id=run.run_id,
            evidence=run.evidence,
            asked=run.asked,
        )

    def _own(
        self, run: CustomerRun, trainer: AttestedPeer, kind: str, wire: bytes
    ) -> ProtectedUpdate:
        """What this node's own attested trainer made for this place of the run; nothing else leaves
        for the aggregator.
        """
        context = Context(run.contract.digest(), run.run_id, kind, run.number, self.party, run.base)
        return ProtectedUpdate.verify(wire, sender=trainer, context=context)

    def _loaded(self, run: CustomerRun) -> AttestedPeer:
        if not run.loaded or run.trainer is None:
            raise ProtocolError(
                "Weights and records are not loaded yet.", safe="The trainer enclave did nothing."
            )
        return run.trainer

    def _keep(self, run: CustomerRun, measured: enclave_pb2.Measured) -> None:
        run.local = canonical.decode(measured.local, max_bytes=8 << 20)
        run.own = measured.own

    def _show(self, progress: enclave_pb2.Progress) -> None:
        """A line every few seconds, and the last of each piece of work."""
        if progress.done < progress.total and time.monotonic() - self._told < _SHOW_EVERY:
            return
        self._told = time.monotonic()
        value = f", loss {progress.value:.3f}" if progress.value else ""
        self.settings.on_progress(f"{progress.stage}: {progress.done}/{progress.total}{value}")

    def _end(self, run_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id].enclave.discard()
        super()._end(run_id)


def _base(state: bytes) -> bytes:
    return hashlib.sha384(state).digest()
