"""Bytes in Flower records."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedark.foundation.errors import ProtocolError
from fedark.links.flower.payload import SMALL_BYTES, pack, unpack


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1])
def test_bytes_come_back_as_they_were(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    record = RecordDict.inflate(pack(data).deflate(), pack(data).children)
    assert unpack(record) == data


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({"data": b"x"})}),
        RecordDict({"fedark": ConfigRecord({"data": "text"})}),
        RecordDict({"fedark": ConfigRecord({"data": b"x", "more": b"y"})}),
        RecordDict({"fedark": ConfigRecord({"data": b"x"}), "more": ConfigRecord()}),
        RecordDict({"fedark": MetricRecord({"data": 1})}),
        RecordDict({"fedark": ArrayRecord([np.zeros(3, np.uint8)])}),
        RecordDict({"fedark": ArrayRecord({"data": Array(np.zeros(3, np.uint8))})}),
        RecordDict({"fedark": ArrayRecord({"data": Array("uint8", (4,), "fedark.bytes", b"abc")})}),
    ],
)
def test_anything_else_is_refused(record: RecordDict) -> None:
    with pytest.raises(ProtocolError):
        unpack(record)
