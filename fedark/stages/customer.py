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

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, ModelTerms, SignedContract, now
from fedark.contract.job import DataSpec
from fedark.enclave.durable import DurableEnclave
from fedark.enclave.host import EnclaveHandle
from fedark.enclave.protection import Context, ProtectedUpdate
from fedark.enclave.session import RunConfig
from fedark.enclave.usage import peak_mib
from fedark.enclave.vouching import vouch
from fedark.foundation import canonical
from fedark.foundation.errors import (
    BudgetExceeded,
    ContractError,
    DataError,
    EnclaveFailed,
    FedarkError,
    FederationError,
    ProtocolError,
)
from fedark.foundation.files import write_atomic
from fedark.records.reading import Record, one_answer
from fedark.records.splits import split_train_test
from fedark.stages.budget import charge, release, show_head
from fedark.stages.customer_run import CustomerRun
from fedark.stages.node import SEEN_LOGS, NodeBase, NodeSettings, find_bundle
from fedark.stages.runs import MEMORY
from fedark.stages.watched_log import WatchedLog, provider_key
from fedark.translog.head import TreeHead
from fedark.translog.view import sign_view
from fedark.v1 import enclave_pb2, stage_pb2
from fedark.vault.bundle import SealedBundle

__all__ = ["CustomerData", "CustomerNode"]

_PIECE = 4 << 20
_BATCH = 2000
_SHOW_EVERY = 3.0  # seconds
_LOAD_ATTEMPTS = 5


@dataclass(frozen=True)
class CustomerData:
    """Where a customer's records are and how they are read.

    Attributes:
        file: CSV or JSON lines.
        test: a file of held-out records, or None to hold out `spec.test_fraction` of `file`.
        spec: columns and template.
    """

    file: Path
    test: Path | None
    spec: DataSpec


class CustomerNode(NodeBase):
    """See the module's docstring."""

    role = "customer"

    def __init__(self, settings: NodeSettings, data: CustomerData) -> None:
        super().__init__(settings)
        self._data = data
        self._log_seen = WatchedLog(
            self.party, settings.state, settings.state / SEEN_LOGS, settings.on_progress
        )
        self._runs: dict[str, CustomerRun] = {}
        self._shown = 0.0

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

    def _run(self, run_id: str) -> CustomerRun | None:
        """The run, as this node remembers it."""
        if run_id not in self._runs and (state := self._memory.load(run_id)) is not None:
            contract = Contract.decode(state["contract"])
            run = CustomerRun(contract, self._enclave(run_id, contract), state["nonces"])
            self._recall(run_id, run, state)
            self._runs[run_id] = run
        return self._runs.get(run_id)

    def _recall(self, run_id: str, run: CustomerRun, state: dict[str, Any]) -> None:
        contract, provider = run.contract, run.contract.provider
        if state["signatures"] is not None:
            run.signed = SignedContract.verify(contract, state["signatures"])
        name = contract.aggregator.name
        run.aggregator = self._readmit(
            contract, run_id, state["aggregator"], role="aggregator", party=name
        )
        run.trainer = self._readmit(
            contract, run_id, state["trainer"], role="trainer", party=self.party
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
        run.number, run.base, run.local = state["number"], state["base"], state["local"]

    def _enclave(self, run_id: str, contract: Contract) -> DurableEnclave:
        start = self.settings.start_enclave
        if start is None:
            raise FederationError("This node has no way to start an enclave.")
        config = self._config(run_id, contract).encode()
        return DurableEnclave(
            lambda checkpoint: start("trainer", config, checkpoint),
            self._memory.enclave(run_id),
            refeed=lambda enclave: self._refeed(run_id, enclave),
            say=self.settings.on_progress,
        )

    def _config(self, run_id: str, contract: Contract) -> RunConfig:
        return RunConfig(role="trainer", party=self.party, contract=contract, run_id=run_id)

    def _refeed(self, run_id: str, enclave: EnclaveHandle) -> None:
        """Bring weights and records to an enclave that has gone on from a checkpoint; it compares
        them with what it had.
        """
        run = self._runs.get(run_id)
        if run is None or not run.loaded:
            return  # `load` brings them itself
        for terms in run.contract.models:
            enclave.call(enclave_pb2.Call(reopen=enclave_pb2.Reopen(model=terms.name)))
            self._feed(run.contract, terms, enclave)
        self._open_data(enclave, *self._read(run.contract))

    def _dispatch(self, message: stage_pb2.StageRequest) -> stage_pb2.StageReply:
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
        if stage != "abort" and run.contract.expired(now()):
            raise ProtocolError("The contract is not valid any more.", safe="The node did nothing.")
        reply = self._stage(stage, run, message)
        if message.run_id in self._runs:
            self._memory.save(message.run_id, run.state(self._proof))
        return reply

    def _stage(
        self, stage: str | None, run: CustomerRun, message: stage_pb2.StageRequest
    ) -> stage_pb2.StageReply:
        match stage:
            case "attest":
                return stage_pb2.StageReply(
                    attest=self._attest(message.run_id, run, message.attest)
                )
            case "load":
                return stage_pb2.StageReply(load=self._load(message.run_id, run, message.load))
            case "round":
                return stage_pb2.StageReply(round=self._round(message.run_id, run, message.round))
            case "evaluate":
                return stage_pb2.StageReply(
                    evaluate=self._evaluate(message.run_id, run, message.evaluate)
                )
            case "endorse":
                return stage_pb2.StageReply(
                    endorse=self._endorse(message.run_id, run, message.endorse)
                )
            case "unmask":
                return stage_pb2.StageReply(
                    unmask=self._unmask(message.run_id, run, message.unmask)
                )
            case "deliver":
                return stage_pb2.StageReply(
                    deliver=self._deliver(message.run_id, run, message.deliver)
                )
            case "abort":
                try:
                    self._log_seen.take_refusal(message.run_id, run, message.abort)
                finally:
                    self._end(message.run_id)
                return stage_pb2.StageReply(abort=stage_pb2.AbortReply())
        raise ProtocolError(
            f"A customer does not answer stage {stage!r}.", safe="The node did nothing."
        )

    # -- stages
    # -------------------------------------------------------------------------------------------------------

    def _enrol(self, run_id: str, request: stage_pb2.EnrolRequest) -> stage_pb2.EnrolReply:
        before = self._run(run_id)
        if before is not None:
            if before.contract.encode() != request.contract:
                raise ProtocolError("This run has enrolled already.", safe="It goes on as it is.")
            return stage_pb2.EnrolReply(signature=self._sign(before.contract), nonces=before.nonces)
        contract = self._agree(request.contract)
        train, test = self._read(contract, self.settings.on_progress)
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
        run = self._runs[run_id] = CustomerRun(contract, enclave, nonces)
        self._memory.save(run_id, run.state(self._proof))
        self.settings.on_progress(
            f"signed the contract of job {contract.job}; {len(train)} records stay here"
        )
        return stage_pb2.EnrolReply(signature=self._sign(contract), nonces=nonces)

    def _read(
        self, contract: Contract, say: Callable[[str], None] = lambda text: None
    ) -> tuple[list[Record], list[Record]]:
        spec = self._data.spec
        labels = contract.models[0].labels
        with self._unsaid():
            records = spec.read(self._data.file, labels, say)
            if self._data.test is not None:
                return records, spec.read(self._data.test, labels, say)
        train, test = split_train_test(records, spec.test_fraction)
        return (train, test) if train else (records, [])

    @contextlib.contextmanager
    def _unsaid(self) -> Iterator[None]:
        """What is wrong with the records, or is left of their budget, is for this node's own
        people; the others learn that it cannot take part."""
        try:
            yield
        except DataError as error:
            self.settings.on_progress(str(error))
            raise FederationError(
                f"The records of {self.party} do not fit this contract; its own log says where.",
                safe="Nothing was trained on them as they are now.",
            ) from None
        except BudgetExceeded as error:
            self.settings.on_progress(str(error))
            raise BudgetExceeded(
                f"The privacy budget of {self.party} does not allow this job; its own log says"
                " more.",
                safe=error.safe,
            ) from None

    def _own_problems(self, contract: Contract) -> list[str]:
        problems = []
        for terms in contract.models:
            try:
                self._bundle(contract, terms).check_payload()
            except FedarkError as error:
                problems.append(error.what)
        if len({terms.labels for terms in contract.models}) > 1:
            problems.append("its models have different labels")
        return problems

    def _bundle(self, contract: Contract, terms: ModelTerms) -> SealedBundle:
        bundle = find_bundle(
            self.settings.catalogue, terms.bundle, bytes.fromhex(contract.provider.signing_key)
        )
        if bundle is None:
            raise FederationError(
                f"The sealed bundle of model {terms.name} ({terms.bundle[:16]}...) is not in the"
                f" catalogue of {self.party}.",
                fix=(
                    f"Copy it from the provider into {self.settings.catalogue}; it is encrypted,"
                    " any way will do."
                ),
            )
        return bundle

    def _attest(
        self, run_id: str, run: CustomerRun, request: stage_pb2.AttestRequest
    ) -> stage_pb2.AttestReply:
        contract, enclave = run.contract, run.enclave
        run.signed = SignedContract.verify(contract, dict(request.contract_signatures))
        name = contract.aggregator.name
        run.aggregator = self._admit(
            contract, run_id, request.aggregator_evidence["node"], role="aggregator", party=name
        )
        gate = self._gate(contract, run_id)
        nonce = gate.challenge("trainer", self.party, now=now())
        run.trainer = self._admit(
            contract,
            run_id,
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
            log_head=self._log_seen.last(contract),
            announced=announced,
        )

    def _evidence(self, enclave: EnclaveHandle, peer: str, nonce: bytes) -> bytes:
        return bytes(
            enclave.call(
                enclave_pb2.Call(attest=enclave_pb2.Attest(peer=peer, nonce=nonce))
            ).evidence.evidence
        )

    def _load(
        self, run_id: str, run: CustomerRun, request: stage_pb2.LoadRequest
    ) -> stage_pb2.LoadReply:
        if run.trainer is None or run.aggregator is None:
            raise ProtocolError(
                "The enclaves are not proven yet.", safe="No record was opened to the trainer."
            )
        run.log_head = self._log_seen.check_release(run_id, run, run.trainer, request.grants)
        run.loaded = False  # a node that was killed right here does it again
        for attempt in range(1, _LOAD_ATTEMPTS + 1):
            try:
                receipts, measured = self._fill(run_id, run, request)
                break
            except EnclaveFailed as error:
                if attempt == _LOAD_ATTEMPTS:
                    raise
                self.settings.on_progress(f"loading begins again: {error.what}")
        self._keep(run, measured)
        self._consent.use(run.contract, run_id)
        run.loaded = True
        protected = self._own(run_id, run, run.trainer, "loaded", measured.protected)
        view = sign_view(
            self.settings.keys.signing,
            party=self.party,
            run_id=run_id,
            contract=run.contract.digest(),
            head=run.log_head,
        )
        shown = (
            show_head(self.settings.keys.signing, run.charge, run_id, run.contract)
            if run.charge is not None
            else b""
        )
        return stage_pb2.LoadReply(
            receipts=receipts, protected_metrics=protected.wire, log_view=view, ledger_head=shown
        )

    def _fill(
        self, run_id: str, run: CustomerRun, request: stage_pb2.LoadRequest
    ) -> tuple[dict[str, bytes], enclave_pb2.Measured]:
        """Weights and records into the enclave, and the first measurement out; brought anew to an
        enclave that dies here.
        """
        if run.contract.protection.mode == "masked":
            self._join(run, request)
        receipts: dict[str, bytes] = {}
        for terms in run.contract.models:
            bundle = self._bundle(run.contract, terms)
            run.enclave.call(
                enclave_pb2.Call(
                    grant=enclave_pb2.Grant(
                        model=terms.name,
                        manifest=bundle.manifest.encode(),
                        grant=request.grants.by_model[terms.name],
                        group_grant=request.group_grant,
                    )
                )
            )
            receipts[terms.name] = self._feed(run.contract, terms, run.enclave)
        train, test = self._read(run.contract)
        self._charge(run_id, run, train)
        if run.charge is not None:
            spent = run.charge.spent
            self.settings.on_progress(
                f"charged: its records have spent epsilon {spent.epsilon:.3g} at delta"
                f" {spent.delta:g}"
            )
        self._open_data(run.enclave, train, test)
        self.settings.on_progress("weights and records are in the enclave; measuring before")
        begin = enclave_pb2.Call(begin=enclave_pb2.Begin())
        return receipts, run.enclave.call(begin, on_progress=self._show, restart=False).measured

    def _charge(self, run_id: str, run: CustomerRun, records: list[Record]) -> None:
        with self._unsaid():
            run.charge = charge(
                self.settings.state, run.contract, run_id, records, self.settings.budget, now=now()
            )

    def _feed(self, contract: Contract, terms: ModelTerms, enclave: EnclaveHandle) -> bytes:
        """The sealed bytes of a model whose grant the enclave has accepted; returns its receipt."""
        for data, last in _with_last(self._bundle(contract, terms).payload(_PIECE)):
            reply = enclave.call(
                enclave_pb2.Call(sealed=enclave_pb2.Sealed(model=terms.name, data=data, last=last))
            )
        return bytes(reply.receipt.receipt)

    def _join(self, run: CustomerRun, request: stage_pb2.LoadRequest) -> None:
        """Have the trainer admit its fellows and agree keys with them, before a record is opened to
        it.
        """
        peers = {
            name: enclave_pb2.Announcement(evidence=announced.evidence, hello=announced.hello)
            for name, announced in request.announced.items()
        }
        run.enclave.call(
            enclave_pb2.Call(
                join=enclave_pb2.Join(
                    peers=peers, collateral=dict(self.settings.collateral.items())
                )
            )
        )
        self.settings.on_progress(
            f"keys agreed with {len(peers) - 1} other trainer enclaves, each proven"
        )

    def _open_data(self, enclave: EnclaveHandle, train: list[Record], test: list[Record]) -> None:
        batches = [(enclave_pb2.Records.TRAIN, batch) for batch in _batches(train)]
        batches += [(enclave_pb2.Records.TEST, batch) for batch in _batches(test)]
        for index, (split, batch) in enumerate(batches):
            records = [
                enclave_pb2.Record(prompt=record.prompt, answer=record.answer) for record in batch
            ]
            call = enclave_pb2.Records(split=split, records=records, last=index == len(batches) - 1)
            with self._unsaid():
                enclave.call(enclave_pb2.Call(records=call))

    def _round(
        self, run_id: str, run: CustomerRun, request: stage_pb2.RoundRequest
    ) -> stage_pb2.RoundReply:
        trainer = self._loaded(run)
        if not run.log_agreed:
            self._log_seen.agree(run_id, run, request.log_views)
        self.settings.on_progress(f"round {request.round} of {run.contract.rounds}")
        call = enclave_pb2.Round(round=request.round, state=request.state, masked=request.masked)
        reply = run.enclave.call(enclave_pb2.Call(round=call), on_progress=self._show)
        run.number, run.base = request.round, _base(request.state)
        protected = self._own(run_id, run, trainer, "update", reply.update.protected)
        if run.contract.privacy.mechanism != "none":
            if (
                run.charge is None
            ):  # this node was started again meanwhile; the ledger knows the charge
                self._charge(run_id, run, self._read(run.contract)[0])
            again = self._memory.begin(run_id, protected.wire)
            if run.charge is not None:
                release(self.settings.state, run.charge, request.round, again=again, now=now())
        return stage_pb2.RoundReply(protected_update=protected.wire)

    def _evaluate(
        self, run_id: str, run: CustomerRun, request: stage_pb2.EvaluateRequest
    ) -> stage_pb2.EvaluateReply:
        trainer = self._loaded(run)
        call = enclave_pb2.Evaluate(state=request.state, masked=request.masked)
        reply = run.enclave.call(enclave_pb2.Call(evaluate=call), on_progress=self._show)
        self._keep(run, reply.measured)
        run.number, run.base = run.contract.rounds + 1, _base(request.state)
        protected = self._own(run_id, run, trainer, "evaluated", reply.measured.protected)
        return stage_pb2.EvaluateReply(protected_metrics=protected.wire)

    def _endorse(
        self, run_id: str, run: CustomerRun, request: stage_pb2.EndorseRequest
    ) -> stage_pb2.EndorseReply:
        trainer = self._loaded(run)
        reply = run.enclave.call(
            enclave_pb2.Call(endorse=enclave_pb2.Endorse(request=request.request))
        )
        protected = self._own(run_id, run, trainer, "endorsement", reply.update.protected)
        return stage_pb2.EndorseReply(protected_endorsement=protected.wire)

    def _unmask(
        self, run_id: str, run: CustomerRun, request: stage_pb2.UnmaskRequest
    ) -> stage_pb2.UnmaskReply:
        trainer = self._loaded(run)
        reply = run.enclave.call(
            enclave_pb2.Call(unmask=enclave_pb2.Unmask(request=request.request))
        )
        protected = self._own(run_id, run, trainer, "shares", reply.update.protected)
        return stage_pb2.UnmaskReply(protected_shares=protected.wire)

    def _deliver(
        self, run_id: str, run: CustomerRun, request: stage_pb2.DeliverRequest
    ) -> stage_pb2.DeliverReply:
        if run.signed is None or run.aggregator is None:
            raise ProtocolError("The enclaves are not proven yet.", safe="Nothing was stored.")
        folder = self._store(run.signed, run.aggregator, request)
        write_atomic(folder / "local.json", json.dumps(run.local, indent=2).encode())
        memory = {"node": round(peak_mib(), 1), "enclave": round(run.enclave.peak_mib(), 1)}
        write_atomic(folder / MEMORY, json.dumps({"peak_mib": memory}).encode())
        self.settings.on_progress(f"adapter and report are in {folder}")
        self._end(run_id)
        return stage_pb2.DeliverReply(stored=True)

    # -- helpers
    # ------------------------------------------------------------------------------------------------------

    def _own(
        self, run_id: str, run: CustomerRun, trainer: AttestedPeer, kind: str, wire: bytes
    ) -> ProtectedUpdate:
        """What this node's own attested trainer made for this place of the run; nothing else leaves
        for the aggregator.
        """
        context = Context(run.contract.digest(), run_id, kind, run.number, self.party, run.base)
        return ProtectedUpdate.verify(wire, sender=trainer, context=context)

    def _loaded(self, run: CustomerRun) -> AttestedPeer:
        if not run.loaded or run.trainer is None:
            raise ProtocolError(
                "Weights and records are not loaded yet.", safe="The trainer enclave did nothing."
            )
        return run.trainer

    def _keep(self, run: CustomerRun, measured: enclave_pb2.Measured) -> None:
        run.local = canonical.decode(measured.local, max_bytes=8 << 20)

    def _show(self, progress: enclave_pb2.Progress) -> None:
        """A line every few seconds, and the last of each piece of work."""
        if progress.done < progress.total and time.monotonic() - self._shown < _SHOW_EVERY:
            return
        self._shown = time.monotonic()
        value = f", loss {progress.value:.3f}" if progress.value else ""
        self.settings.on_progress(f"{progress.stage}: {progress.done}/{progress.total}{value}")

    def _end(self, run_id: str) -> None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.enclave.discard()
        self._memory.forget(run_id)


def _base(state: bytes) -> bytes:
    return hashlib.sha384(state).digest()


def _with_last(pieces: Iterator[memoryview]) -> Iterator[tuple[bytes, bool]]:
    held: bytes | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = bytes(piece)
    yield held or b"", True


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    for start in range(0, len(records), _BATCH):
        yield records[start : start + _BATCH]
