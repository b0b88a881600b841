"""The rows of a data file: CSV, JSON Lines, Parquet or Arrow.

Told apart by the name, in small or capital letters: `.csv`, `.tsv`, `.jsonl` and `.ndjson`, each
also with `.gz`, and `.parquet`, `.arrow` and `.feather`. Of a CSV file the delimiter (comma,
semicolon, tab or bar), a `sep=` line, the line ends and a byte order mark are found out.

A file may have been made to harm its reader. It is read piece by piece, and what is kept of it is
bounded, packed or not: `MAX_BYTES` of text, `MAX_RECORDS` rows, `MAX_CHARACTERS` a line and a
field. Errors name file, line, and columns that were asked for, and nothing else of the content.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import itertools
import math
import stat
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedark.foundation.errors import DataError
from fedark.foundation.jsontext import NotFinite, read_json

__all__ = [
    "MAX_BYTES",
    "MAX_CHARACTERS",
    "MAX_RECORDS",
    "Row",
    "NotText",
    "columns_of",
    "is_utf8",
    "normal",
    "read_rows",
    "read_text",
]

MAX_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 20
MAX_RECORDS = 5_000_000
_CHUNK = 1 << 16
_DELIMITERS = ",;\t|"
_TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow", ".feather")
_BATCH = 1024
_LOOKED_AT = 200  # lines of JSON, for their columns
_UNPACK = {".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz"}


class NotText(str):
    """Stands for a value that is no text, and says what is wrong with it."""

    __slots__ = ()


Row = tuple[int, tuple[str | None, ...]]
"""Number of the line (in a table: of the row, from 1), and the values of the columns that were
asked for. None is a value that is missing, null or not there."""


def read_rows(path: Path, columns: Sequence[str], encoding: str = "") -> Iterator[Row]:
    """The rows of a file with these columns, one after the other.

    Args:
        columns: their names; compared as `normal` has it where none is exactly so.
        encoding: of a text file that is not UTF-8; "" refuses such a file.

    Raises:
        DataError: the file is missing, unreadable, empty, malformed or too large, or has no such
            column.
    """
    kind = _kind(path)
    if kind in _TABLES:
        yield from _table(path, kind, columns)
        return
    packed = path.suffix.lower() == ".gz"
    codec = encoding if encoding and not is_utf8(path) else "utf-8"
    lines = _lines(path, codec, packed=packed)
    try:
        if kind in (".jsonl", ".ndjson"):
            yield from _json_rows(path, lines, columns)
        else:
            yield from _csv_rows(path, lines, columns, "\t" if kind == ".tsv" else _DELIMITERS)
    except _NotText as error:
        raise DataError(
            str(path),
            error.line,
            f"it is not {codec.upper()}.",
            fix='Save the file as UTF-8, or name its encoding, such as data.encoding = "cp1252".',
        ) from None


def columns_of(path: Path, encoding: str = "") -> list[str]:
    """The names of a file's columns: of a JSON Lines file those of its first lines.

    Raises:
        DataError: as `read_rows`.
    """
    kind = _kind(path)
    if kind in _TABLES:
        return _table_columns(path, kind)
    packed = path.suffix.lower() == ".gz"
    codec = encoding if encoding and not is_utf8(path) else "utf-8"
    lines = _lines(path, codec, packed=packed)
    try:
        if kind in (".jsonl", ".ndjson"):
            found: dict[str, None] = {}
            for _, line in itertools.islice(lines, _LOOKED_AT):
                with contextlib.suppress(ValueError):
                    row = read_json(line) if line.strip() else {}
                    found |= dict.fromkeys(row if isinstance(row, dict) else ())
            return list(found)
        for _, line in lines:
            if line.strip() and not line.lower().startswith("sep="):
                delimiter = _delimiter(line, (), "\t" if kind == ".tsv" else _DELIMITERS)
                return next(csv.reader([line], delimiter=delimiter), [])
    except (_NotText, csv.Error):
        raise DataError(
            str(path), 1, "its header cannot be read.", fix="Save the file as CSV in UTF-8."
        ) from None
    return []


def read_text(path: Path) -> str:
    """The text of a small file, UTF-8.

    Raises:
        DataError: it is missing, unreadable, empty, longer than 16 million characters, or not
            UTF-8.
    """
    with _opened(path, packed=False) as file:
        data = _read(path, file, 1 << 24)
        if file.read(1):
            raise DataError(str(path), None, "it is longer than 16 MiB.", fix="Name another file.")
    if not data.strip():
        raise _empty(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(str(path), None, "it is not UTF-8.", fix="Save it as UTF-8.") from None


def normal(text: str) -> str:
    """The form in which names are compared: composed characters (NFC), and single blanks between
    words.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


class _NotText(Exception):
    """The bytes are not of the encoding, from this line on."""

    def __init__(self, line: int) -> None:
        self.line = line
        super().__init__()


def _kind(path: Path) -> str:
    """What a file is by its name: a suffix of `_TEXTS` or `_TABLES`.

    Raises:
        DataError: it is none that can be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    packed = suffixes[-1] == ".gz" and len(suffixes) > 1
    kind = suffixes[-2] if packed else suffixes[-1]
    if kind in _TEXTS or (kind in _TABLES and not packed):
        return kind
    raise DataError(
        str(path),
        None,
        "its name ends neither in .csv, .tsv or .jsonl (also with .gz) nor in .parquet or .arrow.",
        fix=_advice(suffixes[-1]),
    )


def _advice(suffix: str) -> str:
    if suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        return 'Save the sheet as "CSV UTF-8".'
    if suffix == ".json":
        return "Write one JSON object a line: jq -c '.[]' FILE.json > FILE.jsonl"
    if suffix in _UNPACK:
        return "Unpack it first, or pack it with gzip."
    return "Rename or convert the file."


# -- bytes and lines


def _opened(path: Path, *, packed: bool) -> BinaryIO | gzip.GzipFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(
                str(path), None, "it cannot be read: it is no file.", fix="Check the path."
            )
        return gzip.open(path, "rb") if packed else path.open("rb")
    except FileNotFoundError:
        raise DataError(
            str(path),
            None,
            "it does not exist.",
            fix="Check the path, in the job file or the node's party.toml.",
        ) from None
    except OSError as error:
        raise DataError(
            str(path),
            None,
            f"it cannot be read ({error.strerror}).",
            fix="Check the path and its rights.",
        ) from None


def _read(path: Path, file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(
            str(path), None, "it is no whole gzip file.", fix="Copy or pack it again."
        ) from None
    except OSError as error:
        raise DataError(
            str(path),
            None,
            f"it cannot be read ({error.strerror}).",
            fix="Check the disk and the file's rights.",
        ) from None


def is_utf8(path: Path) -> bool:
    """Whether a text file, packed or not, is UTF-8 (or UTF-16 with its mark) as a whole.

    Raises:
        DataError: it is missing, unreadable or too large.
    """
    try:
        for _ in _lines(path, "utf-8", packed=path.suffix.lower() == ".gz"):
            pass
    except _NotText:
        return False
    return True


def _lines(path: Path, encoding: str, *, packed: bool) -> Iterator[tuple[int, str]]:
    """The lines of a text file without their ends, numbered from 1.

    Lines end at "\\n" alone, or at "\\r" where the file has that first: a record may hold other
    characters that `str.splitlines` takes for line ends.
    """
    number, rest, end, size, blank = 0, "", "", 0, True
    with _opened(path, packed=packed) as file:
        chunk = _read(path, file, _CHUNK)
        if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
        while True:
            size += len(chunk)
            if size > MAX_BYTES:
                what = f"it holds more than {MAX_BYTES >> 20} MiB of text."
                raise DataError(str(path), None, what, fix="Split it into several files.")
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(encoding, "replace")
                raise _NotText(number + 1 + (rest + good).count(end or "\n")) from None
            blank = blank and not text.strip()
            rest += text
            if not end:
                ends = [rest.find(char) for char in "\n\r"]
                if ends[1] >= 0 and ends[0] < 0 and ends[1] < len(rest) - 1:
                    end = "\r"
                elif ends[0] >= 0:
                    end = "\n"
            lines = rest.split(end) if end else [rest]
            rest = lines.pop() if chunk else ""
            for line in lines:
                number += 1
                yield number, _checked(path, number, line)
            _checked(path, number + 1, rest)
            if not chunk:
                break
            chunk = _read(path, file, _CHUNK)
    if blank:
        raise _empty(path)


def _checked(path: Path, number: int, line: str) -> str:
    if len(line) > MAX_CHARACTERS:
        what = f"it is longer than {MAX_CHARACTERS:,} characters."
        raise DataError(
            str(path), number, what, fix="Split the record, or check the file's line ends."
        )
    if "\0" in line:
        raise DataError(
            str(path),
            number,
            "it holds a zero byte.",
            fix="Check that this is a text file in UTF-8.",
        )
    return line


def _empty(path: Path) -> DataError:
    return DataError(str(path), None, "it is empty.", fix="Give a file with at least one record.")


# -- CSV


def _csv_rows(
    path: Path, lines: Iterator[tuple[int, str]], columns: Sequence[str], delimiters: str
) -> Iterator[Row]:
    if csv.field_size_limit() < MAX_CHARACTERS + 1:
        csv.field_size_limit(MAX_CHARACTERS + 1)  # of the whole process, whose default is 131,072
    written = (item for item in lines if item[1].strip())
    first, delimiter = next(written, (1, "")), ""
    if first[1].lower().startswith("sep=") and len(first[1].rstrip("\r")) == 5:
        delimiter = first[1][4]
        first = next(written, (2, ""))
    delimiter = delimiter or _delimiter(first[1], columns, delimiters)
    at = [first[0]]  # the line that the reader has taken last

    def feed() -> Iterator[str]:
        for number, line in itertools.chain([first], lines):
            at[0] = number
            yield line + "\n"

    reader = csv.reader(feed(), strict=True, delimiter=delimiter)
    places: list[int] = []
    width = 0
    began = first[0]
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _malformed_csv(path, began, str(error)) from None
        line, began = began, at[0] + 1
        if not row:
            continue
        if not places:
            places, width = [_place(path, line, row, name) for name in columns], len(row)
        elif len(row) != width:
            what = f"it has {len(row)} fields, but the header has {width}."
            raise DataError(
                str(path),
                line,
                what,
                fix=f"Check for an unquoted {_named(delimiter)} or a missing field.",
            )
        else:
            yield line, tuple(row[place] for place in places)


def _malformed_csv(path: Path, line: int, message: str) -> DataError:
    if "field limit" in message:
        what = f"a field has more than {MAX_CHARACTERS:,} characters."
        return DataError(str(path), line, what, fix="Split the record, or check its quotes.")
    fix = (
        "Quote fields that hold the delimiter, a quote or a line end, and double the quotes in"
        " them."
    )
    return DataError(str(path), line, "it is not well-formed CSV.", fix=fix)


def _delimiter(header: str, columns: Sequence[str], delimiters: str) -> str:
    """The delimiter under which a header has most of the columns, then most fields."""

    def found(delimiter: str) -> tuple[int, int]:
        try:
            names = next(csv.reader([header], strict=True, delimiter=delimiter), [])
        except csv.Error:
            return (0, 0)
        known = {normal(name) for name in names}
        return (sum(normal(name) in known for name in columns), len(names))

    return max(delimiters, key=found)


def _named(delimiter: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}.get(delimiter, "delimiter")


def _place(path: Path, line: int | None, names: Sequence[str], name: str) -> int:
    """Where a column stands in a header."""
    for form in (str, normal):
        places = [index for index, other in enumerate(names) if form(other) == form(name)]
        if len(places) > 1:
            raise DataError(
                str(path),
                line,
                f"column {name!r} stands twice in the header.",
                fix="Give every column its own name.",
            )
        if places:
            return places[0]
    raise _no_column(path, line, name)


def _no_column(path: Path, line: int | None, name: str) -> DataError:
    return DataError(
        str(path),
        line,
        f"there is no column {name!r}.",
        fix="Check the prompt and answer columns (data.prompt, data.answer).",
    )


# -- JSON Lines


def _json_rows(
    path: Path, lines: Iterator[tuple[int, str]], columns: Sequence[str]
) -> Iterator[Row]:
    missing = dict.fromkeys(columns)
    some = 0
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = read_json(line, _members, as_written=True)
        except NotFinite:
            what = NotText("it holds NaN or Infinity, which JSON does not know.")
            yield number, (what,) * len(columns)
            continue
        except UnicodeEncodeError:
            what = NotText("a text in it holds half of a character, an unpaired surrogate.")
            raise DataError(str(path), number, what, fix="Cut texts between characters.") from None
        except ValueError:
            raise DataError(
                str(path), number, "it is not JSON.", fix="Write one JSON object a line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                str(path), number, "it is not a JSON object.", fix="Write one JSON object a line."
            )
        some += 1
        values = []
        for name in columns:
            key = _key(row, name)
            if key is not None:
                missing.pop(name, None)
            values.append(None if key is None else _json_text(name, row[key]))
        yield number, tuple(values)
    if some and missing:
        raise _no_column(path, None, next(iter(missing)))


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object that knows a member that stands in it twice."""
    members: dict[str, Any] = {}
    for key, value in pairs:
        members[key] = _TWICE if key in members else value
    return members


_TWICE: Any = object()


def _key(row: dict[str, Any], name: str) -> str | None:
    if name in row:
        return name
    wanted = normal(name)
    return next((key for key in row if normal(key) == wanted), None)


def _json_text(name: str, value: Any) -> str | None:
    if value is None or type(value) is str:  # numbers are texts here, as they were written
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if value is _TWICE:
        return NotText(f"column {name!r} stands in it twice.")
    return NotText(f"column {name!r} holds a list or an object, not a text.")


# -- tables


def _arrow(path: Path) -> Any:
    with _opened(path, packed=False):
        pass
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(
            str(path),
            None,
            "Parquet and Arrow files need the package pyarrow, which is not installed.",
            fix="pip install 'fedark[arrow]', or save the table as CSV.",
        ) from None
    return pa


def _no_table(path: Path, kind: str) -> DataError:
    return DataError(
        str(path),
        None,
        f"it is no whole {'Parquet' if kind == '.parquet' else 'Arrow'} file.",
        fix="Write it again, or save the table as CSV.",
    )


def _table(path: Path, kind: str, columns: Sequence[str]) -> Iterator[Row]:
    arrow = _arrow(path)
    try:
        yield from _table_rows(arrow, path, kind, columns)
    except (arrow.ArrowException, OSError, MemoryError, ValueError):
        raise _no_table(path, kind) from None


def _table_rows(arrow: Any, path: Path, kind: str, columns: Sequence[str]) -> Iterator[Row]:
    with arrow.OSFile(str(path), "rb") as source:
        if kind == ".parquet":
            from pyarrow import parquet

            file = parquet.ParquetFile(source, memory_map=False)
            schema, details = file.schema_arrow, file.metadata
            places = _places(arrow, path, schema, columns)
            groups = [details.row_group(index) for index in range(details.num_row_groups)]
            _bounded(path, sum(max(0, group.total_byte_size) for group in groups))
            wanted = list(dict.fromkeys(schema.names[place] for place in places))
            batches = file.iter_batches(batch_size=_BATCH, columns=wanted)
        else:
            try:
                reader = arrow.ipc.open_file(source)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            except arrow.ArrowInvalid:
                source.seek(0)
                batches = reader = arrow.ipc.open_stream(source)
            schema = reader.schema
            places = _places(arrow, path, schema, columns)
        names = [schema.names[place] for place in places]
        single = [schema.types[place] in (arrow.float16(), arrow.float32()) for place in places]
        number, size = 0, 0
        for batch in batches:
            batch.validate(full=True)
            size += batch.nbytes
            _bounded(path, size)
            for start in range(0, batch.num_rows, _BATCH):
                part = batch.slice(start, _BATCH)
                cells = [part.column(part.schema.names.index(name)).to_pylist() for name in names]
                for row in zip(*cells, strict=True):
                    number += 1
                    values = zip(columns, row, single, strict=True)
                    yield number, tuple(_cell(*value) for value in values)


def _table_columns(path: Path, kind: str) -> list[str]:
    arrow = _arrow(path)
    try:
        with arrow.OSFile(str(path), "rb") as source:
            if kind == ".parquet":
                from pyarrow import parquet

                return list(parquet.ParquetFile(source).schema_arrow.names)
            try:
                return list(arrow.ipc.open_file(source).schema.names)
            except arrow.ArrowInvalid:
                source.seek(0)
                return list(arrow.ipc.open_stream(source).schema.names)
    except (arrow.ArrowException, OSError, MemoryError, ValueError):
        raise _no_table(path, kind) from None


def _bounded(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        what = f"it holds more than {MAX_BYTES >> 20} MiB."
        raise DataError(str(path), None, what, fix="Split it into several files.")


def _places(arrow: Any, path: Path, schema: Any, columns: Sequence[str]) -> list[int]:
    places = [_place(path, None, schema.names, name) for name in columns]
    for name, place in zip(columns, places, strict=True):
        kind = schema.types[place]
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        plain: tuple[str, ...] = (
            "string",
            "large_string",
            "string_view",
            "boolean",
            "integer",
            "floating",
        )
        plain += ("decimal", "date", "timestamp", "null")
        if not any(getattr(arrow.types, f"is_{test}")(kind) for test in plain):
            raise DataError(
                str(path),
                None,
                f"column {name!r} holds neither texts nor numbers.",
                fix="Write it as text.",
            )
    return places


def _cell(name: str, value: Any, single: bool) -> str | None:
    if value is None or type(value) is str:
        return value
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is float and not math.isfinite(value):
        return NotText(f"column {name!r} holds NaN or Infinity.")
    if isinstance(value, date | datetime):
        return value.isoformat()
    if single:
        return str(np.float32(value))  # the shortest text that means this value
    return format(value, "f") if isinstance(value, Decimal) else str(value)
