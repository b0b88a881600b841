"""Whole jobs under the privacy mechanisms: what leaves is noised as accounted, and nothing leaves
beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import write_job

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.contract.privacy import claim_problems, mechanism, noised_layout
from fedark.contract.protection import fewest_in_a_sum, masked_terms
from fedark.enclave import protection, trainer
from fedark.enclave.aggregator import AggregatorSession
from fedark.foundation.errors import ContractError
from fedark.privacy import mechanisms
from fedark.privacy.noise import GridNoise, check_variance
from fedark.simulation import simulate
from fedark.simulation.local import prepare

TERMS = {
    "example-distributed": (
        "privacy.epsilon=8.0",
        "privacy.records=90",
        "privacy.sampling_rate=0.5",
    ),
    "example-local": (
        "privacy.epsilon=8.0",
        "privacy.records=90",
        "privacy.sampling_rate=0.5",
        "privacy.local_steps=2",
    ),
    "customer-level": ("privacy.epsilon=8.0",),
}


def _job(folder: Path, mechanism: str, *more: str) -> Job:
    path = write_job(folder, minimum=3)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    noisy = "privacy.accept_noise=true"  # so few records cannot be heard above it
    return Job.load(path, (f'privacy.mechanism="{mechanism}"', noisy, *TERMS[mechanism], *more))


@pytest.mark.parametrize("mode", ["sealed", "masked"])
@pytest.mark.parametrize("mechanism", TERMS)
def test_each_mechanism_runs_under_each_protection_and_says_what_it_guarantees(
    mechanism: str, mode: str, tmp_path: Path
) -> None:
    job = _job(tmp_path / "job", mechanism, f'protection.mode="{mode}"')
    with simulate(job, tmp_path / "work") as running:
        report: dict[str, Any] = running.run()
    privacy = report["privacy"]
    assert privacy["mechanism"] == mechanism
    assert all(
        0 < entry["epsilon"] <= 8.001 and entry["delta"] == 1e-5 for entry in privacy["guarantees"]
    )
    metrics = report["models"]["tiny"]["metrics"]
    assert set(metrics) == {"before/acceptance/north", "federated/acceptance/north"}
    assert report["models"]["tiny"]["train_loss"] == []


def _noise_of_a_run(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Contract, Any]:
    """The contract of a one-round job whose gradient sums are all zeros, and what its sum was, in
    steps of the grid.
    """
    means: list[Any] = []
    stepped = AggregatorSession._stepped

    def nothing(
        contract: Contract, tasks: dict[str, Any], records: Any, tally: Any = None
    ) -> dict[str, Any]:
        return {name: np.zeros(task.terms.travelling, np.float32) for name, task in tasks.items()}

    def seen(self: AggregatorSession, terms: Any, mean: Any) -> Any:
        means.append(mean)
        return stepped(self, terms, mean)

    monkeypatch.setattr(trainer, "private_updates", nothing)
    monkeypatch.setattr(AggregatorSession, "_stepped", seen)
    job = _job(
        folder / "job",
        "example-distributed",
        f'protection.mode="{mode}"',
        "job.rounds=1",
        "models.0.adapter.rank=64",
    )
    with simulate(job, folder / "work") as running:
        running.run()
        contract = running.federation.contract
    (mean,) = means
    return contract, np.rint(
        mean * len(contract.customers) / noised_layout(contract, "any").step
    ).astype(np.int64)


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_the_noise_in_the_adapter_is_what_the_contract_accounts_for(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract, steps = _noise_of_a_run(tmp_path, mode, monkeypatch)
    found = mechanism(contract)
    assert found is not None
    assert check_variance(steps, found.variance(3), deficit=0.2).ok


def test_one_customers_missing_share_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same measurement, with the noise of one of three customers left out."""
    shares = iter([0, 1, 1])

    class Sometimes(GridNoise):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.kept = next(shares)

        def __call__(self, start: int, out: Any) -> None:
            super().__call__(start, out)
            out *= self.kept

    monkeypatch.setattr(mechanisms, "GridNoise", Sometimes)
    contract, steps = _noise_of_a_run(tmp_path, "masked", monkeypatch)
    found = mechanism(contract)
    assert found is not None
    assert not check_variance(steps, found.variance(3), deficit=0.2).ok


def test_a_contract_that_claims_less_than_its_noise_gives_is_signed_by_nobody(
    tmp_path: Path,
) -> None:
    job = _job(tmp_path / "job", "example-distributed")
    federation = prepare(job, tmp_path / "work", sandbox="none")
    terms = federation.contract.privacy
    weaker = federation.contract.model_copy(
        update={
            "privacy": terms.model_copy(update={"noise_multiplier": terms.noise_multiplier / 2})
        }
    )
    assert claim_problems(federation.contract) == []
    (problem,) = claim_problems(weaker)
    assert "claims epsilon 8" in problem
    assert claim_problems(
        weaker.model_copy(update={"privacy": terms.model_copy(update={"noise_multiplier": 0.0})})
    ) == ["its privacy mechanism 'example-distributed' has no noise"]


def test_a_job_whose_terms_cannot_be_kept_says_so_at_once(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", minimum=3)
    with pytest.raises(ContractError) as refused:
        Job.load(
            path,
            (
                'privacy.mechanism="example-distributed"',
                "protection.colluders=3",
                "privacy.sampling_rate=0.1234567890123",
            ),
        )
    told = str(refused.value)
    assert all(
        word in told for word in ("colluders", "privacy.records", "replay", "privacy.sampling_rate")
    ), told


@pytest.mark.parametrize(
    ("mechanism", "shared"),
    [("example-distributed", True), ("customer-level", True), ("example-local", False)],
)
def test_customers_who_share_noise_agree_on_whose_is_in_the_sum(
    mechanism: str, shared: bool, tmp_path: Path
) -> None:
    """Found in review: without agreement a sum may cover fewer than the minimum cohort, and so
    fewer shares of noise. All do by default, also in large cohorts; who adds all of the noise alone
    may do without.
    """
    masked = 'protection.mode="masked"'
    if shared:
        with pytest.raises(ContractError, match="fewer shares of noise"):
            _job(tmp_path / "without", mechanism, masked, "protection.agreement=false")
    contract = prepare(
        _job(tmp_path / "job", mechanism, masked), tmp_path / "work", sandbox="none"
    ).contract
    large = contract.model_copy(
        update={
            "parties": tuple(
                party.model_copy(update={"name": f"{party.name}{i}" if i else party.name})
                for party in contract.parties
                for i in range(20 if party.role == "customer" else 1)
            )
        }
    )
    assert len(large.customers) >= 16
    assert masked_terms(large, "run").agreement
    without = large.model_copy(
        update={"protection": large.protection.model_copy(update={"agreement": False})}
    )
    assert masked_terms(without, "run").agreement == shared
    assert not shared or fewest_in_a_sum(without) == without.protection.minimum_cohort


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_no_count_of_a_customers_records_reaches_the_aggregator(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, training losses, local-only adapters and held-out records stay at the customers."""
    seen: list[Any] = []
    real = protection.Payload.decode.__func__

    def decode(cls: Any, data: bytes) -> Any:
        payload = real(cls, data)
        seen.append(payload)
        return payload

    monkeypatch.setattr(protection.Payload, "decode", classmethod(decode))
    with simulate(
        _job(tmp_path / "job", "example-distributed", f'protection.mode="{mode}"'),
        tmp_path / "work",
    ) as running:
        running.run()
    assert seen
    assert {payload.weight for payload in seen} <= {0, 1}
    assert {
        key.split("/")[0] for payload in seen for items in payload.metrics.values() for key in items
    } <= {"before", "federated"}
