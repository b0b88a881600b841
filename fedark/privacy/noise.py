"""Integer noise for the grid of a masked sum: discrete Gaussian values from AES-256-CTR, exact to
far below any delta.

No floating-point number touches a sample. A value is read off a table of the distribution function
whose thresholds are 128-bit integers, computed with 320-bit integers; the vector that the noise is
added to is integer too, and every sum of the two is reached from every vector. So the attack of
Mironov, "On Significance of the Least Significant Bits for Differential Privacy" (CCS 2012), which
reads a secret off the gaps between floating-point outputs, finds no gaps.

A table holds |x| <= 13 standard deviations; above a deviation of 256 the noise is a X + Y of two
tables, Y wide enough (deviation sqrt(5) a) to fill the gaps of a X: `Shape` bounds how far that is
from the discrete Gaussian of the summed variance. Bits come from a fresh secret key, addressed by
position; no position is served twice, since noise that is used twice cancels. What is not
excluded: whoever can time the table search of this process may learn about the values.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import InputError, Refused
from fedark.secagg.stream import BLOCK, SPARE, Keystream

__all__ = ["GridNoise", "Shape", "VarianceCheck", "check_variance", "smoothing_error"]

_CUT = (
    13  # standard deviations that a table holds: the tail beyond is under 2 exp(-13^2 / 2) < 2^-120
)
_BITS = 128
_FIXED = 320
_WIDEST = 1 << 29  # what a masked sum's layout can hold
_SINGLE = 1 << 16  # the largest variance of a single table
_FILL = 5  # variance of Y in units of a^2
_LOW = (1 << 64) - 1


def smoothing_error(variance: float) -> float:
    """Bound on |log| of the sum of exp(-(k - c)^2 / 2v) over all integers k against its integral,
    for any real c and v >= 1/4.

    By Poisson summation the two differ by the factor 1 + 2 sum_m exp(-2 pi^2 v m^2) cos(2 pi m c).
    """
    return 2.1 * math.exp(-2 * math.pi**2 * variance)


@dataclass(frozen=True)
class Shape:
    """The distribution of one value: how it is drawn, its bound, and its distance from the discrete
    Gaussian.

    Attributes:
        variance: sigma^2 in square grid steps, at least 1/4.
    """

    variance: Fraction

    def __post_init__(self) -> None:
        if self.variance < Fraction(1, 4):
            raise InputError(
                "Noise of less than half a grid step is not supported.", fix="Take a finer grid."
            )
        if self.bound > _WIDEST:
            raise InputError("The noise is too wide for a masked sum.", fix="Take a coarser grid.")

    @cached_property
    def scale(self) -> int:
        """a: the noise is a X + Y; 0 if a single table, Y, is enough."""
        if self.variance <= _SINGLE:
            return 0
        return math.isqrt(math.isqrt(int(self.variance / _FILL)))

    @cached_property
    def parts(self) -> tuple[Fraction, ...]:
        """The variances of Y and, if there is one, of X."""
        if not self.scale:
            return (self.variance,)
        fill = Fraction(_FILL * self.scale**2)
        return fill, (self.variance - fill) / self.scale**2

    @cached_property
    def bound(self) -> int:
        """K: no value is larger."""
        halves = [_half_width(part) for part in self.parts]
        return halves[0] + (self.scale * halves[1] if self.scale else 0)

    @property
    def divergence(self) -> float:
        """Bound on |log ratio| to the discrete Gaussian of this variance, tables taken as exact.

        The probability of z is a sum over x of products of two Gaussians: the Gaussian at z, times
        a sum of a third one, of variance Var X Var Y / sigma^2, over shifted integers; all four
        normalisers are within their smoothing errors.
        """
        if not self.scale:
            return 0.0
        fill, wide = self.parts
        return sum(
            smoothing_error(float(part))
            for part in (fill * wide / self.variance, fill, wide, self.variance)
        )

    @property
    def distance(self) -> float:
        """Bound on the total variation between what the tables give and exact discrete Gaussians:
        cut tails, rounded thresholds.
        """
        tail = 2 * math.exp(
            -(_CUT**2) / 2
        )  # a discrete Gaussian is subgaussian: Canonne, Kamath, Steinke (2020), lemma 22
        return sum(2 * tail + (2 * _half_width(part) + 1) * 2.0**-_BITS for part in self.parts)


class GridNoise:
    """The noise of one vector of one release: `secagg.vector.Noise`.

    Values depend on the key and their position only, so threads may fetch any ranges in any order.

    Args:
        variance: of one value, in square grid steps.
        length: of the vector.
        key: 32 bytes, for tests alone; a fresh secret one otherwise.
    """

    def __init__(self, variance: int | Fraction, length: int, *, key: bytes | None = None) -> None:
        self.shape = Shape(Fraction(variance))
        self._tables = [_table(part) for part in self.shape.parts]
        self._stream = Keystream(key or os.urandom(32))
        self._length, self._served, self._lock = length, 0, threading.Lock()

    @property
    def bound(self) -> int:
        """`Layout.noise_bound` for it."""
        return self.shape.bound

    def __call__(self, start: int, out: NDArray[np.int32]) -> None:
        """Fill `out` with the noise of the values start, start + 1, ... .

        Raises:
            Refused: positions outside the vector, or more values than it has: this noise was used
                before.
        """
        with self._lock:
            self._served += out.size
            if self._served > self._length or not 0 <= start <= self._length - out.size:
                raise Refused(
                    "Noise was asked for twice, or beyond its vector.",
                    safe="Nothing was released with it.",
                )
        words = np.empty(min(BLOCK, start % BLOCK + out.size) + SPARE, np.uint64)
        done = 0
        while done < out.size:
            block, first = divmod(start + done, BLOCK)
            count = min(BLOCK - first, out.size - done)
            target = out[done : done + count]
            target[:] = self._draw(0, block, first, count, words)
            if self.shape.scale:
                target += self.shape.scale * self._draw(1, block, first, count, words)
            done += count

    def _draw(
        self, part: int, block: int, first: int, count: int, words: NDArray[np.uint64]
    ) -> NDArray[np.int32]:
        high, low, half = self._tables[part]
        draws = self._stream.block((2 * part << 64) + block, words, first + count)[first:]
        index = np.searchsorted(high, draws, side="right")
        # A draw whose 64 bits are those of a threshold's upper half (once in 2^50) is decided by 64
        # more.
        for at in np.flatnonzero((index > 0) & (high[index - 1] == draws)):
            more = int(
                self._stream.words(first + count, (1 << 64) * (2 * part + 1) + block)[first + at]
            )
            begin = int(np.searchsorted(high, draws[at], side="left"))
            index[at] = begin + sum(int(value) <= more for value in low[begin : index[at]])
        return index.astype(np.int32) - np.int32(half)


def _half_width(variance: Fraction) -> int:
    """The largest value in a table: _CUT standard deviations, rounded up."""
    return math.isqrt(math.ceil(_CUT**2 * variance) - 1) + 1


@lru_cache(maxsize=16)
def _table(variance: Fraction) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Thresholds of the discrete Gaussian on [-H, H], as upper and lower 64 bits; a value is the
    number of those <= a draw, - H.
    """
    half = _half_width(variance)
    weights = _weights(variance, half)
    total = 2 * sum(weights) - weights[0]
    reached, thresholds = 0, []
    for value in range(-half, half):
        reached += weights[abs(value)]
        thresholds.append((reached << _BITS) // total)
    high = np.array([threshold >> 64 for threshold in thresholds], np.uint64)
    low = np.array([threshold & _LOW for threshold in thresholds], np.uint64)
    return high, low, half


def _weights(variance: Fraction, half: int) -> list[int]:
    """2^320 exp(-k^2 / 2v), k = 0..half: each from the one before, by two integer products."""
    with localcontext() as context:
        context.prec = 120
        unit = Decimal(2) ** _FIXED
        ratio = int((Decimal(-variance.denominator) / Decimal(2 * variance.numerator)).exp() * unit)
    square = ratio * ratio >> _FIXED
    weights = [1 << _FIXED]
    for _ in range(half):
        weights.append(weights[-1] * ratio >> _FIXED)
        ratio = ratio * square >> _FIXED
    return weights


@dataclass(frozen=True)
class VarianceCheck:
    """What `check_variance` found: `ok` if the measured variance lies in [low, high]."""

    claimed: float
    measured: float
    count: int
    low: float
    high: float

    @property
    def ok(self) -> bool:
        """Whether the noise is what it is claimed to be, as far as this many values can tell."""
        return self.low <= self.measured <= self.high


def check_variance(
    noise: NDArray[np.integer], claimed: float, *, deficit: float = 0.1, alarm: float = 1e-6
) -> VarianceCheck:
    """Compare noise alone (an aggregate of zeros, or an aggregate less its known sum) with the
    variance that is accounted for.

    Args:
        noise: any shape, in grid steps.
        claimed: variance of one value, in square grid steps.
        deficit: the relative shortfall that must not pass; one of n shares missing is 1 / n.
        alarm: the probability that correct noise fails, and at most that of such a shortfall
            passing.

    Raises:
        InputError: there are too few values to see such a shortfall.
    """
    from scipy.stats import chi2

    values = np.asarray(noise, np.float64).ravel()
    low, high = (
        claimed * chi2.ppf([alarm / 2, 1 - alarm / 2], max(values.size, 1)) / max(values.size, 1)
    )
    if (
        claimed * (1 - deficit) * chi2.ppf(1 - alarm, max(values.size, 1)) / max(values.size, 1)
        >= low
    ):
        raise InputError(
            f"{values.size} values cannot show a shortfall of {deficit:.0%} in the noise.",
            fix="Measure more rounds or values.",
        )
    return VarianceCheck(claimed, float(np.mean(values**2)), values.size, float(low), float(high))
