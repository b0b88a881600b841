"""The server's complete view of a run must not tell two inputs apart, as long as their sum is the
same.

Two worlds: in one the victim holds x and another client y, in the other the reverse; and whoever is
lost holds x or y. Everything that the server sees or derives in two rounds (every message of a
session whole, announcements and endorsements too, recovered seeds, every upload, the lost ones too,
with all masks taken off that were recovered, the sums) is turned into features; a threshold on each
feature and a trained linear classifier try to tell the worlds apart. Controls show that both notice
a missing mask, of a pair alone or of a lost client alone.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from fedark.secagg import Contribution, Lane, wire
from fedark.secagg import client as client_module
from fedark.secagg import server as server_module
from fedark.secagg.vector import apply_masks

ROUNDS = 240
SWAPPED, GONE = (3, 997), 11
"""Figures by which a contribution is known: of the two that are swapped, and of a lost client."""


LOST = (3, 2)
"""Whose upload comes too late, in each round of a session: one survives the round in which the
other is lost.
"""


def view(session, rounds):
    """Every byte that the server sees in a session whose `rounds` lose one client each, and all
    that it derives from them.
    """
    session.start()
    seen = [*session.hellos.values()]
    for inputs, lost in zip(rounds, LOST, strict=True):
        current = session.open(model=os.urandom(48))
        messages = session.upload(current, inputs, lost=[session.parties[lost]])
        current.close()
        replies = []
        for party in current.committee:
            replies.append(session.clients[party].endorse(current.endorsement_request()))
            current.endorse(replies[-1], party)
        for party, request in current.unmask_requests().items():
            replies.append(session.clients[party].unmask(request))
            current.accept(replies[-1], party)
        streams = recovered(current)
        keys = [key for found in streams.values() for key, _ in found]
        bare = [
            stripped(session, current, messages, index, found) for index, found in streams.items()
        ]
        seen += [*messages.values(), *replies, *keys, *bare, current.finish().words.tobytes()]
    return np.unpackbits(np.frombuffer(b"".join(bytes(piece) for piece in seen), np.uint8))


def recovered(current):
    """Client -> every stream of its upload that the server knows: what takes it off again."""
    streams = {index: [] for index in current._cohort.members}
    for owner, secrets in sorted(current._recover(current._survivors).items()):
        streams[owner].append((secrets[0], False))
        slots = current._cohort.slots(owner)
        for position, secret in zip(current._released[owner][1:], secrets[1:], strict=True):
            lost = slots[position - 1]
            streams[owner].append((secret, owner > lost))
            streams[lost].append((secret, lost > owner))
    return streams


def stripped(session, current, messages, index, streams):
    """An upload's words without the masks that the server knows."""
    frame = wire.parse(messages[session.parties[index]], 1 << 20)
    _, masked = frame.split(
        current._cohort.sealed_bytes(index), session.layout.words(len(current._cohort))
    )
    words = masked.copy()
    apply_masks(words, streams, 1)
    return words.tobytes()


def observe(session):
    """[rounds, features] and the world of each round: at random, each as often as the other in
    either half.
    """
    assert session.directory.topology.agreement
    rng = np.random.default_rng(7)
    worlds = np.concatenate([rng.permutation(np.arange(ROUNDS // 2) % 2) for _ in range(2)])
    ramp = np.linspace(-1, 1, session.length).astype(np.float32)
    rows = np.stack(
        [
            view(session, [inputs_of(session, ramp, world, lost) for lost in LOST])
            for world in worlds
        ]
    )
    return rows[:, rows.min(axis=0) < rows.max(axis=0)].astype(np.float32), worlds


def inputs_of(session, ramp, world, lost):
    """The contributions of one round in which the client `lost` is lost."""
    held = [(ramp, SWAPPED[0]), (-ramp, SWAPPED[1]), (session.vector(1), 5), (session.vector(2), 7)]
    held[:2] = held[:2] if world else held[1::-1]
    held[lost] = (ramp if world else -ramp, GONE)
    return {
        p: Contribution(v, 1, {"m": m}) for p, (v, m) in zip(session.parties, held, strict=True)
    }


def tells_apart(rows, worlds):
    """The strongest single feature in standard deviations, and the accuracy of a linear classifier
    on unseen rounds.
    """
    ones, zeros = rows[worlds == 1], rows[worlds == 0]
    spread = np.sqrt(0.25 / len(ones) + 0.25 / len(zeros))
    strongest = float(np.abs(ones.mean(axis=0) - zeros.mean(axis=0)).max() / spread)
    half = ROUNDS // 2
    train, signs = rows[:half] - 0.5, 2 * worlds[:half] - 1
    # Ridge regression in its dual form: the best linear rule that the first half supports.
    weights = train.T @ np.linalg.solve(train @ train.T + np.eye(half), signs)
    guesses = (rows[half:] - 0.5) @ weights > 0
    return strongest, float(np.mean(guesses == worlds[half:]))


def small(lab):
    return lab(
        size=4, minimum=3, length=24, value_range=2.0, agreement=True, metrics=(Lane("m", 1000),)
    )


def test_the_servers_view_does_not_tell_two_inputs_apart(lab):
    """By Hoeffding's inequality either bound fails by chance less than once in 4 * 10^6 runs."""
    rows, worlds = observe(small(lab))
    assert rows.shape[1] > 60_000, "most bits of the messages"
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest < np.sqrt(2 * np.log(2 * rows.shape[1] * 4e6))
    assert abs(accuracy - 0.5) < np.sqrt(np.log(2 * 4e6) / ROUNDS)


WEAKER = {
    "the self-mask alone": lambda figure, streams: streams[:1],
    "no mask": lambda figure, streams: [],
    "all but the mask of the pair": lambda figure, streams: (
        [streams[0], *streams[2:]] if figure in SWAPPED else streams
    ),
    "all but the self-mask of the lost": lambda figure, streams: (
        streams[1:] if figure == GONE else streams
    ),
}
"""What a client masks with: by its figure, of its self-mask and then the masks that it has with
each neighbour, in order.
"""


@pytest.mark.parametrize("kept", WEAKER)
def test_control_a_missing_mask_tells_the_inputs_apart(lab, monkeypatch, kept):
    genuine = client_module.mask

    def weaker(words, layout, cohort, contribution, streams, **more):
        genuine(
            words,
            layout,
            cohort,
            contribution,
            WEAKER[kept](contribution.metrics["m"], streams),
            **more,
        )

    monkeypatch.setattr(client_module, "mask", weaker)
    monkeypatch.setattr(server_module.RoundSum, "check", lambda self: None)
    session = small(lab)
    first, second = (
        session.directory.topology.neighbours(0),
        session.directory.topology.neighbours(1),
    )
    assert (first[0], second[0]) == (1, 0), "each other's first neighbours"
    rows, worlds = observe(session)
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest > 10
    assert accuracy > 0.95
