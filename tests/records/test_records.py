"""Reading records: every kind of bad file is refused with file and line and without content; splits
are stable.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import DataError, InputError
from fedark.records import rows
from fedark.records.reading import Record, one_answer, read_labels, read_records
from fedark.records.rows import MAX_CHARACTERS
from fedark.records.splits import dirichlet_split, split_train_test
from fedark.records.template import Template, column

SECRET = "zanzibar"
LABELS = ("open", "close")


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, template: str = "{text}", labels: tuple[str, ...] = LABELS) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(path, template, "answer", labels)
    assert SECRET not in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix
    return caught.value


def test_csv_with_quotes_commas_and_line_ends_is_read_exactly(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,answer\r\n"a, ""b""\nc",open\r\nd\u2028e, close \r\n\r\n')
    assert [(r.prompt, r.answer) for r in read_records(path, "{text}", "answer", LABELS)] == [
        ('a, "b"\nc', "open"),
        ("d\u2028e", "close"),
    ]


def test_jsonl_is_read_exactly_and_templates_join_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.jsonl",
        '\ufeff{"text": "x", "desk": 7, "answer":'
        ' "open"}\n\n{"text":"y{z}","desk":1.5,"answer":"close"}',
    )
    assert [r.prompt for r in read_records(path, "{{{desk}}} {text}", "answer", LABELS)] == [
        "{7} x",
        "{1.5} y{z}",
    ]


@pytest.mark.parametrize("name", ["gone.csv", "gone.jsonl"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "does not exist" in str(refusal(tmp_path / name))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    assert "cannot be read" in str(refusal(tmp_path / "d.csv"))


@pytest.mark.parametrize("content", ["", " \n\n", "text,answer\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    assert refusal(write(tmp_path, "a.csv", content)).line is None


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    assert "neither" in str(refusal(write(tmp_path, "a.xlsx", "text,answer\na,open\n")))


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.csv", f"text,answer\na,open\n{SECRET},close,more\n", 3, "3 fields"),
        ("a.csv", f'text,answer\na,open\n"{SECRET}"x,close\n', 3, "well-formed"),
        ("a.csv", f'text,answer\na,open\n"{SECRET},close\n', 3, "well-formed"),
        ("a.csv", f'text,answer\n"a\nb",open\n{SECRET}\n', 4, "1 fields"),
        ("a.csv", f"text,text\n{SECRET},open\n", 1, "stands twice"),
        ("a.csv", f"{SECRET},answer\na,open\n", 1, "no column 'text'"),
        ("a.csv", f"text,{SECRET}\na,open\n", 1, "no column 'answer'"),
        ("a.csv", f"text,answer\na,open\n ,{SECRET}\n", 3, "'text' is empty"),
        ("a.csv", f"text,answer\n{SECRET},\n", 2, "'answer' is empty"),
        ("a.csv", f"text,answer\na,open\nb\0{SECRET},close\n", 3, "zero byte"),
        ("a.jsonl", f'{{"text": "a", "answer": "open"}}\n{{"text": "{SECRET}"\n', 2, "not JSON"),
        ("a.jsonl", f'\n["{SECRET}"]\n', 2, "not a JSON object"),
        ("a.jsonl", f'{{"text": "{SECRET}"}}\n', None, "no column 'answer'"),
        ("a.jsonl", f'{{"text": ["{SECRET}"], "answer": "open"}}\n', 1, "'text' holds a list"),
        ("a.jsonl", f'{{"text": "{SECRET}", "text": "b", "answer": "open"}}\n', 1, "twice"),
        ("a.jsonl", f'{{"text": "{SECRET}", "answer": "open", "x": NaN}}\n', 1, "NaN"),
        ("a.jsonl", f'{{"text": "{SECRET}", "answer": -Infinity}}\n', 1, "NaN or Infinity"),
        ("a.jsonl", f'{{"text": null, "answer": "open", "x": "{SECRET}"}}\n', 1, "is empty"),
        ("a.tsv", f"text\tanswer\n{SECRET}\topen\tx\n", 2, "3 fields"),
        ("a.csv", f"sep=;\ntext;answer\n{SECRET};open;x\n", 3, "unquoted semicolon"),
        ("a.jsonl", "[" * 60000 + "\n", 1, "not JSON"),
        (
            "a.jsonl",
            f'{{"text": "{SECRET} \\ud83d", "answer": "open"}}\n',
            1,
            "half of a character",
        ),
    ],
)
def test_a_malformed_line_is_named_and_not_quoted(
    tmp_path: Path, name: str, content: str, line: int | None, says: str
) -> None:
    error = refusal(write(tmp_path, name, content))
    assert error.line == line
    assert says in str(error)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path, mark: bytes) -> None:
    path = write(
        tmp_path,
        "a.csv",
        mark + b"text,answer\na,open\n" + "zanzib\u00e4r,close\n".encode("latin-1"),
    )
    assert refusal(path).line == 3


def test_an_over_long_line_is_refused(tmp_path: Path) -> None:
    error = refusal(
        write(tmp_path, "a.csv", f"text,answer\na,open\n{SECRET * (MAX_CHARACTERS // 4)},close\n")
    )
    assert error.line == 3
    assert "longer than" in str(error)


def test_a_label_the_model_does_not_know_is_refused_with_line_and_count(tmp_path: Path) -> None:
    error = refusal(
        write(tmp_path, "a.csv", f"text,answer\na,open\nb,{SECRET}\nc,close\nd,{SECRET}\n")
    )
    assert error.line == 3
    assert "2 such records" in str(error)


def test_a_file_of_one_class_is_read_and_can_be_told(tmp_path: Path) -> None:
    one = read_records(
        write(tmp_path, "a.csv", "text,answer\na,open\nb,open\n"), "{text}", "answer", LABELS
    )
    both = read_records(
        write(tmp_path, "b.csv", "text,answer\na,open\nb,close\n"), "{text}", "answer", LABELS
    )
    assert (len(one), one_answer(one), one_answer(both)) == (2, True, False)


@pytest.mark.parametrize(
    ("template", "columns", "filled"),
    [
        ("{desc. of fault}", ("desc. of fault",), "0"),
        ("{Load [kW]}: {0}", ("Load [kW]", "0"), "0: 1"),
        ("{text!r}{text:>9}", ("text!r", "text:>9"), "01"),
        ("{{{desk}}} {text}", ("desk", "text"), "{0} 1"),
        ("{a {{b}} c}", ("a {b} c",), "0"),
        ("{a{{b}}}", ("a{b}",), "0"),
        ('{"a } b"}.{"{"}', ("a } b", "{"), "0.1"),
        ('{"say \\"x\\""}', ('say "x"',), "0"),
        ("{ a }{a}", (" a ", "a"), "01"),
    ],
)
def test_a_template_can_name_any_column(
    template: str, columns: tuple[str, ...], filled: str, tmp_path: Path
) -> None:
    parsed = Template.parse(template)
    assert parsed.columns == columns
    assert parsed.fill([str(index) for index in range(len(columns))]) == filled
    row = {name: str(index) for index, name in enumerate(columns)}
    path = write(tmp_path, "a.jsonl", json.dumps({**row, "answer": "x"}))
    assert read_records(path, template, "answer") == [Record(filled, "x")]


@given(st.text(min_size=1))
def test_a_template_of_one_column_can_be_made_for_every_name(name: str) -> None:
    assert Template.parse(column(name)) == Template(("", ""), (name,))


@pytest.mark.parametrize(
    "template", ["plain", "{}", "{text", "}", "{a{b}", "{a{{b}}", '{"a}', '{"a"x}', '{""}', "{a}}"]
)
def test_a_template_that_names_no_column_or_not_whole_is_refused(template: str) -> None:
    with pytest.raises(InputError):
        Template.parse(template)


def test_empty_null_and_missing_columns_are_empty_where_another_is_not(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "input": "", "output": "x"},
        {"instruction": "b", "input": None, "output": "x"},
        {"instruction": "c", "output": "x"},
        {"instruction": "", "input": "d", "output": "x"},
    ]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    read = read_records(path, "{instruction}|{input}", "output")
    assert [record.prompt for record in read] == ["a|", "b|", "c|", "|d"]
    table = write(tmp_path, "a.csv", "instruction,input,output\na,,x\nb, ,x\n,,x\n")
    with pytest.raises(DataError, match="line 4: its whole prompt is empty"):
        read_records(table, "{instruction}|{input}", "output")


def test_a_column_that_no_record_has_is_an_error_and_not_empty(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a", "answer": "x"}\n')
    with pytest.raises(DataError, match="no column 'inptu'"):
        read_records(path, "{text} {inptu}", "answer")


NUMBERS = ["1.10", "1e5", "12345678901234567890.5", "0.00001", "-0", "1E400", "9" * 5000]


def test_numbers_are_kept_as_they_were_written(tmp_path: Path) -> None:
    jsonl = "".join(f'{{"n": {number}, "a": {number}}}\n' for number in NUMBERS)
    table = "n,a\n" + "".join(f"{number},{number}\n" for number in NUMBERS)
    for path in (write(tmp_path, "a.jsonl", jsonl), write(tmp_path, "a.csv", table)):
        read = read_records(path, "{n}", "a")
        assert [(r.prompt, r.answer) for r in read] == [(n, n) for n in NUMBERS]


def test_booleans_are_true_and_false_as_json_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"n": true, "a": false}\n{"n": "x", "a": true}\n')
    read = read_records(path, "{n}", "a", ("true", "false"))
    assert [(r.prompt, r.answer) for r in read] == [("true", "false"), ("x", "true")]


def test_labels_are_compared_without_blanks_and_composition_and_said_as_listed(
    tmp_path: Path,
) -> None:
    labels = ("water leak ", "Sto\u0308rung")
    content = "t,a\na,water leak\nb, water  leak \nc,St\u00f6rung\nd,Sto\u0308rung\n"
    read = read_records(write(tmp_path, "a.csv", content), "{t}", "a", labels)
    assert [record.answer for record in read] == [labels[0], labels[0], labels[1], labels[1]]
    free = read_records(write(tmp_path, "b.csv", content), "{t}", "a")
    assert [record.answer for record in free][1::2] == [" water  leak ", "Sto\u0308rung"]


@pytest.mark.parametrize("labels", [["a", "a "], ["\u00f6", "o\u0308"], ["a b", "a\u00a0b"]])
def test_labels_that_could_not_be_told_apart_are_refused(labels: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        read_labels(write(tmp_path, "labels.json", json.dumps(labels)))


def test_a_list_of_numbers_or_booleans_is_a_list_of_labels_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "labels.json", '[1.0, true, "x "]')
    assert read_labels(path) == ("1.0", "true", "x ")


WANTED = [("a, b; c", "open"), ("d\te", "close")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'text;answer\r\n"a, b; c";open\r\nd\te;close\r\n'),
        ("a.csv", b'\xef\xbb\xbftext;answer\r\n"a, b; c";open\r\nd\te;close\r\n'),
        (
            "a.csv",
            b"sep=;\r\ntext;answer\r\na, b\x3b c;open\r\n".replace(b"a, b; c", b'"a, b; c"')
            + b"d\te;close\r\n",
        ),
        ("A.CSV", b'text,answer\r"a, b; c",open\rd\te,close\r'),
        ("a.tsv", b'text\tanswer\na, b; c\topen\n"d\te"\tclose\n'),
        ("a.csv", b'text\tanswer\na, b; c\topen\n"d\te"\tclose\n'),
        ("a.csv", b"id|text|answer\n1|a, b; c|open\n2|d\te|close\n"),
        ("a.csv", '"text","answer"\n"a, b; c",open\nd\te,close'.encode("utf-16")),
        ("a.Csv.GZ", gzip.compress(b'text,answer\n"a, b; c",open\nd\te,close\n', mtime=0)),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a, b; c", "answer": "open"}\n', mtime=0)
            + gzip.compress(b'{"text": "d\\te", "answer": "close"}\n', mtime=0),
        ),
        (
            "a.ndjson",
            b'{"text": "a, b; c", "answer": "open"}\r{"text": "d\\te", "answer": "close"}',
        ),
    ],
)
def test_files_as_programs_write_them_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    read = read_records(write(tmp_path, name, content), "{text}", "answer", LABELS)
    assert [(record.prompt, record.answer) for record in read] == WANTED


def test_a_header_may_name_columns_twice_that_nobody_asks_for(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text;;answer;;\na;1;open;;\n")
    assert read_records(path, "{text}", "answer") == [Record("a", "open")]


def test_a_column_is_found_by_its_name_in_another_composition(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "Sto\u0308rung ,answer\na,open\n")
    assert read_records(path, "{St\u00f6rung}", "answer") == [Record("a", "open")]


def test_a_long_field_is_read_up_to_the_limit(tmp_path: Path) -> None:
    text = "x" * 200_000
    path = write(tmp_path, "a.csv", f"text,answer\n{text},open\n")
    assert read_records(path, "{text}", "answer") == [Record(text, "open")]
    lines = "\n".join(["y" * 1000] * (MAX_CHARACTERS // 1000 + 1))
    with pytest.raises(DataError, match="line 2: a field has more than"):
        read_records(write(tmp_path, "b.csv", f'text,answer\n"{lines}",open\n'), "{text}", "answer")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a", "answer": "open"}\n', mtime=0)[:-9],
            "no whole gzip",
        ),
        ("a.jsonl.gz", b"\x1f\x8b" + b"x" * 50, "no whole gzip"),
        ("a.csv.gz", b"text,answer\na,open\n", "no whole gzip"),
        ("a.csv.gz", gzip.compress(b"x" * (64 << 20), mtime=0), "longer than"),
        ("a.json", b"[]", "neither"),
        ("a.zip", b"PK", "neither"),
        ("a", b"text", "neither"),
        ("a.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "no whole Parquet"),
        ("a.arrow", b"ARROW1\0\0" + b"\xff" * 50, "no whole Arrow"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "neither"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    assert says in str(refusal(write(tmp_path, name, content)))


def test_a_packed_file_is_not_unpacked_beyond_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_BYTES", 1 << 20)
    content = b"text,answer\n" + b"a,open\n" * 1_000_000
    path = write(tmp_path, "a.csv.gz", gzip.compress(content, mtime=0))
    tracemalloc.start()
    assert "more than 1 MiB" in str(refusal(path))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_file_in_another_encoding_is_read_where_the_job_names_it(tmp_path: Path) -> None:
    content = "text,answer\nSt\u00f6rung,open\n"
    plain = write(tmp_path, "a.csv", content)
    old = write(tmp_path, "b.csv", content.encode("cp1252"))
    for path in (plain, old):  # a file that is UTF-8 is read as such all the same
        read = read_records(path, "{text}", "answer", encoding="cp1252")
        assert read == [Record("St\u00f6rung", "open")]
    with pytest.raises(DataError, match="line 2: it is not UTF-8"):
        read_records(old, "{text}", "answer")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_tables_are_read_as_texts(tmp_path: Path, suffix: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    table = arrow.table(
        {
            "text.de": arrow.array(["a", None, "c", "d"]).dictionary_encode(),
            "n": arrow.array([1.1, None, 3.0, 4.5], arrow.float32()),
            "ok": [True, False, None, True],
            "answer": ["open", "close", "open", "close"],
            "other": [[1], [2], [3], [4]],
        }
    )
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    elif suffix == ".feather":
        feather.write_feather(table, path)
    else:
        with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    read = read_records(path, "{text.de}|{n}|{ok}", "answer", LABELS)
    assert [(r.prompt, r.line) for r in read] == [
        ("a|1.1|true", 1),
        ("||false", 2),
        ("c|3.0|", 3),
        ("d|4.5|true", 4),
    ]
    with pytest.raises(DataError, match="'other' holds neither"):
        read_records(path, "{other}", "answer")


def test_a_table_larger_than_the_bound_or_with_nan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": [1.0, float("nan")], "answer": ["open"] * 2}), path)
    assert refusal(path).line == 2
    monkeypatch.setattr(rows, "MAX_BYTES", 1 << 20)
    big = arrow.table({"text": ["a" * 1000] * 5000, "answer": ["open"] * 5000})
    parquet.write_table(big, path, use_dictionary=False)
    assert "more than 1 MiB" in str(refusal(path))
    parquet.write_table(big, path)  # a dictionary unpacks to more than its own size
    assert "more than 1 MiB" in str(refusal(path))


def test_a_table_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "fedark[arrow]" in str(refusal(write(tmp_path, "a.parquet", b"PAR1")))


def test_unusable_records_are_left_out_where_that_is_wanted_and_told_without_content(
    tmp_path: Path,
) -> None:
    lines = [
        {"text": "a", "answer": "open"},
        {"text": "", "answer": "open"},
        {"text": "b", "answer": SECRET},
        {"text": [SECRET], "answer": "open"},
        {"text": "c", "answer": None},
        {"text": SECRET * MAX_CHARACTERS, "answer": "open"},
        {"text": "d", "answer": float("nan")},
        {"text": "e", "answer": "close"},
    ]
    lines[5]["text"] = SECRET * (MAX_CHARACTERS // 16)
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    told: list[str] = []
    template = "{text}" * 3
    read = read_records(path, template, "answer", LABELS, leave_out=told.append)
    assert [record.line for record in read] == [1, 8]
    assert len(told) == 6
    assert SECRET not in "".join(told)
    assert refusal(path, template).line == 2


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400))
def test_no_file_at_all_gives_anything_but_records_or_a_data_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.csv", "a.jsonl", "a.tsv", "a.csv.gz", "a.parquet", "a.arrow"):
            path = write(Path(folder), name, data)
            for encoding in ("", "cp1252", "shift_jis"):
                with contextlib.suppress(DataError):
                    read_records(path, "{text}", "answer", encoding=encoding)


def test_a_record_never_shows_its_content() -> None:
    assert SECRET not in repr([Record(SECRET, SECRET)])


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", '["a", null]', '["a", " "]', '["a", "a"]']
)
def test_a_bad_list_of_labels_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError):
        read_labels(write(tmp_path, "labels.json", content))


def test_many_labels_may_stand_in_one_line(tmp_path: Path) -> None:
    labels = tuple(f"label {number}" for number in range(20_000))
    assert read_labels(write(tmp_path, "labels.json", json.dumps(labels))) == labels


def test_the_train_test_split_does_not_depend_on_order_or_on_other_records() -> None:
    records = [Record(f"p{i % 150}", str(i)) for i in range(200)]
    train, test = split_train_test(records, 0.3)
    assert sorted(map(id, train + test)) == sorted(map(id, records))
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert 20 < len({r.prompt for r in test}) < 70
    part_train, part_test = split_train_test(records[::-2], 0.3)
    assert set(part_train) <= set(train)
    assert set(part_test) <= set(test)
    assert split_train_test(records, 0.0)[1] == split_train_test(records, 1.0)[0] == []


@given(st.integers(1, 6), st.sampled_from([0.1, 0.5, 100.0]), st.integers(0, 1000))
def test_the_dirichlet_split_deals_every_record_once_and_is_seeded(
    customers: int, alpha: float, seed: int
) -> None:
    records = [Record(f"p{i}", f"l{i % 7}") for i in range(140)]
    shares = dirichlet_split(records, customers, alpha, seed, minimum=1)
    assert sorted(id(r) for share in shares for r in share) == sorted(map(id, records))
    assert shares == dirichlet_split(records, customers, alpha, seed, minimum=1)
    assert min(map(len, shares)) >= 1


def test_a_smaller_alpha_skews_labels_more() -> None:
    records = [Record(f"p{i}", f"l{i % 10}") for i in range(2000)]

    def largest_share(alpha: float) -> float:
        shares = dirichlet_split(records, 4, alpha, 0)
        return (
            sum(max(Counter(r.answer for r in share).values()) / len(share) for share in shares) / 4
        )

    assert largest_share(0.1) > largest_share(1.0) + 0.05 > largest_share(100.0) + 0.1


def test_an_impossible_deal_is_an_error_and_not_an_endless_loop() -> None:
    with pytest.raises(InputError):
        dirichlet_split([Record("p", "l")] * 10, 5, 0.5, 0)
