"""The trainer enclave: where a provider's weights and a customer's records meet.

Order, enforced by what each step needs: the aggregator admitted (an `AttestedPeer`) -> under masks,
the other trainers admitted and keys agreed with them -> weight keys accepted and bundles opened in
memory -> records -> `Begin` -> rounds, strictly increasing -> `Evaluate`, of one final adapter.
Nothing but the following leaves:

- protected messages to the aggregator enclave (`fedark.enclave.protection`);
- under masks, evidence and a session key for the fellow trainers;
- receipts for the provider;
- counts of correct answers and losses, and the loss of each training step, to the customer's own
  node.

Weights and records are in this process's memory only and are never written. An enclave that goes on
from a checkpoint has
neither: `Reopen` and the bundle's bytes, then the records, bring them again, and only the same
ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import ModelTerms, now
from fedark.contract.privacy import mechanism
from fedark.contract.protection import EVALUATED, UPDATE, may_leave, train_key
from fedark.enclave.checkpoint import SealingKey
from fedark.enclave.masking import TrainerMasks
from fedark.enclave.private import noised_updates, private_updates
from fedark.enclave.protection import (
    LOADED,
    Context,
    GroupKey,
    Metric,
    Payload,
    ProtectedUpdate,
    protect,
)
from fedark.enclave.session import ProgressSink, Quote, RunConfig, SessionBase, reply_done, seed_of
from fedark.foundation import canonical
from fedark.foundation.errors import DataError, ModelError, ProtocolError, Refused
from fedark.foundation.jsontext import read_json
from fedark.privacy.ledger import record_bytes
from fedark.records.reading import Record
from fedark.tuning.self_check import self_check
from fedark.tuning.task import TaskModel
from fedark.v1 import enclave_pb2 as pb
from fedark.vault.manifest import Manifest
from fedark.vault.opener import Collector, Opener
from fedark.vault.release import Accepted, Receipt, accept

__all__ = ["TrainerSession"]

_MAX_RECORDS = 5_000_000
_MAX_RECORD_CHARS = 1 << 20

Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class _Model:
    """One base model of the job inside the enclave."""

    terms: ModelTerms
    task: TaskModel
    initial: Vector
    replay: list[Record]
    acceptance: list[tuple[str, Record]]
    local: dict[str, Metric] = field(default_factory=dict)
    losses: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class _Opening:
    """A bundle that is being opened."""

    accepted: Accepted
    opener: Opener
    collector: Collector


class TrainerSession(SessionBase):
    """See the module's docstring."""

    seals_after = SessionBase.seals_after | {
        *("grant", "records", "begin", "round", "evaluate"),
        *("peer_nonce", "announce", "join", "endorse", "unmask"),
    }

    def __init__(
        self,
        config: RunConfig,
        quote: Quote,
        sealing_key: SealingKey | None = None,
        on_model: Callable[[TaskModel], None] | None = None,
    ) -> None:
        super().__init__(config, quote, sealing_key)
        self._on_model = on_model or (lambda task: None)
        self._aggregator: AttestedPeer | None = None
        self._group: GroupKey | None = None
        self._openings: dict[str, _Opening] = {}
        self._models: dict[str, _Model] = {}
        self._train: list[Record] = []
        self._test: list[Record] = []
        self._data_closed = False
        self._grants: dict[str, tuple[bytes, float]] = {}
        self._digest_of_data = hashlib.sha384()
        self._data_expected = b""
        self._figures: dict[str, tuple[dict[str, Metric], dict[str, Metric]]] = {}
        self._begun = False
        self._round = 0
        self._base = b""
        self._masks: TrainerMasks | None = None
        self._private = mechanism(self.contract)
        if self.contract.protection.mode == "masked":
            self._masks = TrainerMasks(
                self.contract, config.run_id, config.party, self._signing, self._nonces
            )

    def _seals(self, call: pb.Call, kind: str) -> bool:
        return super()._seals(call, kind) and (kind != "records" or call.records.last)

    def _handle(self, kind: str, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        match kind:
            case "admit_peer":
                if self._known(call.admit_peer.peer, call.admit_peer.evidence):
                    return pb.Reply(admitted=pb.Admitted())
                if self._aggregator is not None:
                    raise ProtocolError(
                        "An aggregator enclave is admitted already.",
                        safe="It stays the only one of this run.",
                    )
                self._aggregator = self._admit(call.admit_peer)
                return pb.Reply(admitted=pb.Admitted())
            case "grant":
                return self._grant(call.grant)
            case "reopen":
                return self._reopen(call.reopen.model)
            case "sealed":
                return self._sealed(call.sealed)
            case "records":
                return self._records(call.records)
            case "begin":
                return self._begin(progress)
            case "round":
                return self._train_round(call.round, progress)
            case "evaluate":
                return self._evaluate(call.evaluate, progress)
            case "peer_nonce":
                return pb.Reply(nonce=pb.Nonce(nonce=self._masked().nonce(now=now())))
            case "announce":
                return self._announce(call.announce)
            case "join":
                return self._join(call.join)
            case "endorse":
                return self._member("endorsement", self._masked().endorse(call.endorse.request))
            case "unmask":
                return self._member("shares", self._masked().unmask(call.unmask.request))
        return super()._handle(kind, call, progress)

    # -- fellow trainers, under masks
    # ---------------------------------------------------------------------------------

    def _masked(self) -> TrainerMasks:
        if self._masks is None:
            raise ProtocolError(
                "The contract does not mask its updates.", safe="The trainer enclave did nothing."
            )
        return self._masks

    def _announce(self, call: pb.Announce) -> pb.Reply:
        """Prove this enclave to all of its fellows at once, and announce its session key."""
        masks, gate = self._masked(), self._gate({})
        first = not masks.combined
        combined = masks.combine(dict(call.nonces), now=now())
        for party in masks.fellows if first else ():
            gate.expect(combined, self.config.role, party, now=now())
        evidence = self._evidence(combined).encode()
        return pb.Reply(announcement=pb.Announcement(evidence=evidence, hello=masks.hello()))

    def _join(self, call: pb.Join) -> pb.Reply:
        """Admit every fellow by its evidence, then agree keys: with nobody unless all who were
        brought are proven.
        """
        masks, collateral = self._masked(), dict(call.collateral)
        self._admitted()  # whose admission has verified the contract's signatures
        others = {
            party: call.peers[party] for party in sorted(call.peers) if party != self.config.party
        }
        if masks.joined(other.hello for other in others.values()):
            return reply_done()
        peers = [
            self._appraise(self.config.role, party, other.evidence, collateral)
            for party, other in others.items()
        ]
        masks.join(peers, [other.hello for other in others.values()])
        return reply_done()

    def _member(self, kind: str, message: bytes) -> pb.Reply:
        """A committee member's answer: encrypted to the aggregator enclave, for shares unmask the
        sum for whoever holds them.
        """
        context = Context(
            self.digest, self.config.run_id, kind, self._round, self.config.party, self._base
        )
        payload = Payload(0, {}, {}, message)
        return pb.Reply(update=pb.Update(protected=self._protect(payload, context).wire))

    # -- weights
    # ------------------------------------------------------------------------------------------------------

    def _admitted(self) -> AttestedPeer:
        if self._aggregator is None:
            raise ProtocolError(
                "The aggregator enclave has not been admitted yet.",
                safe="The trainer enclave did nothing.",
            )
        return self._aggregator

    def _grant(self, grant: pb.Grant) -> pb.Reply:
        if self._grants.get(grant.model, (b"", 0.0))[0] == grant.SerializeToString(
            deterministic=True
        ):
            return self._reopen(grant.model)
        at = now()
        self._open(grant, at)
        self._grants[grant.model] = grant.SerializeToString(deterministic=True), at.timestamp()
        return reply_done()

    def _reopen(self, model: str) -> pb.Reply:
        """Take a model's sealed bytes from their beginning again, under the grant that was accepted
        for it.
        """
        kept, at = self._grants.get(model, (b"", 0.0))
        if not kept:
            raise ProtocolError("A model without a grant cannot be opened again.")
        self._models.pop(model, None)
        self._open(pb.Grant.FromString(kept), datetime.fromtimestamp(at, UTC))
        return reply_done()

    def _open(self, grant: pb.Grant, at: datetime) -> None:
        """Accept a grant, as of `at`, and wait for its bundle's bytes."""
        aggregator = self._admitted()
        terms = self.contract.model(grant.model)
        if terms is None or terms.name in self._models:
            raise ProtocolError(
                "A grant names a model that the contract has not, or that is open already."
            )
        manifest = Manifest.verify(
            grant.manifest, bytes.fromhex(self.contract.provider.signing_key)
        )
        if manifest.digest().hex() != terms.bundle:
            raise ModelError(
                f"The sealed bundle for model {terms.name} is not the one in the contract.",
                safe="No weight was opened.",
                fix="Fetch the bundle that the contract names.",
            )
        nonce, evidence = self._answered.get(self.contract.provider.name, (b"", b""))
        accepted = accept(
            grant.grant,
            hpke=self._hpke,
            manifest=manifest,
            contract=self.contract,
            model=terms.name,
            run_id=self.config.run_id,
            party=self.config.party,
            nonce=nonce,
            evidence=evidence,
            now=at,
        )
        self._group = GroupKey.accept(
            grant.group_grant,
            hpke=self._hpke,
            signing_public=self._signing.public,
            party=self.config.party,
            aggregator=aggregator,
        )
        collector = Collector(manifest)
        self._openings[terms.name] = _Opening(
            accepted, Opener(manifest, accepted.key, collector), collector
        )
        accepted.key.wipe()

    def _sealed(self, sealed: pb.Sealed) -> pb.Reply:
        terms = self.contract.model(sealed.model)
        opening = self._openings.get(sealed.model)
        if terms is None or opening is None:
            raise ProtocolError("Sealed bytes came for a model without a grant.")
        opening.opener.feed(sealed.data)
        if not sealed.last:
            return reply_done()
        del self._openings[sealed.model]
        opened, files = opening.opener.finish(), opening.collector.files
        acceptance = _extra(files, "extra/acceptance.jsonl")
        if not {group for group, _ in acceptance} <= set(self.contract.evaluation.groups):
            raise ModelError(
                f"The acceptance set of model {terms.name} has a group that the contract does not"
                " name.",
                safe="Nothing was measured.",
            )
        task = TaskModel.load(files, terms)
        self._on_model(task)
        self._models[terms.name] = _Model(
            terms=terms,
            task=task,
            initial=task.initial(),
            replay=[record for _, record in _extra(files, "extra/replay.jsonl")],
            acceptance=acceptance,
        )
        self._models[terms.name].local, self._models[terms.name].losses = self._figures.get(
            terms.name, ({}, {})
        )
        receipt = Receipt.make(opening.accepted, opened, self._signing, now=now())
        return pb.Reply(receipt=pb.Receipt(receipt=receipt))

    # -- records
    # ------------------------------------------------------------------------------------------------------

    def _records(self, records: pb.Records) -> pb.Reply:
        self._admitted()
        if self._data_closed:
            raise ProtocolError("Records came after the last ones.")
        split = self._train if records.split == pb.Records.TRAIN else self._test
        batch = [Record(record.prompt, record.answer) for record in records.records]
        if len(split) + len(records.records) > _MAX_RECORDS:
            raise DataError(self.config.party, None, f"more than {_MAX_RECORDS} records")
        answers = set().union(*(terms.labels for terms in self.contract.models))
        for record in batch:
            if max(len(record.prompt), len(record.answer)) > _MAX_RECORD_CHARS:
                raise DataError(
                    self.config.party,
                    None,
                    f"a record has more than {_MAX_RECORD_CHARS} characters",
                )
            if answers and record.answer not in answers:
                raise DataError(
                    self.config.party, None, "a record's answer is none of the contract's labels"
                )
        if records.last and not self._train and not (split is self._train and batch):
            raise DataError(self.config.party, None, "no training record")
        for record in batch:
            self._digest_of_data.update(
                canonical.encode([records.split, record.prompt, record.answer])
            )
        if records.last and self._data_expected not in (b"", self._digest_of_data.digest()):
            self._train, self._test, self._digest_of_data = [], [], hashlib.sha384()
            raise Refused(
                f"The records that {self.config.party} brought again are not those that this run"
                " began with.",
                safe="They were dropped, and nothing was trained on them.",
                fix="Put the data file back as it was, or begin a new run.",
            )
        split += batch
        self._data_closed = records.last
        if records.last and self._private is not None and self._private.unit == "record":
            # A record that is in the file twice is one to the ledger: it must not move a sum twice.
            self._train = list(
                {
                    record_bytes(record.prompt, record.answer): record for record in self._train
                }.values()
            )
        return reply_done()

    # -- state
    # --------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "aggregator": self._aggregator.party if self._aggregator is not None else None,
            "grants": {model: list(kept) for model, kept in self._grants.items()},
            "data": self._digest_of_data.digest() if self._data_closed else self._data_expected,
            "begun": self._begun,
            "round": self._round,
            "base": self._base,
            "figures": {
                name: [_plain(local), _plain(losses)]
                for name, (local, losses) in self._all_figures().items()
            },
            "masks": self._masks.state() if self._masks is not None else None,
        }

    def _all_figures(self) -> dict[str, tuple[dict[str, Metric], dict[str, Metric]]]:
        """Local figures and losses by model, of models that wait to be opened again too."""
        return self._figures | {
            name: (model.local, model.losses) for name, model in self._models.items()
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["aggregator"] is not None:
            self._aggregator = self._readmitted("aggregator", state["aggregator"])
        self._grants = {model: (grant, at) for model, (grant, at) in state["grants"].items()}
        self._data_expected = state["data"]
        self._begun, self._round, self._base = state["begun"], state["round"], state["base"]
        self._figures = {
            name: (_figured(local), _figured(losses))
            for name, (local, losses) in state["figures"].items()
        }
        if self._masks is not None:
            self._masks = TrainerMasks(
                self.contract, self.config.run_id, self.config.party, self._signing, self._nonces
            )
            fellows = [name for name in self._masks.fellows if name in self._proofs]
            self._masks.restore(
                state["masks"], [self._readmitted(self.config.role, name) for name in fellows]
            )

    # -- measuring and training
    # ---------------------------------------------------------------------------------------

    def _ready(self) -> None:
        self._complete()
        if self._round:
            raise ProtocolError("This enclave has begun already.", safe="It goes on as it is.")

    def _complete(self) -> None:
        missing = [terms.name for terms in self.contract.models if terms.name not in self._models]
        if missing or not self._data_closed:
            raise ProtocolError("Training was asked for before weights and records were complete.")

    def _begin(self, progress: ProgressSink) -> pb.Reply:
        self._ready()
        initial = {name: model.initial for name, model in self._models.items()}
        if self._begun:  # asked again, by a node that was interrupted
            known = {name: dict(model.local) for name, model in self._models.items()}
            return self._measured(self._leave(LOADED, 0, initial, known, progress))
        metrics: dict[str, dict[str, Metric]] = {}
        for name, model in self._models.items():
            if self._private is not None and self._private.unit == "record":
                self_check(model.task, self._train)
            report = _reporter(progress, f"{name}: before")
            measured = self._measure(model, "before", report)
            epochs = model.terms.training.baseline_epochs
            if epochs:
                model.task.train(
                    self._train,
                    [],
                    epochs=epochs,
                    seed=self._seed(name, "baseline"),
                    progress=_reporter(progress, f"{name}: local-only"),
                )
                measured |= self._measure(
                    model, "local", _reporter(progress, f"{name}: local-only, measuring"), full=True
                )
                model.task.set_flat(model.initial)
            model.local = dict(measured)
            metrics[name] = measured
        self._begun = True
        return self._measured(self._leave(LOADED, 0, initial, metrics, progress))

    def _train_round(self, call: pb.Round, progress: ProgressSink) -> pb.Reply:
        vectors, base = self._open_global(call.round, call.state)
        if not self._round < call.round <= self.contract.rounds:
            raise ProtocolError(
                f"Round {call.round} was asked for after round {self._round}: no round is trained"
                " twice."
            )
        if self._masks is not None:
            self._masks.begin(UPDATE, call.masked, base)
        self._round, self._base = call.round, base
        deltas: dict[str, Vector] = {}
        metrics: dict[str, dict[str, Metric]] = {name: {} for name in self._models}
        for name, model in self._models.items():
            model.task.set_flat(vectors[name])
        if self._private is not None and self._private.unit == "record":
            tasks = {terms.name: self._models[terms.name].task for terms in self.contract.models}
            deltas = private_updates(self.contract, tasks, self._train)
        else:
            for name, model in self._models.items():
                stats = model.task.train(
                    self._train,
                    model.replay,
                    epochs=model.terms.training.epochs,
                    seed=self._seed(name, call.round),
                    progress=_reporter(progress, f"{name}: round {call.round}"),
                )
                deltas[name] = (model.task.get_flat() - vectors[name]).astype(np.float32)
                if self._private is None:
                    model.losses[train_key(call.round)] = (
                        0,
                        stats.examples,
                        stats.loss * stats.examples,
                    )
                    metrics[name] = {"train": model.losses[train_key(call.round)]}
        return pb.Reply(
            update=pb.Update(
                protected=self._leave(UPDATE, call.round, deltas, metrics, progress).wire
            )
        )

    def _evaluate(self, call: pb.Evaluate, progress: ProgressSink) -> pb.Reply:
        final = self.contract.rounds + 1
        vectors, base = self._open_global(final, call.state)
        if self._round == final and self._base != base:
            raise ProtocolError(
                "Another final adapter was measured already.",
                safe="This one was not, and nothing left.",
            )
        if self._masks is not None:
            self._masks.begin(EVALUATED, call.masked, base)
        self._round, self._base = final, base
        metrics: dict[str, dict[str, Metric]] = {}
        for name, model in self._models.items():
            model.task.set_flat(vectors[name])
            metrics[name] = self._measure(
                model, "federated", _reporter(progress, f"{name}: federated")
            )
            model.local |= metrics[name]
        return self._measured(self._leave(EVALUATED, final, {}, metrics, progress))

    def _open_global(self, number: int, wire: bytes) -> tuple[dict[str, Vector], bytes]:
        aggregator = self._admitted()
        if not self._begun or self._group is None:
            raise ProtocolError("A round was asked for before the enclave had begun.")
        self._complete()  # after a restart they must be brought again
        context = Context(self.digest, self.config.run_id, "global", number, aggregator.party)
        vectors = self._group.open_global(wire, context, aggregator)
        for name, model in self._models.items():
            if name not in vectors or vectors[name].shape != (model.terms.travelling,):
                raise ProtocolError(
                    f"The global adapter of model {name} has not the shape of the contract."
                )
        return vectors, hashlib.sha384(wire).digest()

    def _measure(
        self,
        model: _Model,
        when: str,
        report: Callable[[int, int, float], None],
        *,
        full: bool = False,
    ) -> dict[str, Metric]:
        """Correct, total and loss on the customer's held-out records and, by group, on the
        acceptance set.

        Every customer measures the local-only adapter on the whole acceptance set, but the common
        ones (before, federated) on a K-th of it: the cohort's sum then counts each record once.
        """
        measured: dict[str, Metric] = {}
        if self._test:
            measured[f"{when}/own"] = _evaluate(model.task, self._test)
        rows = model.acceptance
        if not full:
            names = [party.name for party in self.contract.customers]
            rows = rows[names.index(self.config.party) :: len(names)]
        groups = self.contract.evaluation.groups
        for index, group in enumerate(groups):
            measured[f"{when}/acceptance/{group}"] = _evaluate(
                model.task, [record for name, record in rows if name == group]
            )
            report(index + 1, len(groups), 0.0)
        return measured

    def _measured(self, protected: ProtectedUpdate) -> pb.Reply:
        local = canonical.encode(
            {
                name: {key: list(value) for key, value in model.local.items()}
                for name, model in self._models.items()
            }
        )
        return pb.Reply(measured=pb.Measured(local=local, protected=protected.wire))

    def _leave(
        self,
        kind: str,
        number: int,
        vectors: dict[str, Vector],
        metrics: dict[str, dict[str, Metric]],
        progress: ProgressSink,
    ) -> ProtectedUpdate:
        """What leaves for the aggregator enclave: encrypted to it, and masked too where the
        contract says so.
        """
        context = Context(
            self.digest, self.config.run_id, kind, number, self.config.party, self._base
        )
        records = len(self._train)
        if self._masks is None:
            if self._private is not None:
                records, metrics = 1, may_leave(self.contract, metrics)
                if kind == UPDATE and self._private.kind != "example-local":
                    vectors = noised_updates(self.contract, vectors)
            return self._protect(Payload(records, vectors, metrics), context)

        def on_clipped() -> None:
            progress(
                pb.Progress(
                    stage="the update was clipped to the contract's bounds", done=1, total=1
                )
            )

        if kind == LOADED:
            return self._protect(Payload(0, vectors, {}), context)
        figures = {name: {**model.local, **model.losses} for name, model in self._models.items()}
        return self._protect(
            Payload(0, {}, {}, self._masks.upload(kind, vectors, records, figures, on_clipped)),
            context,
        )

    def _protect(self, payload: Payload, context: Context) -> ProtectedUpdate:
        return protect(payload, context, recipient=self._admitted(), signer=self._signing)

    def _seed(self, *parts: Any) -> int:
        return seed_of(self.contract.seed, self.config.party, *parts)


def _plain(figures: dict[str, Metric]) -> dict[str, list[int | float]]:
    return {key: [correct, total, float(loss)] for key, (correct, total, loss) in figures.items()}


def _figured(plain: dict[str, list[Any]]) -> dict[str, Metric]:
    return {key: (correct, total, loss) for key, (correct, total, loss) in plain.items()}


def _evaluate(task: TaskModel, records: Iterable[Record]) -> Metric:
    measured = task.evaluate(list(records))
    return measured.correct, measured.total, float(measured.loss_sum)


def _extra(files: Any, name: str) -> list[tuple[str, Record]]:
    """The provider's own records in a bundle: JSON lines of prompt, answer and group."""
    rows: list[tuple[str, Record]] = []
    for number, line in enumerate(bytes(files.get(name, b"")).splitlines(), start=1):
        try:
            row = read_json(line)
            rows.append((str(row["group"]), Record(str(row["prompt"]), str(row["answer"]))))
        except (ValueError, KeyError, TypeError):
            raise ModelError(
                f"{name} of the sealed bundle, line {number}: not a record.",
                safe="Nothing was trained.",
            ) from None
    return rows


def _reporter(progress: ProgressSink, stage: str) -> Callable[[int, int, float], None]:
    def report(done: int, total: int, value: float) -> None:
        progress(pb.Progress(stage=stage, done=done, total=total, value=value))

    return report
