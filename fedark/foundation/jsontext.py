"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["DEPTH", "NotFinite", "read_json"]

DEPTH = 64
"""Of lists and objects in each other."""


class NotFinite(ValueError):
    """NaN or an infinity stands in the text, which JSON does not know but Python reads."""


def read_json(
    data: bytes | bytearray | memoryview | str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    as_written: bool = False,
) -> Any:
    """The value of a JSON text.

    Args:
        data: in UTF-8.
        pairs: makes an object of its members, as `json.loads` has it.
        as_written: numbers are the texts that they were written as, and have to be finite.

    Raises:
        NotFinite: NaN or an infinity, where numbers are taken as written.
        ValueError: not JSON or not UTF-8; nested deeper than `DEPTH`; or with half of a surrogate
            pair. Python would take the last two, and whatever walks through the value, or writes,
            prints or tokenizes its text, would fail.
    """
    text = data if isinstance(data, str) else bytes(data).decode()
    hooks: dict[str, Any] = (
        {"parse_int": str, "parse_float": str, "parse_constant": _refuse} if as_written else {}
    )
    try:
        value = json.loads(text, object_pairs_hook=pairs, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    if any(isinstance(one, dict | list) for one in level):
        raise ValueError("nested too deeply")
    if "\\u" in text:  # nothing else can write one
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse(name: str) -> Any:
    raise NotFinite(name)
