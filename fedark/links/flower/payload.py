"""Bytes in Flower messages, in the record that Flower moves fastest (measured on 1.41).

Up to 1 MiB: bytes in a ConfigRecord, which makes three objects of a message instead of five; each
object costs the SuperLink a request and a transaction on either way. Above: one uint8 array, which
Flower moves in pieces of 5 MiB. The array's bytes are the payload itself (no numpy file around it),
so nothing is parsed on the way.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedark.foundation.errors import ProtocolError

__all__ = ["MESSAGE_TYPE", "pack", "unpack"]

MESSAGE_TYPE = "query.stage"
SMALL_BYTES = 1 << 20
_RECORD, _FIELD, _KIND = "fedark", "data", "fedark.bytes"


def pack(data: bytes) -> RecordDict:
    """A record that carries `data`."""
    if len(data) <= SMALL_BYTES:
        return RecordDict({_RECORD: ConfigRecord({_FIELD: data})})
    return RecordDict({_RECORD: ArrayRecord({_FIELD: Array("uint8", (len(data),), _KIND, data)})})


def unpack(content: RecordDict) -> bytes:
    """The bytes of `pack`.

    Raises:
        ProtocolError: the record is anything else.
    """
    record = content.get(_RECORD) if len(content) == 1 else None
    value = record.get(_FIELD) if record is not None and len(record) == 1 else None
    if isinstance(value, bytes):
        return value
    if isinstance(value, Array) and (value.stype, value.dtype, tuple(value.shape)) == (
        _KIND,
        "uint8",
        (len(value.data),),
    ):
        return bytes(value.data)
    raise ProtocolError("A Flower message does not carry one fedark payload.")
