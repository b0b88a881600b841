"""Two models compared on the same records: who answers right where the other does not.

The exact test of McNemar (1947): of the records on which the two differ, each is won by either with
the same chance if none is better. The interval of the difference is Clopper and Pearson's (1934)
for the share of these records that is won, so it too holds for any number of records, and means:
given how many records the two differ on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Paired", "compare"]

_LEVEL = 0.95
_HALVINGS = 50


@dataclass(frozen=True)
class Paired:
    """How one model does beside another on the same records.

    Attributes:
        records: how many.
        won, lost: those that it alone answers right, and those that the other alone does.
        p: of the two-sided exact test that none of the two is better.
        low, high: 95 % interval of the difference of the shares that are right, in points (0-100).
    """

    records: int
    won: int
    lost: int
    p: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "gained" or "lost" where the interval leaves 0 out, else "even"."""
        return "gained" if self.low > 0 else "lost" if self.high < 0 else "even"


def compare(mine: Sequence[bool], other: Sequence[bool]) -> Paired:
    """Compare whether each record was answered right, by two models, in the same order."""
    pairs = list(zip(mine, other, strict=True))
    won = sum(one and not two for one, two in pairs)
    lost = sum(two and not one for one, two in pairs)
    differ, count = won + lost, max(len(pairs), 1)
    p = min(1.0, 2 * _at_most(min(won, lost), differ, 0.5))
    tail = (1 - _LEVEL) / 2
    lowest = _solve(lambda share: 1 - _at_most(won - 1, differ, share) - tail) if won else 0.0
    highest = _solve(lambda share: tail - _at_most(won, differ, share)) if lost else 1.0
    low, high = ((2 * share - 1) * differ / count * 100 for share in (lowest, highest))
    return Paired(len(pairs), won, lost, p, low, high)


def _at_most(count: int, of: int, share: float) -> float:
    """Probability that at most `count` of `of` independent draws succeed, each with `share`."""
    if count < 0 or share >= 1:
        return float(count >= of)
    if share <= 0:
        return 1.0
    logs = (
        math.lgamma(of + 1)
        - math.lgamma(k + 1)
        - math.lgamma(of - k + 1)
        + k * math.log(share)
        + (of - k) * math.log1p(-share)
        for k in range(min(count, of) + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _solve(rising: Callable[[float], float]) -> float:
    """Where a function that rises on [0, 1] passes 0."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
