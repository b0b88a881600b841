"""Customers that harm: every update is clipped where it is made and held against the bound where it
is summed; robust means are for those who see updates apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import CUSTOMERS, write_job

from fedark.contract.contract import ServerTerms
from fedark.contract.job import Job
from fedark.enclave import aggregator, trainer
from fedark.foundation.errors import ContractError, FederationError
from fedark.simulation import simulate

BOUND = 0.01


def job_of(folder: Path, *overrides: str, minimum: int = 2, **named: Any) -> Job:
    path = write_job(folder / "job", rounds=1, records=16, minimum=minimum, **named)
    return Job.load(path, (*overrides, "models.0.training.baseline_epochs=0"))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the aggregator enclave reads of updates."""
    seen: list[Any] = []
    inner = aggregator.ProtectedUpdate.open

    def watch(self: Any, hpke: Any) -> Any:
        payload = inner(self, hpke)
        if self.context.kind == "update":
            seen.append(payload)
        return payload

    monkeypatch.setattr(aggregator.ProtectedUpdate, "open", watch)
    return seen


def test_a_trainer_enclave_clips_its_update_before_it_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, said = opened(monkeypatch), list[str]()
    job = job_of(tmp_path, f"protection.clip_norm={BOUND}")
    with simulate(job, tmp_path / "w", say=said.append) as running:
        running.run()
    norms = [np.linalg.norm(payload.vectors["tiny"].astype(np.float64)) for payload in seen]
    assert len(norms) == 3
    assert max(norms) <= BOUND
    assert min(norms) > BOUND * 0.99
    assert sum("was clipped" in line for line in said) == 3


@pytest.mark.attack("a scaled update of a broken enclave")
@pytest.mark.parametrize("factor", [1.001, 1000.0])
def test_attack_scaled_update_of_a_broken_enclave_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, refusal: Callable[[str], None]
) -> None:
    clipped = trainer.TrainerSession._clipped

    def broken(self: Any, vectors: Any) -> Any:
        inside = clipped(self, vectors)
        if self.config.party != "north":
            return inside
        return {name: vector * np.float32(factor) for name, vector in inside.items()}

    monkeypatch.setattr(trainer.TrainerSession, "_clipped", broken)
    with simulate(job_of(tmp_path, f"protection.clip_norm={BOUND}"), tmp_path / "w") as running:
        report = running.run()
    assert "longer than the contract's clip_norm" in report["passed_over"]["north"]
    assert report["customers"] == ["east", "south"]
    refusal("An update is longer than the contract's clip_norm.")


def test_the_trimmed_mean_is_what_the_aggregator_enclave_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (*CUSTOMERS, "west", "centre")
    seen, steps = opened(monkeypatch), list[Any]()
    inner = aggregator.AggregatorSession._stepped

    def watch(self: Any, terms: Any, mean: Any) -> Any:
        steps.append(mean)
        return inner(self, terms, mean)

    monkeypatch.setattr(aggregator.AggregatorSession, "_stepped", watch)
    overrides = ('models.0.server.mean="trimmed"', "models.0.server.trim=0.2")
    job = job_of(tmp_path, *overrides, minimum=3, customers=names)
    with simulate(job, tmp_path / "w") as running:
        running.run()
    ordered = np.sort(np.stack([payload.vectors["tiny"] for payload in seen]), axis=0)
    assert np.allclose(steps[0], ordered[1:-1].mean(axis=0), atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (('protection.mode="masked"',), "needs to see each update"),
        (
            (
                'privacy.mechanism="customer-level"',
                "privacy.accept_noise=true",
                "models.0.training.replay=0",
            ),
            "needs to see each update",
        ),
        ((), "leaves 1 of 3 customers in each value"),
    ],
)
def test_a_robust_mean_is_refused_where_updates_are_not_seen_or_too_few_are_left(
    tmp_path: Path, overrides: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ContractError, match=why):
        job_of(tmp_path, *overrides, 'models.0.server.mean="trimmed"', minimum=3)


def test_a_round_with_too_few_for_its_trimmed_mean_gives_nothing(tmp_path: Path) -> None:
    """Else what is left of a value could be one customer's own."""
    session = object.__new__(aggregator.AggregatorSession)
    names = (*CUSTOMERS, "west", "centre")
    job = job_of(tmp_path, minimum=3, customers=names[:3])
    with simulate(job, tmp_path / "w") as running:
        contract = running.federation.contract
    server = ServerTerms(mean="trimmed", trim=0.2)
    terms = contract.models[0].model_copy(update={"server": server})
    session.contract = contract.model_copy(update={"models": (terms,)})
    session._number, session._curve = 1, aggregator.Curve(contract)
    session._require_untrimmed(1, 5)
    with pytest.raises(FederationError, match="leaves 2 in each value"):
        session._require_untrimmed(1, 4)
