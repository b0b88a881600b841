"""The mechanisms of a contract, on the grid of its masked sum: sensitivity, noise shares, and the
cost against each view.

What is released in a round is a sum of integers: every customer's clipped vector, rounded, plus its
share of discrete Gaussian noise. Three steps lead from there to the Gaussian mechanism that
`accounting` knows; docs/privacy.md has the proofs.

1. Rounding: the sensitivity is the norm of a rounded vector, but for a probability that is added
   to delta (Kairouz, Liu, Steinke, 2021, equation 2).
2. Sum of shares: it is nearly a discrete Gaussian of the summed variance (theorem 9 there).
3. Continuous Gaussian: a discrete Gaussian is nearly a rounding of a continuous one of a variance
   that is smaller by 4, and rounding does not know the data. So what holds for the
   Poisson-subsampled Gaussian, PRV included, holds here.

The factors of 2 and 3 are below 1 + 1e-20 for any job and enter epsilon; the sampler's distance
enters delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fedark.foundation.errors import InputError
from fedark.privacy.accounting import Event, Guarantee, Spend, View, cost, noise_multiplier, upward
from fedark.privacy.kinds import TRAITS, Kind, Traits, Unit
from fedark.privacy.noise import GridNoise, Shape, smoothing_error
from fedark.secagg.terms import Layout

__all__ = ["Mechanism", "calibrated"]

_RESERVED = 1e-3  # share of delta that unlucky roundings may use up
_ROUNDING = 4  # variance, in square grid steps, that step 3 takes from the noise
_LEAST_SHARE = 9  # so that step 2 is nothing
_REDRAWN = 1e-30  # probability that a vector within `sum_norm` has its rounding drawn again
_ARITHMETIC = (
    2.0**-14
)  # of the largest sum: what adding a record may do to the float32 sum of the others

_POISSON = (
    "each round draws every record independently with the stated probability, and which were drawn"
    " stays secret"
)
_SIZES = (
    "batch sizes and the number of records are not published; the divisor of the mean is public"
)
_ONCE = (
    "each counted release leaves the customer once: a round that is run again is another release"
)
_RECORD = (
    "a person's data is one record; of somebody with m records, the guarantee is that of a group"
    " of m"
)
_HONEST = (
    "at least {honest} of the customers whose vectors are summed are honest, add their share, and"
    " the sum alone is unmasked"
)
_INSIDE = (
    "gradients, sampling and noise are made by an attested enclave that does what its measured code"
    " says"
)


def calibrated(epsilon: float, delta: float, rate: float | Fraction, steps: int) -> float:
    """The noise multiplier for a mechanism of this module: what is set aside of delta is taken into
    account.
    """
    return noise_multiplier(epsilon * (1 - 1e-9), rate, steps, delta * (1 - _RESERVED) * (1 - 1e-9))


@dataclass(frozen=True)
class Mechanism:
    """One mechanism with all its parameters. Made by `example_distributed`, `example_local` or
    `customer_level`.

    Attributes:
        kind: as the contract names it.
        noise_multiplier: standard deviation over sensitivity that `customers - dropped - colluders`
            shares reach.
        rate: Poisson sampling rate, exact; 1 without sampling.
        releases: rounds, or local steps.
        length: values of the vector.
        sensitivity: L2, in grid steps, of the rounded vector to one unit.
        unlucky: probability in one release that the rounding exceeds it.
        sum_norm: L2 norm, in units of the vector, that a customer clips its sum to before it is
            rounded.
        customers: shares of noise in a sum, if nobody drops.
        colluders: customers that may tell their shares.
        dropped: customers that may drop from a round. One more, and the round must be aborted
            before anything is unmasked.
    """

    kind: Kind
    noise_multiplier: float
    rate: Fraction
    releases: int
    length: int
    sensitivity: float
    unlucky: float
    sum_norm: float
    customers: int = 1
    colluders: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.noise_multiplier < math.inf:
            problems.append("the noise multiplier is not positive")
        if not 0 < self.rate <= 1:
            problems.append("the sampling rate is not in (0, 1]")
        if self.releases < 1 or self.length < 1:
            problems.append("there is nothing to release")
        if not (0 < self.sensitivity < math.inf and self.sum_norm > 0):
            problems.append("the clipping norm is less than the grid resolves")
        if min(self.colluders, self.dropped) < 0 or self._honest("colluders") < 1:
            problems.append("no honest customer's noise is left when customers drop and collude")
        if problems:
            raise InputError(
                f"A privacy mechanism ({self.kind}) cannot be: {'; '.join(problems)}.",
                safe="Nothing was started.",
            )

    @classmethod
    def example_distributed(
        cls,
        layout: Layout,
        *,
        record_norm: float,
        noise_multiplier: float,
        rate: Fraction,
        rounds: int,
        delta: float,
        customers: int,
        colluders: int = 0,
        dropped: int = 0,
    ) -> Mechanism:
        """One Poisson sample and one clipped gradient sum of each customer a round, noise shared by
        all.

        Args:
            layout: of the sum; its noise bound is not looked at.
            record_norm: L2 norm C that one record's gradient is clipped to, in units of the vector.
            delta: of the job; 0.1% of it pays for unlucky roundings.
        """
        sensitivity, unlucky = _of_record(layout, record_norm, delta, rounds)
        released = (rounds, layout.length, sensitivity, unlucky, _sum_norm(layout))
        return cls(
            "example-distributed", noise_multiplier, rate, *released, customers, colluders, dropped
        )

    @classmethod
    def example_local(
        cls,
        layout: Layout,
        *,
        record_norm: float,
        noise_multiplier: float,
        rate: Fraction,
        steps: int,
        delta: float,
    ) -> Mechanism:
        """`steps` local steps, over all rounds, each with the whole noise: no other customer is
        relied on.
        """
        sensitivity, unlucky = _of_record(layout, record_norm, delta, steps)
        return cls(
            "example-local",
            noise_multiplier,
            rate,
            steps,
            layout.length,
            sensitivity,
            unlucky,
            _sum_norm(layout),
        )

    @classmethod
    def customer_level(
        cls,
        layout: Layout,
        *,
        noise_multiplier: float,
        rounds: int,
        customers: int,
        colluders: int = 0,
        dropped: int = 0,
    ) -> Mechanism:
        """The whole clipped update of every customer in every round; its absence is a vector of
        zeros.
        """
        released = (rounds, layout.length, layout.integer_norm, 0.0, layout.clip_norm)
        return cls(
            "customer-level",
            noise_multiplier,
            Fraction(1),
            *released,
            customers,
            colluders,
            dropped,
        )

    @property
    def traits(self) -> Traits:
        """What sets it apart from the others."""
        return TRAITS[self.kind]

    @property
    def unit(self) -> Unit:
        """What is protected."""
        return self.traits.unit

    @property
    def minimum(self) -> int:
        """Fewest customers in a sum that may be unmasked."""
        return self.customers - self.dropped

    @property
    def share_variance(self) -> int:
        """Variance of the noise that each customer adds to each value, in square grid steps."""
        needed = (self.noise_multiplier * self.sensitivity) ** 2 + _ROUNDING
        return max(math.ceil(needed * (1 + 1e-12) / (self.minimum - self.colluders)), _LEAST_SHARE)

    @property
    def noise_bound(self) -> int:
        """`Layout.noise_bound` for it."""
        return Shape(Fraction(self.share_variance)).bound

    def noise(self) -> GridNoise:
        """A fresh share, for one vector of one release."""
        return GridNoise(self.share_variance, self.length)

    def variance(self, summed: int) -> int:
        """Of the noise in a sum of `summed` customers, in square grid steps: what `check_variance`
        compares with.
        """
        return summed * self.share_variance

    def spend(self, view: View) -> Spend:
        """The cost of the whole job.

        Args:
            view: "adapter": the server, or whoever has the adapter; all noise of the fewest
                survivors counts. "colluders": the same, together with max(1, colluders) customers,
                who know their own shares.
        """
        honest = self._honest(view)
        share = Shape(Fraction(self.share_variance))
        effective = math.sqrt(honest * self.share_variance - _ROUNDING) / self.sensitivity
        values = float(self.length) * self.releases
        sums = sum(smoothing_error(self.share_variance * k / (k + 1)) for k in range(1, honest))
        divergence = 5 * sums + honest * share.divergence + 3 * smoothing_error(_ROUNDING)
        return Spend(
            (Event(effective, upward(self.rate), self.releases),),
            self.unit,
            delta=self.unlucky * self.releases,
            divergence=divergence * values,
            distance=honest * share.distance * values
            + (_REDRAWN * self.releases if self.unit == "record" else 0.0),
        )

    def guarantee(self, view: View, delta: float) -> Guarantee:
        """What the whole job guarantees, alone."""
        value, accountant = cost([self.spend(view)], delta)
        honest = self._honest(view)
        assumptions = [_INSIDE, _ONCE]
        if self.unit == "record":
            assumptions += [_POISSON, _SIZES, _RECORD]
        if self.traits.shared:
            assumptions.append(_HONEST.format(honest=honest))
        against = {
            "adapter": "the server, and whoever has the adapter",
            "colluders": (
                f"the server together with {max(1, self.colluders)} of the other customers"
            ),
        }[view]
        if not self.traits.shared:
            against = "everyone outside the customer's own enclave"
        return Guarantee(
            value, delta, self.unit, against, self.kind, accountant, tuple(assumptions)
        )

    def _honest(self, view: View) -> int:
        if not self.traits.shared:
            return 1
        return self.minimum - (max(1, self.colluders) if view == "colluders" else 0)


def _of_record(
    layout: Layout, record_norm: float, delta: float, releases: int
) -> tuple[float, float]:
    """Sensitivity in grid steps of the rounded sum to one record, and the probability that a
    rounding exceeds it.

    Clipping the sum and clamping its values come after the record is added and move no two sums
    apart.
    """
    if not 0 < record_norm <= layout.clip_norm:
        raise InputError(
            "A record's clipping norm is not in (0, clip_norm of its sum].",
            safe="Nothing was started.",
        )
    norm = (record_norm + _ARITHMETIC * layout.clip_norm) / layout.step
    unlucky = _RESERVED * delta / max(releases, 1)
    always, mostly = norm + math.sqrt(layout.length), _rounded_norm(norm, layout.length, unlucky)
    return (always, 0.0) if always <= mostly else (mostly, unlucky)


def _rounded_norm(norm: float, length: int, failure: float) -> float:
    """What the norm of a random rounding exceeds with at most this probability (equation 2 of
    Kairouz, Liu, Steinke).
    """
    deviation = math.sqrt(2 * math.log(1 / failure)) * (norm + math.sqrt(length) / 2)
    return math.sqrt(norm**2 + length / 4 + deviation)


def _sum_norm(layout: Layout) -> float:
    """The largest norm of a sum whose rounding is never drawn again by the masked sum, in units of
    the vector.

    A rounding that is drawn again depends on the data, which step 1 does not allow.
    """
    root = math.sqrt(layout.length)
    always = layout.integer_norm - root
    slope = math.sqrt(2 * math.log(1 / _REDRAWN))
    # norm^2 + slope * norm + (length / 4 + slope * root / 2 - integer_norm^2) = 0
    under = slope**2 - 4 * (layout.length / 4 + slope * root / 2 - layout.integer_norm**2)
    mostly = (math.sqrt(under) - slope) / 2 if under > 0 else 0.0
    return min(max(always, mostly) * layout.step * (1 - 1e-6), layout.clip_norm)
