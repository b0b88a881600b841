"""`fedark plan`: terms for a private job that its own checks agree with, and no better news than
was measured.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from small import write_job
from typer.testing import CliRunner

import fedark
import fedark.contract.plan as module
from fedark.cli import app
from fedark.contract.contract import PrivacyTerms
from fedark.contract.job import Job
from fedark.contract.plan import MEASURED, plan
from fedark.contract.privacy import NOISE_REFUSED
from fedark.foundation.errors import ContractError, FedarkError

BANKING: dict[str, Any] = {"records": 10_003, "customers": 8, "values": 29_568}
NOISE = {1.0: 26.0, 3.0: 9.91, 8.0: 4.4}  # at rate 0.5, 200 rounds, as the accountant solves it


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the accountant, which takes many seconds a plan."""

    def solve(terms: PrivacyTerms, rounds: int) -> PrivacyTerms:
        noise = NOISE.get(terms.epsilon, 10.0)
        return terms.model_copy(update={"noise_multiplier": noise})

    monkeypatch.setattr(module, "solved", solve)
    monkeypatch.setattr(module, "claim_problems", lambda outline: [])
    monkeypatch.setattr(module, "cost", lambda spends, delta: (1.0, ""))


@pytest.mark.parametrize(("epsilon", "best"), [(1.0, 34.0), (3.0, 85.0), (8.0, 170.0)])
@pytest.mark.usefixtures("quick")
def test_the_rule_gives_about_the_rates_that_were_found_best(epsilon: float, best: float) -> None:
    found = plan(epsilon=epsilon, **BANKING)
    assert (found.rounds, found.privacy.sampling_rate, found.privacy.clip_norm) == (200, 0.5, 0.4)
    assert found.learning_rate == pytest.approx(best, rel=0.15)
    assert found.problems == ()


@pytest.mark.parametrize(
    ("mechanism", "epsilon"),
    [("example-distributed", 3.0), ("customer-level", 2.0), ("customer-level", 5.0)],
)
def test_the_accountants_epsilon_of_a_plan_is_what_was_asked_for(
    mechanism: Any, epsilon: float
) -> None:
    found = plan(**BANKING, epsilon=epsilon, mechanism=mechanism)
    assert 0.95 * epsilon < found.epsilon <= epsilon * (1 + 1e-6)
    if mechanism == "example-distributed":
        assert found.privacy.noise_multiplier == pytest.approx(NOISE[epsilon], rel=0.01)


@pytest.mark.usefixtures("quick")
def test_less_noise_is_promised_more_and_none_is_promised_better_than_measured() -> None:
    runs = [plan(epsilon=epsilon, **BANKING) for epsilon in (1.0, 3.0, 8.0)]
    assert [run.ratio for run in runs] == sorted((run.ratio for run in runs), reverse=True)
    assert any("89.1 %" in line for line in runs[1].said)
    assert max(reached for *_, reached in MEASURED) < 93.0


@pytest.mark.usefixtures("quick")
def test_a_job_that_nobody_could_use_is_planned_with_the_reason_why_it_would_be_refused() -> None:
    buried = plan(records=300, customers=3, values=30_000, epsilon=1.0)
    assert buried.ratio > NOISE_REFUSED
    assert any("nothing to be learned" in problem for problem in buried.problems)
    few = plan(records=300, customers=5, values=30_000, epsilon=3.0, mechanism="customer-level")
    assert few.problems
    assert any("no job of this mechanism was measured" in line for line in few.said)


@pytest.mark.usefixtures("quick")
def test_lora_is_proposed_with_the_word_that_nothing_was_measured() -> None:
    head, lora = plan(epsilon=3.0, **BANKING), plan(epsilon=3.0, lora=True, **BANKING)
    assert lora.learning_rate < head.learning_rate / 10
    assert any("guess" in line for line in lora.said)
    assert not any("guess" in line for line in head.said)


@pytest.mark.parametrize(
    "terms",
    [
        {"epsilon": 40.0},
        {"epsilon": 3.0, "mechanism": "none"},
        {"epsilon": 3.0, "records": 3},
        {"epsilon": 0.0},
    ],
)
def test_what_cannot_be_planned_is_refused(terms: dict[str, Any]) -> None:
    with pytest.raises((FedarkError, ValueError)):
        plan(**BANKING | terms)


@pytest.mark.usefixtures("quick")
def test_a_plans_lines_are_a_job_files_own_and_give_the_job_that_was_planned(
    tmp_path: Path,
) -> None:
    path = write_job(tmp_path / "job", minimum=3)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    found = fedark.plan(path, records=5000, epsilon=2.0)
    tables = tomllib.loads(found.toml())
    given = [f"job.rounds={found.rounds}"]
    given += [
        f"privacy.{key}={value!r}".replace("'", '"') for key, value in tables["privacy"].items()
    ]
    server = tables["models"]["server"]
    given.append(f"models.0.server.learning_rate={server['learning_rate']}")
    job = Job.load(path, tuple(given))
    assert job.rounds == 200
    assert job.privacy == found.privacy.model_copy(update={"noise_multiplier": 0.0})
    assert job.models[0].server.learning_rate == found.learning_rate


@pytest.mark.usefixtures("quick")
def test_the_command_takes_a_jobs_values_and_options_override_them(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", minimum=3)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    done = CliRunner().invoke(app, ["plan", str(path), "--epsilon", "8", "--rounds", "50"])
    assert done.exit_code == 0, done.output
    assert "rounds = 50" in done.output
    assert "epsilon = 8" in done.output
    assert "expect little" in done.output  # ninety records
    assert "guess" in done.output  # LoRA
    whole = ["plan", "--records", "10003", "--customers", "8", "--values", "29568"]
    done = CliRunner().invoke(app, whole)
    assert "epsilon: " in done.output
    assert "learning_rate = 82" in done.output
    assert "refused" not in done.output
    assert isinstance(CliRunner().invoke(app, whole[:3]).exception, FedarkError)


def test_what_a_plan_says_of_accuracy_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    for mechanism, epsilon, ratio, reached in MEASURED:
        rows = [
            line
            for line in text.splitlines()
            if mechanism in line and f"epsilon {epsilon:g}" in line and f"| {ratio:g} |" in line
        ]
        assert any(f"| {reached:.1f} |" in row for row in rows), (mechanism, ratio)


@pytest.mark.usefixtures("quick")
def test_the_default_mechanism_shares_the_noise() -> None:
    assert plan(epsilon=3.0, **BANKING).privacy.mechanism == "example-distributed"
    assert PrivacyTerms().mechanism == "none"
    with pytest.raises(ContractError, match="fewer records than customers"):
        plan(records=2, customers=8, values=10, epsilon=3.0)
