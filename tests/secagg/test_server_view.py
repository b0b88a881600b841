"""The server's complete view of a run must not tell two inputs apart, as long as their sum is the same.

Two worlds: in one the victim holds x and another client y, in the other the reverse. Everything that the server sees or derives
(every message of a session whole, announcements and endorsements too, recovered seeds, uploads with the recovered self-masks
taken off, the sum) is turned into features; a threshold on each
feature and a trained linear classifier try to tell the worlds apart. Controls show that both notice a missing mask.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from fedark.secagg import Contribution, Metric, wire
from fedark.secagg import client as client_module
from fedark.secagg import server as server_module
from fedark.secagg.vector import apply_masks

ROUNDS = 240


def view(session, inputs):
    """Every byte that the server sees in a session of one round with one client lost, and what it derives from them."""
    session.start()
    current = session.open(model=os.urandom(48))
    messages = session.upload(current, inputs, lost=[session.parties[3]])
    current.close()
    replies = []
    for party in current.committee:
        replies.append(session.clients[party].endorse(current.endorsement_request()))
        current.endorse(replies[-1], party)
    for party, request in current.unmask_requests().items():
        replies.append(session.clients[party].unmask(request))
        current.accept(replies[-1], party)

    result = current.finish()
    captured, bare = result.packed._streams, []
    for index, party in enumerate(session.parties[:3]):
        frame = wire.parse(messages[party], 1 << 20)
        _, masked = frame.split(current._cohort.sealed_bytes(index), session.layout.words(len(session.parties)))
        bare.append(masked.copy())
        apply_masks(bare[-1], [captured[::2][index]], 1)
    seen = [*session.hellos.values(), *messages.values(), *replies]
    derived = [*(words.tobytes() for words in bare), *(key for key, _ in captured), result.words.tobytes()]
    return np.unpackbits(np.frombuffer(b"".join([*seen, *derived]), np.uint8))


def observe(session):
    """[rounds, features] and the world of each round: at random, each as often as the other in either half."""
    assert session.directory.topology.agreement
    rng = np.random.default_rng(7)
    worlds = np.concatenate([rng.permutation(np.arange(ROUNDS // 2) % 2) for _ in range(2)])
    ramp = np.linspace(-1, 1, session.length).astype(np.float32)
    rows = []
    for world in worlds:
        held = [(ramp, 3), (-ramp, 997), (session.vector(1), 5), (session.vector(2), 7)]
        held[:2] = held[:2] if world else held[1::-1]
        inputs = {p: Contribution(v, 1, {"m": m}) for p, (v, m) in zip(session.parties, held, strict=True)}
        rows.append(view(session, inputs))
    rows = np.stack(rows)
    return rows[:, rows.min(axis=0) < rows.max(axis=0)].astype(np.float32), worlds


def tells_apart(rows, worlds):
    """The strongest single feature in standard deviations, and the accuracy of a linear classifier on unseen rounds."""
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
    return lab(size=4, minimum=3, length=24, value_range=2.0, agreement=True, metrics=(Metric("m", 1000),))


def test_the_servers_view_does_not_tell_two_inputs_apart(lab):
    """By Hoeffding's inequality either bound fails by chance less than once in 4 * 10^6 runs."""
    rows, worlds = observe(small(lab))
    assert rows.shape[1] > 30_000, "most bits of the messages"
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest < np.sqrt(2 * np.log(2 * rows.shape[1] * 4e6))
    assert abs(accuracy - 0.5) < np.sqrt(np.log(2 * 4e6) / ROUNDS)


@pytest.mark.parametrize("kept", ["self-mask alone", "no mask"])
def test_control_a_missing_mask_tells_the_inputs_apart(lab, monkeypatch, kept):
    genuine = client_module.mask
    count = 1 if kept == "self-mask alone" else 0

    def weaker(words, layout, cohort, contribution, streams, **more):
        genuine(words, layout, cohort, contribution, streams[:count], **more)

    monkeypatch.setattr(client_module, "mask", weaker)
    monkeypatch.setattr(server_module.RoundSum, "check", lambda self: None)
    rows, worlds = observe(small(lab))
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest > 10
    assert accuracy > 0.95
