"""The local-only baseline under privacy is no straw man: it chooses settings of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning.baseline import train_alone

Make = Callable[[tuple[str, ...]], list[Record]]
LABELS = ("open_line", "close_breaker", "shed_load")


def task_with(zoo: Any, name: str = "minilm", method: str = "head", **training: object) -> Any:
    tiny = zoo[name]
    settings = {"baseline_epochs": 10, "batch_size": 8, **training}
    return tiny.load(tiny.terms(method=method, training=settings))


@pytest.mark.parametrize("method", ["head", "ffa-lora"])
def test_it_learns_although_the_rates_of_the_rounds_are_of_no_use_alone(
    zoo: Any, records: Make, method: str
) -> None:
    data = records(LABELS) * 3
    task = task_with(
        zoo,
        method=method,
        baseline_epochs=30,
        learning_rate=1e-9,
        head_learning_rate=1e-9,
        optimizer="sgd",
    )
    train_alone(task, data, private=False, seed=1)
    as_rounds = task.evaluate(data).correct
    task.set_flat(task.initial())
    before = task.evaluate(data).correct
    train_alone(task, data, private=True, seed=1)
    assert as_rounds == before
    assert task.evaluate(data).correct > before + len(data) // 6


def test_the_best_on_held_back_records_is_trained(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_with(zoo, head_learning_rate=0.3)
    rates: list[float] = []
    train, evaluate = task.train, task.evaluate

    def watched(*args: Any, settings: Any, **named: Any) -> Any:
        rates.append(settings.head_learning_rate)
        return train(*args, settings=settings, **named)

    def best_at_a_hundredth(data: Any) -> Any:
        measured = evaluate(data)
        return replace(measured, correct=measured.total if rates[-1] == 1e-2 else 0)

    monkeypatch.setattr(task, "train", watched)
    monkeypatch.setattr(task, "evaluate", best_at_a_hundredth)
    train_alone(task, records(LABELS) * 3, private=True, seed=1)
    assert rates == [0.3, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1e-2]


def test_a_baseline_that_diverges_ends_no_private_job(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_with(zoo)
    monkeypatch.setattr(task, "train", _diverges)
    before = task.get_flat()
    train_alone(task, records(LABELS), private=True, seed=1)
    assert np.array_equal(task.get_flat(), before)
    with pytest.raises(InputError):
        train_alone(task, records(LABELS), private=False, seed=1)


def _diverges(*_: Any, **__: Any) -> None:
    raise InputError("Training diverged in step 1 of 1.")


def test_one_record_is_enough(zoo: Any, records: Make) -> None:
    task = task_with(zoo)
    before = task.get_flat()
    train_alone(task, records(LABELS)[:1], private=True, seed=1)
    assert not np.array_equal(task.get_flat(), before)


def test_the_trials_cost_about_as_much_as_the_training(zoo: Any, records: Make) -> None:
    task = task_with(zoo, method="ffa-lora")
    steps: list[int] = []
    train = task.train

    def counting(*args: Any, **named: Any) -> Any:
        stats = train(*args, **named)
        steps.append(stats.steps)
        return stats

    task.train = counting
    train_alone(task, records(LABELS) * 3, private=True, seed=1)
    *trials, last = steps
    assert len(trials) == 6
    assert sum(trials) <= 1.2 * last
