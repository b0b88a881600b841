"""What the noise of a private job leaves of what it learns, said before anything is charged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import parties
import pytest
from small import write_job

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.contract.privacy import (
    NOISE_REFUSED,
    NOISE_WARNED,
    REACH_REFUSED,
    REACH_WARNED,
    Outline,
    futile_problems,
    learning_lines,
    learning_warnings,
    mechanism,
    noise_to_signal,
    noised_layout,
    reach,
)
from fedark.foundation.errors import ContractError
from fedark.privacy.accounting import cost
from fedark.simulation.check import check
from fedark.simulation.local import prepare
from fedark.tuning.server_optimizer import server_optimizer

RECORD = {
    "mechanism": "example-distributed",
    "noise_multiplier": 10.0,
    "clip_norm": 0.4,
    "sampling_rate": 0.5,
    "records": 10_000,
}


def private(values: int = 29_568, rounds: int = 200, **terms: Any) -> Contract:
    layout = ({"name": "head.weight", "shape": (values,), "travels": True},)
    return parties.contract(
        rounds=rounds,
        models=[parties.model() | {"layout": layout}],
        protection={"minimum_cohort": 3, "colluders": 0},
        privacy=RECORD | terms,
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # noise z C sqrt(d) of a release over q N C sqrt(T)
        ({}, 10 * math.sqrt(29_568) / (0.5 * 10_000 * math.sqrt(200))),
        ({"rounds": 50}, 10 * math.sqrt(29_568) / (0.5 * 10_000 * math.sqrt(50))),
        ({"values": 100}, 10 * math.sqrt(100) / (0.5 * 10_000 * math.sqrt(200))),
        ({"clip_norm": 3.0}, 10 * math.sqrt(29_568) / (0.5 * 10_000 * math.sqrt(200))),
        # every customer adds all of it, in each of its local steps
        (
            {"mechanism": "example-local", "local_steps": 4},
            10 * math.sqrt(3 * 29_568) / (0.5 * 10_000 * math.sqrt(800)),
        ),
        # three customers are three units
        ({"mechanism": "customer-level"}, 10 * math.sqrt(29_568) / (3 * math.sqrt(200))),
    ],
)
def test_the_ratio_is_that_of_the_noise_to_the_largest_signal(
    change: dict[str, Any], expected: float
) -> None:
    # what float32 may lose of a sum of all customer's records is noised too (2**-14 of it)
    lost = 0 if change.get("mechanism") == "customer-level" else 2**-14 * 0.5 * 10_000 / 3
    assert noise_to_signal(private(**change)) == pytest.approx(expected * (1 + lost), rel=0.02)


def test_the_ratio_is_that_of_noise_that_is_really_drawn() -> None:
    contract = private(values=4000, rounds=1, sampling_rate=0.2)
    found, layout = mechanism(contract), noised_layout(contract, "noised")
    assert found is not None
    drawn = np.zeros(4000)
    for _ in contract.customers:
        share = np.zeros(4000, np.int32)
        found.noise()(0, share)
        drawn += share
    norm = float(np.linalg.norm(drawn)) * layout.step
    assert noise_to_signal(contract) == pytest.approx(norm / (0.2 * 10_000 * 0.4), rel=0.05)


def test_a_job_without_a_mechanism_has_no_noise() -> None:
    assert noise_to_signal(parties.contract()) == 0.0
    assert futile_problems(parties.contract()) == []


def test_noise_that_buries_a_job_is_refused_unless_the_job_accepts_it() -> None:
    quiet, loud, buried = private(), private(records=1500), private(records=200)
    assert noise_to_signal(quiet) < NOISE_WARNED < noise_to_signal(loud) < NOISE_REFUSED
    assert learning_warnings(quiet) == []
    (warning,) = learning_warnings(loud)
    assert "noise" in warning
    assert "expect little" in warning
    assert futile_problems(quiet) == futile_problems(loud) == []
    (problem,) = futile_problems(buried)
    assert "expect nothing" in problem
    assert "privacy.accept_noise = true" in problem
    assert futile_problems(private(records=200, accept_noise=True)) == []


def steps(rounds: int = 200, *, values: int = 10_000, more: Any = (), **terms: Any) -> Contract:
    """A job whose noise is no matter."""
    layout = ({"name": "head.weight", "shape": (values,), "travels": True},)
    return parties.contract(
        rounds=rounds,
        models=[parties.model() | {"layout": layout} | dict(more)],
        protection={"minimum_cohort": 3, "colluders": 0},
        privacy=RECORD | {"records": 10_000_000} | terms,
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 200 * 0.4 / 100),  # T eta C over the root of the number of values
        ({"rounds": 5, "clip_norm": 2.0}, 5 * 2 / 100),
        ({"more": {"server": {"learning_rate": 85.0}}}, 200 * 85 * 0.4 / 100),
        ({"mechanism": "customer-level"}, 200 * 0.4 / 100),
        # the optimiser of a customer's own steps sets their length, whatever is clipped
        (
            {
                "mechanism": "example-local",
                "local_steps": 4,
                "more": {"training": {"head_learning_rate": 0.2}},
            },
            200 * 4 * 0.2,
        ),
        # Adam: the clip norm where the second moment is tau's alone
        (
            {"more": {"server": {"optimizer": "fedadam", "learning_rate": 0.1, "tau": 2.0}}},
            200 * 0.1 * 0.4 / 2 / 100,
        ),
    ],
)
def test_the_reach_is_that_of_gradients_that_all_pull_the_same_way(
    change: dict[str, Any], expected: float
) -> None:
    assert reach(steps(**change)) == pytest.approx(expected)


@pytest.mark.parametrize("tau", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_no_updates_move_the_servers_vector_further_than_the_reach(
    optimizer: str, tau: float
) -> None:
    server = {"optimizer": optimizer, "learning_rate": 0.7, "tau": tau}
    contract = steps(20, values=50, more={"server": server})
    generator = np.random.default_rng(1)
    for growth in (0.0, 0.3, 1.0):  # of the updates' lengths, up to the clip norm
        made = server_optimizer(contract.models[0].server, 50)
        direction = generator.normal(size=50)
        vector = np.zeros(50, np.float32)
        for number in range(20):
            length = 0.4 * (number + 1) ** growth / 20**growth
            update = length * direction / np.linalg.norm(direction)
            vector = made.step(vector, (vector + update).astype(np.float32))
        assert np.sqrt(np.mean(vector**2)) <= reach(contract) * (1 + 1e-5)


def test_steps_that_move_nothing_are_refused_unless_the_job_accepts_it() -> None:
    far, short, still = steps(), steps(20), steps(5)
    assert reach(far) > REACH_WARNED > reach(short) > REACH_REFUSED > reach(still)
    assert learning_warnings(far) == futile_problems(far) == futile_problems(short) == []
    (warning,) = learning_warnings(short)
    assert "steps" in warning
    (problem,) = futile_problems(still)
    assert "stays as it was" in problem
    assert "learning_rate" in problem
    assert "privacy.accept_noise = true" in problem
    assert futile_problems(steps(5, accept_noise=True)) == []
    assert futile_problems(steps(5, mechanism="none")) == []


def test_of_several_models_the_one_that_moves_least_counts() -> None:
    fast = {"server": {"learning_rate": 1000.0}}
    slow = steps(5).models[0]
    models = (steps(5, more=fast).models[0], slow)
    outline = Outline(steps().privacy, steps().protection, 5, ("a", "b", "c"), models)
    (problem,) = futile_problems(outline)
    assert reach(outline) == pytest.approx(reach(steps(5)) / math.sqrt(2))
    assert "steps" in problem


@pytest.mark.parametrize("terms", [{"records": 0}, {"noise_multiplier": 0.0}])
def test_terms_that_make_no_mechanism_are_shown_and_not_crashed_on(terms: dict[str, Any]) -> None:
    assert learning_lines(private(**terms))[0].startswith("noise: ")


def _terms(folder: Path, *more: str) -> tuple[Path, tuple[str, ...]]:
    path = write_job(folder, minimum=3)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    return path, (
        'privacy.mechanism="example-distributed"',
        "privacy.records=90",
        "privacy.sampling_rate=0.5",
        *more,
    )


def test_a_job_that_would_learn_nothing_ends_before_anything_is_sealed_or_charged(
    tmp_path: Path,
) -> None:
    path, terms = _terms(tmp_path / "job", "privacy.epsilon=1.0", "privacy.sampling_rate=0.1")
    with pytest.raises(ContractError, match="expect nothing to be learned"):
        prepare(Job.load(path, terms), tmp_path / "work", sandbox="none")
    assert not list((tmp_path / "work").rglob("ledger.sqlite"))


def test_a_check_says_what_noise_and_steps_leave_and_refuses_what_moves_nothing(
    tmp_path: Path,
) -> None:
    path, terms = _terms(tmp_path / "job", "privacy.epsilon=8.0", "privacy.accept_noise=true")
    found = check(Job.load(path, terms))
    assert [line for line in found.lines if line.startswith("noise: ")]
    assert [line for line in found.lines if line.startswith("steps: ")]
    assert len([line for line in found.warnings if "; " in line]) == 2
    with pytest.raises(ContractError, match="the adapter stays as it was"):
        check(Job.load(path, (*terms, "privacy.accept_noise=false", "privacy.clip_norm=1e-3")))


@pytest.mark.parametrize("epsilon", ["30.1", "100.0", "1000.0", "0.0", "1e-9"])
def test_an_epsilon_that_cannot_be_accounted_is_said_when_the_job_is_checked(
    epsilon: str, tmp_path: Path
) -> None:
    path, terms = _terms(tmp_path / "job", f"privacy.epsilon={epsilon}")
    with pytest.raises(ContractError, match="epsilon"):
        Job.load(path, terms)


def test_an_epsilon_beyond_the_precision_of_so_many_values_is_said_with_the_contract() -> None:
    from fedark.contract.privacy import claim_problems

    contract = private(values=25_000_000, rounds=2, epsilon=30.0, delta=1e-12, noise_multiplier=0.4)
    assert math.isinf(cost([mechanism(contract).spend("adapter")], 1e-12)[0])  # type: ignore[union-attr]
    (problem,) = claim_problems(contract)
    assert "beyond what can be accounted" in problem
