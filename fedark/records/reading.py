"""Records: reading them from a data file, and checking them.

A record is one prompt and its answer, in the characters of the file: a number as it was written, a
boolean as `true` or `false`. A column of the prompt may be empty where another one is not: Alpaca's
`input`, for example. Only a label is taken in another form, that in which the job lists it: both
are compared without regard to blanks and to how letters are composed.

A file is checked whole. A record that cannot be used (an empty one, an answer that is no label)
ends the reading, or is left out where `data.unusable` says so. An error names the file, the line
and the column that was asked for, by the job file or the node's own settings, and how many records
have the fault; never the content of a record, a label or a column that was not asked for: those
belong to the customer. A node tells it to its own people and lets none of it travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedark.foundation.errors import DataError
from fedark.foundation.jsontext import read_json
from fedark.records.rows import MAX_CHARACTERS, MAX_RECORDS, NotText, normal, read_rows, read_text
from fedark.records.template import Template

__all__ = ["Record", "alike_labels", "one_answer", "read_labels", "read_records"]


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One prompt and its answer. Its `repr` shows neither: records must not reach a log or a
    traceback.

    Attributes:
        line: where it stands in its file, or 0; no part of what it is.
        group: what the acceptance report is split by; no part of what it is.
    """

    prompt: str
    answer: str
    line: int = field(default=0, compare=False)
    group: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return "Record(...)"


def read_records(
    path: Path,
    prompt: str,
    answer: str,
    labels: Sequence[str] = (),
    *,
    group: str = "",
    encoding: str = "",
    leave_out: Callable[[str], None] | None = None,
    setting: str = 'data.unusable = "leave-out"',
) -> list[Record]:
    """Read a file that `fedark.records.rows` can read.

    Args:
        path: the file.
        prompt: a template, such as "{text}" (`fedark.records.template`).
        answer: the column that holds the answer, or "" for records whose answer is asked for.
        labels: the admissible answers; empty for free text.
        group: the column of `Record.group`, or "".
        encoding: of a file that is not UTF-8.
        leave_out: leaves unusable records out and is told how many; None refuses the file.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed, or has an unusable record,
            with the first line at fault.
        InputError: the template itself is wrong.
    """
    template = Template.parse(prompt)
    names = list(dict.fromkeys((*template.columns, *filter(None, (answer, group)))))
    place = {name: index for index, name in enumerate(names)}
    known = {normal(label): label for label in labels}
    faults: dict[str, list[int]] = {}
    records: list[Record] = []
    rows = 0
    for line, values in read_rows(path, names, encoding):
        rows += 1
        if rows > MAX_RECORDS:
            what = f"it holds more than {MAX_RECORDS:,} records."
            raise DataError(str(path), None, what, fix="Split it into several files.")
        asked = [values[place[name]] for name in template.columns]
        wanted = values[place[answer]] if answer else ""
        fault = _fault(template, asked, answer, wanted)
        given = wanted or ""
        if not fault and known and answer:
            given = known.get(normal(given), "")
            fault = "" if given else f"the answer is none of the model's {len(known)} labels"
        if fault:
            faults.setdefault(fault, []).append(line)
            continue
        filled = template.fill([value or "" for value in asked])
        if max(len(filled), len(given)) > MAX_CHARACTERS:
            what = f"prompt or answer has more than {MAX_CHARACTERS:,} characters"
            faults.setdefault(what, []).append(line)
            continue
        of = (values[place[group]] or "") if group else ""
        records.append(Record(filled, given, line, of))
    if not rows:
        raise _no_records(path)
    if faults:
        _tell(path, faults, leave_out, setting)
    if not records:
        raise _no_records(path)
    return records


def one_answer(records: Iterable[Record]) -> bool:
    """Whether all records have the same answer, of which nothing can be learned."""
    return len({record.answer for record in records}) == 1


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels of a `.json` file, a list of texts, in its order and exactly as they stand there.

    Raises:
        DataError: the file is missing, not such a list, or names a label twice.
    """
    try:
        labels = read_json(read_text(path), as_written=True)
    except ValueError:
        labels = None
    if isinstance(labels, list):
        labels = [str(item).lower() if type(item) is bool else item for item in labels]
    if (
        not isinstance(labels, list)
        or not labels
        or not all(isinstance(item, str) and item.strip() for item in labels)
    ):
        raise DataError(
            str(path),
            None,
            "it is not a JSON list of non-empty strings.",
            fix="Write one list of labels.",
        )
    if alike_labels(labels):
        raise DataError(
            str(path),
            None,
            "a label stands in it twice, or twice but for blanks and composed letters.",
            fix="Remove the duplicates.",
        )
    return tuple(labels)


def alike_labels(labels: Sequence[str]) -> bool:
    """Whether two of the labels could not be told apart in a file of records."""
    return len({normal(label) for label in labels}) != len(labels)


def _fault(template: Template, asked: Sequence[str | None], answer: str, given: str | None) -> str:
    """Why a row is no record, or ""."""
    for value in (*asked, given):
        if isinstance(value, NotText):
            return value
    if answer and (given is None or not given.strip()):
        return f"column {answer!r} is empty"
    if not any(value and value.strip() for value in asked):
        one = len(set(template.columns)) == 1
        return f"column {template.columns[0]!r} is empty" if one else "its whole prompt is empty"
    return ""


def _tell(
    path: Path, faults: dict[str, list[int]], leave_out: Callable[[str], None] | None, setting: str
) -> None:
    """Refuse the file for the first of its faults, or tell of all of them."""
    if leave_out is None:
        fault, lines = min(faults.items(), key=lambda item: item[1][0])
        many = f" ({len(lines)} such records in the file)" if len(lines) > 1 else ""
        raise DataError(
            str(path),
            lines[0],
            f"{fault.rstrip('.')}{many}.",
            fix=f"Correct or remove such records, or have them left out: {setting}.",
        )
    for fault, lines in faults.items():
        leave_out(
            f"warning: {path}: {len(lines)} records were left out, the first in line {lines[0]}:"
            f" {fault.rstrip('.')}"
        )


def _no_records(path: Path) -> DataError:
    return DataError(
        str(path), None, "it holds no records.", fix="Give a file with at least one record."
    )
