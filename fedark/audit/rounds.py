"""One round of `example-distributed` as a customer makes it, with the noise of all: what is audited.

Poisson sample, clipped gradient sum, rounding to the grid of the masked sum, integer noise: the functions that a trainer enclave
calls (`fedark.enclave.private`), in its order. The masks are left out, since they cancel in what is unmasked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from fedark.audit.canaries import Members
from fedark.mechanism import on_grid
from fedark.privacy.mechanisms import Mechanism
from fedark.privacy.sampling import poisson_sample
from fedark.secagg import Layout
from fedark.tuning.layout import Flat
from fedark.tuning.per_example import clip_vector

__all__ = ["GridRound", "Release", "grid_round"]

Release = Callable[[Members], Flat]
"""One round: everything between the members' records and the noisy sum that is unmasked, in the unit of a gradient."""

_BITS = 24
_CUSTOMERS = 8  # whose shares of noise are in the sum; one of them is audited
_ROOM = 4  # the grid holds sums of so many times the expected number of records, all at their bound and in one direction


@dataclass(frozen=True)
class GridRound:
    """A `Release` with the mechanism's noise, or with none.

    Attributes:
        mechanism: the noise and its shares; None releases the sum as it is.
        layout: of the sum.
        clip_norm: L2 norm of one record's gradient.
        rate: of the Poisson sample.
    """

    mechanism: Mechanism | None
    layout: Layout
    clip_norm: float
    rate: Fraction

    def __call__(self, members: Members) -> Flat:
        """The noisy sum of one round, float32 [travelling]."""
        drawn = poisson_sample(len(members), self.rate)
        total = members.gradient_sum(drawn, clip_norm=self.clip_norm)
        if self.mechanism is None:
            return total
        summed = on_grid(self.layout, self.mechanism, clip_vector(total, self.mechanism.sum_norm)).astype(np.float64)
        for _ in range(self.mechanism.customers - 1):  # the others bring nothing but their shares of noise
            summed += on_grid(self.layout, self.mechanism, np.zeros_like(total))
        return summed.astype(np.float32)


def grid_round(
    length: int, *, noise_multiplier: float | None, clip_norm: float, rate: Fraction, rounds: int, delta: float, population: int
) -> GridRound:
    """The round of a job of this size; `noise_multiplier` None for one without noise.

    Raises:
        InputError: no such mechanism can be.
    """
    reach = clip_norm * max(float(rate) * population, 1.0) * _ROOM
    layout = Layout("audit", length, bits=_BITS, clip_norm=reach, value_range=reach)
    if noise_multiplier is None:
        return GridRound(None, layout, clip_norm, rate)
    mechanism = Mechanism.example_distributed(
        layout,
        record_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        rate=rate,
        rounds=rounds,
        delta=delta,
        customers=_CUSTOMERS,
    )
    return GridRound(mechanism, replace(layout, noise_bound=mechanism.noise_bound), clip_norm, rate)
