"""A language model that chooses among listed labels is not drawn to the shortest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fedark.records.reading import Record

LABELS = ("hold", "open line", "close the breaker now", "shed load at five six seven now")


@pytest.fixture(params=["gpt2", "llama"])
def task(request: pytest.FixtureRequest, zoo: Any) -> Any:
    tiny = zoo[request.param]
    return tiny.load(tiny.terms(labels=LABELS, training={"max_length": 40}))


def scores(task: Any, prompt: str, *, mean: bool) -> list[float]:
    """What every label gets by reading it whole behind the prompt, one at a time."""
    found = []
    for tail in task._encoder.answers(LABELS):
        head = task._encoder.prompts([prompt], [12])[0]
        ids = torch.tensor([[*head, *tail]])
        with torch.no_grad():
            logits = task.scorer(ids, torch.ones_like(ids))[0, len(head) - 1 : -1]
        total = -float(functional.cross_entropy(logits, torch.tensor(tail), reduction="sum"))
        found.append(total / len(tail) if mean else total)
    return found


def test_a_label_counts_by_its_mean_likelihood_a_token(task: Any, texts: list[str]) -> None:
    means = [scores(task, text, mean=True) for text in texts]
    chosen = [row.index(max(row)) for row in means]
    sums = [scores(task, text, mean=False) for text in texts]
    shortest = [row.index(max(row)) for row in sums].count(0)
    assert shortest > 0.75 * len(texts), "a sum prefers the shortest"
    assert chosen.count(0) < shortest / 2
    records = [Record(text, LABELS[place]) for text, place in zip(texts, chosen, strict=True)]
    measured = task.evaluate(records)
    assert (measured.correct, measured.total) == (len(texts), len(texts))
    expected = -sum(max(row) for row in means)
    assert measured.loss_sum == pytest.approx(expected, rel=1e-4)


def test_labels_of_very_different_lengths_are_learned(task: Any) -> None:
    prompts = ("hot north", "cold south", "bus a is at", "the load of line")
    records = [Record(prompt, label) for prompt, label in zip(prompts, LABELS, strict=True)] * 4
    task.train(records, epochs=40, seed=1)
    assert task.evaluate(records).correct == len(records)
