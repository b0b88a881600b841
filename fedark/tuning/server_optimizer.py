"""The server's step from the cohort's average to the next global adapter (FedOpt, Reddi et al.,
arXiv:2003.00295).

Both optimisers see only the global vector and the average of the customers' vectors, so they run
unchanged on what an aggregator enclave summed or what secure aggregation revealed. Arithmetic is
float64 inside and float32 outside; the result is the same on every machine that follows IEEE 754.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedark.contract.contract import ServerTerms
from fedark.foundation.errors import ProtocolError
from fedark.foundation.snapshot import Snapshot

__all__ = ["FedAdam", "FedAvg", "OptimizerState", "ServerOptimizer", "server_optimizer"]

Flat = npt.NDArray[np.float32]


class Moments(Snapshot):
    """FedAdam's two moments: float64, little-endian."""

    m: bytes
    v: bytes


class OptimizerState(Snapshot):
    """An optimiser's state; FedAvg has no moments."""

    size: int
    moments: Moments | None


class ServerOptimizer(Protocol):
    """What both optimisers offer."""

    def step(self, current: Flat, average: Flat) -> Flat:
        """The next global vector, float32 of the same length, from the current one and the cohort's
        average.
        """

    def state(self) -> OptimizerState:
        """What it must not forget."""

    def restore(self, state: OptimizerState) -> None:
        """Go on from what `state` gave.

        Raises:
            ProtocolError: it is not one of this optimiser and size.
        """


def server_optimizer(terms: ServerTerms, size: int) -> ServerOptimizer:
    """A fresh optimiser, the one that `terms` name, for vectors of `size` values."""
    return FedAdam(terms, size) if terms.optimizer == "fedadam" else FedAvg(terms, size)


class FedAvg:
    """x + eta * delta with delta = average - x; at eta = 1 the average itself (McMahan et al.,
    arXiv:1602.05629).
    """

    def __init__(self, terms: ServerTerms, size: int) -> None:
        self._rate = terms.learning_rate
        self._size = size

    def step(self, current: Flat, average: Flat) -> Flat:
        delta = _delta(current, average, self._size)
        return _finite(current + self._rate * delta)

    def state(self) -> OptimizerState:
        return OptimizerState(size=self._size, moments=None)

    def restore(self, state: OptimizerState) -> None:
        if state != self.state():
            raise ProtocolError("A server optimiser's state is not one of FedAvg at this size.")


class FedAdam:
    """Algorithm 2 of the paper, without bias correction, as there.

    m = beta1 m + (1 - beta1) delta; v = beta2 v + (1 - beta2) delta^2 with v = tau^2 at the start;
    x = x + eta m / (sqrt(v) + tau).
    """

    def __init__(self, terms: ServerTerms, size: int) -> None:
        self._terms = terms
        self._m = np.zeros(size)
        self._v = np.full(size, terms.tau**2)

    def step(self, current: Flat, average: Flat) -> Flat:
        terms = self._terms
        delta = _delta(current, average, self._m.size)
        m = terms.beta1 * self._m + (1 - terms.beta1) * delta
        v = terms.beta2 * self._v + (1 - terms.beta2) * delta**2
        following = _finite(current + terms.learning_rate * m / (np.sqrt(v) + terms.tau))
        self._m, self._v = m, v
        return following

    def state(self) -> OptimizerState:
        moments = Moments(m=self._m.astype("<f8").tobytes(), v=self._v.astype("<f8").tobytes())
        return OptimizerState(size=self._m.size, moments=moments)

    def restore(self, state: OptimizerState) -> None:
        size, kept = self._m.size, state.moments
        if kept is None or state.size != size or {len(kept.m), len(kept.v)} != {8 * size}:
            raise ProtocolError("A server optimiser's state is not one of FedAdam at this size.")
        m, v = (np.frombuffer(data, dtype="<f8").astype(np.float64) for data in (kept.m, kept.v))
        if not (np.isfinite(m).all() and np.isfinite(v).all() and (v >= 0).all()):
            raise ProtocolError("A server optimiser's state holds impossible values.")
        self._m, self._v = m, v


def _delta(current: Flat, average: Flat, size: int) -> npt.NDArray[np.float64]:
    if current.shape != (size,) or average.shape != (size,):
        raise ProtocolError(
            f"An adapter vector does not have the {size} values that the contract fixes."
        )
    delta: npt.NDArray[np.float64] = average.astype(np.float64) - current.astype(np.float64)
    if not np.isfinite(delta).all():
        raise ProtocolError("An adapter vector holds a value that is not a finite number.")
    return delta


def _finite(vector: npt.NDArray[np.float64]) -> Flat:
    with np.errstate(over="ignore"):
        result = vector.astype(np.float32)
    if not np.isfinite(result).all():
        raise ProtocolError(
            "The server step left the range of float32; the adapter before it still stands."
        )
    return result
