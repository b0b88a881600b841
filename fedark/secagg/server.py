"""The server of the masked protocol: collects, asks the committee, and unmasks one sum. A state
machine without I/O.

It is trusted with nothing: whatever it does differently, `Client` refuses. What it checks itself
only keeps honest servers from wasting a round: lengths, one upload a party, late uploads,
commitments of recovered secrets. Who sent a message is for the caller to know: uploads and shares
carry no signature of their own, because in a run each comes in a `ProtectedUpdate`
(`fedark.enclave.protection`), which its enclave has signed as a whole, vector included. What other
clients must believe, keys and endorsements, is signed here.

    open -> receive* -> close -> [endorsement request -> endorse*] -> unmask requests -> accept* ->
    finish

Uploads are added to a running sum in batches of up to 256 MiB, each read once, block by block.
After `close` the survivor set stands. Recovery combines all secrets of the round in one matrix
product; a member whose share is off the secret that its owner committed to is found, left out, and
named. An owner is named if so many members agree against its commitments that it must be its own
doing; else nobody is, and a further answer can still save the round. Two trips a round (Bonawitz et
al. 2017 needs four), a third where the topology asks for agreement.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import ProtocolError, Refused
from fedark.secagg import schedule, shamir, wire
from fedark.secagg.cohort import Cohort, reply_limit, upload_limit
from fedark.secagg.directory import Directory, check_cohort, check_round
from fedark.secagg.vector import (
    AGAIN,
    MOST_STREAMS,
    MaskedSum,
    RoundSum,
    Stream,
    Words,
    apply_masks,
)

__all__ = ["ServerRound", "Server"]

_DROPPED = "The message was dropped; the round goes on without it."
_SUBSETS = 200
_PENDING_BYTES = 1 << 28
Shares = NDArray[np.uint8]


class Server:
    """The server's side of one session."""

    def __init__(self, directory: Directory, threads: int | None = None) -> None:
        self._directory, self._threads = directory, threads
        self._last = 0

    def open(
        self, number: int, layout: str, participants: list[str], model_digest: bytes
    ) -> ServerRound:
        """Begin a round.

        Args:
            number: larger than every earlier one.
            participants: parties of the directory.
            model_digest: SHA-384 of the model that every participant was sent.

        Raises:
            ProtocolError, Refused: every client would refuse it.
        """
        if number <= self._last:
            raise ProtocolError(
                f"Round {number} is not new.", fix="Every attempt takes a new round number."
            )
        strangers = set(participants) - set(self._directory.parties)
        if strangers:
            raise ProtocolError(
                f"{len(strangers)} participants are not in the session's directory."
            )
        members = sorted(self._directory.index[party] for party in set(participants))
        check_round(self._directory, number, layout, members)
        self._last = number
        return ServerRound(self._directory, number, layout, members, model_digest, self._threads)


@dataclass
class _Upload:
    commitments: bytes
    sealed: bytes


class ServerRound:
    """One round at the server.

    Attributes:
        request: the message for every committee member and participant.
        faults: party -> what was wrong with its shares: a member's, which an owner that deals badly
            can cause too, or an owner's.
    """

    def __init__(
        self,
        directory: Directory,
        number: int,
        layout: str,
        members: list[int],
        model_digest: bytes,
        threads: int | None,
    ) -> None:
        self._directory, self._layout, self._threads = (
            directory,
            directory.terms.by_name[layout],
            threads,
        )
        self._cohort = Cohort(directory, members)
        self._ctx = schedule.context(directory.sid, number, layout, model_digest, members)
        self._total: Words | None = None
        self._pending: list[Words] = []
        self._uploads: dict[int, _Upload] = {}
        self._survivors: list[int] | None = None
        self._digest = b""
        self._endorsements: dict[int, bytes] = {}
        self._answers: dict[int, dict[int, Shares]] = {}  # member -> owner -> its shares
        self._finished = False
        self.faults: dict[str, str] = {}
        self.request = wire.message(
            wire.unsigned("round", {"round": number, "layout": layout, "participants": members})
        )

    def receive(self, message: bytes | bytearray | memoryview, sender: str) -> None:
        """Take one upload from `sender`, as the caller has authenticated it. The message must not
        change until the sum is read.

        Raises:
            ProtocolError, Refused: malformed, late, repeated, from a stranger or another round; the
            round goes on without it.
        """
        directory, cohort = self._directory, self._cohort
        if self._survivors is not None:
            raise ProtocolError(
                f"The upload of {sender} came after the survivors were declared.", safe=_DROPPED
            )
        frame = wire.parse(message, upload_limit(directory, self._layout, len(cohort)))
        values = self._sent(frame.header, "upload", {"ctx": 32, "commitments": bytes}, sender)
        index = directory.index[sender]
        if index not in cohort or index in self._uploads:
            raise ProtocolError(
                f"{sender} is not a participant, or has uploaded already.", safe=_DROPPED
            )
        if values["ctx"] != self._ctx:
            raise Refused(
                f"The upload of {sender} is for another round, model or cohort.", safe=_DROPPED
            )
        if len(values["commitments"]) != 32 * cohort.secrets(index):
            raise ProtocolError(
                f"The upload of {sender} has a wrong number of commitments.", safe=_DROPPED
            )
        body, words = frame.split(cohort.sealed_bytes(index), self._layout.words(len(cohort)))
        self._uploads[index] = _Upload(values["commitments"], bytes(body))
        self._pending.append(words)
        if len(self._pending) * words.nbytes > _PENDING_BYTES:
            self._fold([])

    def close(self) -> tuple[str, ...]:
        """Declare the survivors: everybody whose upload was received.

        Raises:
            ProtocolError: closed already.
            Refused: too few; the round is over and revealed nothing.
        """
        if self._survivors is not None:
            raise ProtocolError("The survivors of this round stand.")
        survivors = sorted(self._uploads)
        self._survivors = survivors
        check_cohort(self._directory, survivors)
        self._digest = schedule.survivors_digest(self._ctx, survivors)
        return self._directory.names(survivors)

    @property
    def needs_agreement(self) -> bool:
        """Whether members must endorse the survivors first."""
        return self._directory.topology.agreement

    @property
    def committee(self) -> tuple[str, ...]:
        """The parties that unmask."""
        return self._directory.names(self._directory.topology.committee)

    @property
    def enough_endorsements(self) -> bool:
        """Whether unmask requests can be sent."""
        return (
            not self.needs_agreement
            or len(self._endorsements) >= self._directory.topology.threshold
        )

    @property
    def enough_answers(self) -> bool:
        """Whether enough members have answered to try `finish`."""
        return len(self._answers) >= self._directory.topology.threshold

    def endorsement_request(self) -> bytes:
        """For every member: sign these survivors."""
        values = {"ctx": self._ctx, "survivors": self._closed()}
        return wire.message(wire.unsigned("survivors", values))

    def endorse(self, message: bytes | memoryview, sender: str) -> None:
        """Take one member's signature.

        Raises:
            ProtocolError, Refused: malformed, wrong, for another set, or not from a member.
        """
        self._closed()
        frame = wire.parse(message, reply_limit(self._directory))
        frame.split(0)
        values = wire.verified(
            frame.header, "survivors", {"ctx": 32, "digest": 32}, self._directory.signers, sender
        )
        member = self._member(sender, values["ctx"], values["digest"])
        self._endorsements[member] = wire.signature_of(frame.header)

    def unmask_requests(self) -> dict[str, bytes]:
        """One message for each member: the survivors, their endorsements, and what they sealed for
        it.

        Raises:
            ProtocolError: not closed, or too few endorsements.
        """
        survivors, committee = self._closed(), self._directory.topology.committee
        if not self.enough_endorsements:
            raise ProtocolError(
                "Too few members have signed the survivors.", safe="Nothing was revealed."
            )
        endorsements = [
            [member, signature] for member, signature in sorted(self._endorsements.items())
        ]
        header = wire.unsigned(
            "unmask", {"ctx": self._ctx, "survivors": survivors, "endorsements": endorsements}
        )
        pieces: dict[int, list[memoryview]] = {member: [] for member in committee}
        for sender in survivors:
            sealed, size = memoryview(self._uploads[sender].sealed), self._cohort.blob_bytes(sender)
            receivers = (member for member in committee if member != sender)
            for at, member in enumerate(receivers):
                pieces[member].append(sealed[at * size : (at + 1) * size])
        names = self._directory.parties
        return {names[member]: wire.message(header, *parts) for member, parts in pieces.items()}

    def accept(self, message: bytes | memoryview, sender: str) -> None:
        """Take one member's shares from `sender`, as the caller has authenticated it.

        Raises:
            ProtocolError, Refused: malformed, wrong, for another set, repeated, or not from a
            member.
        """
        survivors = self._closed()
        frame = wire.parse(message, reply_limit(self._directory))
        values = self._sent(
            frame.header, "shares", {"ctx": 32, "digest": 32, "missing": list}, sender
        )
        member = self._member(sender, values["ctx"], values["digest"])
        if member in self._answers:
            raise ProtocolError(f"{sender} has answered already.", safe=_DROPPED)
        missing = set(wire.indices(values["missing"], len(self._directory.parties)))
        rows = [(u, len(self._released[u])) for u in survivors if u not in missing]
        body, _ = frame.split(sum(count for _, count in rows) * shamir.SHARE_BYTES)
        shares = np.frombuffer(body, np.uint8).reshape(-1, shamir.SHARE_BYTES)
        answer, at = dict[int, Shares](), 0
        for u, count in rows:
            answer[u] = shares[at : at + count]
            at += count
        self._answers[member] = answer

    def finish(self) -> RoundSum:
        """Recover the round's secrets and unmask the sum. Once; but where answers do not suffice,
        again after a further one.

        Raises:
            ProtocolError: too few answers, or finished already.
            Refused: a secret cannot be recovered and nothing was unmasked, or the sum is
                impossible.
        """
        survivors = self._closed()
        if self._finished or not self.enough_answers:
            raise ProtocolError(
                "The round is finished, or too few members have answered.",
                safe="Nothing was unmasked.",
            )
        recovered = self._recover(survivors)
        self._finished = True
        streams: list[Stream] = []
        for u, secrets in recovered.items():
            streams.append((secrets[0], False))
            slots = self._cohort.slots(u) if secrets[1:] else []
            for slot, secret in zip(self._released[u][1:], secrets[1:], strict=True):
                streams.append((secret, u > slots[slot - 1]))
        if len(streams) > MOST_STREAMS:  # opened in batches
            self._fold(streams)
            streams = []
        packed, self._pending = (
            MaskedSum([*([] if self._total is None else [self._total]), *self._pending], streams),
            [],
        )
        result = RoundSum(self._layout, self._directory.names(survivors), len(self._cohort), packed)
        result.check()
        return result

    def _fold(self, streams: list[Stream]) -> None:
        if self._total is None:
            self._total = np.zeros(self._layout.words(len(self._cohort)), np.uint64)
        apply_masks(self._total, streams, self._threads, self._pending)
        self._pending = []

    def _recover(self, survivors: list[int]) -> dict[int, list[bytes]]:
        """Every survivor's released secrets, checked against its commitments."""
        need = self._directory.topology.threshold
        bad: set[int] = set()
        recovered: dict[int, list[bytes]] = {}
        while len(recovered) < len(survivors):
            groups: dict[tuple[int, ...], list[int]] = {}
            for u in (u for u in survivors if u not in recovered):
                able = self._able(u, bad)
                if len(able) < need:
                    raise Refused(
                        f"Fewer than {need} members hold good shares of"
                        f" {self._directory.parties[u]}.",
                        safe="Nothing was unmasked.",
                        fix=f"One more member's answer may save the round. Else: {AGAIN}",
                    )
                groups.setdefault(tuple(able[:need]), []).append(u)
            failed = []
            for members, owners in groups.items():
                found, wrong = self._combine(members, owners)
                recovered |= found
                failed += wrong
            if failed:
                bad |= self._blame(failed[0], bad)
        return recovered

    def _combine(
        self, members: tuple[int, ...], owners: list[int]
    ) -> tuple[dict[int, list[bytes]], list[int]]:
        """The secrets of `owners` that agree with their commitments; owners whose do not."""
        stacked = np.stack([np.concatenate([self._answers[m][u] for u in owners]) for m in members])
        secrets = [bytes(row) for row in shamir.combine(self._points(members), stacked)]
        found: dict[int, list[bytes]] = {}
        wrong = []
        at = 0
        for u in owners:
            positions = self._released[u]
            mine = secrets[at : at + len(positions)]
            at += len(positions)
            commitments = self._uploads[u].commitments
            good = all(
                schedule.commitment(self._ctx, u, slot, secret)
                == commitments[32 * slot : 32 * slot + 32]
                for slot, secret in zip(positions, mine, strict=True)
            )
            if good:
                found[u] = mine
            else:
                wrong.append(u)
        return found, wrong

    def _able(self, owner: int, bad: set[int]) -> list[int]:
        """The members not in `bad` that have given shares of `owner`."""
        return [m for m, answer in self._answers.items() if owner in answer and m not in bad]

    def _blame(self, owner: int, bad: set[int]) -> set[int]:
        """The members whose shares of `owner` are off the polynomial that meets the commitments.

        Raises:
            Refused: none was found that does.
        """
        topology, party = self._directory.topology, self._directory.parties[owner]
        able = self._able(owner, bad)
        # Among so many are as many honest members as make a polynomial, whoever lies: theirs is the
        # one that the owner dealt.
        most = min(
            self._directory.terms.colluders, 2 * topology.threshold - len(topology.committee) - 1
        )
        proof = topology.threshold + max(1, most)
        guilty = False
        for subset in itertools.islice(_subsets(able, topology.threshold), _SUBSETS):
            found, _ = self._combine(subset, [owner])
            if not found and (guilty or len(able) < proof):
                continue
            others = [m for m in able if m not in subset]
            agree = self._agreeing(subset, others, owner)
            if found:
                liars = {m for m, same in zip(others, agree, strict=True) if not same}
                self.faults |= {self._directory.parties[m]: "a wrong share" for m in liars}
                return liars
            guilty = len(subset) + sum(agree) >= proof
        if not guilty:
            raise Refused(
                f"{len(able)} answers do not recover the secrets of {party}; whether it or a member"
                " is at fault is not known.",
                safe="Nothing was unmasked.",
                fix=f"One more member's answer may save the round. Else: {AGAIN}",
            )
        self._finished = True
        self.faults[party] = "shares that do not recover what it committed to"
        raise Refused(
            f"The secrets of {party} cannot be recovered: it dealt other ones than it"
            " committed to.",
            safe="Nothing was unmasked.",
            fix=f"Leave out the party that `faults` names. {AGAIN}",
        )

    def _agreeing(self, subset: Sequence[int], others: Sequence[int], owner: int) -> list[bool]:
        """Whether the shares of `owner` that each of `others` gave lie on the polynomial of those
        that `subset` gave.
        """
        if not others:
            return []
        shares, theirs = (
            np.stack([self._answers[m][owner] for m in members]) for members in (subset, others)
        )
        same: list[bool] = shamir.agreeing(
            self._points(subset), shares, self._points(others), theirs
        ).tolist()
        return same

    def _points(self, members: Sequence[int]) -> list[int]:
        """Where the shares of committee members are on the polynomials."""
        return [self._directory.topology.committee.index(m) + 1 for m in members]

    def _sent(
        self, header: bytes, kind: str, shape: dict[str, type | int], sender: str
    ) -> dict[str, Any]:
        values = wire.fields(header, kind, {"party": str, **shape})
        if values["party"] != sender or sender not in self._directory.index:
            raise ProtocolError(f"A {kind!r} message is from a stranger.", safe=_DROPPED)
        return values

    def _member(self, sender: str, ctx: bytes, digest: bytes) -> int:
        member = self._directory.index[sender]
        if member not in self._directory.topology.committee:
            raise ProtocolError(f"{sender} is not on the committee.", safe=_DROPPED)
        if ctx != self._ctx or digest != self._digest:
            raise Refused(
                f"The message of {sender} is for another round or another survivor set.",
                safe=_DROPPED,
            )
        return member

    @cached_property
    def _released(self) -> dict[int, list[int]]:
        """For every survivor the positions of the secrets that members release."""
        survivors = self._closed()
        gone = self._cohort.without(survivors)
        return {u: self._cohort.released(u, gone) for u in survivors}

    def _closed(self) -> list[int]:
        if self._survivors is None or not self._digest:
            raise ProtocolError(
                "The survivors of this round are not declared.", safe="Nothing was revealed."
            )
        return self._survivors


def _subsets(members: list[int], size: int) -> itertools.chain[tuple[int, ...]]:
    """Subsets of `size`, first those that leave out few neighbours in the list: one or two liars
    are found quickly.
    """
    spare = len(members) - size
    near = (
        tuple(m for at, m in enumerate(members) if at not in out)[:size]
        for width in (1, 2)
        if width <= spare
        for out in itertools.combinations(range(len(members)), width)
    )
    return itertools.chain(near, itertools.combinations(members, size))
