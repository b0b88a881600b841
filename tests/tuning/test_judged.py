"""Answers are judged beyond right and wrong: classes, confusions, overlap of free text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedark.contract.protection import detail_keys
from fedark.records.reading import Record
from fedark.stages.report import _judged
from fedark.tuning.judged import details, rouge_l, samples, token_f1

Make = Callable[[tuple[str, ...]], list[Record]]
ANSWERS = ("open line", "close the breaker", "shed load now", "hold")


@pytest.mark.parametrize(
    ("wanted", "given", "tokens", "sequence"),
    [
        ("Open the line.", "open the line", 1.0, 1.0),
        ("open the line", "", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("a b c d", "d c b a", 1.0, 0.25),
        ("close the breaker now", "close breaker", 4 / 6, 4 / 6),
        ("a a b", "a b b", 4 / 6, 4 / 6),
        ("öffnen Sie", "ÖFFNEN sie bitte", 4 / 5, 4 / 5),
    ],
)
def test_overlap_of_words(wanted: str, given: str, tokens: float, sequence: float) -> None:
    assert token_f1(wanted, given) == pytest.approx(tokens)
    assert rouge_l(wanted, given) == pytest.approx(sequence)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sums_of_shares_give_the_macro_f1_of_all(zoo: Any, records: Make, name: str) -> None:
    tiny = zoo[name]
    labels = tiny.labels or ANSWERS
    task = tiny.load(tiny.terms(labels=labels))
    data = records(labels)
    task.train(data[:12], epochs=1, seed=0)
    shares = [data[place::3] for place in range(3)]
    totals: dict[str, list[float]] = {}
    for share in shares:
        found = details(task, share, task.evaluate(share).said)
        assert list(found) == detail_keys(task.terms)
        for key, counts in found.items():
            old = totals.setdefault(f"before/{key}", [0, 0, 0.0])
            totals[f"before/{key}"] = [a + b for a, b in zip(old, counts, strict=True)]
    judged = _judged(task.terms, totals, "before")
    pairs = [next(iter(task.evaluate([record]).said)) for record in data]
    scores = []
    for label in sorted({right for right, _ in pairs}):
        hits = pairs.count((label, label))
        misses = sum(label in pair and pair != (label, label) for pair in pairs)
        scores.append(2 * hits / (2 * hits + misses))
    assert judged["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    for i in range(len(labels)):
        for j in range(len(labels)):
            assert judged["confusion"][i][j] == pairs.count((i, j))
    assert task.evaluate(data).correct == sum(judged["confusion"][i][i] for i in range(len(labels)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_free_text_is_what_greedy_decoding_writes(zoo: Any, records: Make, name: str) -> None:
    task, data = zoo[name].load(), records(ANSWERS)
    task.train(data, epochs=30, seed=0)
    given = task.answers([record.prompt for record in data])
    for record, answer in zip(data, given, strict=True):
        ids = task._encoder.prompts([record.prompt], [12])[0]
        written: list[int] = []
        with torch.no_grad():
            while len(written) < 12:
                row = torch.tensor([ids + written])
                token = int(task.scorer(row, torch.ones_like(row))[0, -1].argmax())
                if token == 3:
                    break
                written.append(token)
        assert answer == task._encoder.text(written)
    measured = task.evaluate(data)
    exact = sum(record.answer == answer for record, answer in zip(data, given, strict=True))
    assert exact == measured.correct > 0
    found = details(task, data, measured.said)
    assert found["token-f1"][1] == len(data)
    assert found["token-f1"][2] >= exact


def test_samples_are_of_the_acceptance_set_before_and_after(zoo: Any, records: Make) -> None:
    task, data = zoo["minilm"].load(), records(zoo["minilm"].labels)
    before = task.get_flat()
    task.train(data, epochs=20, seed=0)
    after = task.get_flat()
    rows = samples(task, [("all", record) for record in data], before, after)
    assert len(rows) == 5
    known = {record.prompt: record.answer for record in data}
    for prompt, right, first, last in rows:
        assert known[prompt] == right
        for flat, said in ((before, first), (after, last)):
            task.set_flat(flat)
            ((_, given),) = task.evaluate([Record(prompt, right)]).said
            assert task.terms.labels[given] == said
    assert samples(task, [], before, after) == []
