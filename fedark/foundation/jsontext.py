"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["DEPTH", "read_json"]

DEPTH = 64
"""Of lists and objects in each other."""


def read_json(
    data: bytes | bytearray | memoryview | str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a JSON text.

    Args:
        data: in UTF-8.
        pairs: makes an object of its members, as `json.loads` has it.

    Raises:
        ValueError: not JSON or not UTF-8; nested deeper than `DEPTH`; or with half of a surrogate
            pair. Python would take the last two, and whatever walks through the value, or writes,
            prints or tokenizes its text, would fail.
    """
    text = data if isinstance(data, str) else bytes(data).decode()
    try:
        value = json.loads(text, object_pairs_hook=pairs)
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
