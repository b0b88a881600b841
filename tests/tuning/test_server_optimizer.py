"""The server's step against the formulas written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedark.contract.contract import ServerTerms
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.tuning.server_optimizer import OptimizerState, server_optimizer

RNG = np.random.default_rng(0)


def vector(size: int = 5) -> np.ndarray:
    return RNG.normal(size=size).astype(np.float32)


def test_fedavg_at_rate_one_gives_the_average() -> None:
    current, average = vector(), vector()
    assert np.array_equal(server_optimizer(ServerTerms(), 5).step(current, average), average)


def test_fedavg_scales_the_step() -> None:
    current, average = vector(), vector()
    got = server_optimizer(ServerTerms(learning_rate=0.5), 5).step(current, average)
    np.testing.assert_allclose(got, (current.astype(float) + average) / 2, rtol=1e-6)


def test_fedadam_follows_the_paper_over_several_rounds() -> None:
    terms = ServerTerms(optimizer="fedadam", learning_rate=0.1, beta1=0.8, beta2=0.9, tau=0.01)
    optimizer = server_optimizer(terms, 3)
    current = vector(3)
    expected, m, v = [float(x) for x in current], [0.0] * 3, [0.01**2] * 3
    for _ in range(4):
        average = vector(3)
        for i in range(3):
            delta = float(average[i]) - float(np.float32(expected[i]))
            m[i] = 0.8 * m[i] + 0.2 * delta
            v[i] = 0.9 * v[i] + 0.1 * delta**2
            expected[i] = float(np.float32(expected[i])) + 0.1 * m[i] / (math.sqrt(v[i]) + 0.01)
        current = optimizer.step(current, average)
        assert current.dtype == np.float32
        np.testing.assert_allclose(current, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_stored_state_continues_bit_for_bit(name: str) -> None:
    terms = ServerTerms(optimizer=name, learning_rate=0.3)
    straight = server_optimizer(terms, 5)
    start, first, second = vector(), vector(), vector()
    middle = straight.step(start, first)
    resumed = server_optimizer(terms, 5)
    resumed.restore(OptimizerState.decode(straight.state().encode()))
    assert np.array_equal(resumed.step(middle, second), straight.step(middle, second))


@pytest.mark.parametrize(
    "change",
    [
        {"moments": None},
        {"moments": {"m": b"", "v": bytes(40)}},
        {"moments": {"m": bytes(40), "v": bytes(39)}},
        {"size": 4},
        {"moments": {"m": bytes(40), "v": b"\xff" * 40}},
        {"more": 1},
    ],
)
def test_a_foreign_or_impossible_state_is_refused(change: dict[str, object]) -> None:
    optimizer = server_optimizer(ServerTerms(optimizer="fedadam"), 5)
    state = canonical.encode(optimizer.state().model_dump() | change)
    with pytest.raises(ProtocolError):
        optimizer.restore(OptimizerState.decode(state))


def test_the_state_of_one_optimiser_is_nothing_to_the_other() -> None:
    adam, avg = (server_optimizer(ServerTerms(optimizer=name), 5) for name in ("fedadam", "fedavg"))
    for one, other in ((adam, avg), (avg, adam)):
        with pytest.raises(ProtocolError):
            one.restore(other.state())


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_vector_of_wrong_length_or_with_a_nan_changes_nothing(name: str) -> None:
    optimizer = server_optimizer(ServerTerms(optimizer=name), 5)
    before = optimizer.state()
    for bad in (vector(4), np.full(5, np.nan, np.float32), np.full(5, np.inf, np.float32)):
        with pytest.raises(ProtocolError):
            optimizer.step(vector(), bad)
    assert optimizer.state() == before


def test_a_step_out_of_float32_is_an_error_and_not_an_infinity() -> None:
    with pytest.raises(ProtocolError):
        server_optimizer(ServerTerms(learning_rate=1e9), 5).step(
            vector(), np.full(5, 3e38, np.float32)
        )
