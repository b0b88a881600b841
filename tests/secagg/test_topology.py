"""Thresholds, committees and graphs: the bounds that keep the server from a second sum."""

from __future__ import annotations

import os
from itertools import chain, combinations, product

import numpy as np
import pytest

import fedark.secagg.topology as topology_module
from fedark.foundation.errors import ContractError
from fedark.secagg import Layout, SessionTerms
from fedark.secagg.topology import (
    REFUSAL_BITS,
    STATISTICAL_BITS,
    Topology,
    committee_bound,
    committee_size,
    graph_degree,
    most_dropped,
    must_agree,
    refusal_bound,
    smallest_sum,
    split_bound,
    threshold,
)


def terms(size, minimum, colluders, agreement=False):
    return SessionTerms(
        bytes(48),
        "r",
        tuple(f"c{i:04d}" for i in range(size)),
        minimum,
        colluders,
        (Layout("x", 1),),
        agreement,
    )


@pytest.mark.parametrize("size", [3, 4, 5, 7, 10, 33, 64])
def test_two_quorums_always_share_an_honest_member(size):
    for colluders in range(size):
        need = threshold(size, colluders)
        if need > size:
            continue
        # Each quorum counts every colluder; the honest parts of two disjoint ones would need this
        # many members.
        assert 2 * (need - colluders) > size - colluders


def test_more_colluders_than_any_threshold_tolerates_are_refused():
    with pytest.raises(ContractError, match="colluders"):
        terms(5, 4, 3)
    for size in range(3, 12):
        for colluders in range(size - 1):
            assert Topology(terms(size, size, colluders), size, bytes(32)).threshold <= size


@pytest.mark.parametrize(
    ("size", "minimum", "match"),
    [(2, 2, "3 to"), (5, 2, "minimum"), (5, 6, "minimum"), (3000, 9, "3 to")],
)
def test_cohorts_whose_sum_tells_too_much_are_refused(size, minimum, match):
    with pytest.raises(ContractError, match=match):
        terms(size, minimum, 0)


@pytest.mark.parametrize(("size", "colluders"), [(200, 20), (500, 50), (1000, 100), (2000, 200)])
def test_a_sampled_committee_and_a_sparse_graph_meet_their_bounds(size, colluders):
    committee = committee_size(size, colluders)
    assert committee < size
    assert committee_bound(size, colluders, committee) <= -STATISTICAL_BITS
    minimum = 7 * size // 10
    mean, floor = graph_degree(size, colluders, minimum)
    assert mean < size - 1
    assert split_bound(size, colluders, minimum, mean, floor) <= -STATISTICAL_BITS
    assert refusal_bound(size, minimum, mean, floor) <= -REFUSAL_BITS
    assert split_bound(size, colluders, minimum, mean, floor - 1) > -STATISTICAL_BITS, (
        "control: the floor is the lowest that does"
    )


def random_graph(rng, size, chance):
    """A graph with independent edges: for every client a bit mask of its neighbours."""
    upper = np.triu(rng.random((size, size)) < chance, 1)
    return [sum(1 << int(v) for v in np.flatnonzero(row)) for row in upper | upper.T]


def splits(graph, colluders, minimum, floor):
    """Exhaustive: whether any admissible survivor set leaves the honest survivors (those from
    `colluders` on) in two parts.
    """
    size = len(graph)
    for gone in chain.from_iterable(
        combinations(range(size), count) for count in range(size - minimum + 1)
    ):
        alive = (1 << size) - 1 & ~sum(1 << v for v in gone)
        if any(alive >> v & 1 and (graph[v] & alive).bit_count() < floor for v in range(size)):
            continue
        honest = alive >> colluders << colluders
        reached = frontier = honest & -honest
        while frontier:
            near = 0
            for v in range(size):
                near |= graph[v] if frontier >> v & 1 else 0
            frontier = near & honest & ~reached
            reached |= frontier
        if reached != honest:
            return True
    return False


@pytest.mark.parametrize(
    ("size", "colluders", "minimum", "degree", "floor"),
    [(13, 2, 12, 6, 2), (14, 4, 12, 9, 2), (16, 2, 15, 6, 2), (16, 4, 14, 8, 4), (20, 4, 19, 8, 3)],
)
def test_the_split_bound_holds_over_every_survivor_set_of_small_graphs(
    size, colluders, minimum, degree, floor
):
    rng = np.random.default_rng(size)
    graphs = [random_graph(rng, size, degree / (size - 1)) for _ in range(500)]
    found = np.mean([splits(graph, colluders, minimum, floor) for graph in graphs])
    assert 0 < found < 2.0 ** split_bound(size, colluders, minimum, degree, floor) < 0.2


def test_the_refusal_bound_is_met_by_random_drops():
    size, minimum, degree, floor = 80, 56, 40, 18
    rng = np.random.default_rng(1)
    rounds, lost = 3000, 0
    for _ in range(rounds):
        graph = np.triu(rng.random((size, size)) < degree / (size - 1), 1)
        graph = (graph | graph.T)[:minimum, :minimum]  # whoever drops: all clients are alike
        lost += graph.sum(axis=1).min() < floor
    bound = 2.0 ** refusal_bound(size, minimum, degree, floor)
    assert 0.3 * bound < lost / rounds < bound + 4 * np.sqrt(bound / rounds)


@pytest.mark.parametrize(("size", "colluders"), [(65, 1), (80, 8), (200, 20), (500, 50)])
def test_random_drops_of_as_many_clients_as_admitted_cost_no_round(size, colluders):
    minimum = -(-7 * size // 10)
    rng = np.random.default_rng(size)
    seeds = (f"{size}/{i}".encode().ljust(32, b".") for i in range(40))
    topologies = [Topology(terms(size, minimum, colluders), size, seed) for seed in seeds]
    refused = sum(
        bool(one.sparse_in(np.sort(rng.permutation(size)[:minimum])).size) for one in topologies
    )
    assert not topologies[0].complete
    assert refused == 0


def test_the_committee_bound_is_the_probability_that_sampling_shows():
    size, colluders, committee = 100, 40, 30
    most = 2 * threshold(committee, 0) - committee - 1
    rng = np.random.default_rng(1)
    hits = np.mean(
        [np.sum(rng.permutation(size)[:committee] < colluders) > most for _ in range(20_000)]
    )
    expected = 2.0 ** committee_bound(size, colluders, committee)
    assert abs(hits - expected) < 6 * np.sqrt(expected / 20_000)


def test_small_cohorts_mask_with_everybody_and_everybody_unmasks():
    topology = Topology(terms(10, 7, 3), 10, os.urandom(32))
    assert topology.complete
    assert topology.committee == tuple(range(10))
    assert topology.neighbours(3).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def ring(size, degree):
    """For every client a bit mask of its neighbours."""
    return [
        sum(1 << int(v) for v in np.flatnonzero(row)) for row in topology_module._ring(size, degree)
    ]


def reached_from(graph, start, within):
    """The clients that can be reached from `start` over clients of the bit mask `within`."""
    found = frontier = start
    while frontier:
        near = 0
        for v in range(len(graph)):
            near |= graph[v] if frontier >> v & 1 else 0
        frontier = near & within & ~found
        found |= frontier
    return found


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 8, 9, 10, 11])
def test_a_ring_falls_apart_for_no_fewer_clients_than_each_has_neighbours(size):
    for degree in range(2, size):
        if degree * size % 2:
            continue
        graph = ring(size, degree)
        assert all(row.bit_count() == degree for row in graph)
        assert all(
            (graph[v] >> u & 1) == (graph[u] >> v & 1) and not graph[u] >> u & 1
            for u in range(size)
            for v in range(size)
        )
        for gone in combinations(range(size), degree - 1):
            left = (1 << size) - 1 & ~sum(1 << v for v in gone)
            assert reached_from(graph, left & -left, left) == left
        alone = (1 << size) - 1 & ~graph[0]
        assert degree == size - 1 or reached_from(graph, 1, alone) != alone, (
            "control: its neighbours gone, a client stands alone"
        )


def learnt(graph, need, colluders, answers):
    """The smallest sums that a server learns, as sets of honest clients (the first), if honest
    member i released for answers[i].

    A set's sum is known when all its self-masks are, and the pair masks of every edge that leaves
    it to an honest client.
    """
    honest = len(answers)
    known = {u for u in range(honest) if sum(u in a for a in answers) + colluders >= need}
    tied = [0] * honest  # by edges whose masks are not recovered: what is learnt goes together
    for u, v in combinations(range(honest), 2):
        told = max(
            sum(one in a and other not in a for a in answers) for one, other in ((u, v), (v, u))
        )
        if graph[u] >> v & 1 and told + colluders < need:
            tied[u] |= 1 << v
            tied[v] |= 1 << u
    sums = []
    for u in known:
        # Everything that must be in a sum with u: it ends where it meets somebody whose self-mask
        # is not known.
        found = reached_from(tied, 1 << u, (1 << honest) - 1)
        if all(v in known for v in range(honest) if found >> v & 1):
            sums.append(found)
    return {one for one in sums if not any(other != one and other & one == other for other in sums)}


@pytest.mark.parametrize(
    ("size", "minimum", "colluders"),
    [
        (5, 4, 0),
        (6, 5, 0),
        (6, 5, 1),
        (7, 6, 0),
        (7, 6, 1),
        (8, 7, 1),
        (9, 8, 1),
        (9, 7, 0),
        (10, 8, 0),
    ],
)
def test_whatever_survivors_a_server_shows_to_whom_a_ring_gives_away_one_sum(
    size, minimum, colluders
):
    """Without agreement, each honest member answers for a set of its own."""
    rng = np.random.default_rng(size)
    need, degree = threshold(size, colluders), graph_degree(size, colluders, minimum).mean
    assert degree < size - 1
    assert not must_agree(size, colluders, minimum)
    everybody = frozenset(range(size))
    sets = [
        everybody - set(gone)
        for count in range(size - minimum + 1)
        for gone in combinations(range(size), count)
    ]
    honest = size - colluders
    if exhaustive := len(sets) ** honest <= 20_000:
        choices = product(sets, repeat=honest)
    else:  # few different sets: with many, nothing finds a quorum
        choices = (
            [sets[i] for i in rng.choice(rng.permutation(len(sets))[:3], honest)]
            for _ in range(1000)
        )
    # Colluders, the last, stand anywhere in the ring.
    graphs = []
    for order in (rng.permutation(size) for _ in range(20)):
        whole = topology_module._ring(size, degree)[np.ix_(order, order)]
        graphs.append([sum(1 << int(v) for v in np.flatnonzero(row)) for row in whole])
    fewest = size
    for number, answers in enumerate(choices):
        sums = learnt(graphs[number % 20], need, colluders, answers)
        assert len(sums) <= 1
        fewest = min([fewest, *(one.bit_count() for one in sums)])
    assert fewest < size, "control: something is learnt"
    assert not exhaustive or fewest <= minimum
    assert honest - most_dropped(size, colluders, minimum, False) <= fewest <= honest


def test_control_a_ring_of_too_few_neighbours_gives_away_a_part():
    everybody = frozenset(range(6))
    answers = [everybody - {1, 5}] * 6
    assert learnt(ring(6, 2), threshold(6, 0), 0, answers) == {0b000001, 0b011100}
    assert learnt(ring(6, 4), threshold(6, 0), 0, answers) == {0b011101}


def test_every_small_cohort_stays_connected_whoever_is_taken_away():
    """Found in review: with nobody to take away each had one neighbour, and every pair gave away
    its sum.
    """
    for size in range(3, 10):
        for minimum in range(3, size + 1):
            for colluders in range(minimum - 1):
                for agreement in (False, True):
                    agreed = agreement or must_agree(size, colluders, minimum)
                    taken = colluders + most_dropped(size, colluders, minimum, agreed)
                    graph = ring(size, graph_degree(size, colluders, minimum, agreement).mean)
                    for gone in combinations(range(size), min(taken, size - 2)):
                        left = (1 << size) - 1 & ~sum(1 << v for v in gone)
                        assert reached_from(graph, left & -left, left) == left, (
                            size,
                            minimum,
                            colluders,
                            agreement,
                        )


@pytest.mark.parametrize("size", [4, 10, 33, 50, 64, 65, 100, 200])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_a_ring_has_more_neighbours_than_clients_can_be_taken_away(size, share):
    colluders, minimum = int(share * size), max(3, -(-7 * size // 10))
    for agreement in (False, True):
        degree, floor = graph_degree(size, colluders, minimum, agreement)
        agreed = agreement or must_agree(size, colluders, minimum)
        if not floor:
            assert degree >= 2
            assert degree >= min(
                size - 1, colluders + most_dropped(size, colluders, minimum, agreed) + 1
            )
            assert degree * size % 2 == 0
        assert (
            most_dropped(size, colluders, minimum, False)
            >= most_dropped(size, colluders, minimum, True)
            == size - minimum
        )


def test_graph_and_committee_come_from_the_seed_and_are_symmetric():
    logs = terms(300, 210, 15)
    seed = os.urandom(32)
    one, same, other = (
        Topology(logs, 300, seed),
        Topology(logs, 300, seed),
        Topology(logs, 300, os.urandom(32)),
    )
    assert one.committee == same.committee != other.committee
    for u in range(0, 300, 17):
        assert u not in one.neighbours(u)
        assert np.array_equal(one.neighbours(u), same.neighbours(u))
        assert all(u in one.neighbours(int(v)) for v in one.neighbours(u))
    mean = np.mean([one.neighbours(u).size for u in range(300)])
    assert abs(mean - graph_degree(300, 15, 210).mean) < 6


def test_a_client_whose_neighbours_are_all_declared_gone_makes_the_survivor_set_inadmissible():
    """The attack on sparse graphs: drop exactly the victim's neighbours, and its masks are all
    recovered.
    """
    topology = Topology(terms(300, 210, 15), 300, os.urandom(32))
    survivors = np.setdiff1d(np.arange(300), topology.neighbours(7))
    assert survivors.size > 210
    assert 7 in topology.sparse_in(survivors)
    assert topology.sparse_in(np.arange(300)).size == 0


def test_honest_survivors_stay_connected_when_an_adversary_drops_as_many_as_it_may():
    """Greedy attempts to cut a few clients out of the graph never pass the degree check."""
    size, colluders, minimum = 300, 15, 210
    rng = np.random.default_rng(3)
    topology = Topology(terms(size, minimum, colluders), size, os.urandom(32))
    adjacency = np.zeros((size, size), bool)
    for u in range(size):
        adjacency[u, topology.neighbours(u)] = True
    for _ in range(8):
        part = list(rng.permutation(size)[:1])
        corrupt = set(rng.permutation(size)[:colluders].tolist()) - set(part)
        for _ in range(10):
            border = np.flatnonzero(adjacency[part].any(axis=0))
            border = [v for v in border if v not in part and v not in corrupt]
            if len(border) > size - minimum:
                border = sorted(border, key=lambda v: -adjacency[v, part].sum())[: size - minimum]
            survivors = np.array([v for v in range(size) if v not in border])
            honest = [v for v in survivors if v not in corrupt]
            reached, frontier = {honest[0]}, [honest[0]]
            while frontier:
                near = np.flatnonzero(adjacency[frontier].any(axis=0))
                frontier = [int(v) for v in near if v in set(honest) - reached]
                reached |= set(frontier)
            assert len(reached) == len(honest) or topology.sparse_in(survivors).size > 0
            part.append(int(border[0]))


def revealed(size, need, colluders, minimum):
    """Exhaustive: the largest number of distinct sums, and the smallest sum, over all answers of
    the honest members.

    Members 0.. are honest; each names one survivor set of at least `minimum`. A client counts as
    alive if `need` members (with the colluders) named it, as gone if `need` did not.
    """
    sets = [
        frozenset(s)
        for bits in product([0, 1], repeat=size)
        if len(s := [i for i in range(size) if bits[i]]) >= minimum
    ]
    honest = size - colluders
    both, smallest = 0, size
    for answers in product(sets, repeat=honest):
        alive = {v for v in range(size) if sum(v in a for a in answers) + colluders >= need}
        gone = {v for v in range(size) if sum(v not in a for a in answers) + colluders >= need}
        both = max(both, len(alive & gone & set(range(honest))))
        if alive | gone >= set(range(honest)):
            smallest = min(smallest, len((alive - gone) & set(range(honest))))
    return both, smallest


@pytest.mark.parametrize(
    ("size", "colluders", "minimum"), [(3, 0, 3), (3, 1, 3), (4, 1, 3), (4, 0, 3)]
)
def test_no_answers_of_honest_members_reveal_both_secrets_of_a_party(size, colluders, minimum):
    both, smallest = revealed(size, threshold(size, colluders), colluders, minimum)
    assert both == 0
    assert smallest >= 2 or Topology(terms(size, minimum, colluders), size, bytes(32)).agreement


def test_control_with_a_low_threshold_some_answers_reveal_both_secrets_of_a_party():
    assert revealed(4, 2, 0, 3)[0] > 0


def test_the_smallest_sum_is_over_every_session_that_a_server_may_make_of_a_roster():
    assert smallest_sum(20, 1, 10, False) == 20 - most_dropped(20, 1, 10, False) == 6
    # All 24 would have to agree; 20 of them would not.
    assert must_agree(24, 1, 8)
    assert not must_agree(17, 1, 8)
    assert smallest_sum(24, 1, 8, False) == 3
    assert smallest_sum(2048, 1, 3, True) == 3
    for size in range(3, 40):
        for minimum in range(3, size + 1):
            assert smallest_sum(size, 1, minimum, True) == minimum
            assert 3 <= smallest_sum(size, 1, minimum, False) <= minimum, "two that are honest"


def test_agreement_is_asked_for_where_split_answers_could_leave_fewer_than_two_honest_clients():
    assert Topology(terms(10, 5, 3), 10, bytes(32)).agreement
    assert not Topology(terms(10, 7, 1), 10, bytes(32)).agreement
    assert Topology(terms(10, 7, 1, agreement=True), 10, bytes(32)).agreement
