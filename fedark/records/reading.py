"""Records: reading them from CSV or JSON Lines.

A record is one prompt and its answer. A file is checked whole when it is read: encoding, shape,
empty fields, over-long lines, labels that the model does not know, and answers that are all the
same. An error names the file, the line and the column that was asked for, by the job file or the
node's own settings, and how many labels are strange; never the content of a record, a label or a
column that was not asked for: those belong to the customer. A node tells it to its own people and
lets none of it travel.
"""

from __future__ import annotations

import csv
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import DataError, InputError
from fedark.foundation.jsontext import read_json

__all__ = ["MAX_LINE_CHARACTERS", "Record", "placeholders", "read_labels", "read_records"]

MAX_LINE_CHARACTERS = 64 * 1024


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One prompt and its answer. Its `repr` shows neither: records must not reach a log or a
    traceback.
    """

    prompt: str
    answer: str

    def __repr__(self) -> str:
        return "Record(...)"


def read_records(
    path: Path, prompt_template: str, answer_column: str, labels: Sequence[str] = ()
) -> list[Record]:
    """Read a `.csv` file with a header line, or a `.jsonl` file of one object a line.

    Args:
        path: the file, UTF-8 (a byte order mark is allowed).
        prompt_template: text with `{column}` placeholders, such as "{text}"; `{{` and `}}` stand
            for braces.
        answer_column: the column that holds the answer.
        labels: the admissible answers; empty for free text.

    Raises:
        DataError: the file is missing, unreadable, empty or malformed, with the first line at
            fault.
        InputError: the template itself is wrong.
    """
    columns = placeholders(prompt_template)
    text = _read_text(path)
    if path.suffix == ".csv":
        rows = _csv_rows(path, text)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _json_rows(path, text)
    else:
        raise DataError(
            str(path),
            None,
            "its name ends neither in .csv nor in .jsonl.",
            fix="Rename or convert the file.",
        )
    known = frozenset(labels)
    records: list[Record] = []
    strangers: list[int] = []
    for line, row in rows:
        for column in (*columns, answer_column):
            if column not in row:
                raise DataError(
                    str(path),
                    line,
                    f"there is no column {column!r}.",
                    fix="Check the job's prompt and answer columns.",
                )
            if not row[column].strip():
                raise DataError(
                    str(path),
                    line,
                    f"column {column!r} is empty.",
                    fix="Fill it in, or remove the record.",
                )
        record = Record(prompt_template.format_map(row), row[answer_column].strip())
        if known and record.answer not in known:
            strangers.append(line)
        records.append(record)
    if not records:
        raise DataError(
            str(path), None, "it holds no records.", fix="Give a file with at least one record."
        )
    if strangers:
        what = (
            f"the answer is none of the model's {len(known)} labels ({len(strangers)} such records"
            " in the file)."
        )
        raise DataError(
            str(path),
            strangers[0],
            what,
            fix="Correct the answers, or have the provider add the label.",
        )
    if known and len({record.answer for record in records}) == 1:
        raise DataError(
            str(path),
            None,
            "all records have the same answer, so nothing can be learned from them.",
            fix="Add other records.",
        )
    return records


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels of a `.json` file, a list of strings, in its order.

    Raises:
        DataError: the file is missing, not such a list, or names a label twice.
    """
    try:
        labels = read_json(_read_text(path, longest=None))
    except ValueError:
        labels = None
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
    if len(set(labels)) != len(labels):
        raise DataError(
            str(path), None, "a label stands in it twice.", fix="Remove the duplicates."
        )
    return tuple(labels)


def placeholders(template: str) -> list[str]:
    """The columns that a prompt template names.

    Raises:
        InputError: it names none, or holds something else in braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        parts = [("", "", "", "")]
    columns = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        # A dot or bracket would reach into the value, a number would be positional.
        if spec or conversion or not name or name.isdigit() or any(char in name for char in ".[]"):
            raise InputError(
                "A prompt template may hold nothing in braces but the name of a column.",
                safe="The data was not read.",
                fix='Write it like "{text}"; a brace itself is written twice.',
            )
        columns.append(name)
    if not columns:
        raise InputError(
            "The prompt template names no column, so every prompt would be the same.",
            safe="The data was not read.",
            fix='Write it like "{text}".',
        )
    return columns


def _read_text(path: Path, longest: int | None = MAX_LINE_CHARACTERS) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            str(path), None, "it does not exist.", fix="Check the path in the job file."
        ) from None
    except OSError as error:
        raise DataError(
            str(path),
            None,
            f"it cannot be read ({error.strerror}).",
            fix="Check the path and its rights.",
        ) from None
    if not data.strip():
        raise DataError(
            str(path), None, "it is empty.", fix="Give a file with at least one record."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec skipped the mark before it counted.
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            str(path), line, "it is not UTF-8.", fix="Save the file as UTF-8."
        ) from None
    for number, content in enumerate(text.split("\n"), 1):
        if longest is not None and len(content) > longest:
            what = f"it is longer than {longest} characters."
            raise DataError(
                str(path), number, what, fix="Split the record, or check the file's line ends."
            )
        if "\0" in content:
            raise DataError(
                str(path), number, "it holds a zero byte.", fix="Check that this is a text file."
            )
    return text


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    # Split at "\n" alone: a record may hold other characters that str.splitlines takes for line
    # ends.
    reader = csv.reader((line + "\n" for line in text.split("\n")), strict=True)
    header: list[str] | None = None
    end = 0
    while True:
        line = end + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            fix = (
                "Quote fields that hold a comma, a quote or a line end, and double the quotes in"
                " them."
            )
            raise DataError(str(path), line, "it is not well-formed CSV.", fix=fix) from None
        end = reader.line_num
        if not row:
            continue
        if header is None:
            if len(set(row)) != len(row):
                raise DataError(
                    str(path),
                    line,
                    "a column stands twice in the header.",
                    fix="Give every column its own name.",
                )
            header = row
        elif len(row) != len(header):
            what = f"it has {len(row)} fields, but the header has {len(header)}."
            raise DataError(
                str(path), line, what, fix="Check for an unquoted comma or a missing field."
            )
        else:
            yield line, dict(zip(header, row, strict=True))


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = read_json(line)
        except UnicodeEncodeError:
            what = "a text in it holds half of a character, an unpaired surrogate."
            raise DataError(str(path), number, what, fix="Cut texts between characters.") from None
        except ValueError:
            raise DataError(
                str(path), number, "it is not JSON.", fix="Write one JSON object a line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                str(path), number, "it is not a JSON object.", fix="Write one JSON object a line."
            )
        # Numbers are taken as written; true, null, lists and maps are left out and thus reported as
        # a missing column.
        yield (
            number,
            {key: str(value) for key, value in row.items() if type(value) in (str, int, float)},
        )
