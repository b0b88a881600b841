"""The benchmark measures what it says: both sides compute the mean, and every row can be made."""

from __future__ import annotations

import numpy as np
import pytest

from fedark.bench import secagg as bench
from fedark.bench.secagg_flower import FlowerSession, available

needs_flower = pytest.mark.skipif(not available(), reason="Flower's SecAgg+ is not installed")


@needs_flower
@pytest.mark.parametrize("dropped", [0, 1])
def test_the_peer_is_called_so_that_it_computes_the_mean(dropped):
    vector = np.random.default_rng(1).normal(0, 0.5, 200).astype(np.float32)
    peer = FlowerSession(5, vector)
    peer.round(dropped)
    alive = list(range(1, 6 - dropped))
    dead = list(range(6 - dropped, 6))
    uploads = [peer.upload(state) for state in peer.states[: len(alive)]]
    mean = peer.unmask(uploads, peer.shares(alive, dead), alive, dead)
    assert np.abs(mean[0] - vector).max() < 0.01


def test_our_side_computes_the_mean_and_says_so_itself(monkeypatch):
    session = bench.MaskedSession(5, 300)
    timed = session.round(bench._vector(300), 1)
    assert timed.client > 0
    assert timed.server > 0
    monkeypatch.setattr(bench.np, "abs", lambda value: np.full(1, 1e9))
    with pytest.raises(AssertionError, match="wrong"):
        session.round(bench._vector(300), 0)


@needs_flower
def test_every_row_of_the_benchmark_can_be_made(monkeypatch):
    monkeypatch.setattr(bench, "CASES", ((4, 3000, 1, 1, 1, 1, 9.0),))
    monkeypatch.setattr(bench, "COHORTS", (5,))
    rows = list(bench.rows())
    assert len({row.case for row in rows}) == len(rows)
    assert all(row.ours > 0 for row in rows if "reply" not in row.case)
    assert [row.goal for row in rows if "upload" in row.case and row.goal.startswith("<=")] == [
        "<= 9.0"
    ]


def test_without_flower_its_rows_have_no_peer_and_no_verdict(monkeypatch):
    monkeypatch.setattr(bench, "available", lambda: False)
    rows = list(bench._against_flower(4, 1000, 1, 1, 1, 1, 9.0))
    assert [(row.peer, row.ok) for row in rows[:4]] == [(None, None)] * 4
