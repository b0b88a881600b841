"""Canonical CBOR (RFC 8949, 4.2.1, keys in the order of 4.2.3): one byte string for one value,
nothing else accepted.

Whatever is signed, hashed or taken from another party as CBOR goes through here. `decode` accepts
exactly the bytes that `encode` would have produced: no trailing bytes, no duplicate keys, no
longer-than-needed integers, no indefinite lengths, no tags, within a size and depth cap. A plain
CBOR decoder accepts all of those (measured on cbor2), and each of them lets two parties read one
signed message in two ways.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import cbor2

from fedark.foundation.errors import ProtocolError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "decode", "digest", "encode"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
_PLAIN = frozenset({type(None), bool, str, bytes})
_KEYS = frozenset({str, int, bytes})


def encode(value: Any) -> bytes:
    """Canonical CBOR of None, bool, int, float, str, bytes, and lists, tuples and maps of them;
    floats are finite.

    Raises:
        TypeError: for any other type.
    """
    _check(value, MAX_DEPTH, "value")
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value whose canonical encoding is exactly `data`.

    Raises:
        ProtocolError: `data` is larger than `max_bytes`, nests deeper than `max_depth`, or is not
            canonical.
    """
    if len(data) > max_bytes:
        raise ProtocolError(f"A CBOR item of {len(data)} bytes is over the limit of {max_bytes}.")
    try:
        value = cbor2.loads(
            data, max_depth=max_depth + 1, allow_indefinite=False, allow_duplicate_keys=False
        )
        _check(value, max_depth, "item")
        canonical = cbor2.dumps(value, canonical=True)
    except (
        cbor2.CBORError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
        EOFError,
    ) as error:
        raise ProtocolError(f"A CBOR item is malformed ({type(error).__name__}).") from None
    if canonical != data:
        raise ProtocolError("A CBOR item is not in canonical form.")
    return value


def digest(value: Any) -> bytes:
    """SHA-384 of the canonical encoding, 48 bytes."""
    return hashlib.sha384(encode(value)).digest()


def _check(value: Any, depth: int, where: str) -> None:
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) not in _KEYS:
                raise TypeError(f"{where} has a map key of type {type(key).__name__}")
            if type(key) is int and not -(1 << 64) <= key < (1 << 64):
                raise TypeError(f"{where} has a map key out of range")
    elif kind is not list and kind is not tuple:
        if kind is int:
            if not -(1 << 64) <= value < (1 << 64):
                raise TypeError(f"{where} is an integer out of range")
        elif kind is float:
            if not math.isfinite(value):
                raise TypeError(f"{where} is not a finite number")
        elif kind not in _PLAIN:
            raise TypeError(f"{where} has a value of type {kind.__name__}")
        return
    if value and depth < 1:
        raise TypeError(f"{where} nests too deeply")
    for item in value.values() if kind is dict else value:
        if type(item) not in _PLAIN:  # most are: no call for them
            _check(item, depth - 1, where)
