"""From right guesses to a lower bound on epsilon (Steinke, Nasr, Jagielski, "Privacy Auditing with
One (1) Training Run", 2023).

Each of m canaries was included by a fair coin, and a guesser, from what was released, says of some
of them whether they were. If training is (epsilon, delta)-private, the number of right guesses
among r is not much larger than a binomial one with success probability 1 / (1 + exp(-epsilon)):
theorem 5.2 of the paper bounds the probability of v or more by

    beta + 2 m delta max_i (beta_i - beta) / i,   beta = P(Bin >= v),   beta_i = P(Bin >= v - i)

An epsilon at which this is below 1 - confidence is refuted. The number of guesses is fixed before
they are looked at.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["epsilon_lower_bound", "refutation"]

_LARGEST = 60.0  # an epsilon that no number of guesses reaches


def refutation(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound on the probability, if training is (epsilon, delta)-private, of `right` or more right
    ones among `guesses`.
    """
    success = 1 / (1 + math.exp(-epsilon))
    counts = np.arange(guesses + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    choose = logs[guesses] - logs[counts] - logs[guesses - counts]
    failure = -epsilon - math.log1p(
        math.exp(-epsilon)
    )  # the logarithm of 1 - success, without cancellation
    mass = np.exp(choose + counts * math.log(success) + (guesses - counts) * failure)
    tail = np.concatenate([np.cumsum(mass[::-1])[::-1], [0.0]])  # tail[v] = P(Bin >= v)
    steps = np.arange(1, right + 1)
    slope = float(np.max((tail[right - steps] - tail[right]) / steps)) if right else 0.0
    return min(1.0, float(tail[right]) + 2 * canaries * delta * slope)


def epsilon_lower_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon that the guesses refute at `confidence`, to within 1e-6; 0 if they refute
    none.

    Args:
        canaries: m, each included by a fair coin of its own.
        guesses: r <= m, chosen without looking at the coins.
        right: how many of them were right.
        delta: of the claim that is audited.
    """
    if not 0 <= right <= guesses <= canaries or not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ValueError(
            "an audit needs 0 <= right <= guesses <= canaries, delta in [0, 1) and a confidence in"
            " (0, 1)"
        )
    allowed = 1 - confidence
    if guesses == 0 or refutation(canaries, guesses, right, 0.0, delta) > allowed:
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-6:
        middle = (low + high) / 2
        if refutation(canaries, guesses, right, middle, delta) > allowed:
            high = middle
        else:
            low = middle
    return low
