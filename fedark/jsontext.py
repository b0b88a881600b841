"""JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["read_json"]


def read_json(data: bytes | bytearray | memoryview | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        data: in UTF-8.
        pairs: makes an object of its members, as `json.loads` has it.

    Raises:
        ValueError: not JSON or not UTF-8, nested too deeply, or with half of a surrogate pair: Python would take it, and what wants
            to write, print or tokenize the text later would fail.
    """
    text = data if isinstance(data, str) else bytes(data).decode()
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        if "\\u" in text:  # nothing else can write one
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
