"""The client of the masked protocol, as it runs inside an attested trainer enclave: a state machine
without I/O.

    hello -> join -> { begin -> [upload] -> [endorse] -> [unmask] } for ever larger rounds

It keeps eight rules whatever the server says; they stand in docs/design/secure-aggregation.md, and
comments name them where they are kept. Secrets live in this object only. It cannot be copied or
pickled; `state` is for a checkpoint that the enclave seals to itself
(`fedark.enclave.checkpoint`). A client whose host rolls it back counts as one that colludes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from fedark.foundation.errors import InputError, ProtocolError, Refused
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.snapshot import Bytes32, Row, Snapshot
from fedark.secagg import schedule, shamir, wire
from fedark.secagg.cohort import SALT_BYTES, Cohort, request_limit
from fedark.secagg.directory import Directory, announce, check_cohort, check_round
from fedark.secagg.terms import Layout, SessionTerms
from fedark.secagg.vector import Contribution, Noise, mask

__all__ = ["Client", "ClientState", "Releases"]

_KEPT = "Nothing was revealed."
_NONCE = bytes(12)


@dataclass
class Releases:
    """What this enclave has given for each (layout, model). Shared by all sessions of one enclave.

    A round whose unmasking stalls is therefore not repeated with its model: the server asks the
    same members again, and those that have answered repeat their answer.

    Attributes:
        done: it has helped to unmask a sum.
        sessions: the identifier of the one session that it uploads in. The quorum argument holds
            within a session; the sums of two sessions have no honest uploader in common.
    """

    done: set[tuple[str, bytes]] = field(default_factory=set)
    sessions: dict[tuple[str, bytes], bytes] = field(default_factory=dict)

    def check(self, layout: str, model: bytes, sid: bytes) -> None:
        """Refuse an upload that could be subtracted from what was given before.

        Raises:
            Refused: a sum was released, or another session has an upload.
        """
        if (layout, model) in self.done:
            raise _second(
                "A sum for this model was released before; a second one could be subtracted"
                " from it."
            )
        if self.sessions.get((layout, model), sid) != sid:
            raise _second(
                "An upload for this model went to another session; a second sum could be subtracted"
                " from that one's."
            )

    def bind(self, layout: str, model: bytes, sid: bytes) -> None:
        """Upload in this session and in no other.

        Raises:
            Refused: as `check`.
        """
        self.check(layout, model, sid)
        self.sessions[layout, model] = sid


class RoundState(Snapshot):
    """A `_Round` in a checkpoint; see `Client` for what stands in it."""

    number: int
    layout: str
    ctx: Bytes32
    model: bytes
    participants: list[int]
    pairs: dict[int, bytes]
    uploaded: bool
    shares: bytes | None
    endorsed: bytes | None
    answered: bytes | None
    answer: bytes


class ClientState(Snapshot):
    """A `Client` in a checkpoint.

    Attributes:
        chains: partner -> its chain's key, and the first round that it still has.
        released: layout and model digest of every sum that was helped to unmask.
        sessions: layout, model digest, and the session that it uploaded in.
    """

    secret: Bytes32 | None
    public: Bytes32
    hello: bytes
    chains: dict[int, Annotated[tuple[Bytes32, int], Row]]
    last: int
    released: list[Annotated[tuple[str, bytes], Row]]
    sessions: list[Annotated[tuple[str, bytes, bytes], Row]]
    round: RoundState | None


@dataclass
class _Round:
    number: int
    layout: Layout
    ctx: bytes
    model_digest: bytes
    participants: Cohort
    pairs: dict[int, bytes]
    uploaded: bool = False
    own_shares: NDArray[np.uint8] | None = None
    endorsed: bytes | None = None
    answered: bytes | None = None
    answer: bytes = b""

    def state(self) -> RoundState:
        return RoundState(
            number=self.number,
            layout=self.layout.name,
            ctx=self.ctx,
            model=self.model_digest,
            participants=list(self.participants.members),
            pairs=self.pairs,
            uploaded=self.uploaded,
            shares=self.own_shares.tobytes() if self.own_shares is not None else None,
            endorsed=self.endorsed,
            answered=self.answered,
            answer=self.answer,
        )


class Client:
    """One party's side of one session."""

    def __init__(
        self,
        terms: SessionTerms,
        party: str,
        signing: SigningKey,
        releases: Releases | None = None,
        threads: int | None = None,
    ) -> None:
        """`signing`: the enclave's key that attestation binds. `threads`: for the masks; None: one
        for each core.
        """
        if party not in terms.roster:
            raise Refused(f"{party} is not on the roster.", safe="No key was made.")
        self._terms, self._party, self._signing, self._threads = terms, party, signing, threads
        self._releases = releases if releases is not None else Releases()
        self._secret: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._public = self._secret.public_key().public_bytes_raw()
        self._hello = announce(terms, party, self._public, os.urandom(32), signing)
        self._directory: Directory | None = None
        self._chains: dict[int, schedule.Chain] = {}
        self._me = -1
        self._last = 0
        self._round: _Round | None = None

    def hello(self) -> bytes:
        """The signed announcement of this session's key."""
        return self._hello

    def join(self, directory: Directory) -> None:
        """Agree a key with each partner in a directory that this client verified itself.

        Raises:
            Refused: the directory is for other terms, or does not hold this client's own key.
            ProtocolError: the session was joined already.
        """
        if self._secret is None:
            raise ProtocolError("This session was joined already.", safe=_KEPT)
        own = directory.index.get(self._party, -1)
        if directory.terms != self._terms or own < 0 or directory.keys[own] != self._public:
            raise Refused(
                "The directory does not hold this client's own key and terms.",
                safe="No key was agreed.",
            )
        roots = {
            i: schedule.pair_root(
                self._secret, directory.keys[i], directory.sid, self._party, directory.parties[i]
            )
            for i in directory.topology.partners(own)
        }
        self._directory, self._me = directory, own
        self._chains = {i: schedule.Chain(root) for i, root in roots.items()}
        self._secret = None

    def begin(self, request: bytes, model_digest: bytes) -> Layout:
        """Enter a round that the server proposes.

        Args:
            request: the server's message.
            model_digest: SHA-384 of the model that this client received, computed by its own
                enclave.

        Returns:
            The layout that an upload must fit.

        Raises:
            ProtocolError: malformed, or a round number that is not new.
            Refused: a cohort that is too small, or a model whose sum was released before, or that
                another session has an upload for.
        """
        directory = self._joined()
        frame = wire.parse(request, request_limit(directory))
        frame.split(0)
        values = wire.fields(
            frame.header, "round", {"round": int, "layout": str, "participants": list}
        )
        number, participants = (
            values["round"],
            wire.indices(values["participants"], len(directory.parties)),
        )
        # Rule 1: a round number is burned before a key of the round is derived.
        if number <= self._last:
            raise ProtocolError(
                f"Round {number} is not new: round {self._last} was begun.",
                safe="Nothing was uploaded.",
            )
        # Rule 6: enough participants. Rule 8: no model twice.
        check_round(directory, number, values["layout"], participants)
        layout = self._terms.by_name[values["layout"]]
        self._releases.check(layout.name, model_digest, directory.sid)
        self._last = number
        self._round = None
        # Rule 2: every key, mask and share of the round derives from ctx.
        ctx = schedule.context(directory.sid, number, layout.name, model_digest, participants)
        info = schedule.round_info(ctx)
        pairs = {i: chain.take(number, info) for i, chain in self._chains.items()}
        self._round = _Round(
            number, layout, ctx, model_digest, Cohort(directory, participants), pairs
        )
        return layout

    def upload(self, contribution: Contribution, noise: Noise | None = None) -> memoryview:
        """The masked vector of this round, with the sealed shares of its recovery secrets.

        Raises:
            InputError: the contribution does not fit the layout; the round still waits for one that
                does.
            ProtocolError: no round was begun, this client is no participant, or it uploaded
                already.
            Refused: the model's sum was released, or another session has an upload for it, since
                the round was begun.
        """
        directory, current = self._joined(), self._current()
        if self._me not in current.participants:
            raise ProtocolError(
                "This client is not a participant of the round.", safe="Nothing was uploaded."
            )
        # Rule 3: one upload a round.
        if current.uploaded or current.answered is not None:
            raise ProtocolError(
                "This client has uploaded to this round, or helped to close it.",
                safe="Nothing was uploaded.",
            )
        # Rule 8: for a model digest an enclave uploads in one session alone.
        self._releases.bind(current.layout.name, current.model_digest, directory.sid)
        current.uploaded = True

        others = current.participants.slots(self._me)
        secrets = self._secrets(current, others)
        # Rule 4: the self-mask stays in every round.
        streams = [(secrets[0], True)] + [
            (s, self._me < v) for s, v in zip(secrets[1:], others, strict=True)
        ]
        sealed = self._seal(directory, current, secrets)
        commitments = b"".join(
            schedule.commitment(current.ctx, self._me, i, secret)
            for i, secret in enumerate(secrets)
        )
        header = wire.unsigned(
            "upload", {"party": self._party, "ctx": current.ctx, "commitments": commitments}
        )
        cohort = len(current.participants)
        message, words = wire.build(header, sealed, current.layout.words(cohort))
        try:
            mask(
                words,
                current.layout,
                cohort,
                contribution,
                streams,
                noise=noise,
                threads=self._threads,
            )
        except InputError:
            current.uploaded = False  # nothing was made of it
            raise
        return message

    def endorse(self, request: bytes) -> bytes:
        """Sign the survivor set, once a round: what a member does before anybody reveals anything.

        Raises:
            ProtocolError: malformed, out of order, or not asked for by this topology.
            Refused: another set was signed, or the set is not admissible.
        """
        directory, current = self._joined(), self._current()
        frame = wire.parse(request, request_limit(directory))
        frame.split(0)
        values = wire.fields(frame.header, "survivors", {"ctx": 32, "survivors": list})
        digest, _ = self._survivors(directory, current, values["ctx"], values["survivors"])
        if not directory.topology.agreement:
            raise ProtocolError("This session has no agreement on survivors.", safe=_KEPT)
        # Rule 7: one survivor set is signed.
        if current.endorsed not in (None, digest):
            raise Refused("Another survivor set of this round was signed already.", safe=_KEPT)
        current.endorsed = digest
        header = wire.signed(
            "survivors", {"party": self._party, "ctx": current.ctx, "digest": digest}, self._signing
        )
        return wire.message(header)

    def unmask(self, request: bytes) -> bytes:
        """This member's shares for one survivor set.

        Raises:
            ProtocolError: malformed or out of order.
            Refused: another set was answered, the set is not admissible, or its endorsements do not
                suffice.
        """
        directory, current = self._joined(), self._current()
        frame = wire.parse(request, request_limit(directory))
        values = wire.fields(
            frame.header, "unmask", {"ctx": 32, "survivors": list, "endorsements": list}
        )
        digest, survivors = self._survivors(directory, current, values["ctx"], values["survivors"])
        # Rule 5: one survivor set is answered, and the same one always alike.
        if current.answered is not None:
            if current.answered != digest:
                raise Refused(
                    "Another survivor set of this round was answered already.", safe=_KEPT
                )
            return current.answer
        # Rule 7: shares leave only against t members' signatures on this set.
        if directory.topology.agreement:
            if current.endorsed not in (None, digest):
                raise Refused("Another survivor set of this round was signed already.", safe=_KEPT)
            _check_endorsements(directory, current.ctx, digest, values["endorsements"])
        elif values["endorsements"]:
            raise ProtocolError("This session has no agreement on survivors.", safe=_KEPT)
        senders = [u for u in survivors if u != self._me]
        sizes = [current.participants.blob_bytes(u) for u in senders]
        body, _ = frame.split(sum(sizes))

        # Rule 8: a sum is released once for a model. From here on the round is answered: what fails
        # below is not asked for again with another set.
        if (current.layout.name, current.model_digest) in self._releases.done:
            raise Refused("A sum for this model was released before.", safe=_KEPT)
        self._releases.done.add((current.layout.name, current.model_digest))
        current.answered = digest
        opened: dict[int, NDArray[np.uint8]] = {}
        if self._me in survivors and current.own_shares is not None:
            opened[self._me] = current.own_shares
        at = 0
        for sender, size in zip(senders, sizes, strict=True):
            shares = self._open(directory, current, sender, body[at : at + size])
            at += size
            if shares is not None:
                opened[sender] = shares
        # Rule 5: b_u of survivors, s_uv of survivors with those who are gone.
        gone = current.participants.without(survivors)
        shares_body = b"".join(
            opened[u][current.participants.released(u, gone)].tobytes()
            for u in survivors
            if u in opened
        )
        missing = [u for u in survivors if u not in opened]
        header = wire.unsigned(
            "shares",
            {"party": self._party, "ctx": current.ctx, "digest": digest, "missing": missing},
        )
        current.answer = wire.message(header, shares_body)
        current.pairs = {}
        current.own_shares = None
        return current.answer

    def _secrets(self, current: _Round, others: list[int]) -> list[bytes]:
        """The keys of this round's masks: b_u, fresh, then s_uv for each of `others`."""
        return [
            os.urandom(shamir.SECRET_BYTES),
            *(schedule.mask_seed(current.pairs[v]) for v in others),
        ]

    def _seal(self, directory: Directory, current: _Round, secrets: list[bytes]) -> bytes:
        committee = directory.topology.committee
        matrix = np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, shamir.SECRET_BYTES)
        shares = shamir.split(matrix, directory.topology.threshold, len(committee))
        salt = os.urandom(SALT_BYTES)
        info = schedule.seal_info(self._party, salt)
        sealed = []
        for position, member in enumerate(committee):
            if member == self._me:
                current.own_shares = shares[position].copy()
                continue
            key = schedule.seal_key(current.pairs[member], info)
            sealed.append(salt + AESGCM(key).encrypt(_NONCE, shares[position].tobytes(), None))
        return b"".join(sealed)

    def _open(
        self, directory: Directory, current: _Round, sender: int, blob: memoryview
    ) -> NDArray[np.uint8] | None:
        """The shares that `sender` sealed for this member, or None: altered, replayed, or not for
        this round.
        """
        info = schedule.seal_info(directory.parties[sender], bytes(blob[:SALT_BYTES]))
        key = schedule.seal_key(current.pairs[sender], info)
        try:
            plain = AESGCM(key).decrypt(_NONCE, bytes(blob[SALT_BYTES:]), None)
        except InvalidTag:
            return None
        return np.frombuffer(plain, np.uint8).reshape(-1, shamir.SHARE_BYTES)

    def _survivors(
        self, directory: Directory, current: _Round, ctx: bytes, listed: list[int]
    ) -> tuple[bytes, list[int]]:
        if self._me not in directory.topology.committee:
            raise ProtocolError("This client is not on the committee.", safe=_KEPT)
        if ctx != current.ctx:
            raise Refused(
                "The survivors are of a round that this client did not begin.", safe=_KEPT
            )
        survivors = wire.indices(listed, len(directory.parties))
        if any(u not in current.participants for u in survivors):
            raise Refused("A survivor is not a participant of the round.", safe=_KEPT)
        if self._me in survivors and not current.uploaded:
            raise Refused("The survivors name this client, which has uploaded nothing.", safe=_KEPT)
        # Rule 6: the minimum cohort, and enough neighbours for each.
        check_cohort(directory, survivors)
        return schedule.survivors_digest(ctx, survivors), survivors

    def _joined(self) -> Directory:
        if self._directory is None:
            raise ProtocolError("No session was joined.", safe=_KEPT)
        return self._directory

    def _current(self) -> _Round:
        if self._round is None:
            raise ProtocolError("No round was begun.", safe=_KEPT)
        return self._round

    def state(self) -> ClientState:
        """All that this client must not forget, secrets included."""
        current = self._round
        return ClientState(
            secret=self._secret.private_bytes_raw() if self._secret is not None else None,
            public=self._public,
            hello=self._hello,
            chains={i: chain.state() for i, chain in self._chains.items()},
            last=self._last,
            released=sorted(self._releases.done),
            sessions=[(*of, sid) for of, sid in sorted(self._releases.sessions.items())],
            round=current.state() if current is not None else None,
        )

    def restore(self, state: ClientState, directory: Directory | None) -> None:
        """Go on from `state`, of a client of the same terms, party and signing key.

        Args:
            directory: the one that was joined, verified again; None before joining.
        """
        secret = state.secret
        self._secret = X25519PrivateKey.from_private_bytes(secret) if secret is not None else None
        self._public, self._hello, self._last = state.public, state.hello, state.last
        # Added to what a sibling session has given meanwhile.
        self._releases.done |= set(state.released)
        self._releases.sessions |= {(layout, model): sid for layout, model, sid in state.sessions}
        self._directory, self._round = directory, None
        if directory is None:
            return
        self._me = directory.index[self._party]
        self._chains = {i: schedule.Chain(*kept) for i, kept in state.chains.items()}
        if (kept := state.round) is not None:
            shares = kept.shares
            self._round = _Round(
                number=kept.number,
                layout=self._terms.by_name[kept.layout],
                ctx=kept.ctx,
                model_digest=kept.model,
                participants=Cohort(directory, kept.participants),
                pairs=dict(kept.pairs),
                uploaded=kept.uploaded,
                own_shares=(
                    None
                    if shares is None
                    else np.frombuffer(shares, np.uint8).reshape(-1, shamir.SHARE_BYTES)
                ),
                endorsed=kept.endorsed,
                answered=kept.answered,
                answer=kept.answer,
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Client holds session secrets: it is neither copied nor stored")

    def __repr__(self) -> str:
        return f"Client(party={self._party!r}, round={self._last})"


def _second(what: str) -> Refused:
    return Refused(what, safe="Nothing was uploaded.", fix="Continue with the next model.")


def _check_endorsements(
    directory: Directory, ctx: bytes, digest: bytes, endorsements: list[object]
) -> None:
    signers = set()
    for item in endorsements:
        if not (
            isinstance(item, list)
            and len(item) == 2
            and type(item[0]) is int
            and type(item[1]) is bytes
        ):
            raise ProtocolError("An endorsement is malformed.", safe=_KEPT)
        member, signature = item
        if member not in directory.topology.committee or member in signers:
            raise Refused(
                "An endorsement is not of a committee member, or stands twice.", safe=_KEPT
            )
        party = directory.parties[member]
        payload = wire.unsigned("survivors", {"party": party, "ctx": ctx, "digest": digest})
        verify_signature(
            directory.signers[party], wire.label("survivors"), payload, signature, by=party
        )
        signers.add(member)
    if len(signers) < directory.topology.threshold:
        raise Refused(
            f"{len(signers)} of {directory.topology.threshold} needed members have signed this"
            " survivor set.",
            safe=_KEPT,
        )
