"""The audit leaves sound training alone and refutes a claim of epsilon 3 for each planted bug."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from fedark.auditing.canaries import AuditedTask, dirac, flipped, quiet_coordinates
from fedark.auditing.embedded import LABELS, PRIVACY, ROUNDS, small_records, small_task
from fedark.auditing.one_run import AuditReport, audit
from fedark.auditing.rounds import NOISELESS, Release, audited_contract, trainer_round
from fedark.cli import audit as command
from fedark.contract.contract import AdapterTerms, Contract, ServerTerms
from fedark.contract.privacy import claim_problems, mechanism
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning import per_example
from fedark.tuning.task import TaskModel

DIRACS = 1000
POPULATION = 300 + 150 + 500


@pytest.fixture(scope="module")
def task() -> TaskModel:
    return small_task()


@pytest.fixture(scope="module")
def noise() -> float:
    return 1.423  # what `calibrated` solves for; that it gives epsilon 3 is asserted below


def made(task: TaskModel, noise: float, **change: Any) -> Contract:
    """The contract whose noise is that of epsilon 3 if `noise` is."""
    privacy = PRIVACY.model_copy(update={"noise_multiplier": noise, **change})
    return audited_contract(task.terms, privacy, rounds=ROUNDS, records=POPULATION)


def run(
    task: TaskModel, release: Release, *, seed: int = 0, claimed: float = 3.0, **change: Any
) -> AuditReport:
    data = small_records(600, seed=0)
    terms = {
        "claimed": claimed,
        "delta": PRIVACY.delta,
        "rounds": ROUNDS,
        "expected": PRIVACY.sampling_rate * POPULATION,
        "clip_norm": 1.0,
        "diracs": DIRACS,
        "server": ServerTerms(optimizer="fedadam", learning_rate=0.3),
        "seed": seed,
    }
    return audit(task, data[:300], data[300:], release, **{**terms, **change})


def test_sound_training_is_not_refuted_and_something_is_measured(
    task: TaskModel, noise: float
) -> None:
    contract = made(task, noise)
    assert claim_problems(contract) == []
    reports = [run(task, trainer_round(contract), seed=seed) for seed in range(3)]
    assert not any(report.refuted for report in reports)
    assert max(report.measured for report in reports) < 2
    assert min(report.measured for report in reports) > 0.1


def test_without_noise_the_bound_is_above_three(task: TaskModel) -> None:
    report = run(task, trainer_round(made(task, NOISELESS)), claimed=math.inf)
    assert report.measured > 3
    assert not report.refuted
    assert report.measured <= report.reach


def test_noise_that_is_off_is_refuted(
    task: TaskModel, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedark.enclave.private.noised", lambda _contract, vector: vector)
    assert run(task, trainer_round(made(task, noise))).refuted


def test_a_fortieth_of_the_noise_is_refuted(task: TaskModel, noise: float) -> None:
    assert run(
        task, trainer_round(made(task, noise / 40))
    ).refuted  # five draws measured 3.6 to 4.3; with a tenth 2.8 to 3.6


def test_noise_for_a_smaller_clipping_norm_than_the_trainers_is_refuted(
    task: TaskModel, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AuditedTask.gradient_sum
    monkeypatch.setattr(
        AuditedTask,
        "gradient_sum",
        lambda self, records, clip_norm: honest(self, records, clip_norm=1e6),
    )
    assert run(task, trainer_round(made(task, noise))).refuted


def test_a_clipping_that_does_nothing_is_refuted(
    task: TaskModel, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        per_example,
        "clip_factors",
        lambda norms, _bound: torch.ones_like(norms, dtype=torch.float64),
    )
    assert run(task, trainer_round(made(task, noise))).refuted


def test_flipped_records_alone_show_a_model_that_learns_them_by_heart(task: TaskModel) -> None:
    def greedy(audited: AuditedTask, members: Any) -> Any:
        return -audited.gradient_sum(members, clip_norm=1e3)[0]

    strong = ServerTerms(optimizer="fedadam", learning_rate=3.0)
    report = run(task, greedy, diracs=0, claimed=1.0, rounds=150, expected=300.0, server=strong)
    assert [one.canaries for one in report.by] == ["flipped"]
    assert report.refuted


def test_a_low_rank_adapter_is_audited_on_the_same_path(noise: float) -> None:
    lora = small_task(AdapterTerms(rank=2, targets=("query", "value"), layers=(1,)))
    few = {"rounds": 15, "diracs": 1000}
    assert not run(lora, trainer_round(made(lora, noise)), **few).refuted
    assert run(lora, trainer_round(made(lora, NOISELESS)), claimed=1.0, **few).refuted


# -- parts


def test_canaries_are_clipped_like_records_and_add_to_their_sum(task: TaskModel) -> None:
    records = small_records(2, seed=3)
    task.set_flat(task.initial())
    total, norms = AuditedTask(task, 50.0).gradient_sum(
        [records[0], dirac(7), records[1], dirac(11)], clip_norm=2.0
    )
    expected, true = task.gradient_sum(records, clip_norm=2.0)
    expected[[7, 11]] += 2.0
    np.testing.assert_allclose(total, expected, atol=1e-6)
    assert np.array_equal(norms, true)
    assert not AuditedTask(task, 50.0).gradient_sum([], clip_norm=2.0)[0].any()


def test_the_round_has_the_noise_of_all_customers(task: TaskModel, noise: float) -> None:
    task.set_flat(task.initial())
    contract = made(task, noise)
    release, found = trainer_round(contract), mechanism(contract)
    assert found is not None
    noisy = np.concatenate([release(AuditedTask(task, 1.0), []) for _ in range(4)])
    assert np.std(noisy) == pytest.approx(noise * PRIVACY.clip_norm, rel=0.05)
    assert found.guarantee("adapter", PRIVACY.delta).epsilon <= 3.0


def test_what_releases_no_gradient_sums_is_not_audited(task: TaskModel) -> None:
    for kind in ("none", "customer-level", "example-local"):
        with pytest.raises(InputError, match="releases none"):
            made(task, 1.0, mechanism=kind)


def test_flipped_records_have_another_answer() -> None:
    records = small_records(200, seed=1)
    wrong = flipped(records, LABELS, np.random.default_rng(0))
    assert all(
        w.prompt == r.prompt and w.answer != r.answer and w.answer in LABELS
        for w, r in zip(wrong, records, strict=True)
    )
    assert len({w.answer for w in wrong}) == len(LABELS)


def test_canaries_have_coordinates_of_their_own(task: TaskModel) -> None:
    chosen = quiet_coordinates(task, small_records(50, seed=1), 1000, 1.0, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 1000
    with pytest.raises(InputError, match="too small"):
        quiet_coordinates(task, [], 10**6, 1.0, np.random.default_rng(0))


def test_nothing_to_audit_is_refused(task: TaskModel) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a round was trained")

    terms: dict[str, Any] = {
        "claimed": 1.0, "delta": 1e-5, "rounds": 1, "expected": 1.0, "clip_norm": 1.0,
        "server": ServerTerms(), "seed": 0
    }  # fmt: skip
    for records, diracs in (([], 5), ([Record("w1 w2", LABELS[0])], 0)):
        with pytest.raises(InputError, match="canaries"):
            audit(task, records, [], never, diracs=diracs, **terms)


# -- the command


@pytest.fixture
def command_line() -> Callable[..., Any]:
    app = typer.Typer()
    app.command()(command.audit)
    return lambda *words: CliRunner().invoke(app, list(words))


def test_the_command_puts_the_bound_beside_the_claim(command_line: Callable[..., Any]) -> None:
    result = command_line("--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["claimed"], report["refuted"]) == (3.0, False)
    assert 0 <= report["measured"] < 3


def test_the_command_ends_with_status_one_if_the_claim_is_refuted(
    command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedark.enclave.private.noised", lambda _contract, vector: vector)
    result = command_line()
    assert result.exit_code == 1
    assert "REFUTED" in result.output


@pytest.mark.parametrize("words", [("--epsilon", "-1"), ("--epsilon", "0"), ("--epsilon", "nan")])
def test_a_claim_that_means_nothing_is_refused(
    command_line: Callable[..., Any], words: tuple[str, str]
) -> None:
    assert isinstance(command_line(*words).exception, InputError)
