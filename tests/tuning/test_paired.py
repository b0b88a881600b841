"""Paired comparisons hold for few records too, and are those of scipy."""

from __future__ import annotations

import pytest

from fedark.tuning.paired import compare

binomtest = pytest.importorskip("scipy.stats").binomtest


def pairs(won: int, lost: int, records: int) -> tuple[list[bool], list[bool]]:
    rest = [True] * (records - won - lost)
    return [True] * won + [False] * lost + rest, [False] * won + [True] * lost + rest


@pytest.mark.parametrize(
    ("won", "lost", "records"),
    [(5, 1, 50), (0, 3, 50), (9, 0, 20), (12, 3, 200), (3, 12, 200), (700, 640, 5000)],
)
def test_p_and_interval_are_those_of_the_exact_binomial_test(
    won: int, lost: int, records: int
) -> None:
    found = compare(*pairs(won, lost, records))
    exact = binomtest(won, won + lost)
    scale = (won + lost) / records * 100
    low, high = ((2 * share - 1) * scale for share in exact.proportion_ci())
    assert found.p == pytest.approx(exact.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("won", "lost", "verdict"), [(12, 3, "gained"), (3, 12, "lost"), (5, 2, "even"), (0, 0, "even")]
)
def test_a_difference_within_noise_is_none(won: int, lost: int, verdict: str) -> None:
    assert compare(*pairs(won, lost, 100)).verdict == verdict


def test_records_that_are_not_the_same_ones_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([True, True], [True])
