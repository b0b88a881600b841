"""How learning rates change over a job: a factor of `TrainingTerms`' rates, by the share of the job
that is done. It goes by the rounds that the job may have: one that ends earlier ends at a higher
rate.
"""

from __future__ import annotations

import math

from fedark.contract.contract import TrainingTerms

__all__ = ["rate_factor"]


def rate_factor(terms: TrainingTerms, done: float) -> float:
    """The factor at `done`, from 0 to 1: a rise in a straight line for `terms.warmup` of the job,
    then the schedule.
    """
    if done < terms.warmup:
        return done / terms.warmup
    left = 1 - (done - terms.warmup) / (1 - terms.warmup)
    if terms.schedule == "linear":
        return left
    return (1 - math.cos(math.pi * left)) / 2 if terms.schedule == "cosine" else 1.0
