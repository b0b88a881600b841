"""The audit leaves sound training alone and refutes a claim of epsilon 3 for each planted bug."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedark.audit.canaries import Members, flipped, quiet_coordinates
from fedark.audit.embedded import LABELS, small_records, small_task
from fedark.audit.one_run import AuditReport, audit
from fedark.audit.rounds import GridRound, Release, grid_round
from fedark.cli import audit as command
from fedark.contract import AdapterTerms, ServerTerms
from fedark.errors import InputError
from fedark.privacy.mechanisms import calibrated
from fedark.tuning import per_example
from fedark.tuning.data import Record
from fedark.tuning.task import TaskModel

RATE, ROUNDS, DELTA, DIRACS = Fraction("0.1"), 60, 1e-5, 1000
POPULATION = 300 + 150 + 500


@pytest.fixture(scope="module")
def task() -> TaskModel:
    return small_task()


@pytest.fixture(scope="module")
def noise() -> float:
    return calibrated(3.0, DELTA, RATE, ROUNDS)


def made(task: TaskModel, noise_multiplier: float | None) -> GridRound:
    return grid_round(
        task.terms.travelling,
        noise_multiplier=noise_multiplier,
        clip_norm=1.0,
        rate=RATE,
        rounds=ROUNDS,
        delta=DELTA,
        population=POPULATION,
    )


def run(task: TaskModel, release: Release, *, seed: int = 0, claimed: float = 3.0, **change: Any) -> AuditReport:
    data = small_records(600, seed=0)
    terms = {
        "claimed": claimed,
        "delta": DELTA,
        "rounds": ROUNDS,
        "expected": float(RATE) * POPULATION,
        "clip_norm": 1.0,
        "diracs": DIRACS,
        "server": ServerTerms(optimizer="fedadam", learning_rate=0.3),
        "seed": seed,
    }
    return audit(task, data[:300], data[300:], release, **{**terms, **change})


def test_sound_training_is_not_refuted_and_something_is_measured(task: TaskModel, noise: float) -> None:
    reports = [run(task, made(task, noise), seed=seed) for seed in range(4)]
    assert not any(report.refuted for report in reports)
    assert max(report.measured for report in reports) < 2
    assert min(report.measured for report in reports) > 0.1


def test_without_noise_the_bound_is_above_three(task: TaskModel) -> None:
    report = run(task, made(task, None), claimed=math.inf)
    assert report.measured > 3
    assert not report.refuted
    assert report.measured <= report.reach


def test_noise_that_is_off_is_refuted(task: TaskModel, noise: float) -> None:
    assert run(task, replace(made(task, noise), mechanism=None)).refuted


def test_a_tenth_of_the_noise_is_refuted(task: TaskModel, noise: float) -> None:
    assert run(task, made(task, noise / 10)).refuted


def test_a_clipping_norm_that_is_not_passed_on_is_refuted(task: TaskModel, noise: float) -> None:
    assert run(task, replace(made(task, noise), clip_norm=1e6)).refuted


def test_a_clipping_that_does_nothing_is_refuted(task: TaskModel, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(norms: Any, _bound: float) -> Any:
        return norms.double().clone().fill_(1.0)

    monkeypatch.setattr(per_example, "clip_factors", nothing)
    monkeypatch.setattr("fedark.audit.canaries.clip_factors", nothing)
    assert run(task, made(task, noise)).refuted


def test_flipped_records_alone_show_a_model_that_learns_them_by_heart(task: TaskModel) -> None:
    def greedy(members: Members) -> Any:
        return members.gradient_sum(np.arange(len(members)), clip_norm=1e3)

    report = run(
        task,
        greedy,
        diracs=0,
        claimed=1.0,
        rounds=150,
        expected=300.0,
        server=ServerTerms(optimizer="fedadam", learning_rate=3.0),
    )
    assert [one.canaries for one in report.by] == ["flipped"]
    assert report.refuted


def test_a_low_rank_adapter_is_audited_on_the_same_path(noise: float) -> None:
    lora = small_task(AdapterTerms(rank=2, targets=("query", "value"), layers=(1,)))
    sound = made(lora, noise)
    few = {"rounds": 15, "diracs": 1000}
    assert not run(lora, sound, **few).refuted
    assert run(lora, replace(sound, mechanism=None), claimed=1.0, **few).refuted


# -- parts ------------------------------------------------------------------------------------------------------------


def test_members_sum_the_clipped_gradients_of_exactly_the_drawn_ones(task: TaskModel) -> None:
    records = small_records(20, seed=3)
    members = Members(task, records, np.array([7, 3, 11]), 50.0)
    task.set_flat(task.initial())
    assert len(members) == 23
    total = members.gradient_sum(np.array([0, 5, 20, 22]), clip_norm=2.0)
    expected, _ = task.gradient_sum([records[0], records[5]], clip_norm=2.0)
    expected[[7, 11]] += 2.0
    np.testing.assert_allclose(total, expected, atol=1e-6)
    assert not members.gradient_sum(np.array([], np.int64), clip_norm=2.0).any()


def test_a_round_without_noise_is_the_sum_and_with_noise_is_on_the_grid(task: TaskModel, noise: float) -> None:
    members = Members(task, small_records(50, seed=3), np.array([1, 2]), 50.0)
    everyone = Fraction(1)
    bare = replace(made(task, None), rate=everyone)
    np.testing.assert_array_equal(bare(members), members.gradient_sum(np.arange(52), clip_norm=1.0))
    sound = replace(made(task, noise), rate=everyone)
    errors = np.concatenate([sound(members) - bare(members) for _ in range(3)]) / sound.layout.step
    assert sound.mechanism is not None
    assert np.std(errors) == pytest.approx(math.sqrt(8 * sound.mechanism.share_variance), rel=0.03)
    whole = sound(members).astype(np.float64) / sound.layout.step
    np.testing.assert_allclose(whole, np.rint(whole), atol=0.2)


def test_the_noise_of_a_round_is_what_the_claim_asks_for(task: TaskModel, noise: float) -> None:
    mechanism = made(task, noise).mechanism
    assert mechanism is not None
    assert mechanism.guarantee("adapter", DELTA).epsilon <= 3.0


def test_flipped_records_have_another_answer() -> None:
    records = small_records(200, seed=1)
    wrong = flipped(records, LABELS, np.random.default_rng(0))
    assert all(
        w.prompt == r.prompt and w.answer != r.answer and w.answer in LABELS for w, r in zip(wrong, records, strict=True)
    )
    assert len({w.answer for w in wrong}) == len(LABELS)


def test_canaries_have_coordinates_of_their_own(task: TaskModel) -> None:
    chosen = quiet_coordinates(task, small_records(50, seed=1), 1000, 1.0, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 1000
    with pytest.raises(InputError, match="too small"):
        quiet_coordinates(task, [], 10**6, 1.0, np.random.default_rng(0))


def test_nothing_to_audit_is_refused(task: TaskModel) -> None:
    terms: dict[str, Any] = {
        "claimed": 1.0, "delta": DELTA, "rounds": 1, "expected": 1.0, "clip_norm": 1.0, "server": ServerTerms(), "seed": 0
    }  # fmt: skip
    for records, diracs in (([], 5), ([Record("w1 w2", LABELS[0])], 0)):
        with pytest.raises(InputError, match="canaries"):
            audit(task, records, [], made(task, None), diracs=diracs, **terms)


# -- the command ------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("fedark.audit.rounds.GridRound.__call__", lambda self, members: members.gradient_sum(
        np.arange(len(members)), clip_norm=self.clip_norm))  # fmt: skip
    result = command_line()
    assert result.exit_code == 1
    assert "REFUTED" in result.output


@pytest.mark.parametrize("words", [("--rate", "2"), ("--rate", "x"), ("--epsilon", "-1"), ("--delta", "1")])
def test_a_claim_that_means_nothing_is_refused(command_line: Callable[..., Any], words: tuple[str, str]) -> None:
    assert isinstance(command_line(*words).exception, InputError)
