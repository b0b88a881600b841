"""The aggregator enclave: the only place where a customer's update exists in clear beside the
trainer that made it.

It admits trainers by their evidence, gives each the run's group key, takes one protected message a
customer and round, and lets out only: the next global adapters (encrypted for the cohort), sums of
counts over at least the contract's minimum cohort, and at the end the adapters, encrypted to the
parties that the contract names.

Rounds: 0 collects the "loaded" messages (initial adapters, before-measurements), 1..R the updates
(or, where round 1 is the taster's, moments first, of which only heads are given out),
the next number the last measurements. R is the contract's number of rounds, or fewer by its rule
(`fedark.enclave.curve`): where the contract asks for it, the global adapter that a round gave is
measured before the next one begins. A round that is closed stays closed; a second message of one
customer for one round is refused unless it is the same bytes. The adapters are delivered when the
last measurements are closed; under masks R is enough, as too few may be left to measure.

Under masks (`fedark.enclave.masking`) a customer's message is masked when it is opened here: this
enclave sees the initial adapters, which tell nothing of a customer, and sums over the survivors.
Each round but the loading asks for `OpenRound` before, and for `Survivors` and the committee's
answers between the uploads and `Close`.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import numpy as np

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import ModelTerms
from fedark.contract.privacy import noised_sum, server_scale
from fedark.contract.protection import CURVE, EVALUATED, UPDATE, Figure, kind_of, shares_noise
from fedark.contract.taste import TASTED, taste_values
from fedark.enclave.checkpoint import SealingKey
from fedark.enclave.curve import Curve, CurveState
from fedark.enclave.masking import AggregatorMasks, AggregatorMasksState
from fedark.enclave.protection import (
    FINAL,
    GLOBAL,
    LOADED,
    Context,
    Delivery,
    GroupKey,
    Payload,
    ProtectedUpdate,
    pack_vector,
    seal_delivery,
    unpack_vector,
)
from fedark.enclave.session import Quote, RunConfig, SessionBase, SessionState, reply_done
from fedark.enclave.statements import Delivered, Summed
from fedark.enclave.taste import heads_of
from fedark.foundation import canonical
from fedark.foundation.errors import FederationError, ProtocolError, Refused
from fedark.foundation.snapshot import Bytes32, Row, Snapshot
from fedark.tuning.server_mean import mean_of
from fedark.tuning.server_optimizer import OptimizerState, ServerOptimizer, server_optimizer
from fedark.v1 import enclave_pb2 as pb

__all__ = ["AggregatorSession"]

Vector = np.ndarray[Any, np.dtype[np.float32]]
_ROUNDING = 1e-9  # of a norm that is summed in another order than the trainer's


Counted = dict[str, Annotated[Figure, Row]]


class CountedPayload(Snapshot):
    """What is kept of a customer's message of a closed round: its weight and its counts."""

    weight: int
    metrics: dict[str, Counted]


class AggregatorState(SessionState):
    """An aggregator's session in its checkpoint.

    Attributes:
        trainers: the customers whose trainer enclaves were admitted.
        round, base: the round that is open, and the digest of its global adapter.
        vectors: the global adapters, float32 little-endian.
        due: the global adapter is to be measured for the learning curve before anything else.
        history: of each closed round, the counts of every customer in it.
        figures: whether sums of counts may still be given out.
    """

    group: Bytes32
    trainers: list[str]
    round: int
    base: bytes
    vectors: dict[str, bytes]
    due: bool
    curve: CurveState
    optimizers: dict[str, OptimizerState]
    history: list[dict[str, CountedPayload]]
    figures: bool
    masks: AggregatorMasksState | None


class AggregatorSession(SessionBase):
    """See the module's docstring."""

    _kept = AggregatorState

    def __init__(
        self, config: RunConfig, quote: Quote, sealing_key: SealingKey | None = None
    ) -> None:
        super().__init__(config, quote, sealing_key)
        self._group = GroupKey()
        self._trainers: dict[str, AttestedPeer] = {}
        self._base = b""
        self._received: dict[str, tuple[bytes, Payload]] = {}
        self._vectors: dict[str, Vector] = {}
        self._due = False
        self._measured: dict[str, tuple[bytes, dict[str, Figure]]] = {}
        self._curve = Curve(self.contract)
        self._history: list[dict[str, CountedPayload]] = []
        self._resumed = False
        self._figures_open = True
        self._masks: AggregatorMasks | None = None
        if self.contract.protection.mode == "masked":
            self._masks = AggregatorMasks(self.contract, config.run_id)
        self._scale = server_scale(self.contract)
        self._shares_noise = shares_noise(self.contract)
        self._optimizers: dict[str, ServerOptimizer] = {
            terms.name: server_optimizer(terms.server, terms.travelling)
            for terms in self.contract.models
        }

    # -- trainers

    def _admit_first(self, call: pb.AdmitPeer) -> pb.Reply:
        """Admit a trainer: only before the loading is closed, for the number of trainers that a
        restarted enclave counts on must not grow afterwards (`fedark.enclave.checkpoint`).
        """
        if call.peer in self._trainers:
            return self._admit_again(call)
        self._trainers[call.peer] = self._admit(call)
        return self._granted(call.peer)

    def _admit_again(self, call: pb.AdmitPeer) -> pb.Reply:
        if self._known(call.peer, call.evidence):
            return self._granted(call.peer)
        if call.peer in self._trainers:
            raise ProtocolError(
                "The trainer enclave of this customer is admitted already.",
                safe="It stays the one.",
            )
        raise ProtocolError(
            "A trainer enclave came after the loading was closed.", safe="It was not admitted."
        )

    def _granted(self, party: str) -> pb.Reply:
        grant = self._group.grant(self._trainers[party], self._signing)
        return pb.Reply(admitted=pb.Admitted(group_grant=grant))

    # -- masked rounds

    @property
    def _masked(self) -> AggregatorMasks:
        assert self._masks is not None  # of another contract the table refuses the call
        return self._masks

    def _join(self, call: pb.Join) -> pb.Reply:
        hellos = [announcement.hello for _, announcement in sorted(call.peers.items())]
        if not self._masked.joined(hellos):
            self._masked.join(self._trainers.values(), hellos)
        return reply_done()

    def _open_round(self, call: pb.OpenRound) -> pb.Reply:
        self._expect(call.round)
        opened = self._masked.open(self._number, self._kind, call.parties, self._base)
        return pb.Reply(opened=pb.Opened(masked=opened))

    def _survivors(self, call: pb.Survivors) -> pb.Reply:
        self._expect(call.round)
        endorse, unmask = self._masked.ask(endorsed=call.endorsed)
        return pb.Reply(asked=pb.Asked(endorse=endorse, unmask=unmask))

    def _endorsed(self, call: pb.Submit) -> pb.Reply:
        message = self._verified(call, "endorsement").open(self._hpke).masked
        self._masked.endorse(message, call.party)
        return reply_done()

    def _shared(self, call: pb.Submit) -> pb.Reply:
        message = self._verified(call, "shares").open(self._hpke).masked
        self._masked.accept(message, call.party)
        return reply_done()

    # -- state

    def _snapshot(self) -> AggregatorState:
        return AggregatorState(
            **self._common(),
            group=self._group.secret_bytes(),
            trainers=sorted(self._trainers),
            round=self._number,
            base=self._base,
            vectors={name: pack_vector(vector) for name, vector in self._vectors.items()},
            due=self._due,
            curve=self._curve.state(),
            optimizers={name: optimizer.state() for name, optimizer in self._optimizers.items()},
            history=self._history,
            figures=self._figures_open,
            masks=self._masks.state() if self._masks is not None else None,
        )

    def _restore(self, state: AggregatorState) -> None:
        """Messages of the open round are not in the state: the host brings them again, and they
        verify as before.
        """
        self._group = GroupKey(state.group)
        self._trainers = {name: self._readmitted("trainer", name) for name in state.trainers}
        self._number, self._base, self._resumed = state.round, state.base, True
        self._vectors = {name: unpack_vector(vector) for name, vector in state.vectors.items()}
        self._due = state.due
        self._curve.restore(state.curve)
        for name, optimizer in self._optimizers.items():
            optimizer.restore(state.optimizers[name])
        self._history = state.history
        self._figures_open = state.figures and self._kind != EVALUATED
        if self._masks is not None and state.masks is not None:
            self._masks.restore(state.masks, self._trainers.values())

    @property
    def _least(self) -> int:
        """Fewest customers that close a round; see `fedark.enclave.checkpoint` for those of an
        enclave that was restarted.
        """
        minimum = self.contract.protection.minimum_cohort
        if self._resumed and self._masks is None:
            return max(minimum, len(self._trainers) - minimum + 1)
        return minimum

    @property
    def _kind(self) -> str:
        if self._number == 0:
            return LOADED
        return EVALUATED if self._rounds_over() else kind_of(self.contract, self._number)

    def _expect(self, number: int) -> None:
        if self._due:
            raise ProtocolError(
                f"The global adapter of round {self._number} is to be measured first.",
                safe="The message was dropped.",
            )
        if number != self._number:
            raise ProtocolError(
                f"A message for round {number} came in round {self._number}.",
                safe="It was dropped.",
            )

    def _verified(self, submit: pb.Submit, kind: str) -> ProtectedUpdate:
        self._expect(submit.round)
        return self._from_trainer(submit, kind)

    def _from_trainer(self, submit: pb.Submit, kind: str) -> ProtectedUpdate:
        sender = self._trainers.get(submit.party)
        if sender is None:
            raise Refused(
                "A message came from a customer whose trainer enclave is not admitted.",
                safe="It was dropped.",
            )
        context = Context(
            self.digest, self.config.run_id, kind, self._number, submit.party, self._base
        )
        return ProtectedUpdate.verify(submit.protected, sender=sender, context=context)

    def _submit(self, submit: pb.Submit) -> pb.Reply:
        update = self._verified(submit, self._kind)
        fingerprint = hashlib.sha384(update.wire).digest()
        if submit.party in self._received:
            if self._received[submit.party][0] == fingerprint:
                return reply_done()
            raise Refused(
                f"{submit.party} sent two different messages for one round.",
                safe="The first one counts.",
            )
        payload = update.open(self._hpke)
        self._check(payload, submit.party)
        if self._masks is not None and self._kind != LOADED:
            self._masks.receive(payload.masked, submit.party)
        self._received[submit.party] = fingerprint, payload
        return reply_done()

    def _check(self, payload: Payload, party: str) -> None:
        names = {terms.name for terms in self.contract.models}
        if self._masks is not None:
            if payload.metrics or payload.weight or bool(payload.masked) == (self._kind == LOADED):
                raise ProtocolError(
                    "A message is not masked, as the contract asks.", safe="It was dropped."
                )
        elif set(payload.metrics) != names or payload.weight < 1 or payload.masked:
            raise ProtocolError(
                "A message does not speak for the models of the contract.", safe="It was dropped."
            )
        summed = self._kind == UPDATE and self._masks is None and self._shares_noise
        if summed:
            noised_sum(self.contract, (party,), [_words(payload)])
        kinds = (LOADED,) if self._masks is not None or summed else (LOADED, UPDATE, TASTED)
        wanted = (
            {terms.name: (self._length(terms),) for terms in self.contract.models}
            if self._kind in kinds
            else {}
        )
        shapes = {name: vector.shape for name, vector in payload.vectors.items()}
        if shapes != wanted or bool(payload.noised) != summed:
            raise ProtocolError(
                "A message's adapters have not the shape of the contract.", safe="It was dropped."
            )
        if self._kind == UPDATE and self.contract.privacy.mechanism == "none":
            squares = [np.square(v, dtype=np.float64).sum() for v in payload.vectors.values()]
            if sum(squares) > self.contract.protection.clip_norm**2 * (1 + _ROUNDING):
                raise ProtocolError(
                    "An update is longer than the contract's clip_norm.", safe="It was dropped."
                )

    def _length(self, terms: ModelTerms) -> int:
        """Of a model's vector in a message of the open round."""
        tastes = self._kind == TASTED
        return taste_values(self.contract, terms) if tastes else terms.travelling

    def _close(self, call: pb.Close) -> pb.Reply:
        number = call.round
        if number != self._number or self._due:
            raise ProtocolError(f"Round {number} cannot be closed in round {self._number}.")
        self._require_enough(number, len(self._received))
        self._require_untrimmed(number, len(self._received))
        means: dict[str, np.ndarray[Any, Any]] = {}
        moments: np.ndarray[Any, Any] = np.zeros(0)
        sums: list[dict[str, dict[str, list[int | float]]]] = []
        customers = set(self._received)
        if self._masks is not None:
            customers = self._masks.survivors if self._kind != LOADED else customers
            total = self._masks.finish() if self._kind != LOADED else None
            if total is not None and self._kind == TASTED:
                moments = total.integers()
            elif total is not None and self._kind == UPDATE:
                means = dict(self._masks.split(total))
            elif total is not None:
                sums = self._masks.figures(total)
        else:
            means = self._means() if self._kind == UPDATE else {}
            moments = self._moments() if self._kind == TASTED else moments
            stayed, sums = self._figures(
                {name: payload for name, (_, payload) in self._received.items()}
            )
            customers = stayed if self._kind == EVALUATED else customers
        vectors = dict(self._vectors)
        if self._kind == TASTED:
            vectors, heads = heads_of(self.contract, moments, self._vectors)
            self._curve.tasted(heads)
        for terms in self.contract.models:
            if self._kind == LOADED:
                # Any one will do: they are computed by the same attested code, and differ by
                # rounding at most.
                first = next(
                    self._received[party.name][1]
                    for party in self.contract.customers
                    if party.name in self._received
                )
                vectors[terms.name] = first.vectors[terms.name].copy()
            elif self._kind == UPDATE:
                vectors[terms.name] = self._stepped(terms, means[terms.name])
        kind, metrics = self._kind, canonical.encode(sums)
        self._vectors = vectors
        self._received, self._number = {}, self._number + 1
        said = Summed(
            contract=self.digest,
            run_id=self.config.run_id,
            round=number,
            customers=sorted(customers),
            figures=metrics,
        )
        closed = pb.Closed(metrics=metrics, statement=said.sign(self._signing))
        if kind == EVALUATED:
            return pb.Reply(closed=closed)
        if kind != LOADED:
            self._due = self._curve.summed(number)
        return self._onward(closed)

    def _onward(self, closed: pb.Closed) -> pb.Reply:
        """The end of a round or of its measurement, with the state that goes out next."""
        ended = self._rounds_over()
        if ended:
            self._vectors = self._curve.chosen(self._vectors)
        context = Context(
            self.digest,
            self.config.run_id,
            FINAL if ended else GLOBAL,
            self._number,
            self.config.party,
        )
        state = self._group.seal_global(self._vectors, context, self._signing)
        self._base = hashlib.sha384(state).digest()
        closed.MergeFrom(pb.Closed(state=state, ended=ended, curve=self._curve.encode()))
        return pb.Reply(closed=closed)

    def _require_untrimmed(self, number: int, count: int) -> None:
        cut = max(terms.server.trimmed(count) for terms in self.contract.models)
        if self._kind == UPDATE and count - 2 * cut < self.contract.protection.minimum_cohort:
            raise FederationError(
                f"Of the {count} customers of round {number} the trimmed mean leaves"
                f" {count - 2 * cut} in each value, fewer than the minimum cohort.",
                safe="Nothing was summed and nothing left the enclave.",
                fix="Bring the missing customers back, or trim less in a new contract.",
            )

    def _require_enough(self, number: int, count: int) -> None:
        if count < self._least:
            asks = (
                "a restarted aggregator enclave"
                if self._least > self.contract.protection.minimum_cohort
                else "the contract"
            )
            raise FederationError(
                f"Round {number} has {count} of the {self._least} customers that {asks} asks for.",
                safe="Nothing was summed and nothing left the enclave.",
                fix=(
                    "Bring the missing customers back, or agree on a smaller minimum cohort in a"
                    " new contract."
                ),
            )

    # -- the learning curve

    def _expect_curve(self, number: int) -> None:
        if not self._due or number != self._number:
            raise ProtocolError(
                f"No global adapter of round {number} is to be measured now.",
                safe="The message was dropped.",
            )

    def _submit_curve(self, submit: pb.Submit) -> pb.Reply:
        self._expect_curve(submit.round)
        update = self._from_trainer(submit, CURVE)
        fingerprint = hashlib.sha384(update.wire).digest()
        if submit.party in self._measured and self._measured[submit.party][0] != fingerprint:
            raise Refused(
                f"{submit.party} sent two different measurements of one global adapter.",
                safe="The first one counts.",
            )
        payload = update.open(self._hpke)
        figures = {name: dict(found) for name, found in payload.metrics.items()}
        wanted = {terms.name: {"acceptance"} for terms in self.contract.models}
        if {name: set(found) for name, found in figures.items()} != wanted or payload != Payload(
            0, {}, payload.metrics
        ):
            raise ProtocolError(
                "A message is not a measurement of the global adapter.", safe="It was dropped."
            )
        self._measured[submit.party] = (
            fingerprint,
            {name: found["acceptance"] for name, found in figures.items()},
        )
        return reply_done()

    def _close_curve(self, call: pb.Close) -> pb.Reply:
        self._expect_curve(call.round)
        self._require_enough(call.round, len(self._measured))
        figures = {party: found for party, (_, found) in self._measured.items()}
        self._curve.add(figures, self._vectors)
        self._due, self._measured = False, {}
        if self._rounds_over():
            return self._onward(pb.Closed())
        return pb.Reply(closed=pb.Closed(curve=self._curve.encode()))

    def _means(self) -> dict[str, np.ndarray[Any, Any]]:
        """Means of the open round's updates, 1-D, by model: of noised integers exactly, else
        weighted by records.
        """
        # A fixed order makes the floating-point sum independent of who answered first.
        received = {
            party.name: self._received[party.name][1]
            for party in self.contract.customers
            if party.name in self._received
        }
        if self._shares_noise:
            words = [_words(payload) for payload in received.values()]
            mean = noised_sum(self.contract, list(received), words).mean()
            ends = np.cumsum([terms.travelling for terms in self.contract.models])
            parts = np.split(mean, ends[:-1])
            return {
                terms.name: part for terms, part in zip(self.contract.models, parts, strict=True)
            }
        weights = [payload.weight for payload in received.values()]
        return {
            terms.name: mean_of(
                terms.server,
                weights,
                [payload.vectors[terms.name] for payload in received.values()],
            )
            for terms in self.contract.models
        }

    def _moments(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Sums of the taster's integers, all models in a row: exact, so in any order."""
        rows = [
            np.concatenate([payload.vectors[terms.name] for terms in self.contract.models])
            for _, payload in self._received.values()
        ]
        total: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(rows, np.float64).sum(axis=0)
        return total

    def _stepped(self, terms: ModelTerms, mean: np.ndarray[Any, Any]) -> Vector:
        current, mean = self._vectors[terms.name], mean * self._scale
        return self._optimizers[terms.name].step(current, (current + mean).astype(np.float32))

    def _figures(
        self, received: dict[str, Payload]
    ) -> tuple[set[str], list[dict[str, dict[str, list[int | float]]]]]:
        """Sums of all rounds, at the end and over those who were there to the end; who they are.

        Given out round by round, the sums of two cohorts would differ by the figures of whoever
        dropped out between them. None after a restart in the midst of the last measurements
        (`fedark.enclave.checkpoint`).
        """
        self._history.append(
            {
                name: CountedPayload(
                    weight=payload.weight,
                    metrics={model: dict(items) for model, items in payload.metrics.items()},
                )
                for name, payload in received.items()
            }
        )
        if self._kind != EVALUATED or not self._figures_open:
            return set(), []
        stayed = set.intersection(*(set(entry) for entry in self._history))
        if len(stayed) < self.contract.protection.minimum_cohort:
            return set(), []
        return stayed, [_sums([entry[name] for name in sorted(stayed)]) for entry in self._history]

    def _rounds_over(self) -> bool:
        return bool(self._curve.ended)

    def _deliver(self, call: pb.Deliver) -> pb.Reply:
        name = call.party
        party = self.contract.party(name)
        if party is None or name not in self.contract.deliver_to:
            raise Refused(
                "The contract does not deliver the adapter to this party.",
                safe="Nothing was delivered.",
            )
        sealed = seal_delivery(
            Delivery(self._vectors, self._curve.encode()),
            contract=self.digest,
            run_id=self.config.run_id,
            party=name,
            hpke_public=bytes.fromhex(party.hpke_key),
            kem=self.contract.attestation.kem,
            signer=self._signing,
            base=self._base,
        )
        said = Delivered(
            contract=self.digest,
            run_id=self.config.run_id,
            adapters={
                name: hashlib.sha384(pack_vector(vector)).digest()
                for name, vector in self._vectors.items()
            },
            curve=self._curve.encode(),
            sums=self._number,
        )
        return pb.Reply(delivery=pb.Delivery(sealed=sealed, statement=said.sign(self._signing)))


def _words(payload: Payload) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.frombuffer(payload.noised, "<u8").astype(np.uint64)


def _sums(payloads: list[CountedPayload]) -> dict[str, dict[str, list[int | float]]]:
    """Sums over the cohort of those counts that every member of it gave: a sum over fewer would
    point at someone.
    """
    sums: dict[str, dict[str, list[int | float]]] = {}
    for model in payloads[0].metrics:
        keys = set.intersection(*(set(payload.metrics[model]) for payload in payloads))
        rows: dict[str, list[Figure]] = {
            key: [payload.metrics[model][key] for payload in payloads] for key in sorted(keys)
        }
        sums[model] = {
            key: [
                sum(row[0] for row in items),
                sum(row[1] for row in items),
                float(sum(row[2] for row in items)),
            ]
            for key, items in rows.items()
        }
    return sums
