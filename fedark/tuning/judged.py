"""How answers on the acceptance set are judged, beyond right and wrong.

Classes: for every label how many of its records were answered right, how many it has, and how many
records were answered by it, which is all that precision, recall and macro-F1 need. Free text:
token F1 (as SQuAD's, Rajpurkar et al., arXiv:1606.05250) and ROUGE-L (Lin 2004: F1 of the longest
common subsequence of words), both over the words in lower case without punctuation.

Written here in a few lines, since the kept library (rouge-score) would bring nltk into what every
trainer enclave loads and measures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from fedark.contract.protection import Figure, detail_keys
from fedark.records.reading import Record
from fedark.tuning.layout import Flat
from fedark.tuning.task import TaskModel

__all__ = ["details", "rouge_l", "samples", "token_f1"]

_SAMPLES = 5
_SHOWN = 300  # characters


def details(
    task: TaskModel, records: Sequence[Record], said: Mapping[tuple[int, int], int]
) -> dict[str, Figure]:
    """The figures of `detail_keys` on `records`.

    Args:
        said: of `Evaluation`, over all of `records`.
    """
    if not task.terms.labels:
        given = task.answers([record.prompt for record in records]) if records else []
        pairs = [(record.answer, answer) for record, answer in zip(records, given, strict=True)]
        return {
            "token-f1": (0, len(pairs), sum(token_f1(*pair) for pair in pairs)),
            "rouge-l": (0, len(pairs), sum(rouge_l(*pair) for pair in pairs)),
        }
    found: dict[str, Figure] = {}
    for key in detail_keys(task.terms):
        kind, *places = key.split("/")
        if kind == "said":
            count = said.get((int(places[0]), int(places[1])), 0)
            found[key] = (count, count, 0.0)
        else:
            label = int(places[0])
            gold = sum(count for (right, _), count in said.items() if right == label)
            answered = sum(count for (_, one), count in said.items() if one == label)
            found[key] = (said.get((label, label), 0), gold, float(answered))
    return found


def samples(
    task: TaskModel, acceptance: Sequence[tuple[str, Record]], before: Flat, after: Flat
) -> list[list[str]]:
    """A few records of the acceptance set, spread over it: prompt, right answer, and what the model
    answers with either adapter; long texts are cut.

    Args:
        acceptance: group and record.
        before, after: adapters; the model is left with `after`.
    """
    records = [record for _, record in acceptance]
    records = records[:: max(1, len(records) // _SAMPLES)][:_SAMPLES]
    columns = [[record.prompt for record in records], [record.answer for record in records]]
    for flat in (before, after):
        task.set_flat(flat)
        columns.append([_answer(task, record) for record in records])
    return [[text[:_SHOWN] for text in row] for row in zip(*columns, strict=True)]


def _answer(task: TaskModel, record: Record) -> str:
    if not task.terms.labels:
        return task.answers([record.prompt])[0]
    ((_, given),) = task.evaluate([record]).said
    return task.terms.labels[given]


def token_f1(wanted: str, given: str) -> float:
    """F1 of the words that both have, each as often as in both; 1 for two empty texts."""
    one, other = _words(wanted), _words(given)
    common = sum((Counter(one) & Counter(other)).values())
    return _f1(common, len(one), len(other))


def rouge_l(wanted: str, given: str) -> float:
    """F1 of the longest common subsequence of words; 1 for two empty texts."""
    one, other = _words(wanted), _words(given)
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, another in enumerate(other):
            row.append(before[place] + 1 if word == another else max(row[-1], before[place + 1]))
    return _f1(row[-1], len(one), len(other))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if one + other else 1.0
