"""The bound of one-run auditing against closed forms, an independent binomial, and simulated
private guessers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from fedark.auditing.bound import epsilon_lower_bound, refutation


@given(st.integers(1, 400), st.floats(0, 8), st.data())
def test_the_refutation_is_that_of_the_theorem_term_by_term(
    guesses: int, epsilon: float, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, guesses))
    canaries, delta = 2 * guesses, 1e-4
    success = math.exp(epsilon) / (1 + math.exp(epsilon))
    beta = binom.sf(right - 1, guesses, success)
    alpha = max(
        [
            0.0,
            *((binom.sf(right - i - 1, guesses, success) - beta) / i for i in range(1, right + 1)),
        ]
    )
    expected = min(1.0, beta + 2 * canaries * delta * alpha)
    assert refutation(canaries, guesses, right, epsilon, delta) == pytest.approx(
        expected, rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("guesses", [5, 100, 1000])
def test_all_right_without_delta_is_the_closed_form(guesses: int) -> None:
    success = 0.05 ** (1 / guesses)
    expected = max(0.0, math.log(success / (1 - success)))
    assert epsilon_lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(expected, abs=1e-5)


def test_guesses_at_random_refute_nothing() -> None:
    assert epsilon_lower_bound(1000, 1000, 500, 1e-5) == 0.0
    assert epsilon_lower_bound(1000, 0, 0, 1e-5) == 0.0


def test_more_right_guesses_refute_more_and_a_larger_delta_less() -> None:
    bounds = [epsilon_lower_bound(1000, 200, right, 1e-5) for right in range(100, 201, 10)]
    assert bounds == sorted(bounds)
    assert epsilon_lower_bound(1000, 200, 200, 1e-2) < epsilon_lower_bound(1000, 200, 200, 1e-5)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_refuted_no_more_often_than_the_confidence_allows(
    epsilon: float,
) -> None:
    """Each coin is told truly with probability e^epsilon / (1 + e^epsilon): exactly
    epsilon-private, and the guesser best.
    """
    generator = np.random.default_rng(0)
    right = generator.binomial(300, 1 / (1 + math.exp(-epsilon)), size=2000)
    bounds = np.array(
        [epsilon_lower_bound(300, 300, int(count), 0.0) for count in np.unique(right)]
    )
    wrong = np.repeat(bounds > epsilon, np.unique(right, return_counts=True)[1]).mean()
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.median(bounds) > 0.5 * epsilon


@pytest.mark.parametrize(
    "values", [(10, 11, 5, 0.0), (10, 5, 6, 0.0), (10, 5, -1, 0.0), (10, 5, 5, 1.0)]
)
def test_impossible_counts_are_refused(values: tuple[int, int, int, float]) -> None:
    with pytest.raises(ValueError, match="audit"):
        epsilon_lower_bound(*values)
