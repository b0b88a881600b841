"""The two ends of a masked session inside their enclaves: `fedark.secagg` tied to attestation,
contract and rounds.

Peers are attested without a nonce for each pair: all trainer enclaves answer one challenge that is
derived from the nonces of all of them. That, and what identifies a round and its model, is argued
in docs/design/secure-aggregation.md, "Evidence for a whole cohort": comments name its steps 1 to 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import numpy as np

from fedark.attestation.binding import NONCE_BYTES
from fedark.attestation.gate import AttestedPeer
from fedark.attestation.nonces import NonceBook
from fedark.contract.contract import Contract
from fedark.contract.privacy import mechanism
from fedark.contract.protection import EVALUATED, Figure, figures, lanes, masked_terms
from fedark.foundation import canonical
from fedark.foundation.errors import FederationError, ProtocolError, Refused
from fedark.foundation.keys import SigningKey
from fedark.foundation.snapshot import Row, Snapshot
from fedark.secagg import Client, Contribution, Directory, RoundSum, Server, ServerRound
from fedark.secagg.client import ClientState
from fedark.secagg.vector import l2_norm

__all__ = ["AggregatorMasks", "AggregatorMasksState", "TrainerMasks", "TrainerMasksState"]

_PEERS = "fedark/peers/1"

Vector = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class _Self:
    """An enclave's own identity, which it need not attest to itself."""

    party: str
    signing_public: bytes
    contract_digest: bytes
    run_id: str
    role: str = "trainer"


class TrainerMasksState(Snapshot):
    """A trainer's end in its checkpoint."""

    nonce: bytes
    combined: bytes
    session: bytes
    hellos: list[bytes]
    client: ClientState


class AggregatorMasksState(Snapshot):
    """The aggregator's end in its checkpoint.

    Attributes:
        opening: number, layout, participants and model of the round that is open.
    """

    hellos: list[bytes]
    opening: Annotated[tuple[int, str, list[str], bytes], Row] | None
    survivors: list[str] | None


class TrainerMasks:
    """A trainer's end: nonce -> combine -> join -> { begin -> upload -> [endorse] -> unmask }."""

    def __init__(
        self, contract: Contract, run_id: str, party: str, signing: SigningKey, nonces: NonceBook
    ) -> None:
        self._contract, self._nonces = contract, nonces
        self._terms = masked_terms(contract, run_id)
        self._private = mechanism(contract)
        self._client = Client(self._terms, party, signing)
        self._me = _Self(party, signing.public, self._terms.contract_digest, run_id)
        self._nonce = b""
        self._combined = b""
        self._session = b""
        self._hellos: list[bytes] = []

    @property
    def fellows(self) -> tuple[str, ...]:
        """The other customers of the contract."""
        return tuple(name for name in self._terms.roster if name != self._me.party)

    @property
    def combined(self) -> bytes:
        """What `combine` gave; empty before."""
        return self._combined

    def hello(self) -> bytes:
        """The signed announcement of this session's key."""
        return self._client.hello()

    def nonce(self, *, now: datetime) -> bytes:
        """This enclave's challenge to its fellows. One for the session: asked again, it is the
        same.
        """
        if self._nonce:
            return self._nonce
        # Step 1: one nonce for all fellows.
        self._nonce = self._nonces.issue(_PEERS, now=now)
        return self._nonce

    def combine(self, nonces: Mapping[str, bytes], *, now: datetime) -> bytes:
        """The one challenge that the whole cohort answers. Once; asked again with the same nonces
        it is the same.

        Raises:
            Refused: this enclave's own nonce is not in it as it was given, or is used or too old.
            ProtocolError: not one nonce for every customer, or combined already.
        """
        listed = [[party, nonces[party]] for party in sorted(nonces)]
        session = canonical.encode([_PEERS, self._me.contract_digest, self._me.run_id, listed])
        if self._combined:
            if session != self._session:
                raise ProtocolError(
                    "This enclave has answered its fellows already.", safe="No key was agreed."
                )
            return self._combined
        if set(nonces) != set(self._terms.roster) or any(
            len(nonce) != NONCE_BYTES for nonce in nonces.values()
        ):
            raise ProtocolError(
                "The nonces are not one for every customer of the contract.",
                safe="No key was agreed.",
            )
        # Step 2: this enclave's own nonce went in unaltered.
        if not self._nonce or nonces[self._me.party] != self._nonce:
            raise Refused(
                f"The nonce of the trainer enclave of {self._me.party} was altered on its way to"
                " its fellows.",
                safe="No key was agreed and no record was opened.",
                fix="Whoever relays the messages is not honest, or mixes two runs.",
            )
        self._nonces.spend(self._nonce, _PEERS, now=now)
        self._session, self._combined = session, hashlib.sha256(session).digest()
        return self._combined

    def joined(self, hellos: Iterable[bytes]) -> bool:
        """Whether keys were agreed on exactly these announcements of fellows."""
        return bool(self._hellos) and [*hellos, self.hello()] == self._hellos

    def join(self, peers: Iterable[AttestedPeer], hellos: Iterable[bytes]) -> None:
        """Agree keys with the fellows that were admitted, and with nobody else.

        Raises:
            Refused: a key that is not of an attested fellow, too few of them, or one that stands
                twice.
            ProtocolError: malformed, or joined already.
        """
        hellos = [*hellos, self.hello()]
        self._client.join(Directory.verify(self._terms, [*peers, self._me], hellos))
        self._hellos = hellos

    def state(self) -> TrainerMasksState:
        """What the trainer's checkpoint holds of this end."""
        return TrainerMasksState(
            nonce=self._nonce,
            combined=self._combined,
            session=self._session,
            hellos=self._hellos,
            client=self._client.state(),
        )

    def restore(self, state: TrainerMasksState, peers: Iterable[AttestedPeer]) -> None:
        """Go on from `state`; `peers`: the fellows that were admitted, none before joining."""
        self._nonce, self._combined, self._session = state.nonce, state.combined, state.session
        self._hellos = state.hellos
        joined = (
            Directory.verify(self._terms, [*peers, self._me], self._hellos)
            if self._hellos
            else None
        )
        self._client.restore(state.client, joined)

    def begin(self, layout: str, request: bytes, model: bytes) -> None:
        """Enter the masked round that the aggregator opened, before anything is computed for it.

        Raises:
            ProtocolError: malformed, not new, or of another kind than `layout`.
            Refused: a cohort that is too small, or a model whose sum was released.
        """
        found = self._client.begin(request, model)
        if found.name != layout:
            raise ProtocolError(
                f"A masked round of kind {found.name!r} came for {layout!r}.",
                safe="Nothing was uploaded.",
            )

    def upload(
        self,
        layout: str,
        vectors: Mapping[str, Vector],
        records: int,
        metrics: Mapping[str, Mapping[str, Figure]],
        on_clipped: Callable[[], None],
    ) -> memoryview:
        """The masked message of the round that was begun. Beside it little memory is taken where
        the contract has one model; the vectors of several are copied once, to lie in a row.

        Args:
            vectors: model name -> what travels; not looked at where figures alone are summed.
            records: the customer's training records.
            metrics: all figures so far; not looked at in an update.
            on_clipped: called if the update does not fit the contract's bounds as it is.

        Raises:
            InputError: a figure is missing, or a number is not finite.
            ProtocolError: no round was begun, or this enclave uploaded to it.
        """
        shape = self._terms.by_name[layout]
        weight = min(records, shape.max_weight)
        vector, values = np.zeros(0, np.float32), {}
        if layout == EVALUATED:
            values = lanes(self._contract, metrics)
        else:
            vector = _in_a_row([vectors[model.name] for model in self._contract.models])
            norm, top = (
                l2_norm(vector),
                float(max(vector.max(initial=0.0), -vector.min(initial=0.0))),
            )
            if norm > shape.clip_norm or top * weight / shape.max_weight > shape.value_range:
                on_clipped()
        noise = self._private.noise() if self._private is not None and shape.noise_bound else None
        return self._client.upload(Contribution(vector, weight, values), noise)

    def endorse(self, request: bytes) -> bytes:
        """See `fedark.secagg.Client.endorse`."""
        return self._client.endorse(request)

    def unmask(self, request: bytes) -> bytes:
        """See `fedark.secagg.Client.unmask`."""
        return self._client.unmask(request)


def _in_a_row(vectors: list[Vector]) -> Vector:
    return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)


class AggregatorMasks:
    """The aggregator's end: join -> { open -> receive* -> ask -> [endorse* -> ask] -> accept* ->
    finish }.
    """

    def __init__(self, contract: Contract, run_id: str) -> None:
        self._contract = contract
        self._terms = masked_terms(contract, run_id)
        self._directory: Directory | None = None
        self._server: Server | None = None
        self._mean: Vector | None = None
        self._round: ServerRound | None = None
        self._closed = False
        self._waiting: set[str] = set()
        self._hellos: list[bytes] = []
        self._opening: tuple[int, str, list[str], bytes] | None = None
        self._uploaded: set[str] = set()
        self._survivors: set[str] | None = None
        self._answers: dict[str, bytes] = {}

    def state(self) -> AggregatorMasksState:
        """What the aggregator's checkpoint holds of this end; uploads and answers are brought
        again.
        """
        return AggregatorMasksState(
            hellos=self._hellos,
            opening=self._opening,
            survivors=sorted(self._survivors) if self._survivors is not None else None,
        )

    def restore(self, state: AggregatorMasksState, trainers: Iterable[AttestedPeer]) -> None:
        """Go on from `state`: the round that was open is open, and its survivors stand if they were
        declared.
        """
        if not state.hellos:
            return
        self.join(trainers, state.hellos)
        if state.opening is not None:
            self.open(*state.opening)
        if state.survivors is not None:
            self._survivors = set(state.survivors)

    def joined(self, hellos: Iterable[bytes]) -> bool:
        """Whether the session's keys are exactly these."""
        return bool(self._hellos) and list(hellos) == self._hellos

    def join(self, trainers: Iterable[AttestedPeer], hellos: Iterable[bytes]) -> None:
        """Know the session's keys. Once.

        Raises:
            Refused, ProtocolError: as `fedark.secagg.Directory.verify`.
        """
        if self._server is not None:
            raise ProtocolError(
                "The masked session was joined already.", safe="It goes on as it is."
            )
        self._hellos = list(hellos)
        self._directory = Directory.verify(self._terms, trainers, self._hellos)
        self._server = Server(self._directory)

    def open(self, number: int, layout: str, parties: Iterable[str], model: bytes) -> bytes:
        """Begin the job's round `number`; returns the request for every participant.

        Raises:
            Refused, ProtocolError: every trainer would refuse it.
        """
        if self._server is None:
            raise ProtocolError("No masked session was joined.")
        opening = number, layout, list(parties), model
        if self._round is not None and opening == self._opening:
            return self._round.request
        self._round, self._closed = self._server.open(*opening), False
        self._opening, self._uploaded, self._survivors, self._answers = opening, set(), None, {}
        return self._round.request

    def receive(self, message: bytes | memoryview, party: str) -> None:
        """Take one masked upload; see `fedark.secagg.ServerRound.receive`."""
        if self._survivors is not None and party not in self._survivors:
            raise ProtocolError(
                f"The upload of {party} came after the survivors were declared.",
                safe="It was dropped.",
            )
        self._opened().receive(message, party)
        self._uploaded.add(party)
        if self._uploaded == self._survivors:
            self._end_uploading()  # as it was before this enclave was restarted

    def _end_uploading(self) -> None:
        current = self._opened()
        self._survivors = set(current.close())
        self._closed = True
        if current.needs_agreement:
            self._waiting = set(current.committee)

    def ask(self, *, endorsed: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Endorsement requests, or unmask requests, by member: whichever comes next. Ends the
        uploading.

        Args:
            endorsed: the endorsements are in.

        Raises:
            Refused: too few uploads; the round is over and revealed nothing.
            ProtocolError: survivors were declared before, and not all of their uploads are here
                again.
            FederationError: too few members have signed the survivors.
        """
        current = self._opened()
        if not self._closed:
            if self._survivors is not None:
                missing = ", ".join(sorted(self._survivors - self._uploaded))
                raise ProtocolError(
                    f"The uploads of {missing} were not brought again.",
                    safe="Nothing was unmasked.",
                )
            self._end_uploading()
        if current.needs_agreement and not endorsed:
            return dict.fromkeys(current.committee, current.endorsement_request()), {}
        if not current.enough_endorsements:
            raise self._too_few("signed its survivors")
        self._waiting = set(current.committee)
        return {}, current.unmask_requests()

    def endorse(self, message: bytes | memoryview, party: str) -> None:
        """Take one member's signature; see `fedark.secagg.ServerRound.endorse`."""
        self._declared().endorse(message, party)
        self._waiting.discard(party)

    def accept(self, message: bytes | memoryview, party: str) -> None:
        """Take one member's shares; see `fedark.secagg.ServerRound.accept`. The same bytes once
        more change nothing.
        """
        digest = hashlib.sha256(message).digest()
        if self._answers.get(party) == digest:
            return
        self._declared().accept(message, party)
        self._answers[party] = digest
        self._waiting.discard(party)

    @property
    def survivors(self) -> set[str]:
        """Whose uploads are in the sum of the open round."""
        return set(self._survivors or ())

    def finish(self) -> RoundSum:
        """The unmasked sum of the round; see `fedark.secagg.ServerRound.finish`.

        Raises:
            FederationError: too few members have answered.
        """
        current = self._opened()
        if not current.enough_answers:
            raise self._too_few("given the shares that unmask it")
        self._round, self._opening, self._survivors = None, None, None
        return current.finish()

    def split(self, total: RoundSum) -> dict[str, Vector]:
        """Weighted mean of the updates by model; the next round overwrites it."""
        mean, at = total.mean(buffer=self._mean), 0
        self._mean, found = mean, {}
        for terms in self._contract.models:
            found[terms.name] = mean[at : at + terms.travelling]
            at += terms.travelling
        return found

    def figures(self, total: RoundSum) -> list[dict[str, dict[str, list[int | float]]]]:
        """See `fedark.contract.protection.figures`."""
        return figures(self._contract, total)

    def _too_few(self, done: str) -> FederationError:
        topology = self._directory.topology if self._directory else None
        wanted = f"{topology.threshold} of {len(topology.committee)}" if topology else "enough"
        return FederationError(
            f"A masked round takes {wanted} committee members; these have not {done}:"
            f" {', '.join(sorted(self._waiting))}.",
            safe="Nothing was unmasked.",
            fix="Bring the missing customers back, then submit the job again.",
        )

    def _declared(self) -> ServerRound:
        if not self._closed:
            raise ProtocolError(
                "The survivors of this round are not declared.", safe="Nothing was unmasked."
            )
        return self._opened()

    def _opened(self) -> ServerRound:
        if self._round is None:
            raise ProtocolError("No masked round is open.", safe="Nothing was summed.")
        return self._round
