"""Mechanisms: the grid's sensitivity holds on the real rounding, and the integer mechanism costs no
more than is reported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from fedark.foundation.errors import InputError
from fedark.privacy.accounting import Event, Spend, cost, epsilon
from fedark.privacy.mechanisms import Mechanism, _rounded_norm, calibrated
from fedark.privacy.noise import GridNoise, check_variance, smoothing_error
from fedark.secagg.terms import Layout
from fedark.secagg.vector import Contribution, RoundSum, mask

DELTA, RATE = 1e-5, Fraction("0.1")
LAYOUT = Layout("x", 4000, 16, 24.0, 24.0)
COARSE = Layout("x", 4000, 8, 24.0, 24.0)


def distributed(layout=LAYOUT, *, noise=1.5, rounds=60, customers=8, **more):
    return Mechanism.example_distributed(
        layout,
        record_norm=1.0,
        noise_multiplier=noise,
        rate=RATE,
        rounds=rounds,
        delta=DELTA,
        customers=customers,
        **more,
    )


def rounded(layout, vector, seed):
    """What the masked sum makes of a vector, in grid steps."""
    holder = replace(layout, noise_bound=1)

    def silent(start, out):
        out[:] = 0

    words = np.empty(holder.words(3), np.uint64)
    mask(
        words,
        holder,
        3,
        Contribution(vector.astype(np.float32)),
        [],
        noise=silent,
        rounding_seed=seed,
    )
    return RoundSum(holder, ("a",), 3, words).integers()


def unit(seed, length=4000):
    vector = np.random.default_rng(seed).normal(size=length)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("layout", [LAYOUT, COARSE])
def test_one_record_moves_the_rounded_sum_by_no_more_than_the_sensitivity(layout):
    mechanism = distributed(layout)
    others, record = 5 * unit(0), unit(1)
    moved = [
        np.linalg.norm(rounded(layout, others + record, seed) - rounded(layout, others, seed))
        for seed in (number.to_bytes(32, "big") for number in range(200))
    ]
    assert max(moved) <= mechanism.sensitivity
    # The rounding is part of it: the norm of the record alone would be too little.
    assert np.mean(moved) > 1.0 / layout.step


def test_a_sum_beyond_its_norm_is_clipped_without_moving_further():
    mechanism = distributed()
    clipped = [
        vector * min(1.0, mechanism.sum_norm / np.linalg.norm(vector))
        for vector in (30 * unit(0), 30 * unit(0) + unit(1))
    ]
    seed = bytes(32)
    assert (
        np.linalg.norm(rounded(LAYOUT, clipped[0], seed) - rounded(LAYOUT, clipped[1], seed))
        <= mechanism.sensitivity
    )


@pytest.mark.parametrize(
    "layout", [LAYOUT, COARSE, replace(LAYOUT, length=10), replace(COARSE, length=100_000)]
)
def test_a_sum_within_its_norm_is_never_rounded_again(layout):
    mechanism = distributed(layout)
    assert 0.5 * layout.clip_norm < mechanism.sum_norm <= layout.clip_norm
    steps = mechanism.sum_norm / layout.step
    bounds = (steps + math.sqrt(layout.length), _rounded_norm(steps, layout.length, 1e-30))
    assert min(bounds) <= layout.integer_norm * (1 + 1e-9)


def test_the_norm_of_a_rounding_exceeds_its_bound_as_rarely_as_claimed():
    draw, length, norm = np.random.default_rng(5), 50, 3.0
    vector = norm * unit(2, length)
    whole = np.floor(vector)
    norms = np.linalg.norm(whole + (draw.random((200_000, length)) < vector - whole), axis=1)
    for failure in (0.3, 0.1, 0.01):
        assert np.mean(norms > _rounded_norm(norm, length, failure)) <= failure


@pytest.mark.parametrize(("variance", "honest", "shift"), [(9, 3, 4), (100, 4, 12), (9, 5, 6)])
def test_the_integer_mechanism_costs_no_more_than_the_gaussian_that_is_reported(
    pld, variance, honest, shift
):
    """Exact privacy loss of a sum of discrete Gaussian shares, Poisson-subsampled, in one
    dimension.
    """
    half = 13 * math.isqrt(variance)
    share = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * variance))
    share /= share.sum()
    pmf = np.ones(1)
    for _ in range(honest):
        pmf = np.convolve(pmf, share)
    still = np.concatenate([pmf, np.zeros(shift)])
    moved = np.concatenate([np.zeros(shift), pmf])
    mixed = (1 - float(RATE)) * still + float(RATE) * moved
    with np.errstate(divide="ignore"):
        lower = dict(enumerate(np.log(still).tolist()))
        upper = dict(enumerate(np.log(mixed).tolist()))
    exact = {}
    for high in (False, True):
        one = pld.from_two_probability_mass_functions(
            lower,
            upper,
            pessimistic_estimate=high,
            value_discretization_interval=3e-4,
            symmetric=False,
        )
        exact[high] = one.self_compose(8).get_epsilon_for_delta(DELTA)
    mechanism = replace(
        distributed(rounds=8, customers=honest),
        sensitivity=float(shift),
        noise_multiplier=1e-3,
        unlucky=0.0,
        length=1,
    )
    mechanism = replace(
        mechanism, noise_multiplier=math.sqrt(honest * variance - 4) / shift * (1 - 1e-9)
    )
    assert mechanism.share_variance == variance
    reported = mechanism.guarantee("adapter", DELTA).epsilon
    assert exact[False] <= reported
    if variance == 100:
        assert reported <= exact[True] * 1.02
    # What the reserve of step 3 is for: without it the bound is not proved, and here is nearly
    # tight.
    assert (
        abs(epsilon(math.sqrt(honest * variance) / shift, RATE, 8, DELTA) / exact[True] - 1) < 0.05
    )


@pytest.mark.parametrize(("variance", "shares"), [(0.5, 2), (0.5, 5), (1.0, 3)])
def test_a_sum_of_discrete_gaussians_is_as_close_to_one_as_claimed(variance, shares):
    k = np.arange(-40, 41)
    one = np.exp(-(k**2) / (2 * variance))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    wide = np.arange(-(len(total) // 2), len(total) // 2 + 1)
    ideal = np.exp(-(wide**2) / (2 * shares * variance))
    ideal /= ideal.sum()
    bulk = ideal > 1e-8
    bound = 5 * sum(smoothing_error(variance * n / (n + 1)) for n in range(1, shares))
    assert np.max(np.abs(np.log(total[bulk] / ideal[bulk]))) <= bound


def test_a_discrete_gaussian_is_a_random_rounding_of_a_narrower_gaussian():
    """Step 3 with a rounding of variance 1/2, where its error can be seen: the same bound, around
    every integer.
    """
    rounding, variance = 0.5, 6.0
    grid, k = np.linspace(-60, 60, 240_001), np.arange(-25, 26)
    weights = np.exp(-((k[:, None] - grid) ** 2) / (2 * rounding))
    weights /= np.exp(-((np.arange(-70, 71)[:, None] - grid) ** 2) / (2 * rounding)).sum(axis=0)
    narrow = np.exp(-(grid**2) / (2 * (variance - rounding)))
    made = weights @ (narrow / narrow.sum())
    ideal = np.exp(-(k**2) / (2 * variance))
    ideal /= np.exp(-(np.arange(-60, 61) ** 2) / (2 * variance)).sum()
    bulk = ideal > 1e-9
    assert np.max(np.abs(np.log(made[bulk] / ideal[bulk]))) <= 3 * smoothing_error(rounding)


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_a_calibrated_mechanism_keeps_its_target_against_the_design_view(target):
    noise = calibrated(target, DELTA, RATE, 60)
    for more, view in (({"dropped": 3}, "adapter"), ({"dropped": 2, "colluders": 2}, "colluders")):
        guarantee = distributed(noise=noise, **more).guarantee(view, DELTA)
        assert 0.99 * target < guarantee.epsilon <= target
        assert guarantee.accountant == "PRV (Opacus)"


def test_shares_cover_the_fewest_honest_survivors():
    mechanism = distributed(customers=8, dropped=3, colluders=1)
    needed = (mechanism.noise_multiplier * mechanism.sensitivity) ** 2
    assert mechanism.minimum == 5
    assert needed + 4 <= 4 * mechanism.share_variance < needed + 4 + 8
    assert mechanism.variance(5) == 5 * mechanism.share_variance


@pytest.mark.parametrize(("survivors", "published"), [(7, 3.33), (6, 3.79), (5, 4.44), (4, 5.45)])
def test_too_few_survivors_cost_what_was_published(survivors, published):
    """Eight shares for epsilon 3: what is left if some are missing and the round is not aborted."""
    assert epsilon(1.4225 * math.sqrt(survivors / 8), RATE, 60, DELTA) == pytest.approx(
        published, rel=0.015
    )


def test_whoever_knows_a_share_learns_more_and_both_views_say_so():
    alone = distributed(customers=4)
    assert alone.guarantee("colluders", DELTA).epsilon > alone.guarantee("adapter", DELTA).epsilon
    prepared = distributed(customers=4, colluders=1)
    assert prepared.spend("colluders").events[0].noise_multiplier >= 1.5
    assert "1 of the other customers" in prepared.guarantee("colluders", DELTA).view


def test_local_noise_is_whole_and_relies_on_nobody():
    mechanism = Mechanism.example_local(
        LAYOUT, record_norm=1.0, noise_multiplier=1.5, rate=RATE, steps=60, delta=DELTA
    )
    assert mechanism.spend("adapter") == mechanism.spend("colluders")
    assert mechanism.share_variance >= (1.5 * mechanism.sensitivity) ** 2
    assert "outside the customer's own enclave" in mechanism.guarantee("adapter", DELTA).view


def test_a_customers_whole_update_costs_what_unsampled_releases_cost():
    mechanism = Mechanism.customer_level(
        LAYOUT, noise_multiplier=8.8, rounds=40, customers=100, dropped=10
    )
    guarantee = mechanism.guarantee("adapter", DELTA)
    assert (guarantee.unit, guarantee.accountant) == ("customer", "exact Gaussian")
    assert guarantee.epsilon == pytest.approx(
        cost([Spend((Event(8.8, 1.0, 40),))], DELTA)[0], rel=1e-3
    )
    assert mechanism.sensitivity == LAYOUT.integer_norm


def test_a_finer_grid_and_the_random_rounding_cost_little():
    """The norm of a rounding is far below the worst case of sqrt(d) beyond the vector's."""
    wide = distributed(Layout("x", 54_000, 16, 24.0, 24.0))
    assert wide.sensitivity < 1.01 / (24.0 / 32767)
    assert wide.sensitivity < 0.9 * (1 / wide_step() + math.sqrt(54_000))


def wide_step():
    return 24.0 / 32767


def test_the_noise_of_a_mechanism_fits_its_layout_and_has_its_variance():
    mechanism = distributed()
    layout = replace(LAYOUT, noise_bound=mechanism.noise_bound)
    assert not layout.problems(8)
    total = np.zeros((10, 4000), np.int64)
    for row in total:
        for _ in range(8):
            out, noise = np.empty(4000, np.int32), mechanism.noise()
            assert isinstance(noise, GridNoise)
            noise(0, out)
            row += out
    assert check_variance(total, mechanism.variance(8)).ok
    assert not check_variance(total, mechanism.variance(9)).ok


def test_mechanisms_that_cannot_be_are_refused():
    for wrong in (
        {"dropped": 5, "colluders": 3},
        {"dropped": 7},
        {"colluders": -1},
        {"noise": 0.0},
        {"rounds": 0},
    ):
        with pytest.raises(InputError):
            distributed(**wrong)
    with pytest.raises(InputError):
        Mechanism.example_local(
            LAYOUT, record_norm=25.0, noise_multiplier=1.0, rate=RATE, steps=1, delta=DELTA
        )
    with pytest.raises(InputError):
        Mechanism.example_local(
            LAYOUT, record_norm=1.0, noise_multiplier=1.0, rate=Fraction(2), steps=1, delta=DELTA
        )
