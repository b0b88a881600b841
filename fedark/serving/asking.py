"""A file of prompts in, a file of answers out; a file of records in, figures out.

What is written has one row a record, in the order of the file, with the number of its line there
and never its text: the answers alone are new. Of the same records `measure` gives the figures that
the job itself gave.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedark.foundation.errors import InputError
from fedark.foundation.files import write_atomic
from fedark.records.reading import Record, read_records
from fedark.serving.model import Answering

__all__ = ["Form", "answer_file", "measure"]

Say = Callable[[str], None]
_BATCH = 256
_SETTING = "--leave-out"


@dataclass(frozen=True)
class Form:
    """How records are read.

    Attributes:
        prompt: the template, or "" for the one that the adapter was trained with.
        encoding: of a file that is not UTF-8.
        leave_out: records that cannot be used are left out.
    """

    prompt: str = ""
    encoding: str = ""
    leave_out: bool = False

    def read(self, model: Answering, path: Path, answer: str, say: Say) -> list[Record]:
        """The records of a file; with no answers where `answer` names no column.

        Raises:
            DataError: with file and line.
        """
        return read_records(
            path,
            self.prompt or model.terms.prompt,
            answer,
            model.terms.labels,
            encoding=self.encoding,
            leave_out=say if self.leave_out else None,
            setting=_SETTING,
        )


def answer_file(
    model: Answering,
    source: Path,
    out: Path,
    *,
    form: Form,
    every: bool = False,
    longest: int | None = None,
    stop: Sequence[str] = (),
    say: Say,
) -> int:
    """Answer every prompt of `source` in the file `out` (.csv or .jsonl), which is there whole or
    not at all. Returns how many.

    Args:
        every: write the probability of every label, not only of the likeliest.
        longest, stop: of free text; see `TaskModel.answers`.
        say: told how far it is.

    Raises:
        InputError: the output's name says no form, or `longest` or `stop` fit no classifier.
        DataError: a record cannot be used; with file and line.
        StorageError: `out` cannot be written.
    """
    kind = out.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise InputError(
            f"{out} ends neither in .csv nor in .jsonl.",
            safe="Nothing was read or written.",
            fix="Name the output so that it says its form.",
        )
    if model.terms.labels and (longest is not None or stop):
        raise InputError(
            "A model with labels writes no text whose length or end could be set.",
            safe="Nothing was read or written.",
        )
    records = form.read(model, source, "", say)
    rows: list[dict[str, Any]] = []
    for part in _parts(records):
        prompts = [record.prompt for record in part]
        if model.terms.labels:
            answered = _labelled(model, prompts, every)
        else:
            texts = model.answers(prompts, longest=longest, stop=stop)
            answered = [{"answer": text} for text in texts]
        pairs = zip(part, answered, strict=True)
        rows += [{"line": record.line, **row} for record, row in pairs]
        say(f"{len(rows):,} of {len(records):,} answered")
    write_atomic(out, (_csv(rows) if kind == ".csv" else _json_lines(rows)).encode())
    return len(rows)


def measure(
    model: Answering, source: Path, answer: str, *, form: Form, say: Say
) -> dict[str, object]:
    """The figures of the model on records whose answers are known: `records`, `correct`,
    `accuracy`, `loss` (mean cross-entropy, nats), for labels `labels` (records, answered and
    correct ones of each), for free text `token_f1` and `rouge_l`.

    Args:
        answer: the column that holds the right answer.

    Raises:
        DataError: a record cannot be used; with file and line.
    """
    records = form.read(model, source, answer, say)
    say(f"measuring {len(records):,} records")
    metrics, details = model.evaluate(records)
    found: dict[str, object] = {
        "records": metrics.total,
        "correct": metrics.correct,
        "accuracy": metrics.correct / metrics.total,
        "loss": metrics.loss_sum / metrics.total,
    }
    if model.terms.labels:
        found["labels"] = _by_label(model.terms.labels, metrics.said)
    else:
        for key, name in (("token-f1", "token_f1"), ("rouge-l", "rouge_l")):
            _, total, value = details[key]
            found[name] = value / total
    return found


def _parts(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), _BATCH):
        yield records[start : start + _BATCH]


def _labelled(model: Answering, prompts: Sequence[str], every: bool) -> list[dict[str, Any]]:
    labels, rows = model.terms.labels, []
    for likely in model.probabilities(prompts):
        best = int(likely.argmax())
        row: dict[str, Any] = {"label": labels[best], "probability": round(float(likely[best]), 6)}
        if every:
            each = zip(labels, likely, strict=True)
            row["probabilities"] = {label: round(float(value), 6) for label, value in each}
        rows.append(row)
    return rows


def _by_label(
    labels: Sequence[str], said: Mapping[tuple[int, int], int]
) -> dict[str, dict[str, int]]:
    counts = {label: {"records": 0, "answered": 0, "correct": 0} for label in labels}
    for (right, given), count in said.items():
        counts[labels[right]]["records"] += count
        counts[labels[given]]["answered"] += count
        counts[labels[right]]["correct"] += count * (right == given)
    return counts


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV (RFC 4180); the probabilities of all labels in a column each."""
    flat = [
        {name: value for name, value in row.items() if name != "probabilities"}
        | {f"probability: {name}": value for name, value in row.get("probabilities", {}).items()}
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
