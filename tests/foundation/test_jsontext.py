"""JSON of somebody else: what Python would take and nothing else could write is refused."""

from __future__ import annotations

import json

import pytest

from fedark.foundation.jsontext import DEPTH, read_json

DEEP = json.loads("[" * DEPTH + "]" * DEPTH)


@pytest.mark.parametrize(
    "value", [{}, [1, 2.5, None, True], "å €", "\U0001f600", {"a": {"b": ["\\ud800"]}}, DEEP]
)
def test_what_python_writes_is_read(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert (
            read_json(text)
            == read_json(text.encode())
            == read_json(memoryview(text.encode()))
            == value
        )


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff", "invalid start byte"),
        ('"a"'.encode("utf-16"), "invalid start byte"),
        (b'"\xed\xa0\x91"', "invalid continuation byte"),
        (b'["\\ud811"]', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
        (b'"\\udc00\\ud800"', "surrogates not allowed"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested too deeply"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested too deeply"),
    ],
)
def test_what_is_no_text_or_would_fail_later_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_json(data)


def test_objects_are_made_as_asked() -> None:
    assert read_json('{"a": 1, "a": 2}', tuple) == (("a", 1), ("a", 2))
