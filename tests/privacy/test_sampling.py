"""Poisson sampling: what is accounted for is what is drawn, and another sampler is told apart."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, chi2, norm

from fedark.foundation.errors import InputError
from fedark.privacy.sampling import poisson_sample, sampler_problems

RATE = Fraction("0.1")
ALARM = 1e-6


def keyed(number):
    return number.to_bytes(32, "big")


def rounds(count, population=1250, rate=RATE):
    return [poisson_sample(population, rate, key=keyed(number)) for number in range(count)]


def shuffled(epochs, population=1250, batch=125):
    draw = np.random.default_rng(1)
    for _ in range(epochs):
        order = draw.permutation(population)
        yield from (np.sort(order[at : at + batch]) for at in range(0, population, batch))


def test_batch_sizes_are_binomial():
    sizes = np.array([batch.size for batch in rounds(4000, population=40)])
    expected = binom.pmf(np.arange(12), 40, 0.1) * 4000
    observed = np.bincount(np.minimum(sizes, 11), minlength=12)
    expected[11] = 4000 - expected[:11].sum()
    assert np.sum((observed - expected) ** 2 / expected) < chi2.isf(ALARM, 11)


def test_inclusion_is_independent_of_record_neighbour_and_round():
    present = np.zeros((400, 1000), bool)
    for number, batch in enumerate(rounds(400, population=1000)):
        present[number, batch] = True
    total, q = present.size, 0.1
    limit = norm.isf(ALARM)
    assert abs(present.mean() - q) < limit * math.sqrt(q * (1 - q) / total)
    for left, right in ((present[1:], present[:-1]), (present[:, 1:], present[:, :-1])):
        assert abs((left & right).mean() - q**2) < limit * math.sqrt(3 * q**2 / left.size)
    assert sampler_problems([np.flatnonzero(row) for row in present], 1000, RATE) == []


def test_empty_batches_are_drawn_and_are_fine():
    sizes = [batch.size for batch in rounds(300, population=5)]
    assert 0 in sizes
    assert poisson_sample(0, RATE).size == 0


def test_a_rate_that_is_no_binary_fraction_is_exact_and_one_draws_all():
    assert poisson_sample(7, Fraction(1)).tolist() == list(range(7))
    third = sum(
        poisson_sample(300_000, Fraction(1, 3), key=keyed(number)).size for number in range(3)
    )
    assert abs(third - 300_000) < norm.isf(ALARM) * math.sqrt(900_000 * 2 / 9)


def test_fresh_draws_differ():
    assert not np.array_equal(poisson_sample(10_000, RATE), poisson_sample(10_000, RATE))


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(3, 2), Fraction(0.1)])
def test_a_rate_that_cannot_be_sampled_exactly_is_refused(rate):
    with pytest.raises(InputError):
        poisson_sample(10, rate)


def test_true_poisson_samples_have_no_problems():
    assert sampler_problems(rounds(60), 1250, RATE) == []


def test_shuffled_batches_of_a_fixed_size_are_caught():
    found = sampler_problems(list(shuffled(6)), 1250, RATE)
    assert len(found) == 3


def test_fixed_size_batches_drawn_afresh_are_caught():
    draw = np.random.default_rng(2)
    batches = [draw.choice(1250, 125, replace=False) for _ in range(60)]
    assert any("batch sizes" in problem for problem in sampler_problems(batches, 1250, RATE))


def test_shuffled_batches_with_jittered_sizes_are_caught():
    draw = np.random.default_rng(3)
    batches = []
    for _ in range(6):
        order, sizes = draw.permutation(1250), draw.binomial(1250, 0.1, 10)
        edges = np.cumsum(sizes)
        batches += np.split(order, np.minimum(edges, 1250))[:10]
    assert sampler_problems(batches, 1250, RATE)


def test_another_rate_and_records_that_come_together_are_caught():
    assert sampler_problems(rounds(60, rate=Fraction(13, 100)), 1250, RATE)
    fours = [(4 * batch[:, None] + np.arange(4)).ravel() for batch in rounds(60, population=312)]
    assert any("batch sizes" in problem for problem in sampler_problems(fours, 1248, RATE))


def test_the_same_batch_every_round_is_caught():
    assert sampler_problems([rounds(1)[0]] * 60, 1250, RATE)


def test_doubled_and_foreign_indices_are_caught():
    good = rounds(30)
    assert sampler_problems([*good, np.array([3, 3])], 1250, RATE) == [
        "a batch holds a record twice"
    ]
    assert sampler_problems([*good, np.array([1250])], 1250, RATE) == [
        "a batch holds an index that is no record's"
    ]


def test_a_check_that_could_find_nothing_is_refused():
    with pytest.raises(InputError):
        sampler_problems(rounds(5), 1250, RATE)
    with pytest.raises(InputError):
        sampler_problems(rounds(60, population=20), 20, RATE)
