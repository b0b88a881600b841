"""Moments of a model's features, and the linear head that follows from their sums in closed form.

For the feature vectors x [width] of records and their labels y, one-hot [labels], the moments are
X'X, X'Y and the number of records of each label. The ridge head (Hoerl and Kennard, 1970),

    W = (X'X + lambda I)^-1 X'Y,    centred where the head has a bias,

needs nothing else, and the moments of all records are the sum of their parts: how the records are
spread over customers does not matter.

Sums are exact. A feature is rounded to a fixed-point number of `Shape.places` binary places, so
that products and their sums are integers below 2**(2 LIMB_BITS), and each travels as two numbers of
LIMB_BITS bits: float32 and the grid of a masked sum hold both without rounding.

The regularisation is the one whose head, fitted on one part of the records, has the smallest
squared error on the other, which follows from that part's moments. The delivered head is fitted on
both. No record of an acceptance set has a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedark.contract.taste import LIMB_BITS, Shape
from fedark.foundation.errors import InputError, ProtocolError, Refused

__all__ = ["Head", "Moments", "from_limbs", "integers", "moments", "solve", "to_limbs"]

_LIMB = 1 << LIMB_BITS
_CANDIDATES = tuple(10.0**power for power in np.arange(-3.0, 2.25, 0.5))
_USUAL = 0.3  # where nothing was held out to choose by

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sums over records, of features with a norm of at most 1.

    Attributes:
        xx, xy: float64 [width, width] and [width, labels].
        counts: records of each label, float64 [labels].
    """

    xx: Floats
    xy: Floats
    counts: Floats

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.counts + other.counts)

    @property
    def records(self) -> float:
        return float(self.counts.sum())

    def centred(self) -> Moments:
        """The same about the means."""
        total = max(self.records, 1.0)
        mean, share = self.xy.sum(1) / total, self.counts / total
        return Moments(
            self.xx - total * np.outer(mean, mean),
            self.xy - total * np.outer(mean, share),
            self.counts,
        )


@dataclass(frozen=True)
class Head:
    """A head in closed form.

    Attributes:
        weight: float64 [labels, width], for features as the model gives them.
        bias: float64 [labels]; zeros where the head has none.
        regularisation: lambda, for unit features.
        error: mean squared error on the held-out part of a head fitted on the other; none was
            computed where it is negative.
    """

    weight: Floats
    bias: Floats
    regularisation: float
    error: float


def integers(shape: Shape, features: NDArray[np.float32], labels: Sequence[int]) -> NDArray[Any]:
    """The moments of some records, as integers: int64 [shape.values].

    Args:
        features: [records, width], one row a record.
        labels: index of each record's label.

    Raises:
        InputError: a feature is not a finite number.
    """
    scale = float(1 << shape.places)
    rows = features.astype(np.float64) / shape.norm
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise InputError(
            "The model gives features that are not finite numbers.",
            safe="Nothing was summed.",
            fix="Look for weights or records that no training could use.",
        )
    # Products of such integers, and their sums, stay below 2**53: float64 holds them exactly.
    rows = np.rint(rows / np.maximum(lengths, 1.0) * scale)
    chosen = np.eye(shape.labels)[np.asarray(labels, dtype=np.int64)]
    xx, xy, counts = rows.T @ rows, rows.T @ chosen, chosen.sum(0)
    upper = xx[np.triu_indices(shape.width)]
    return np.concatenate([upper, xy.reshape(-1), counts]).astype(np.int64)


def moments(shape: Shape, summed: NDArray[np.int64]) -> Moments:
    """What summed `integers` stand for.

    Raises:
        ProtocolError: another number of values.
        Refused: no records can have these sums.
    """
    if summed.shape != (shape.values,):
        raise ProtocolError("Summed moments have not the shape of the contract.")
    upper, rest = np.split(summed, [shape.width * (shape.width + 1) // 2])
    xy, counts = np.split(rest, [shape.width * shape.labels])
    scale = float(1 << shape.places)
    xx = np.zeros((shape.width, shape.width))
    xx[np.triu_indices(shape.width)] = upper / scale**2
    xx = xx + np.triu(xx, 1).T
    found = Moments(xx, xy.reshape(shape.width, shape.labels) / scale, counts.astype(np.float64))
    slack = 1 + 4 * math.sqrt(shape.width) / scale  # of rounded features
    if (
        found.counts.min() < 0
        or np.diag(xx).min() < 0
        or np.trace(xx) > found.records * slack
        or (np.abs(found.xy) > found.counts * slack).any()
    ):
        raise Refused(
            "No records can have these summed moments.",
            safe="No head was made of them.",
            fix="Some customer's enclave sent what no honest one can: find out which.",
        )
    return found


def to_limbs(values: NDArray[np.int64]) -> NDArray[np.float32]:
    """Integers within +-2**(2 LIMB_BITS), as twice as many that float32 holds exactly."""
    high, low = np.divmod(values, _LIMB)
    return np.concatenate([high, low]).astype(np.float32)


def from_limbs(summed: NDArray[Any]) -> NDArray[np.int64]:
    """The integers of a sum of `to_limbs`: int64, half as many."""
    high, low = np.split(summed.astype(np.int64), 2)
    result: NDArray[np.int64] = high * _LIMB + low
    return result


def solve(shape: Shape, fitted: Moments, held: Moments) -> Head:
    """The ridge head of both parts, with the regularisation that does best on `held` where the head
    is fitted on the other.
    """
    regularisation, error = _chosen(shape, fitted, held)
    weight, bias = _Ridge(shape, fitted + held).head(regularisation)
    return Head(weight.T / shape.norm, bias, regularisation, error)


class _Ridge:
    """Heads of one set of moments for any regularisation."""

    def __init__(self, shape: Shape, found: Moments) -> None:
        about = found.centred() if shape.centred else found
        values, self._vectors = np.linalg.eigh(about.xx)
        self._values = values.clip(min=0)
        self._turned = self._vectors.T @ about.xy
        total = max(found.records, 1.0)
        self._mean, self._share = found.xy.sum(1) / total, found.counts / total
        self._centred = shape.centred

    def head(self, regularisation: float) -> tuple[Floats, Floats]:
        """Weight [width, labels] and bias [labels]."""
        weight = self._vectors @ (self._turned / (self._values[:, None] + regularisation))
        bias = self._share - self._mean @ weight if self._centred else 0 * self._share
        return weight, bias


def _chosen(shape: Shape, fitted: Moments, held: Moments) -> tuple[float, float]:
    """The regularisation, and the error that chose it."""
    if not (fitted.records and held.records):
        return _USUAL, -1.0
    ridge = _Ridge(shape, fitted)
    errors = {one: _error(held, *ridge.head(one)) for one in _CANDIDATES}
    best = min(errors, key=lambda one: errors[one])
    return best, errors[best]


def _error(held: Moments, weight: Floats, bias: Floats) -> float:
    """Mean squared error of a head on records of which only the moments are known."""
    total = held.records
    mean = held.xy.sum(1)
    said = np.einsum("ij,ij->", weight, held.xx @ weight) + 2 * float(mean @ weight @ bias)
    said += total * float(bias @ bias)
    wanted = np.einsum("ij,ij->", weight, held.xy) + float(bias @ held.counts)
    return float((said - 2 * wanted + total) / total)
