"""The server's step from the cohort's average to the next global adapter (FedOpt, Reddi et al.,
arXiv:2003.00295).

Both optimisers see only the global vector and the average of the customers' vectors, so they run
unchanged on what an aggregator enclave summed or what secure aggregation revealed. Arithmetic is
float64 inside and float32 outside; the result is the same on every machine that follows IEEE 754.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedark.contract.contract import ServerTerms
from fedark.foundation.errors import ProtocolError

__all__ = ["FedAdam", "FedAvg", "ServerOptimizer", "server_optimizer"]

Flat = npt.NDArray[np.float32]


class ServerOptimizer(Protocol):
    """What both optimisers offer."""

    def step(self, current: Flat, average: Flat) -> Flat:
        """The next global vector, float32 of the same length, from the current one and the cohort's
        average.
        """

    def to_map(self) -> dict[str, Any]:
        """The state, of types that canonical CBOR takes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `to_map()`'s answer.

        Raises:
            ProtocolError: it is not one of this optimiser and size.
        """


def server_optimizer(
    terms: ServerTerms, size: int, state: dict[str, Any] | None = None
) -> ServerOptimizer:
    """The optimiser that `terms` name for vectors of `size` values, fresh or continued from
    `to_map()`'s answer.

    Raises:
        ProtocolError: `state` is not one of this optimiser and size.
    """
    optimizer = FedAdam(terms, size) if terms.optimizer == "fedadam" else FedAvg(terms, size)
    if state is not None:
        optimizer.restore(state)
    return optimizer


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

    def to_map(self) -> dict[str, Any]:
        return {"optimizer": "fedavg", "size": self._size}

    def restore(self, state: dict[str, Any]) -> None:
        if state != self.to_map():
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

    def to_map(self) -> dict[str, Any]:
        return {
            "optimizer": "fedadam",
            "size": self._m.size,
            "m": self._m.astype("<f8").tobytes(),
            "v": self._v.astype("<f8").tobytes(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        size = self._m.size
        right = state.keys() == self.to_map().keys() and state["optimizer"] == "fedadam"
        if not right or any(
            not isinstance(state[name], bytes) or len(state[name]) != 8 * size
            for name in ("m", "v")
        ):
            raise ProtocolError("A server optimiser's state is not one of FedAdam at this size.")
        m, v = (np.frombuffer(state[name], dtype="<f8").astype(np.float64) for name in ("m", "v"))
        if state["size"] != size or not (
            np.isfinite(m).all() and np.isfinite(v).all() and (v >= 0).all()
        ):
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
