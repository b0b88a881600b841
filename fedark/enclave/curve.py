"""The learning curve of a run, inside the aggregator enclave: how well the global adapter of each
measured round answers the acceptance set, and what the contract's rule makes of it.

The acceptance set is the provider's and public among the parties. Every customer's trainer enclave
measures the same K-th of it each time, so a figure says something of the adapter and nothing of the
customer who measured it. That is why figures come unmasked, and why neither stopping nor the choice
of a round costs privacy: both follow from what is released anyway.

A host decides whose messages arrive. So two rounds are compared on those parts of the acceptance
set that both were measured on, a target counts only where all of the set was, and the curve says of
every round how many records it stands on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from fedark.contract.contract import Contract
from fedark.contract.protection import Figure
from fedark.enclave.protection import pack_vector, unpack_vector
from fedark.enclave.taste import Tasted
from fedark.foundation import canonical
from fedark.foundation.snapshot import Row, Snapshot

__all__ = ["Curve", "CurveState"]

Vector = np.ndarray[Any, np.dtype[np.float32]]
Figures = Mapping[str, Mapping[str, Figure]]
"""Customer -> model -> what its part of the acceptance set gave."""


class Point(Snapshot):
    """One measured round: model -> correct answers, records, summed loss (nats)."""

    round: int
    models: dict[str, Annotated[Figure, Row]]


class Best(Snapshot):
    """The best round of one model so far.

    Attributes:
        parts: customer -> what its part of the acceptance set gave.
        vector: its global adapter, where it may be the one that is delivered.
    """

    round: int
    parts: dict[str, Annotated[Figure, Row]]
    vector: bytes


class CurveState(Snapshot):
    """The curve in the aggregator's checkpoint."""

    points: list[Point]
    best: dict[str, Best]
    rounds: int
    ended: str
    taste: dict[str, Tasted]


class Curve:
    """One run's curve.

    Attributes:
        ended: why no further round follows: "" while one does, else "target", "patience" or
            "rounds".
    """

    def __init__(self, contract: Contract) -> None:
        self._contract, self._terms = contract, contract.curve
        self._points: list[Point] = []
        self._best: dict[str, Best] = {}
        self._rounds = 0
        self._tasted: dict[str, Tasted] = {}
        self.ended = ""

    def summed(self, number: int) -> bool:
        """Round `number` was summed; returns whether its global adapters are to be measured before
        anything else. If not, the last one ends the rounds.
        """
        self._rounds = number
        due = self._contract.measures(number)
        if not due:
            self._finish()
        return due

    def tasted(self, said: Mapping[str, Tasted]) -> None:
        """Keep what is said of the taster's heads."""
        self._tasted = dict(said)

    def _finish(self) -> None:
        if self._rounds == self._contract.rounds:
            self.ended = "rounds"

    def add(self, figures: Figures, vectors: Mapping[str, Vector]) -> None:
        """Take the figures of the global adapters of the round that was summed, and decide whether
        it was the last.
        """
        number = self._rounds
        totals: dict[str, Figure] = {}
        for terms in self._contract.models:
            name = terms.name
            parts = {party: models[name] for party, models in sorted(figures.items())}
            totals[name] = _total(parts.values())
            if name not in self._best or _better(parts, self._best[name].parts):
                kept = pack_vector(vectors[name]) if self._terms.deliver == "best" else b""
                self._best[name] = Best(round=number, parts=parts, vector=kept)
        self._points.append(Point(round=number, models=totals))
        whole = len(figures) == len(self._contract.customers)
        reached = self._terms.target and all(
            correct >= self._terms.target * total for correct, total, _ in totals.values()
        )
        latest = max(best.round for best in self._best.values())
        waited = sum(point.round > latest for point in self._points)
        if reached and whole:
            self.ended = "target"
        elif self._terms.patience and waited >= self._terms.patience:
            self.ended = "patience"
        else:
            self._finish()

    def chosen(self, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
        """The adapters to deliver, of `vectors`, those of the last round, and of earlier ones."""
        if self._terms.deliver == "last":
            return dict(vectors)
        return {name: unpack_vector(self._best[name].vector) for name in vectors}

    def encode(self) -> bytes:
        """The curve so far, for everybody; canonical CBOR."""
        best = self._terms.deliver == "best"
        return canonical.encode(
            {
                "rounds": self._rounds,
                "ended": self.ended,
                "delivered": {
                    terms.name: (
                        self._best[terms.name].round if best and self._best else self._rounds
                    )
                    for terms in self._contract.models
                },
                "points": [
                    [point.round, {name: list(found) for name, found in point.models.items()}]
                    for point in self._points
                ],
                "taste": {
                    name: [said.regularisation, said.error] for name, said in self._tasted.items()
                },
            }
        )

    def state(self) -> CurveState:
        return CurveState(
            points=self._points,
            best=self._best,
            rounds=self._rounds,
            ended=self.ended,
            taste=self._tasted,
        )

    def restore(self, state: CurveState) -> None:
        self._points, self._best = state.points, state.best
        self._rounds, self.ended, self._tasted = state.rounds, state.ended, state.taste


def _total(parts: Any) -> Figure:
    rows = list(parts)
    return sum(one[0] for one in rows), sum(one[1] for one in rows), float(sum(r[2] for r in rows))


def _better(new: Mapping[str, Figure], old: Mapping[str, Figure]) -> bool:
    """Whether more is right on the parts that both were measured on; a tie goes by the loss."""
    common = sorted(new.keys() & old.keys())
    one, other = (_total(figures[name] for name in common) for figures in (new, old))
    return (one[0], -one[2]) > (other[0], -other[2])
