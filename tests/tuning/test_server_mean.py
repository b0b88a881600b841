"""Averages of the updates of a round that a few harmful customers move less."""

from __future__ import annotations

import numpy as np
import pytest

from fedark.contract.contract import ServerTerms
from fedark.tuning.server_mean import mean_of

HONEST = [np.random.default_rng(seed).normal(1, 0.1, 50).astype(np.float32) for seed in range(7)]


def far(mean: np.ndarray) -> float:
    return float(np.abs(mean - np.mean(HONEST, axis=0)).max())


def test_the_weighted_mean_is_by_records() -> None:
    mean = mean_of(ServerTerms(), [1, 3], [np.zeros(2, np.float32), np.ones(2, np.float32)])
    assert mean.tolist() == [0.75, 0.75]


@pytest.mark.parametrize("attack", [1e6, -1e6, np.float32(3e38)])
def test_one_customer_moves_a_robust_mean_no_further_than_the_others_lie_apart(
    attack: float,
) -> None:
    hostile = np.full(50, attack, np.float32)
    for kind in ("trimmed", "median-norm"):
        mean = mean_of(ServerTerms(mean=kind), [100] * 8, [*HONEST, hostile])
        assert np.isfinite(mean).all()
        assert far(mean) < (0.3 if kind == "trimmed" else 0.6)
    assert far(mean_of(ServerTerms(), [100] * 8, [*HONEST, hostile])) > 1e4


def test_a_record_count_gives_nobody_more_of_a_trimmed_mean() -> None:
    hostile = np.full(50, 5, np.float32)
    updates = [*HONEST, hostile]
    one, other = (
        mean_of(ServerTerms(mean="trimmed"), weights, updates)
        for weights in ([1] * 8, [1] * 7 + [10**6])
    )
    assert np.array_equal(one, other)


def test_without_an_outlier_each_is_close_to_the_plain_mean() -> None:
    for kind in ("trimmed", "median-norm"):
        assert far(mean_of(ServerTerms(mean=kind), [5] * 7, HONEST)) < 0.1


def test_updates_of_zeros_have_a_mean() -> None:
    zeros = [np.zeros(3, np.float32)] * 5
    for kind in ("weighted", "trimmed", "median-norm"):
        assert mean_of(ServerTerms(mean=kind), [1] * 5, zeros).tolist() == [0, 0, 0]


def test_trimming_rounds_up() -> None:
    assert [ServerTerms(mean="trimmed", trim=0.1).trimmed(n) for n in (3, 8, 10, 11)] == [
        1,
        1,
        1,
        2,
    ]
    assert ServerTerms().trimmed(8) == 0
