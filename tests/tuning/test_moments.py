"""Moments are exact sums, and the head that follows from them is the ridge head of all records."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fedark.contract.taste import LIMB_BITS, Shape
from fedark.foundation.errors import InputError, ProtocolError, Refused
from fedark.tuning.moments import Moments, from_limbs, integers, moments, solve, to_limbs

WIDTH, LABELS = 12, 3
SHAPE = Shape(WIDTH, LABELS, 1.0, centred=True, records=10_000)


def records(count: int, seed: int = 1) -> tuple[np.ndarray[Any, Any], list[int]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, LABELS, count)
    features = generator.normal(size=(count, WIDTH)) + 2 * np.eye(LABELS, WIDTH)[labels]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels.tolist()


def whole(shape: Shape, features: np.ndarray[Any, Any], labels: list[int]) -> Moments:
    return moments(shape, integers(shape, features, labels))


@pytest.mark.parametrize("cuts", [[], [1], [50, 51, 400]])
def test_however_records_are_split_the_sum_is_the_same_to_the_last_bit(cuts: list[int]) -> None:
    features, labels = records(500)
    together = integers(SHAPE, features, labels)
    edges = [0, *cuts, 500]
    parts = [to_limbs(integers(SHAPE, features[a:b], labels[a:b])) for a, b in pairwise(edges)]
    assert all(part.dtype == np.float32 for part in parts)
    assert (from_limbs(np.sum(np.asarray(parts, np.float64), axis=0)) == together).all()


@pytest.mark.parametrize("value", [0, 1, -1, (1 << 45) - 1, -(1 << 45), 12345678901])
def test_two_limbs_hold_an_integer_without_rounding(value: int) -> None:
    limbs = to_limbs(np.array([value, -value], np.int64))
    assert from_limbs(limbs).tolist() == [value, -value]
    assert np.abs(limbs).max() < 1 << LIMB_BITS


@pytest.mark.parametrize("records_at_most", [1, 10_000, 5_000_000])
def test_no_customers_sum_leaves_its_limbs(records_at_most: int) -> None:
    shape = Shape(1, 2, 1.0, centred=False, records=records_at_most)
    largest = records_at_most * (1 << 2 * shape.places)
    assert largest < 1 << 2 * LIMB_BITS
    assert np.abs(to_limbs(np.array([largest, -largest], np.int64))).max() < 1 << LIMB_BITS
    assert shape.places >= 11


@pytest.mark.parametrize("centred", [True, False])
def test_the_head_is_the_ridge_head_of_all_records(centred: bool) -> None:
    shape = Shape(WIDTH, LABELS, 1.0, centred=centred, records=10_000)
    features, labels = records(400)
    head = solve(
        shape,
        whole(shape, features[:300], labels[:300]),
        whole(shape, features[300:], labels[300:]),
    )
    rows, wanted = features.astype(np.float64), np.eye(LABELS)[labels]
    mean, share = (rows.mean(0), wanted.mean(0)) if centred else (0.0, 0.0)
    gram = (rows - mean).T @ (rows - mean) + head.regularisation * np.eye(WIDTH)
    weight = np.linalg.solve(gram, (rows - mean).T @ (wanted - share))
    assert np.abs(head.weight - weight.T).max() < 1e-3
    assert np.abs(head.bias - (share - mean @ weight if centred else 0)).max() < 1e-3


def test_the_regularisation_is_the_one_with_the_least_error_on_what_was_held_out() -> None:
    features, labels = records(40)
    other, said = records(400, seed=2)
    head = solve(SHAPE, whole(SHAPE, features, labels), whole(SHAPE, other, said))
    errors = {}
    for power in np.arange(-3.0, 2.25, 0.5):
        rows, wanted = features.astype(float), np.eye(LABELS)[labels]
        mean, share = rows.mean(0), wanted.mean(0)
        gram = (rows - mean).T @ (rows - mean) + 10.0**power * np.eye(WIDTH)
        weight = np.linalg.solve(gram, (rows - mean).T @ (wanted - share))
        scores = (other - mean) @ weight + share
        errors[10.0**power] = float(((scores - np.eye(LABELS)[said]) ** 2).sum(1).mean())
    best = min(errors, key=lambda one: errors[one])
    assert head.regularisation == pytest.approx(best)
    assert head.error == pytest.approx(errors[best], abs=1e-3)


def test_without_records_to_choose_by_the_usual_regularisation_is_taken() -> None:
    nothing = whole(SHAPE, np.zeros((0, WIDTH), np.float32), [])
    head = solve(SHAPE, whole(SHAPE, *records(50)), nothing)
    assert (head.regularisation, head.error) == (0.3, -1.0)
    assert np.isfinite(solve(SHAPE, nothing, nothing).weight).all()


def test_a_feature_beyond_its_norm_counts_no_more_than_one_of_that_norm() -> None:
    shape = Shape(2, 2, 2.0, centred=False, records=10)
    long = whole(shape, np.array([[1e6, 0.0]], np.float32), [0])
    assert long.xx[0, 0] == 1.0
    assert whole(shape, np.array([[1.0, 0.0]], np.float32), [0]).xx[0, 0] == 0.25


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features, labels = records(3)
    features[1, 1] = value
    with pytest.raises(InputError, match="not finite"):
        integers(SHAPE, features, labels)


@pytest.mark.parametrize("what", ["trace", "counts", "labels", "diagonal"])
def test_sums_that_no_records_have_are_refused(what: str) -> None:
    summed = integers(SHAPE, *records(50))
    diagonal = np.cumsum([0, *range(WIDTH, 1, -1)])
    at, by = {
        "trace": (diagonal[0], 100 << 2 * SHAPE.places),
        "diagonal": (diagonal[1], -100 << 2 * SHAPE.places),
        "counts": (summed.size - 1, -100),
        "labels": (WIDTH * (WIDTH + 1) // 2, 100 << SHAPE.places),
    }[what]
    summed[at] += by
    with pytest.raises(Refused, match="No records"):
        moments(SHAPE, summed)


def test_sums_of_another_shape_are_refused() -> None:
    with pytest.raises(ProtocolError, match="shape"):
        moments(SHAPE, np.zeros(SHAPE.values + 1, np.int64))


def test_a_customer_subtracted_from_the_sum_leaves_to_the_last_bit_the_sum_that_never_had_it() -> (
    None
):
    features, labels = records(60)
    parts = [integers(SHAPE, features[a:b], labels[a:b]) for a, b in ((0, 20), (20, 45), (45, 60))]
    left, never = sum(parts) - parts[1], parts[0] + parts[2]
    assert (left == never).all()
    heads = [solve(SHAPE, moments(SHAPE, one), moments(SHAPE, parts[0])) for one in (left, never)]
    assert (heads[0].weight == heads[1].weight).all()
