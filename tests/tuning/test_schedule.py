"""Learning rates over a job, weight decay and dropout of local training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedark.contract.contract import TrainingTerms
from fedark.records.reading import Record
from fedark.tuning.schedule import rate_factor

Make = Callable[[tuple[str, ...]], list[Record]]
LABELS = ("open_line", "close_breaker", "shed_load")


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0)]
)
def test_rates_rise_over_the_warmup_and_then_follow_the_schedule(
    schedule: Any, halfway: float, end: float
) -> None:
    terms = TrainingTerms(schedule=schedule, warmup=0.2)
    assert rate_factor(terms, 0.1) == pytest.approx(0.5)
    assert rate_factor(terms, 0.2) == 1
    assert rate_factor(terms, 0.6) == pytest.approx(halfway)
    assert rate_factor(terms, 1.0) == pytest.approx(end)


def test_the_schedule_goes_on_from_round_to_round(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = zoo["minilm"]
    task = tiny.load(tiny.terms(training={"schedule": "linear", "warmup": 0.25}))
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    for number in range(4):
        task.train(records(LABELS), epochs=1, seed=1, part=(number / 4, (number + 1) / 4))
    top = rates.index(max(rates))
    assert top > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.1 * max(rates) <= 0.1 * task.terms.training.learning_rate


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_draws_the_adapter_towards_zero(
    zoo: Any, records: Make, optimizer: str
) -> None:
    tiny, norms = zoo["minilm"], []
    for decay in (0.0, 1.0):
        task = tiny.load(tiny.terms(training={"weight_decay": decay, "optimizer": optimizer}))
        task.train(records(LABELS), epochs=5, seed=1)
        norms.append(np.linalg.norm(task.get_flat()))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("name", ["minilm", "gpt2", "llama"])
def test_dropout_changes_training_alone_and_the_same_seed_drops_the_same(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = zoo[name]
    answers = tiny.labels or ("open line", "hold")
    flats = {}
    for key, share, seed, noise in (
        ("plain", 0.0, 1, 0),
        ("one", 0.5, 1, 0),
        ("same", 0.5, 1, 9),
        ("other", 0.5, 2, 0),
    ):
        task = tiny.load(tiny.terms(training={"lora_dropout": share}))
        torch.manual_seed(noise)  # whatever else draws in this process
        before = task.evaluate(records(answers)).loss_sum
        assert task.evaluate(records(answers)).loss_sum == before
        task.train(records(answers), epochs=2, seed=seed)
        flats[key] = task.get_flat()
    assert np.array_equal(flats["one"], flats["same"])
    assert not np.array_equal(flats["one"], flats["plain"])
    assert not np.array_equal(flats["one"], flats["other"])


def test_a_lone_head_has_nothing_to_drop(zoo: Any) -> None:
    with pytest.raises(ValueError, match="no LoRA matrices"):
        zoo["minilm"].terms(method="head", training={"lora_dropout": 0.1})
