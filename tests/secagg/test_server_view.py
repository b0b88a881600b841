"""The server's complete view of a run must not tell two inputs apart, as long as their sum is the same.

Two worlds: in one the victim holds x and another client y, in the other the reverse. Everything that the server sees or derives
(uploads, replies, recovered seeds, uploads with the recovered self-masks taken off) is turned into features; a threshold on each
feature and a trained linear classifier try to tell the worlds apart. Controls show that both notice a missing mask.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedark.secagg import Contribution, wire
from fedark.secagg import client as client_module
from fedark.secagg import server as server_module
from fedark.secagg.vector import apply_masks

ROUNDS = 240


def view(session, inputs):
    """Every byte that the server sees in one round with one client lost, and the uploads without their recovered self-masks."""
    current = session.open()
    messages = session.upload(current, inputs, lost=[session.parties[3]])
    replies, captured = [], []

    def capture(total, streams, threads=None, uploads=()):
        captured.extend(streams)
        apply_masks(total, streams, threads, uploads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "apply_masks", capture)
        session.unmask(current, tamper=lambda party, reply: replies.append(reply) or reply)
    self_masks = captured[::2]
    words = []
    for index, party in enumerate(session.parties):
        frame = wire.parse(messages[party], 1 << 20)
        _, masked = frame.split(current._cohort.sealed_bytes(index), session.layout.words(len(session.parties)))
        words.append(masked.copy())
        if index < 3:
            bare = masked.copy()
            apply_masks(bare, [self_masks[index]], 1)
            words.append(bare)
    shares = b"".join(wire.parse(reply, 1 << 20).tail.tobytes() for reply in replies)
    sealed = b"".join(wire.parse(messages[p], 1 << 20).tail.tobytes()[:200] for p in session.parties)
    everything = np.concatenate(words).tobytes() + shares + sealed + b"".join(key for key, _ in captured)
    return np.unpackbits(np.frombuffer(everything, np.uint8)).astype(np.float32)


def observe(session):
    """[rounds, features] and the world of each round, at random."""
    rng = np.random.default_rng(7)
    worlds = rng.integers(0, 2, ROUNDS)
    ramp = np.linspace(-1, 1, session.length).astype(np.float32)
    rows = []
    for world in worlds:
        first, second = (ramp, -ramp) if world else (-ramp, ramp)
        held = [first, second, session.vector(1), session.vector(2)]
        rows.append(view(session, {p: Contribution(v) for p, v in zip(session.parties, held, strict=True)}))
    return np.stack(rows), worlds


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


def test_the_servers_view_does_not_tell_two_inputs_apart(lab):
    rows, worlds = observe(lab(size=4, minimum=3, length=24, value_range=2.0))
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest < 5.7, "about 10^4 features: beyond this one in a thousand runs"
    assert abs(accuracy - 0.5) < 4.5 * 0.5 / np.sqrt(ROUNDS // 2)


@pytest.mark.parametrize("kept", ["self-mask alone", "no mask"])
def test_control_a_missing_mask_tells_the_inputs_apart(lab, monkeypatch, kept):
    genuine = client_module.mask
    count = 1 if kept == "self-mask alone" else 0

    def weaker(words, layout, cohort, contribution, streams, **more):
        genuine(words, layout, cohort, contribution, streams[:count], **more)

    monkeypatch.setattr(client_module, "mask", weaker)
    monkeypatch.setattr(server_module.RoundSum, "check", lambda self: None)
    rows, worlds = observe(lab(size=4, minimum=3, length=24, value_range=2.0))
    strongest, accuracy = tells_apart(rows, worlds)
    assert strongest > 10
    assert accuracy > 0.95
