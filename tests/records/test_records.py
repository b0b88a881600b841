"""Reading records: every kind of bad file is refused with file and line and without content; splits
are stable.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedark.foundation.errors import DataError, InputError
from fedark.records.reading import MAX_LINE_CHARACTERS, Record, read_labels, read_records
from fedark.records.splits import dirichlet_split, split_train_test

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
        ("a.csv", f"{SECRET},answer\na,open\n", 2, "no column 'text'"),
        ("a.csv", f"text,{SECRET}\na,open\n", 2, "no column 'answer'"),
        ("a.csv", f"text,answer\na,open\n ,{SECRET}\n", 3, "'text' is empty"),
        ("a.csv", f"text,answer\n{SECRET},\n", 2, "'answer' is empty"),
        ("a.csv", f"text,answer\na,open\nb\0{SECRET},close\n", 3, "zero byte"),
        ("a.jsonl", f'{{"text": "a", "answer": "open"}}\n{{"text": "{SECRET}"\n', 2, "not JSON"),
        ("a.jsonl", f'\n["{SECRET}"]\n', 2, "not a JSON object"),
        ("a.jsonl", f'{{"text": "{SECRET}"}}\n', 1, "no column 'answer'"),
        ("a.jsonl", f'{{"text": ["{SECRET}"], "answer": "open"}}\n', 1, "no column 'text'"),
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
    tmp_path: Path, name: str, content: str, line: int, says: str
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
        write(tmp_path, "a.csv", f"text,answer\na,open\n{SECRET * MAX_LINE_CHARACTERS},close\n")
    )
    assert error.line == 3
    assert "longer than" in str(error)


def test_a_label_the_model_does_not_know_is_refused_with_line_and_count(tmp_path: Path) -> None:
    error = refusal(
        write(tmp_path, "a.csv", f"text,answer\na,open\nb,{SECRET}\nc,close\nd,{SECRET}\n")
    )
    assert error.line == 3
    assert "2 such records" in str(error)


def test_single_class_data_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,answer\na,open\nb,open\n")
    assert "same answer" in str(refusal(path))
    assert len(read_records(path, "{text}", "answer")) == 2  # free text has no classes


@pytest.mark.parametrize(
    "template",
    ["plain", "{}", "{0}", "{text.x}", "{text[0]}", "{text!r}", "{text:>9}", "{text", "}"],
)
def test_a_template_can_name_columns_and_nothing_else(tmp_path: Path, template: str) -> None:
    with pytest.raises(InputError):
        read_records(
            write(tmp_path, "a.csv", "text,answer\na,open\nb,close\n"), template, "answer", LABELS
        )


def test_a_record_never_shows_its_content() -> None:
    assert SECRET not in repr([Record(SECRET, SECRET)])


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '["a", 1]', '["a", " "]', '["a", "a"]'])
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
