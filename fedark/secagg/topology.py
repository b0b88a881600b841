"""Who masks with whom, and who can unmask: derived from the session identifier, never chosen by the server.

Committee. Every client shares its round secrets, t of c, with a committee that is fixed for the session (Flamingo, Ma et al.
2023). With at most g colluding members and 2 t > c + g, two disjoint sets of honest members can never both complete a quorum:
no party's self-mask seed and pairwise seeds "without that party" are both recovered, in one round or across two rounds. Up to
a few hundred clients everybody is a member; beyond, a sample whose chance to hold more than 2 t - c - 1 colluders (a
hypergeometric tail) is below 2**-STATISTICAL_BITS.

Graph. Small cohorts mask with everybody (Bonawitz et al. 2017). Large ones use a random graph with independent edges, with the
aim of Bell et al. 2020 but against a server that names the dropped clients after it has seen the graph. A survivor must keep
`degree_floor` surviving neighbours; `split_bound` then bounds the probability that the honest survivors of any admissible
survivor set fall into two parts, of which the server could learn separate sums: small parts are impossible unless a client has
too many colluding neighbours (binomial tail), larger ones unless a whole set of honest clients has too few honest neighbours
(union bound over sets). The smallest mean degree that meets 2**-STATISTICAL_BITS is taken. 40 of these bits are margin for a
colluding client that tries many key announcements in order to choose the session identifier.

The price is paid in rounds, not in secrets: one in which some survivor is left with fewer than `degree_floor` neighbours is refused.
With 80 to 200 clients that happens to up to 7 % of rounds with a tenth of the clients gone, to 20 to 40 % with a fifth gone, and
to most with three tenths gone (measured over random sessions); complete graphs, up to 64 clients, know no such case.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedark.secagg.policy import Policy
from fedark.secagg.stream import Keystream

__all__ = ["STATISTICAL_BITS", "Topology", "committee_bound", "committee_size", "graph_degree", "split_bound", "threshold"]

STATISTICAL_BITS = 80
_COMPLETE = 64
_COMMITTEE = 1 << 32
"""First block of the seed's stream that the committee is drawn from; the graph's blocks come before."""
_LOG2E = 1 / math.log(2)


def threshold(committee: int, colluders: int) -> int:
    """Shares that recover a secret: two thirds of the committee, and more than (committee + colluders) / 2."""
    return max(-(-2 * committee // 3), (committee + colluders) // 2 + 1)


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) * _LOG2E


def _log2_sum(terms: list[float]) -> float:
    top = max(terms, default=-math.inf)
    return top if math.isinf(top) else top + math.log2(sum(2.0 ** (term - top) for term in terms))


def _log2_tail(trials: int, chance: float, bound: float) -> float:
    """log2 of Chernoff's bound on a binomial that is far from its mean: at least `bound` above it, at most `bound` below."""
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
    """log2 of the probability that a random committee holds more colluders than its threshold tolerates (-inf: cannot)."""
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


def split_bound(cohort: int, colluders: int, minimum: int, degree: int) -> float:
    """log2 of the probability that some admissible survivor set splits the honest survivors, for a mean degree."""
    honest, dropped, edge = cohort - colluders, cohort - minimum, degree / (cohort - 1)
    floor = degree // 2
    sets = []
    for size in range(1, honest // 2 + 1):
        reach = 1 - (1 - edge) ** size
        near, outside = min(dropped, honest - 2 * size), honest - size
        tail = _log2_tail(outside, reach, near) if near < outside * reach else 0.0
        sets.append(_log2_choose(honest, size) + tail)
    best = 0.0
    # A part has more members than the honest surviving neighbours that each of them is sure to keep.
    for kept in range(1, min(floor, len(sets))):
        crowded = floor - kept + 1
        isolated = math.log2(honest) + (_log2_tail(colluders, edge, crowded) if crowded > colluders * edge else 0.0)
        if isolated > -STATISTICAL_BITS:
            break
        best = min(best, _log2_sum([isolated, *sets[kept:]]))
    return best


@lru_cache(maxsize=64)
def graph_degree(cohort: int, colluders: int, minimum: int) -> int:
    """Mean number of neighbours; cohort - 1 where nothing is gained by fewer."""
    if cohort <= _COMPLETE:
        return cohort - 1
    for degree in range(32, int(0.8 * (cohort - 1)), 4):
        if split_bound(cohort, colluders, minimum, degree) <= -STATISTICAL_BITS:
            return degree
    return cohort - 1


class Topology:
    """Graph, committee and thresholds of one session of `cohort` clients, known by their index in the directory.

    Attributes:
        committee: indices of the members, ascending.
        threshold: t.
        complete: everybody masks with everybody.
        degree_floor: surviving neighbours that every survivor must keep.
        agreement: members release nothing before t of them have signed one survivor set.
    """

    def __init__(self, policy: Policy, cohort: int, seed: bytes) -> None:
        """`seed`: 32 bytes, from the session identifier. `cohort`: at least the policy's minimum, so colluders <= cohort - 2 and
        the threshold exists.
        """
        colluders, minimum = policy.colluders, policy.minimum
        size = committee_size(cohort, colluders)
        degree = graph_degree(cohort, colluders, minimum)
        self.complete = degree == cohort - 1
        self.degree_floor = 0 if self.complete else degree // 2
        self.threshold = threshold(size, colluders if size == cohort else 0)
        draws = Keystream(seed).words(cohort, first=_COMMITTEE)
        self.committee = tuple(int(i) for i in np.sort(np.argsort(draws, kind="stable")[:size]))
        self._adjacency = _random_graph(cohort, degree, seed) if not self.complete else None
        self._cohort = cohort
        bad = colluders if size == cohort else 2 * self.threshold - size - 1
        dropped = (cohort - minimum) * (size - bad) // (self.threshold - bad)
        # Without agreement one sum may cover fewer than `minimum`: each honest member names at most cohort - minimum dropped
        # clients, and threshold - bad of them are needed to treat a client as dropped.
        self.agreement = policy.agreement or not self.complete or cohort - dropped - colluders < 2

    def neighbours(self, index: int) -> NDArray[np.intp]:
        """Indices of the clients that `index` masks with, ascending."""
        if self._adjacency is None:
            return np.delete(np.arange(self._cohort), index)
        near: NDArray[np.intp] = np.flatnonzero(self._adjacency[index])
        return near

    def partners(self, index: int) -> list[int]:
        """Whom `index` shares a key with: neighbours and committee, and everybody if it is a member; ascending."""
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


def _random_graph(cohort: int, degree: int, seed: bytes) -> NDArray[np.bool_]:
    draws = Keystream(seed).words(-(-cohort * cohort // 4))
    chance = draws.view(np.uint16)[: cohort * cohort].reshape(cohort, cohort)
    upper = np.triu(chance < round(degree / (cohort - 1) * (1 << 16)), 1)
    adjacency: NDArray[np.bool_] = upper | upper.T
    return adjacency
