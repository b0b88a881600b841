"""The trainer enclave: where a provider's weights and a customer's records meet.

The order of its calls stands in `fedark.enclave.order`: what follows is what each of them does.
Nothing but the following leaves:

- protected messages to the aggregator enclave (`fedark.enclave.protection`);
- under masks, evidence and a session key for the fellow trainers;
- receipts for the provider;
- counts of correct answers and losses, and the loss of each training step, to the customer's own
  node;
- the customer's personal adapter, to its own node, once the aggregator enclave has delivered the
  shared one that it was made from (`fedark.tuning.personal`).

Weights and records are in this process's memory only and are never written. An enclave that goes on
from a checkpoint has neither: `Reopen` and the bundle's bytes, then the records, bring them again,
and only the same ones.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import ModelTerms, now
from fedark.contract.privacy import mechanism, noised_words
from fedark.contract.protection import (
    CURVE,
    EVALUATED,
    UPDATE,
    Figure,
    kind_of,
    makes_personal,
    may_leave,
    train_key,
)
from fedark.contract.taste import TASTED, start_terms, tasted_problems
from fedark.enclave.checkpoint import SealingKey
from fedark.enclave.gains import figure_of, gained
from fedark.enclave.intake import OpenModel, RecordIntake
from fedark.enclave.masking import TrainerMasks, TrainerMasksState
from fedark.enclave.personal import require_delivered, seal_personal
from fedark.enclave.private import Tally, private_updates
from fedark.enclave.protection import (
    FINAL,
    GLOBAL,
    LOADED,
    Context,
    GroupKey,
    Payload,
    ProtectedUpdate,
    pack_vector,
    protect,
)
from fedark.enclave.session import Quote, RunConfig, SessionBase, SessionState, reply_done, seed_of
from fedark.enclave.statements import Own
from fedark.enclave.taste import tasted
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, InputError, ModelError, ProtocolError
from fedark.foundation.snapshot import Bytes48, Real, Row, Snapshot
from fedark.records.reading import Record
from fedark.tuning.baseline import train_alone
from fedark.tuning.judged import details, samples
from fedark.tuning.per_example import clip_vector
from fedark.tuning.personal import Personal, make_personal, validation_split
from fedark.tuning.self_check import self_check
from fedark.tuning.task import TaskModel
from fedark.tuning.trial import unusable
from fedark.v1 import enclave_pb2 as pb
from fedark.vault.manifest import Manifest
from fedark.vault.opener import Collector, Opener
from fedark.vault.release import Accepted, Receipt, accept

__all__ = ["TrainerSession"]

_REPORTS = 20
_NOTHING: dict[str, Figure] = {}
T = TypeVar("T")

Vector = np.ndarray[Any, np.dtype[np.float32]]


Figures = dict[str, Annotated[Figure, Row]]


class ModelFigures(Snapshot):
    """What was measured of one model here: on local data, and as training losses.

    Attributes:
        spared: under a mechanism, how much had no gradient (`fedark.enclave.private.Tally`). It
            goes to the customer's own node alone.
    """

    local: Figures
    losses: Figures
    spared: dict[str, int]


class KeptGrant(Snapshot):
    """A grant that was accepted, and when (s since 1970): it opens its bundle again."""

    grant: bytes
    at: Real


class TrainerState(SessionState):
    """A trainer's session in its checkpoint.

    Attributes:
        aggregator: the party whose enclave was admitted.
        data: digest of the records that this run began with.
        round, base: the last round that was begun, and the digest of its global adapter.
        shown: the same of the last global adapter that was measured for the learning curve.
        personal: model -> the personal adapter that was made, float32.
    """

    aggregator: str | None
    grants: dict[str, KeptGrant]
    data: Bytes48 | None
    round: int
    base: bytes
    shown: Annotated[tuple[int, bytes], Row]
    figures: dict[str, ModelFigures]
    personal: dict[str, bytes]
    masks: TrainerMasksState | None


@dataclass(frozen=True)
class _Opening:
    """A bundle that is being opened."""

    accepted: Accepted
    opener: Opener
    collector: Collector


class TrainerSession(SessionBase):
    """See the module's docstring."""

    _kept = TrainerState

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
        self._models: dict[str, OpenModel] = {}
        self._grants: dict[str, KeptGrant] = {}
        self._figures = {
            terms.name: ModelFigures(local={}, losses={}, spared={})
            for terms in self.contract.models
        }
        self._base = b""
        self._alone: dict[str, tuple[Vector | None, Vector] | None] = {}
        self._personal: dict[str, bytes] = {}
        self._shown = (0, b"")
        self._private = mechanism(self.contract)
        self._records = RecordIntake(
            self.contract,
            config.party,
            private=self._private is not None,
            by_record=self._private is not None and self._private.unit == "record",
        )
        self._masks = self._new_masks()

    def _new_masks(self) -> TrainerMasks | None:
        if self.contract.protection.mode != "masked":
            return None
        return TrainerMasks(
            self.contract, self.config.run_id, self.config.party, self._signing, self._nonces
        )

    def _admit_first(self, call: pb.AdmitPeer) -> pb.Reply:
        self._aggregator = self._admit(call)
        return pb.Reply(admitted=pb.Admitted())

    def _admit_again(self, call: pb.AdmitPeer) -> pb.Reply:
        if not self._known(call.peer, call.evidence):
            raise ProtocolError(
                "An aggregator enclave is admitted already.",
                safe="It stays the only one of this run.",
            )
        return pb.Reply(admitted=pb.Admitted())

    # -- fellow trainers, under masks

    @property
    def _masked(self) -> TrainerMasks:
        assert self._masks is not None  # of another contract the table refuses the call
        return self._masks

    def _peer_nonce(self, call: pb.PeerNonce) -> pb.Reply:
        return pb.Reply(nonce=pb.Nonce(nonce=self._masked.nonce(now=now())))

    def _announce(self, call: pb.Announce) -> pb.Reply:
        """Prove this enclave to all of its fellows at once, and announce its session key."""
        masks, gate = self._masked, self._gate({})
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
        masks, collateral = self._masked, dict(call.collateral)
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

    def _endorse(self, call: pb.Endorse) -> pb.Reply:
        return self._member("endorsement", self._masked.endorse(call.request))

    def _unmask(self, call: pb.Unmask) -> pb.Reply:
        return self._member("shares", self._masked.unmask(call.request))

    def _member(self, kind: str, message: bytes) -> pb.Reply:
        """A committee member's answer: encrypted to the aggregator enclave, for shares unmask the
        sum for whoever holds them.
        """
        protected = self._protect(Payload(0, {}, {}, message), self._context(kind, self._number))
        return pb.Reply(update=pb.Update(protected=protected.wire))

    # -- weights

    def _admitted(self) -> AttestedPeer:
        assert self._aggregator is not None  # before, the table refuses whatever needs it
        return self._aggregator

    def _grant(self, call: pb.Grant) -> pb.Reply:
        data = call.SerializeToString(deterministic=True)
        kept = self._grants.get(call.model)
        if kept is not None and kept.grant == data:
            return self._reopen(pb.Reopen(model=call.model))
        at = now()
        self._open(call, at)
        self._grants[call.model] = KeptGrant(grant=data, at=at.timestamp())
        return reply_done()

    def _reopen(self, call: pb.Reopen) -> pb.Reply:
        """Take a model's sealed bytes from their beginning again, under the grant that was accepted
        for it. The records come after the weights, and so again too.
        """
        kept = self._grants.get(call.model)
        if kept is None:
            raise ProtocolError("A model without a grant cannot be opened again.")
        self._models.pop(call.model, None)
        self._records.drop()
        self._open(pb.Grant.FromString(kept.grant), datetime.fromtimestamp(kept.at, UTC))
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
        answer = self._answered.get(self.contract.provider.name)
        accepted = accept(
            grant.grant,
            hpke=self._hpke,
            manifest=manifest,
            contract=self.contract,
            model=terms.name,
            run_id=self.config.run_id,
            party=self.config.party,
            nonce=answer.nonce if answer is not None else b"",
            evidence=answer.evidence if answer is not None else b"",
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
        model = OpenModel.load(files, terms, self.contract.evaluation.groups)
        self._on_model(model.task)
        self._models[terms.name] = model
        receipt = Receipt.make(opening.accepted, opened, self._signing, now=now())
        return pb.Reply(receipt=pb.Receipt(receipt=receipt))

    def _weights_open(self) -> bool:
        return self._models.keys() == {terms.name for terms in self.contract.models}

    # -- records

    def _take(self, records: pb.Records) -> pb.Reply:
        bad = self._records.take(records, self._failing)
        return reply_done() if bad is None else pb.Reply(unusable=bad)

    def _failing(self, records: list[Record]) -> list[int]:
        """Indices of the records that one of the models fails on. Under a privacy mechanism nobody
        asks: there, such a record is to be like one that teaches nothing.
        """
        if self._private is not None:
            return []
        found = (
            unusable(model.task, records, self._reporter(f"{name}: trying the records"))
            for name, model in self._models.items()
        )
        return sorted(set().union(*found))

    def _records_kept(self) -> bool:
        return bool(self._records.train)

    # -- state

    def _snapshot(self) -> TrainerState:
        return TrainerState(
            **self._common(),
            aggregator=self._aggregator.party if self._aggregator is not None else None,
            grants=self._grants,
            data=self._records.digest,
            round=self._number,
            base=self._base,
            shown=self._shown,
            figures=self._figures,
            personal=self._personal,
            masks=self._masks.state() if self._masks is not None else None,
        )

    def _restore(self, state: TrainerState) -> None:
        if state.aggregator is not None:
            self._aggregator = self._readmitted("aggregator", state.aggregator)
        self._grants, self._figures = state.grants, state.figures
        self._records.digest = state.data
        self._number, self._base, self._shown = state.round, state.base, state.shown
        self._personal = state.personal
        self._masks = self._new_masks()  # with the key that is restored
        if self._masks is not None and state.masks is not None:
            fellows = [name for name in self._masks.fellows if name in self._proofs]
            self._masks.restore(
                state.masks, [self._readmitted(self.config.role, name) for name in fellows]
            )

    # -- measuring and training

    def _spared(self, what: Callable[[], T], otherwise: T) -> T:
        """What `what` gives. Under a privacy mechanism `otherwise` where it fails, for whatever
        reason: a fault of what touches a customer's records would tell of them.
        """
        if self._private is None:
            return what()
        try:
            return what()
        except Exception:
            return otherwise

    def _begin(self, call: pb.Begin) -> pb.Reply:
        metrics: dict[str, dict[str, Figure]] = {}
        for name, model in self._models.items():
            if self._private is not None and self._private.unit == "record":
                self_check(model.task, _nobodys(model.terms))
            metrics[name] = self._measure(model, "before", self._reporter(f"{name}: before"))
            if self.config.party in self.contract.alone(model.terms):
                metrics[name] |= self._spared(partial(self._baseline, name, model), _NOTHING)
                model.task.set_flat(model.initial)
        for name, measured in metrics.items():
            self._figures[name].local = dict(measured)
        return self._begin_again(call)

    def _baseline(self, name: str, model: OpenModel) -> dict[str, Figure]:
        """Train the local-only baseline and measure it."""
        training = self._reporter(f"{name}: local-only")
        measuring = self._reporter(f"{name}: local-only, measuring")
        self._alone[name] = None  # where it fails it is not tried again: the time would tell of it
        part = self._split(model)[0] if makes_personal(self.contract, model.terms) else []
        judged = train_alone(
            model.task,
            self._records.train,
            private=self._private is not None,
            seed=self._seed(name, "baseline"),
            progress=training,
            part=part,
        )
        self._alone[name] = judged, model.task.get_flat()
        return self._measure(model, "local", measuring, full=True)

    def _split(self, model: OpenModel) -> tuple[list[Record], list[Record]]:
        assert self._records.digest is not None  # records are here, and so is their digest
        return validation_split(model.terms, self._records.train, self._records.digest)

    def _begin_again(self, call: pb.Begin) -> pb.Reply:
        """The answer to `Begin`, to a node that was interrupted too."""
        initial = {name: model.initial for name, model in self._models.items()}
        known = {name: dict(figures.local) for name, figures in self._figures.items()}
        return self._measured(self._leave(LOADED, 0, initial, known))

    def _round(self, call: pb.Round) -> pb.Reply:
        vectors, base = self._open_global(call.round, call.state)
        if not self._number < call.round <= self.contract.rounds:
            raise ProtocolError(
                f"Round {call.round} was asked for after round {self._number}: no round is trained"
                " twice."
            )
        self._require_shown(call.round, base)
        kind = kind_of(self.contract, call.round)
        if self._masks is not None:
            self._masks.begin(kind, call.masked, base)
        self._number, self._base = call.round, base
        self._enter()  # whatever becomes of it, this round is not trained again
        deltas: dict[str, Vector] = {}
        metrics: dict[str, dict[str, Figure]] = {name: {} for name in self._models}
        for name, model in self._models.items():
            model.task.set_flat(vectors[name])
        if kind == TASTED:
            deltas = self._taste(call.round)
        elif self._private is not None and self._private.unit == "record":
            tasks = {terms.name: self._models[terms.name].task for terms in self.contract.models}
            tally = Tally()
            deltas = private_updates(self.contract, tasks, self._records.train, tally)
            for (name, what), count in tally.items():
                self._count(name, what, count)
        else:
            for name, model in self._models.items():
                still: tuple[Vector, Figure | None] = np.zeros_like(vectors[name]), None
                train = partial(self._trained, name, model, vectors[name], call.round)
                deltas[name], loss = self._spared(train, still)
                if loss is None:
                    self._count(name, "rounds without an update", 1)
                elif self._private is None:
                    self._figures[name].losses[train_key(call.round)] = loss
                    metrics[name] = {"train": loss}
        protected = self._leave(kind, call.round, deltas, metrics)
        return pb.Reply(update=pb.Update(protected=protected.wire))

    def _taste(self, number: int) -> dict[str, Vector]:
        """The moments of every model; no loss is measured in this round."""
        if problems := tasted_problems(self.contract):
            raise ContractError(f"contract of job {self.contract.job}", problems)
        found: dict[str, Vector] = {}
        for name, model in self._models.items():
            report = self._reporter(f"{name}: tasting")
            found[name] = tasted(self.contract, model.terms, model.task, self._records.train)
            report(1, 1, 0.0)
            self._figures[name].losses[train_key(number)] = 0, 0, 0.0
        return found

    def _count(self, name: str, what: str, count: int) -> None:
        kept = self._figures[name].spared
        kept[what] = kept.get(what, 0) + count

    def _trained(
        self, name: str, model: OpenModel, start: Vector, number: int
    ) -> tuple[Vector, Figure | None]:
        """The change of one model that a round's local training makes, and the training losses."""
        stats = model.task.train(
            self._records.train,
            model.replay,
            epochs=model.terms.training.epochs,
            seed=self._seed(name, number),
            progress=self._reporter(f"{name}: round {number}"),
            settings=start_terms(self.contract, model.terms),
            part=((number - 1) / self.contract.rounds, number / self.contract.rounds),
        )
        delta = (model.task.get_flat() - start).astype(np.float32)
        if not np.isfinite(delta).all():
            raise InputError("Training diverged.", safe="No update was made from it.")
        return delta, (0, stats.examples, stats.loss * stats.examples)

    def _require_shown(self, number: int, base: bytes) -> None:
        """One global adapter follows on a round, whatever is done with it here."""
        if self._shown[0] > number or (self._shown[0] == number and self._shown[1] != base):
            raise ProtocolError(
                "Another global adapter of this round was measured already.",
                safe="This one was not used, and nothing left.",
            )

    def _measure_global(self, call: pb.Measure) -> pb.Reply:
        """Figures of a round's global adapter on this customer's part of the acceptance set. They
        are of the adapter and of the provider's records alone, so they leave as they are.
        """
        vectors, base = self._open_global(call.round, call.state)
        trained = (self._number, self._base)
        if self._number > call.round or (self._number == call.round and trained[1] != base):
            raise ProtocolError(
                f"The global adapter of a round before {self._number} is measured no more.",
                safe="It was not used, and nothing left.",
            )
        self._require_shown(call.round, base)
        self._shown = call.round, base
        metrics: dict[str, dict[str, Figure]] = {}
        for name, model in self._models.items():
            report = self._reporter(f"{name}: after round {call.round - 1}")
            model.task.set_flat(vectors[name])
            part = [record for _, record in self._part(model)]
            metrics[name] = {"acceptance": figure_of(model.task.evaluate(part))}
            report(1, 1, 0.0)
        context = Context(
            self.digest, self.config.run_id, CURVE, call.round, self.config.party, base
        )
        protected = self._protect(Payload(0, {}, metrics), context)
        return pb.Reply(update=pb.Update(protected=protected.wire))

    def _part(self, model: OpenModel) -> list[tuple[str, Record]]:
        """The K-th of the acceptance set that this customer measures common adapters on."""
        names = [party.name for party in self.contract.customers]
        return model.acceptance[names.index(self.config.party) :: len(names)]

    def _evaluate(self, call: pb.Evaluate) -> pb.Reply:
        final = call.round
        vectors, base = self._open_global(final, call.state, FINAL)
        if self._number > final or (self._number == final and self._base != base):
            raise ProtocolError(
                "Another final adapter was measured already.",
                safe="This one was not, and nothing left.",
            )
        if self._masks is not None:
            self._masks.begin(EVALUATED, call.masked, base)
        self._number, self._base = final, base
        for figures in self._figures.values():  # of rounds that the contract's rule spared
            spared = range(final, self.contract.rounds + 1)
            figures.losses |= {train_key(number): (0, 0, 0.0) for number in spared}
        self._enter()  # whatever becomes of it, no other final adapter is measured
        metrics: dict[str, dict[str, Figure]] = {}
        for name, model in self._models.items():
            model.task.set_flat(vectors[name])
            metrics[name] = self._measure(model, "federated", self._reporter(f"{name}: federated"))
            self._figures[name].local |= metrics[name]
        shown: dict[str, dict[str, Any]] = {
            name: {"samples": samples(model.task, model.acceptance, model.initial, vectors[name])}
            for name, model in self._models.items()
        }
        for name, model in self._models.items():
            if makes_personal(self.contract, model.terms):
                found, shown[name]["personal"] = self._personalised(name, model, vectors[name])
                metrics[name] |= found
                self._figures[name].local |= found
        return self._measured(self._leave(EVALUATED, final, {}, metrics), shown)

    def _personalised(
        self, name: str, model: OpenModel, together: Vector
    ) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Make the personal adapter of a model and keep it; figures of it, and all that its own
        customer is told. Whatever fails of it, the shared adapter is the personal one: nothing here
        may end or mark the job, in any mode.
        """
        self._report(pb.Progress(stage=f"{name}: personal"))
        vectors = {"before": model.initial, "together": together}
        judged: dict[str, Vector] = {}
        try:
            if self.config.party in self.contract.alone(model.terms) and name not in self._alone:
                self._spared(partial(self._baseline, name, model), _NOTHING)  # lost with a process
            alone = self._alone.get(name)
            if alone is not None:
                seen, vectors["alone"] = alone
                judged = {"alone": seen} if seen is not None else {}
            made = make_personal(
                model.task,
                self._split(model),
                model.replay,
                vectors,
                judged,
                seed=self._seed(name, "personal"),
            )
            found = gained(self.contract, model, self._records.test, vectors, made)
        except Exception:
            made = Personal(together, "together")
            nothing: tuple[dict[str, Figure], dict[str, Any]] = {}, {}
            again = partial(gained, self.contract, model, self._records.test, vectors, made)
            found = self._spared(again, nothing)
        self._personal[name] = pack_vector(made.vector)
        return found

    def _personal_adapters(self, call: pb.Personal) -> pb.Reply:
        """The personal adapters, to the customer's own node."""
        require_delivered(
            call.delivery, self._base, party=self.config.party, aggregator=self._admitted()
        )
        adapters = seal_personal(
            self._personal, call.seal_to, contract=self.digest, run_id=self.config.run_id
        )
        return pb.Reply(personal=pb.PersonalAdapters(adapters=adapters))

    def _open_global(
        self, number: int, wire: bytes, kind: str = GLOBAL
    ) -> tuple[dict[str, Vector], bytes]:
        aggregator = self._admitted()
        assert self._group is not None  # it comes with the first weights
        context = Context(self.digest, self.config.run_id, kind, number, aggregator.party)
        vectors = self._group.open_global(wire, context, aggregator)
        for name, model in self._models.items():
            if name not in vectors or vectors[name].shape != (model.terms.travelling,):
                raise ProtocolError(
                    f"The global adapter of model {name} has not the shape of the contract."
                )
        return vectors, hashlib.sha384(wire).digest()

    def _measure(
        self,
        model: OpenModel,
        when: str,
        report: Callable[[int, int, float], None],
        *,
        full: bool = False,
    ) -> dict[str, Figure]:
        """Correct, total and loss on the customer's held-out records and, by group, on the
        acceptance set.

        Every customer measures the local-only adapter on the whole acceptance set, but the common
        ones (before, federated) on a K-th of it: the cohort's sum then counts each record once.
        """
        measured: dict[str, Figure] = {}
        if self._records.test:
            own = partial(model.task.evaluate, self._records.test)
            measured |= self._spared(lambda: {f"{when}/own": figure_of(own())}, _NOTHING)
        rows = model.acceptance
        if not full:
            rows = self._part(model)
        groups = self.contract.evaluation.groups
        said: Counter[tuple[int, int]] = Counter()
        for index, group in enumerate(groups):
            found = model.task.evaluate([record for name, record in rows if name == group])
            measured[f"{when}/acceptance/{group}"] = figure_of(found)
            said.update(found.said)
            report(index + 1, len(groups), 0.0)
        if groups and not full:
            judged = details(model.task, [record for _, record in rows], said)
            measured |= {f"{when}/{key}": value for key, value in judged.items()}
        return measured

    def _measured(
        self, protected: ProtectedUpdate, shown: dict[str, dict[str, Any]] | None = None
    ) -> pb.Reply:
        """The reply to a measurement: figures for this customer's own node, with what else it is
        `shown` of a model, and what leaves for the aggregator.
        """
        found: dict[str, dict[str, Any]] = {
            name: {key: list(value) for key, value in figures.local.items()}
            for name, figures in self._figures.items()
        }
        for name, more in (shown or {}).items():
            found[name] |= {**more, "spared": self._figures[name].spared}
        local = canonical.encode(found)
        said = Own(
            contract=self.digest,
            run_id=self.config.run_id,
            party=self.config.party,
            figures=hashlib.sha384(local).digest(),
            personal={
                name: hashlib.sha384(vector).digest() for name, vector in self._personal.items()
            },
        )
        own = said.sign(self._signing)
        return pb.Reply(measured=pb.Measured(local=local, protected=protected.wire, own=own))

    def _leave(
        self,
        kind: str,
        number: int,
        vectors: dict[str, Vector],
        metrics: dict[str, dict[str, Figure]],
    ) -> ProtectedUpdate:
        """What leaves for the aggregator enclave: encrypted to it, and masked too where the
        contract says so.
        """
        context = self._context(kind, number)
        records = len(self._records.train)
        if self._masks is None:
            metrics = may_leave(self.contract, metrics)
            if self._private is None:
                vectors = self._clipped(vectors) if kind == UPDATE else vectors
                return self._protect(Payload(records, vectors, metrics), context)
            noised = b""
            if kind == UPDATE and self._private.traits.shared:
                whole = np.concatenate([vectors[terms.name] for terms in self.contract.models])
                vectors, noised = {}, noised_words(self.contract, whole).astype("<u8").tobytes()
            return self._protect(Payload(1, vectors, metrics, noised=noised), context)

        if kind == LOADED:
            return self._protect(Payload(0, vectors, {}), context)
        figures = {name: kept.local | kept.losses for name, kept in self._figures.items()}
        message = self._masks.upload(kind, vectors, records, figures, self._tell_clipped)
        return self._protect(Payload(0, {}, {}, message), context)

    def _tell_clipped(self) -> None:
        if self._private is not None:
            return
        stage = "the update was clipped to the contract's bounds"
        self._report(pb.Progress(stage=stage, done=1, total=1))

    def _clipped(self, vectors: dict[str, Vector]) -> dict[str, Vector]:
        """The updates of all models, together no longer than the contract allows."""
        names = [terms.name for terms in self.contract.models]
        whole = np.concatenate([vectors[name] for name in names])
        clipped = clip_vector(whole, self.contract.protection.clip_norm)
        if clipped is whole:
            return vectors
        self._tell_clipped()
        ends = np.cumsum([vectors[name].size for name in names])[:-1]
        return dict(zip(names, np.split(clipped, ends), strict=True))

    def _context(self, kind: str, number: int) -> Context:
        return Context(self.digest, self.config.run_id, kind, number, self.config.party, self._base)

    def _reporter(self, stage: str) -> Callable[[int, int, float], None]:
        """Tells the customer's own node how far a stage is, at most some twenty times, with losses
        to 0.01 nats. Under a privacy mechanism the stage's name alone, once: numbers of steps, and
        whether they end, depend on records.
        """
        if self._private is not None:
            self._report(pb.Progress(stage=stage))
            return lambda done, total, value: None
        told = 0

        def report(done: int, total: int, value: float) -> None:
            nonlocal told
            part = done * _REPORTS // max(total, 1)
            if part > told:
                told, value = part, round(value, 2)
                self._report(pb.Progress(stage=stage, done=done, total=total, value=value))

        return report

    def _protect(self, payload: Payload, context: Context) -> ProtectedUpdate:
        return protect(payload, context, recipient=self._admitted(), signer=self._signing)

    def _seed(self, *parts: Any) -> int:
        return seed_of(self.contract.seed, self.config.party, *parts)


def _nobodys(terms: ModelTerms) -> list[Record]:
    """Records of no customer, for the self-check: what it says must not depend on anybody's."""
    answers = terms.labels or ("yes", "no, it is not", "later", "a b c")
    prompts = ("the first text", "another one, which is longer than the first", "a", "b c d e f")
    return [Record(prompt, answers[at % len(answers)]) for at, prompt in enumerate(prompts)]
