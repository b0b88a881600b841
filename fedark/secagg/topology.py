"""Who masks with whom, and who can unmask: derived from the session identifier, never chosen by the
server. The bounds are argued in docs/design/secure-aggregation.md, "Committee and graph".

Committee. Every client shares its round secrets, t of c, with a committee that is fixed for the
session: everybody up to a few hundred clients, beyond that a sample whose chance to hold too many
colluders is below 2**-STATISTICAL_BITS.

Graph. A ring of nearest neighbours where colluders and admitted drops are few, which holds for
every choice of theirs; else random edges, of which each survivor must keep a floor. `split_bound`
bounds the chance that honest survivors fall into two parts, and `refusal_bound` how often a round
is refused because a survivor keeps fewer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedark.secagg.stream import Keystream
from fedark.secagg.terms import SessionTerms

__all__ = [
    "REFUSAL_BITS",
    "STATISTICAL_BITS",
    "Degree",
    "Topology",
    "committee_bound",
    "committee_size",
    "graph_degree",
    "most_dropped",
    "must_agree",
    "refusal_bound",
    "smallest_sum",
    "split_bound",
    "threshold",
]

STATISTICAL_BITS = 80
REFUSAL_BITS = 10
"""At most one round in 2**REFUSAL_BITS is lost to the floor, over random sessions."""
_SMALL = 64
"""Larger cohorts always agree on the survivors."""
_COMMITTEE = 1 << 32
"""First block of the seed's stream that the committee is drawn from; the graph's blocks come
before.
"""
_LOG2E = 1 / math.log(2)


def threshold(committee: int, colluders: int) -> int:
    """Shares that recover a secret: two thirds of the committee, and more than (committee +
    colluders) / 2.
    """
    return max(-(-2 * committee // 3), (committee + colluders) // 2 + 1)


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) * _LOG2E


def _log2_sum(logs: list[float]) -> float:
    top = max(logs, default=-math.inf)
    return top if math.isinf(top) else top + math.log2(sum(2.0 ** (term - top) for term in logs))


def _log2_tail(trials: int, chance: float, bound: float) -> float:
    """log2 of Chernoff's bound on a binomial that is far from its mean: at least `bound` above it,
    at most `bound` below.
    """
    if trials <= 0 or bound < 0 or bound > trials:
        return -math.inf
    share = bound / trials
    if chance >= 1.0:
        return 0.0 if share >= 1.0 else -math.inf
    divergence = 0.0
    if share > 0:
        divergence += share * math.log2(share / chance)
    if share < 1:
        divergence += (1 - share) * math.log2((1 - share) / (1 - chance))
    return -trials * divergence


def committee_bound(cohort: int, colluders: int, committee: int) -> float:
    """log2 of the probability that a random committee holds more colluders than its threshold
    tolerates (-inf: cannot).
    """
    if committee == cohort:
        return -math.inf if 2 * threshold(cohort, colluders) > cohort + colluders else 0.0
    most = 2 * threshold(committee, 0) - committee - 1
    total = _log2_choose(cohort, committee)
    return _log2_sum(
        [
            _log2_choose(colluders, bad) + _log2_choose(cohort - colluders, committee - bad) - total
            for bad in range(most + 1, min(colluders, committee) + 1)
            if committee - bad <= cohort - colluders
        ]
    )


@lru_cache(maxsize=64)
def committee_size(cohort: int, colluders: int) -> int:
    """Members of the smallest sufficient committee."""
    for size in range(64, cohort):
        if committee_bound(cohort, colluders, size) <= -STATISTICAL_BITS:
            return size
    return cohort


def _edge(cohort: int, degree: int) -> int:
    """Chance of an edge, in 2**-16."""
    return round(degree / (cohort - 1) * (1 << 16))


def _cuts(cohort: int, colluders: int, minimum: int, degree: int) -> list[float]:
    """For s = 1, 2, ...: log2 of the expected number of sets of s honest clients that the droppable
    clients can cut off.
    """
    honest, dropped, edge = cohort - colluders, cohort - minimum, _edge(cohort, degree) / (1 << 16)
    found = []
    for size in range(1, honest // 2 + 1):
        reach = 1 - (1 - edge) ** size
        near, outside = min(dropped, honest - 2 * size), honest - size
        cut = _log2_tail(outside, reach, near) if near < outside * reach else 0.0
        found.append(_log2_choose(honest, size) + cut)
    return found


def _split(cuts: list[float], colluders: int, edge: float, floor: int) -> float:
    logs = []
    for size, cut in enumerate(cuts, 1):
        crowded = floor - size + 1
        logs.append(
            cut
            + (size * _log2_tail(colluders, edge, crowded) if crowded > colluders * edge else 0.0)
        )
    return _log2_sum(logs)


def split_bound(cohort: int, colluders: int, minimum: int, degree: int, floor: int) -> float:
    """log2 of the probability that some admissible survivor set splits the honest survivors.

    Args:
        degree: mean number of neighbours.
        floor: surviving neighbours that every survivor must keep.
    """
    cuts = _cuts(cohort, colluders, minimum, degree)
    return _split(cuts, colluders, _edge(cohort, degree) / (1 << 16), floor)


def refusal_bound(cohort: int, minimum: int, degree: int, floor: int) -> float:
    """log2 of the probability that a random survivor set of `minimum` clients leaves one of them
    fewer than `floor` neighbours.
    """
    edge, others = _edge(cohort, degree) / (1 << 16), minimum - 1
    logs = [
        _log2_choose(others, kept) + kept * math.log2(edge) + (others - kept) * math.log2(1 - edge)
        for kept in range(min(floor, minimum))
    ]
    return math.log2(minimum) + _log2_sum(logs)


def most_dropped(cohort: int, colluders: int, minimum: int, agreement: bool) -> int:
    """How many clients a server can at most have treated as dropped in one round.

    Without agreement, which only cohorts do without where everybody is a member, a sum may cover
    fewer than `minimum` (`smallest_sum`): each honest member names at most cohort - minimum dropped
    clients, and threshold - colluders of them are needed to treat one as dropped.
    """
    if agreement:
        return cohort - minimum
    return (cohort - minimum) * (cohort - colluders) // (threshold(cohort, colluders) - colluders)


def must_agree(cohort: int, colluders: int, minimum: int) -> bool:
    """Whether members release nothing before a quorum has signed one survivor set: in large
    cohorts, and where a sum could else cover fewer than two honest clients.
    """
    return (
        cohort > _SMALL or cohort - most_dropped(cohort, colluders, minimum, False) - colluders < 2
    )


def smallest_sum(size: int, colluders: int, minimum: int, agreement: bool) -> int:
    """How many clients, colluders among them, every sum that a lying server can get covers at
    least, whomever of a roster of `size` it lets into the session: `minimum` with agreement, fewer
    without.
    """
    return min(
        cohort
        - most_dropped(
            cohort, colluders, minimum, agreement or must_agree(cohort, colluders, minimum)
        )
        for cohort in range(minimum, size + 1)
    )


class Degree(NamedTuple):
    """Of a masking graph.

    Attributes:
        mean: number of neighbours; cohort - 1 where nothing is gained by fewer.
        floor: surviving neighbours that every survivor must keep; 0 in a ring, which needs none,
            and in a complete graph.
    """

    mean: int
    floor: int


@lru_cache(maxsize=64)
def graph_degree(cohort: int, colluders: int, minimum: int, agreement: bool = False) -> Degree:
    """The smallest: of a ring, or of a random graph that keeps both bounds."""
    agreement = agreement or must_agree(cohort, colluders, minimum)
    # One neighbour each makes pairs, of which nobody needs to be taken away.
    degree = max(2, colluders + most_dropped(cohort, colluders, minimum, agreement) + 1)
    ring = min(
        degree + degree * cohort % 2, cohort - 1
    )  # an odd number of clients have no odd number of neighbours each
    if cohort > _SMALL:
        for degree in range(20, min(ring, int(0.8 * (cohort - 1))), 4):
            cuts, edge = (
                _cuts(cohort, colluders, minimum, degree),
                _edge(cohort, degree) / (1 << 16),
            )
            # The bound falls as the floor rises.
            floors = range(1, degree)
            at = bisect_left(
                floors,
                True,
                key=lambda floor: _split(cuts, colluders, edge, floor) <= -STATISTICAL_BITS,
            )
            if (
                at < len(floors)
                and refusal_bound(cohort, minimum, degree, floors[at]) <= -REFUSAL_BITS
            ):
                return Degree(degree, floors[at])
    return Degree(ring, 0)


class Topology:
    """Graph, committee and thresholds of one session of `cohort` clients, known by their index in
    the directory.

    Attributes:
        committee: indices of the members, ascending.
        threshold: t.
        complete: everybody masks with everybody: a ring without a gap.
        degree_floor: surviving neighbours that every survivor must keep.
        agreement: members release nothing before t of them have signed one survivor set.
    """

    def __init__(self, terms: SessionTerms, cohort: int, seed: bytes) -> None:
        """`seed`: 32 bytes, from the session identifier. `cohort`: at least the terms' minimum,
        so colluders <= cohort - 2 and the threshold exists.
        """
        colluders, minimum = terms.colluders, terms.minimum
        size = committee_size(cohort, colluders)
        self.threshold = threshold(size, colluders if size == cohort else 0)
        draws = Keystream(seed).words(cohort, first=_COMMITTEE)
        self.committee = tuple(int(i) for i in np.sort(np.argsort(draws, kind="stable")[:size]))
        self._cohort = cohort
        self.agreement = terms.agreement or must_agree(cohort, colluders, minimum)
        degree = graph_degree(cohort, colluders, minimum, self.agreement)
        self.complete = degree.mean == cohort - 1
        self.degree_floor = degree.floor
        self._adjacency = None
        if not self.complete:
            self._adjacency = (
                _random_graph(cohort, degree.mean, seed)
                if degree.floor
                else _ring(cohort, degree.mean)
            )

    def neighbours(self, index: int) -> NDArray[np.intp]:
        """Indices of the clients that `index` masks with, ascending."""
        if self._adjacency is None:
            return np.delete(np.arange(self._cohort), index)
        near: NDArray[np.intp] = np.flatnonzero(self._adjacency[index])
        return near

    def partners(self, index: int) -> list[int]:
        """Whom `index` shares a key with: neighbours and committee, and everybody if it is a
        member; ascending.
        """
        if self.complete or index in self.committee:
            return [i for i in range(self._cohort) if i != index]
        return sorted({*self.neighbours(index).tolist(), *self.committee})

    def sparse_in(self, members: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those of `members` that keep fewer than `degree_floor` neighbours among `members`."""
        if self._adjacency is None:
            return members[:0]
        kept = self._adjacency[np.ix_(members, members)].sum(axis=1)
        sparse: NDArray[np.intp] = members[kept < self.degree_floor]
        return sparse


def _ring(cohort: int, degree: int) -> NDArray[np.bool_]:
    """Everybody with the `degree` nearest in a circle; an odd one, of an even number of clients,
    with the one opposite too.
    """
    apart = np.abs(np.subtract.outer(np.arange(cohort), np.arange(cohort)))
    apart = np.minimum(apart, cohort - apart)
    adjacency: NDArray[np.bool_] = (apart > 0) & (
        (apart <= degree // 2) | (2 * apart == cohort if degree % 2 else False)
    )
    return adjacency


def _random_graph(cohort: int, degree: int, seed: bytes) -> NDArray[np.bool_]:
    draws = Keystream(seed).words(-(-cohort * cohort // 4))
    chance = draws.view(np.uint16)[: cohort * cohort].reshape(cohort, cohort)
    upper = np.triu(chance < _edge(cohort, degree), 1)
    adjacency: NDArray[np.bool_] = upper | upper.T
    return adjacency
