"""Messages of the masked protocol: a canonical CBOR header, optionally signed, then a raw body.
Parsed strictly.

    message   = "FSA1" | u32 header length | header | body | zeros to a multiple of 8 | words
    header    = canonical CBOR map with "kind"; or, signed, canonical [header bytes, signature]

Every length is known to the receiver before it parses (from the terms, the directory and the
round), and anything else is
refused: no length field of a message decides how much is read or allocated. A signature covers the
kind, so a message of one kind never passes for another. Field names and types are checked before a
value is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.secagg.stream import aligned

__all__ = [
    "Split",
    "build",
    "fields",
    "indices",
    "label",
    "message",
    "parse",
    "signature_of",
    "signed",
    "unsigned",
    "verified",
]

_MAGIC = b"FSA1"
_MAX_HEADER = 1 << 20
_DROPPED = "The message was dropped."


class Split:
    """A message taken apart.

    Attributes:
        header: the header bytes.
        tail: body, padding and words, not yet split.
    """

    __slots__ = ("header", "tail")

    def __init__(self, header: bytes, tail: memoryview) -> None:
        self.header, self.tail = header, tail

    def split(self, body: int, words: int = 0) -> tuple[memoryview, NDArray[np.uint64]]:
        """The body of exactly `body` bytes and exactly `words` 64-bit words, without copying.

        Raises:
            ProtocolError: the message has another length, or its padding is not zero.
        """
        start = 8 + len(self.header) + body
        padding = -start % 8 if words else 0
        if len(self.tail) != body + padding + 8 * words:
            length = body + padding + 8 * words
            raise ProtocolError(
                f"A message has {len(self.tail)} bytes after its header, not {length}.",
                safe=_DROPPED,
            )
        if any(self.tail[body : body + padding]):
            raise ProtocolError("The padding of a message is not zero.", safe=_DROPPED)
        return self.tail[:body], np.frombuffer(self.tail[body + padding :], np.uint64)


def message(header: bytes, *body: bytes | memoryview) -> bytes:
    """A message without words."""
    return b"".join((_MAGIC, len(header).to_bytes(4, "big"), header, *body))


def build(header: bytes, body: bytes, words: int) -> tuple[memoryview, NDArray[np.uint64]]:
    """A message with room for `words` words, and a writable view of them: a vector is masked in
    place, never copied.
    """
    front = message(header, body)
    start = len(front) + -len(front) % 8
    whole = aligned(start + 8 * words, start)
    whole[:start] = np.frombuffer(front.ljust(start, b"\0"), np.uint8)
    return whole.data, whole[start:].view(np.uint64)


def parse(data: bytes | bytearray | memoryview, limit: int) -> Split:
    """Take a message of at most `limit` bytes apart.

    Raises:
        ProtocolError: it is longer, or not a message of this protocol.
    """
    view = memoryview(data)
    if not 8 <= len(view) <= limit:
        raise ProtocolError(
            f"A message of {len(view)} bytes is not within 8..{limit}.", safe=_DROPPED
        )
    size = int.from_bytes(view[4:8], "big")
    if view[:4] != _MAGIC or size > min(_MAX_HEADER, len(view) - 8):
        raise ProtocolError("A message is not one of secure aggregation.", safe=_DROPPED)
    return Split(bytes(view[8 : 8 + size]), view[8 + size :])


def label(kind: str) -> str:
    """The signature label of a kind of message."""
    return f"fedark/secagg/1/{kind}"


def unsigned(kind: str, values: Mapping[str, Any]) -> bytes:
    """Header of a message whose sender is not trusted, or known to the receiver otherwise."""
    return canonical.encode({"kind": kind, **values})


def signed(kind: str, values: Mapping[str, Any], key: SigningKey) -> bytes:
    """A header that is signed by the enclave's attested key."""
    inner = unsigned(kind, values)
    return canonical.encode([inner, key.sign(label(kind), inner)])


def fields(header: bytes, kind: str, shape: Mapping[str, type | int]) -> dict[str, Any]:
    """The values of an unsigned header.

    Args:
        shape: for every field its type, or the length of its byte string.

    Raises:
        ProtocolError: another kind, a field missing or unknown, or of another type.
    """
    value = canonical.decode(header, max_bytes=_MAX_HEADER)
    if not isinstance(value, dict) or value.pop("kind", None) != kind or set(value) != set(shape):
        raise ProtocolError(f"A message is not a well-formed {kind!r} message.", safe=_DROPPED)
    for name, form in shape.items():
        found = value[name]
        good = (
            type(found) is form
            if isinstance(form, type)
            else type(found) is bytes and len(found) == form
        )
        if not good:
            raise ProtocolError(
                f"Field {name!r} of a {kind!r} message is malformed.", safe=_DROPPED
            )
    return value


def verified(
    header: bytes,
    kind: str,
    shape: Mapping[str, type | int],
    public: Mapping[str, bytes],
    sender: str | None = None,
) -> dict[str, Any]:
    """The values of a signed header, whose field "party" names the signer.

    Args:
        public: the admissible signers' keys.
        sender: the party that must have signed; None: any of `public`.

    Raises:
        ProtocolError: malformed, or from a stranger.
        Refused: the signature is wrong.
    """
    outer = canonical.decode(header, max_bytes=_MAX_HEADER)
    if not (
        isinstance(outer, list)
        and len(outer) == 2
        and all(type(part) is bytes for part in outer)
        and len(outer[1]) == 64
    ):
        raise ProtocolError(f"A {kind!r} message carries no signature.", safe=_DROPPED)
    value = fields(outer[0], kind, {"party": str, **shape})
    party = value["party"]
    if party not in public or (sender is not None and party != sender):
        raise ProtocolError(f"A {kind!r} message is from a stranger.", safe=_DROPPED)
    verify_signature(public[party], label(kind), outer[0], outer[1], by=party)
    return value


def signature_of(header: bytes) -> bytes:
    """The signature of a signed header that `verified` has accepted."""
    signature: bytes = canonical.decode(header, max_bytes=_MAX_HEADER)[1]
    return signature


def indices(value: Any, limit: int) -> list[int]:
    """A strictly ascending list of indices below `limit`.

    Raises:
        ProtocolError: it is not.
    """
    if (
        not isinstance(value, list)
        or any(type(item) is not int or not 0 <= item < limit for item in value)
        or any(low >= high for low, high in pairwise(value))
    ):
        raise ProtocolError(
            "A list of clients is not ascending, has a duplicate or names a stranger.",
            safe=_DROPPED,
        )
    return value
