"""Poisson sampling of records, as it is accounted: each record is in a batch independently, with
exactly the stated probability.

Shuffled batches of a fixed size are not that, and cost more than what an accountant of Poisson
sampling says for them (Chua et al., "How Private are DP-SGD Implementations?", 2024). Bits come
from AES-256-CTR under a fresh key that is forgotten, decisions are integer comparisons, and a batch
may be empty. `sampler_problems` tells a sampler that does something else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import InputError
from fedark.secagg.stream import BLOCK, Keystream

__all__ = ["FINEST_RATE", "poisson_sample", "sampler_problems"]

_CHUNK = 1 << 18
FINEST_RATE = 1 << 32
"""Largest denominator of a rate."""
_FEWEST_BATCHES = 20


def poisson_sample(
    population: int, rate: Fraction, *, key: bytes | None = None
) -> NDArray[np.int64]:
    """One batch: the drawn indices of 0..population - 1, in ascending order; perhaps none.

    Args:
        rate: of which the denominator is at most 2^32. Convert a decimal from its text:
            Fraction("0.1").
        key: 32 bytes, for tests alone; a fresh secret one otherwise.

    Raises:
        InputError: the rate cannot be sampled exactly.
    """
    if not 0 < rate <= 1 or rate.denominator > FINEST_RATE:
        raise InputError(
            "A sampling rate is a fraction in (0, 1] with a denominator of at most 2^32.",
            fix='Use Fraction("0.1").',
        )
    stream, first = Keystream(key or os.urandom(32)), 0
    drawn = [np.empty(0, np.int64)]
    # A word below the largest multiple of the denominator is uniform modulo it; the others are not
    # used.
    usable = (1 << 64) // rate.denominator * rate.denominator
    for at in range(0, population, _CHUNK):
        count = min(_CHUNK, population - at)
        draws = np.empty(0, np.uint64)
        while draws.size < count:
            words = stream.words(count, first)
            first += -(-count // BLOCK)
            draws = np.concatenate(
                [draws, words[words <= np.uint64(usable - 1)] % np.uint64(rate.denominator)]
            )
        drawn.append(at + np.flatnonzero(draws[:count] < np.uint64(rate.numerator)))
    return np.concatenate(drawn)


def sampler_problems(
    batches: Sequence[NDArray[np.int64]], population: int, rate: Fraction, *, alarm: float = 1e-6
) -> list[str]:
    """What tells `batches` of consecutive rounds from Poisson samples; nothing is found in true
    ones but with probability `alarm`.

    Looked at: batch sizes (of fixed size? of another rate?), how often each record is drawn (dealt
    out in turns?), and how much consecutive batches share (avoiding each other?).

    Raises:
        InputError: fewer than 20 batches, or so few draws that nothing would be found.
    """
    from scipy.stats import chi2, norm

    rounds, q = len(batches), float(rate)
    if rounds < _FEWEST_BATCHES or not 0 < q < 1 or population * q * (1 - q) < 10:
        raise InputError(
            "There are too few batches or records to tell how they are sampled.",
            fix="Draw more rounds.",
        )
    counts = np.zeros(population, np.int64)
    present = np.zeros((2, population), bool)
    shared = 0
    for number, batch in enumerate(batches):
        if batch.size and not 0 <= int(batch.min()) <= int(batch.max()) < population:
            return ["a batch holds an index that is no record's"]
        now, before = present[number % 2], present[1 - number % 2]
        now[:] = False
        now[batch] = True
        if int(now.sum()) != batch.size:
            return ["a batch holds a record twice"]
        counts += now
        shared += int((now & before).sum())
    found, level = [], alarm / 6  # three tests of two sides
    sizes = np.array([batch.size for batch in batches])
    spread = float(np.sum((sizes - population * q) ** 2)) / (population * q * (1 - q))
    if not chi2.ppf(level, rounds) <= spread <= chi2.isf(level, rounds):
        found.append(
            f"batch sizes vary {spread / rounds:.3g} times as much around their mean as those of"
            " Poisson samples"
        )
    limit = float(norm.isf(level))
    variance = rounds * q * (1 - q)
    turns = float(np.sum((counts - rounds * q) ** 2)) / variance
    # The fourth moment of a binomial count gives the variance of its square; the shared total size
    # adds the rest.
    deviation = math.sqrt(population * (2 + (1 - 6 * q * (1 - q)) / variance))
    if abs(turns - population) > limit * deviation:
        found.append(
            f"how often a record is drawn varies {turns / population:.3g} times as much as in"
            " Poisson samples"
        )
    mean = (rounds - 1) * population * q**2
    deviation = math.sqrt(
        population * ((rounds - 1) * (q**2 - q**4) + 2 * (rounds - 2) * (q**3 - q**4))
    )
    if abs(shared - mean) > limit * deviation:
        found.append(
            f"consecutive batches share {shared} records, where Poisson samples share about"
            f" {mean:.0f}"
        )
    return found
