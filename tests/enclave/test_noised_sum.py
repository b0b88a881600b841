"""In mode "sealed" too, what is released of a round is a function of the integer sum alone, which
is what the accountant knows: no order of arrival and no rounding of one customer's share is in it.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedark.contract.contract import Contract
from fedark.contract.privacy import noised, noised_layout, noised_sum, noised_words
from fedark.enclave.aggregator import AggregatorSession
from fedark.enclave.protection import Payload
from fedark.enclave.session import RunConfig
from fedark.foundation.errors import FedarkError, ProtocolError, Refused
from fedark.secagg.vector import RoundSum

sys.path.append(str(Path(__file__).parents[1] / "stages"))
import parties

SIZE = 1000
NAMES = ("north", "east", "south")


def private(mechanism: str = "example-distributed") -> Contract:
    models = [
        parties.model(name)
        | {"layout": ({"name": "head.weight", "shape": (2, SIZE // 2), "travels": True},)}
        for name in ("one", "two")
    ]
    privacy = {
        "mechanism": mechanism,
        "epsilon": 8.0,
        "noise_multiplier": 1.0,
        "clip_norm": 1.0,
        "records": 300,
        "sampling_rate": 0.1,
    }
    return parties.contract(models=models, privacy=privacy, protection={"minimum_cohort": 3})


def words_of(contract: Contract) -> dict[str, Any]:
    draws = np.random.default_rng(7)
    return {
        name: noised_words(contract, draws.normal(0, 1, 2 * SIZE).astype(np.float32))
        for name in NAMES
    }


def aggregated(contract: Contract, words: dict[str, Any], order: tuple[str, ...]) -> Any:
    config = RunConfig(role="aggregator", party="pool", contract=contract, run_id="0" * 32)
    session = AggregatorSession(config, lambda report, nonce: ("simulated", b""))
    session._number = 1
    for name in order:
        payload = Payload(1, {}, {}, noised=words[name].astype("<u8").tobytes())
        session._received[name] = b"", Payload.decode(payload.encode())
    return session._means()


@pytest.mark.parametrize("mechanism", ["example-distributed", "customer-level"])
def test_every_order_of_arrival_gives_the_integer_sum_bit_for_bit(mechanism: str) -> None:
    contract = private(mechanism)
    layout, words = noised_layout(contract, "noised"), words_of(contract)
    integers = sum(RoundSum(layout, ("",), 3, part).integers() for part in words.values())
    wanted = (integers * (layout.step * layout.max_weight / 3)).astype(np.float32)
    for order in itertools.permutations(NAMES):
        means = aggregated(contract, words, order)
        assert list(means) == ["one", "two"]
        assert np.array_equal(np.concatenate(list(means.values())), wanted)


def test_every_split_of_one_integer_sum_gives_the_same_release() -> None:
    """Two other shares of the same sum: one grid step goes from a customer to another."""
    contract = private()
    words = words_of(contract)
    moved = {name: part.copy() for name, part in words.items()}
    layout = noised_layout(contract, "noised")
    ones = np.uint64(sum(1 << plane * layout.width(3) for plane in range(layout.per_word(3))))
    moved["north"][: layout.vector_words(3)] += np.uint64(12345) * ones
    moved["south"][: layout.vector_words(3)] -= np.uint64(12345) * ones
    one, other = (aggregated(contract, parts, NAMES) for parts in (words, moved))
    assert all(np.array_equal(one[name], other[name]) for name in one)

    def as_floats(parts: dict[str, Any]) -> Any:
        alone = [RoundSum(layout, ("",), 3, part).total() for part in parts.values()]
        return np.mean(alone, axis=0)

    assert not np.array_equal(as_floats(words), as_floats(moved)), "rounded shares do tell"


def test_a_share_that_is_no_share_is_refused_when_it_comes() -> None:
    contract = private()
    config = RunConfig(role="aggregator", party="pool", contract=contract, run_id="0" * 32)
    session = AggregatorSession(config, lambda report, nonce: ("simulated", b""))
    session._number = 1
    metrics: Any = {"one": {}, "two": {}}
    good = words_of(contract)["north"]
    session._check(Payload(1, {}, metrics, noised=good.tobytes()), "north")
    heavy = good.copy()
    heavy[-1] += np.uint64(1)
    vectors = {name: np.zeros(SIZE, np.float32) for name in metrics}
    for payload, kind in (
        (Payload(1, {}, metrics, noised=good[:-1].tobytes()), ProtocolError),
        (Payload(1, {}, metrics, noised=heavy.tobytes()), Refused),
        (Payload(1, {}, metrics), FedarkError),
        (Payload(1, vectors, metrics), FedarkError),
        (Payload(1, vectors, metrics, noised=good.tobytes()), ProtocolError),
    ):
        with pytest.raises(kind):
            session._check(payload, "north")


def test_one_customers_noised_vector_is_its_integers_alone() -> None:
    contract = private()
    vector = np.zeros(2 * SIZE, np.float32)
    steps = noised(contract, vector) / noised_layout(contract, "noised").step
    assert np.abs(steps - np.rint(steps)).max() < 0.1
    assert noised_sum(contract, ("a", "b"), [noised_words(contract, vector)] * 2).weight == 2
