"""Grid noise: it has exactly the distribution that is accounted for, at every position once, and
its absence is seen.
"""

from __future__ import annotations

import itertools
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chi2, norm

from fedark.foundation.errors import InputError, Refused
from fedark.privacy import noise as noise_module
from fedark.privacy.noise import GridNoise, Shape, check_variance, smoothing_error
from fedark.secagg.stream import BLOCK
from fedark.secagg.vector import Noise

KEY = bytes(range(32))
ALARM = 1e-6


def drawn(variance, count, key=KEY):
    out = np.empty(count, np.int32)
    GridNoise(variance, count, key=key)(0, out)
    return out


def exact(variance, half):
    """The probabilities of the discrete Gaussian on -half..half, in double precision."""
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * float(variance)))
    return weights / weights.sum()


def chi_square(values, probabilities, half):
    """Pearson's statistic and its degrees of freedom, thin cells joined to their neighbours."""
    counts = np.bincount(values + half, minlength=2 * half + 1)
    edges, mass = [0], 0.0
    for index, probability in enumerate(probabilities):
        mass += probability
        if mass * values.size >= 20:
            edges.append(index + 1)
            mass = 0.0
    expected = np.add.reduceat(probabilities, edges[:-1]) * values.size
    expected[-1] = values.size - expected[:-1].sum()
    observed = np.add.reduceat(counts, edges[:-1])
    return float(np.sum((observed - expected) ** 2 / expected)), expected.size - 1


@pytest.mark.parametrize(
    "variance", [Fraction(1, 4), Fraction(2), Fraction(50), Fraction(1 << 16), Fraction(1 << 18)]
)
def test_values_follow_the_exact_probabilities(variance):
    values = drawn(variance, 400_000)
    half = Shape(variance).bound
    statistic, freedom = chi_square(values, exact(variance, half), half)
    assert chi2.ppf(ALARM, freedom) < statistic < chi2.isf(ALARM, freedom)


@pytest.mark.parametrize("deviation", [3, 300, 10**5, 10**7, 3 * 10**7])
def test_variance_kurtosis_and_mean_are_those_of_a_gaussian(deviation):
    count = 300_000
    values = drawn(Fraction(deviation) ** 2, count).astype(float) / deviation
    limit = norm.isf(ALARM)
    assert abs(values.mean()) < limit / math.sqrt(count)
    assert abs(np.mean(values**2) - 1) < limit * math.sqrt(2 / count)
    assert abs(np.mean(values**4) - 3) < limit * math.sqrt(96 / count)


def test_probabilities_of_a_table_are_right_to_a_hundred_bits():
    variance = Fraction(7, 2)
    high, low, half = noise_module._table(variance)
    reached = [(int(a) << 64) + int(b) for a, b in zip(high, low, strict=True)]
    import mpmath

    with mpmath.workprec(200):
        weights = [mpmath.exp(-mpmath.mpf(k * k) / 7) for k in range(-half, half + 1)]
        total, cumulative = mpmath.fsum(weights), mpmath.mpf(0)
        for threshold, weight in zip(reached, weights[:-1], strict=True):
            cumulative += weight
            assert abs(threshold - cumulative / total * 2**128) < 2
    assert reached == sorted(reached)


def test_two_tables_make_the_discrete_gaussian_of_the_summed_variance():
    """The claim of `Shape.divergence`, on an exact convolution: probabilities differ by rounding
    errors of doubles alone.
    """
    shape = Shape(Fraction(70_000))
    fill, wide = shape.parts
    half = Shape(fill).bound
    y, x = exact(fill, half), exact(wide, Shape(wide).bound)
    spread = np.zeros(2 * shape.bound + 1)
    for index, probability in enumerate(x):
        centre = shape.scale * (index - len(x) // 2) + shape.bound
        spread[centre - half : centre + half + 1] += probability * y
    ideal = exact(shape.variance, shape.bound)
    bulk = ideal > 1e-12
    assert np.max(np.abs(np.log(spread[bulk] / ideal[bulk]))) < 1e-9
    assert shape.divergence < 1e-40


@pytest.mark.parametrize("variance", [0.25, 0.5, 1.0])
def test_the_smoothing_error_bounds_what_it_claims(variance):
    for centre in np.linspace(0, 1, 17):
        k = np.arange(-60, 61)
        total = np.exp(-((k - centre) ** 2) / (2 * variance)).sum() / math.sqrt(
            2 * math.pi * variance
        )
        assert abs(math.log(total)) <= smoothing_error(variance)


def test_a_draw_that_hits_a_threshold_is_decided_by_more_bits(monkeypatch):
    """With a table whose upper halves are coarse, almost every draw is a tie: the result must still
    be right.
    """
    # Thresholds at 0.25, 0.5 + 2^-65 .. 2^-64 ... of one upper half: ties at u = 1 << 63.
    high = np.array([1 << 62, 1 << 63, 1 << 63, 1 << 63], np.uint64)
    low = np.array([0, 0, 1 << 62, 3 << 62], np.uint64)
    monkeypatch.setattr(noise_module, "_table", lambda _: (high, low, 0))

    class Ties:
        def block(self, index, words, count):
            words[:count] = 1 << 63
            return words[:count]

        def words(self, count, first):
            # Of four equal parts of [0, 1): the first two are below low[2].
            return (np.arange(count, dtype=np.uint64) % 4) << 62

    noise = GridNoise(1, 8)
    noise._stream = Ties()
    out = np.empty(8, np.int32)
    noise(0, out)
    assert out.tolist() == [2, 3, 3, 4] * 2


def test_positions_have_their_value_however_they_are_fetched():
    length = 3 * BLOCK + 77
    whole = drawn(10**6, length)
    pieces = np.zeros(length, np.int32)
    noise = GridNoise(10**6, length, key=KEY)
    edges = [0, 5, BLOCK - 1, BLOCK + 1, 2 * BLOCK, length]
    ranges = list(itertools.pairwise(edges))
    threads = [
        threading.Thread(target=lambda a=a, b=b: noise(a, pieces[a:b])) for a, b in reversed(ranges)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(pieces, whole)
    checked: Noise = noise
    assert checked is noise


def test_noise_is_not_served_twice():
    noise, out = GridNoise(9, 100), np.empty(60, np.int32)
    noise(0, out)
    with pytest.raises(Refused):
        noise(0, out)
    with pytest.raises(Refused):
        GridNoise(9, 100)(50, out)


@pytest.mark.parametrize("variance", [9, 1 << 20])
def test_positions_rounds_and_parts_are_independent(variance):
    count = 200_000
    first, second = drawn(variance, count, bytes(32)), drawn(variance, count, b"\1" * 32)
    limit = norm.isf(ALARM) / math.sqrt(count)
    for left, right in ((first[:-1], first[1:]), (first[:-BLOCK], first[BLOCK:]), (first, second)):
        assert abs(np.mean(left.astype(float) * right)) / variance < limit
        assert (
            abs(
                np.mean(
                    (left.astype(float) ** 2 - variance) * (right.astype(float) ** 2 - variance)
                )
            )
            / (2 * variance**2)
            < limit * 1.5
        )
    fresh = [np.empty(50, np.int32) for _ in range(2)]
    for out in fresh:
        GridNoise(10**8, 50)(0, out)
    assert not np.array_equal(*fresh)


@pytest.mark.parametrize("variance", [9, 638_453, 10**12])
def test_no_value_exceeds_the_bound_and_a_layout_can_hold_it(variance):
    shape = Shape(Fraction(variance))
    values = drawn(variance, 100_000)
    assert np.abs(values).max() <= shape.bound <= 14.2 * math.sqrt(variance) + 2
    assert shape.distance < 1e-30


def test_noise_that_no_layout_can_hold_is_refused():
    with pytest.raises(InputError):
        Shape(Fraction(10**16))
    with pytest.raises(InputError):
        Shape(Fraction(1, 5))


def shares(number, variance=638_453, count=20_000, keys=None):
    return sum(
        drawn(variance, count, bytes([index + 1]) * 32).astype(np.int64) for index in range(number)
    )


def test_shares_sum_to_the_variance_that_is_claimed():
    assert check_variance(shares(8), 8 * 638_453).ok


def test_a_missing_share_is_caught():
    assert not check_variance(shares(7), 8 * 638_453).ok


def test_noise_divided_by_ten_is_caught():
    assert not check_variance(shares(8) // 10, 8 * 638_453).ok


def test_noise_that_is_off_is_caught():
    assert not check_variance(np.zeros(20_000, np.int64), 8 * 638_453).ok


def test_noise_that_is_the_same_in_every_round_is_caught_in_their_difference():
    once = shares(4)
    assert not check_variance(once - once, 8 * 638_453).ok


def test_a_check_that_could_not_see_a_missing_share_is_refused():
    with pytest.raises(InputError):
        check_variance(shares(8, count=100), 8 * 638_453)
    assert check_variance(shares(8, count=20_000), 8 * 638_453, deficit=1 / 8).count == 20_000
