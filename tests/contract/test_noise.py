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
    mechanism,
    noise_line,
    noise_problems,
    noise_to_signal,
    noised_layout,
)
from fedark.foundation.errors import ContractError
from fedark.privacy.accounting import cost
from fedark.simulation.local import prepare

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
    assert noise_problems(parties.contract()) == []


def test_noise_that_buries_a_job_is_refused_unless_the_job_accepts_it() -> None:
    quiet, loud, buried = private(), private(records=1500), private(records=200)
    assert noise_to_signal(quiet) < NOISE_WARNED < noise_to_signal(loud) < NOISE_REFUSED
    assert "expect" not in noise_line(quiet)
    assert "expect little" in noise_line(loud)
    assert noise_problems(quiet) == noise_problems(loud) == []
    (problem,) = noise_problems(buried)
    assert "expect nothing" in problem
    assert "privacy.accept_noise = true" in problem
    assert noise_problems(private(records=200, accept_noise=True)) == []


@pytest.mark.parametrize("terms", [{"records": 0}, {"noise_multiplier": 0.0}])
def test_terms_that_make_no_mechanism_are_shown_and_not_crashed_on(terms: dict[str, Any]) -> None:
    assert noise_line(private(**terms)).startswith("noise: ")


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
