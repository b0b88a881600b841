"""How the aggregator enclave averages a round's updates where it sees each of them (mode "sealed").

    weighted      weighted by records: what masks can sum, too
    trimmed       of each value the largest and smallest few are left out, the others count alike
                  (coordinate-wise trimmed mean: Yin et al., arXiv:1803.01498)
    median-norm   weighted by records, each update shortened to at most the median of their norms

The last two bound what a few customers with wrong or hostile records can do. They do not find out
who that is, and where customers' records are unlike each other they take some of what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedark.contract.contract import ServerTerms

__all__ = ["mean_of"]

Vector = np.ndarray[Any, Any]


def mean_of(terms: ServerTerms, weights: Sequence[int], updates: Sequence[Vector]) -> Vector:
    """The average of updates, float64 [values], in the order given.

    Args:
        weights: records of each.
        updates: float32 [values] each; finite.
    """
    if terms.mean == "trimmed":
        cut = terms.trimmed(len(updates))
        kept = np.sort(np.stack(updates), axis=0)[cut : len(updates) - cut]
        mean: Vector = kept.mean(axis=0, dtype=np.float64)
        return mean
    factors = np.ones(len(updates))
    if terms.mean == "median-norm":
        norms = np.array([np.linalg.norm(update.astype(np.float64)) for update in updates])
        factors = np.minimum(1.0, np.median(norms) / np.maximum(norms, np.finfo(np.float64).tiny))
    total = sum(weights)
    mean = np.zeros(updates[0].shape)
    for weight, factor, update in zip(weights, factors, updates, strict=True):
        mean += (weight / total * factor) * update
    return mean
