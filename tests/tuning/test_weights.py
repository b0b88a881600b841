"""Safetensors from memory: equal to the library's own reading, and strict."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedark.foundation.errors import ModelError
from fedark.tuning.weights import read_header, tensors, weight_files

STATE = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(3, dtype=torch.bfloat16),
    "c": torch.tensor(True),
    "d": torch.zeros(0, 4),
    "e": torch.arange(4, dtype=torch.int64),
}


def file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def f32(*offsets: int, shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_tensors_equal_what_was_saved(kind: type) -> None:
    got = tensors({"model.safetensors": kind(save(STATE, metadata={"format": "pt"}))})
    assert got.keys() == STATE.keys()
    for name, value in STATE.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


def test_writable_bytes_are_not_copied() -> None:
    data = bytearray(save({"a": STATE["a"]}))
    got = tensors({"model.safetensors": data})["a"]
    data[-4:] = bytes(4)
    assert got[1, 2] == 0


def test_shapes_alone_take_no_memory() -> None:
    got = tensors({"model.safetensors": save(STATE)}, shapes_only=True)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        k: tuple(v.shape) for k, v in STATE.items()
    }
    assert got["a"].untyped_storage().nbytes() == 4


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02pickle",
        file({}, length=1 << 40),
        file(b"{" * 100_000),
        file(b"\xff\xfe"),
        file([]),
        file({"a": 1}),
        file({"a": f32(0, 4)}, b"1234" + b"x"),
        file({"a": f32(0, 4)}, b"123"),
        file({"a": f32(1, 5)}, b"12345"),
        file({"a": f32(0, 4), "b": f32(0, 4)}, b"1234"),
        file({"a": f32(0, 4), "b": f32(8, 12)}, b"x" * 12),
        file({"a": f32(0, 4, shape=(2,))}, b"1234"),
        file({"a": f32(0, 4, shape=(-1,))}, b"1234"),
        file({"a": f32(4, 0)}, b"1234"),
        file({"a": {"dtype": "OBJ", "shape": [], "data_offsets": [0, 4]}}, b"1234"),
        file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        file({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"),
    ],
)
def test_a_malformed_file_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        read_header("model.safetensors", data)


@given(st.data())
def test_a_damaged_header_is_refused_or_stays_inside_the_file(data: st.DataObject) -> None:
    content = bytearray(save(STATE))
    limit = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = read_header("m", content)
    except ModelError:
        return
    assert all(0 <= entry.start <= entry.end <= len(content) for entry in entries.values())


def test_parts_are_joined_by_their_index_and_a_doubled_tensor_is_refused() -> None:
    one, two = save({"a": STATE["a"]}), save({"e": STATE["e"]})
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "e": "m-2.safetensors"}}).encode()
    files = {
        "model.safetensors.index.json": index,
        "m-1.safetensors": one,
        "m-2.safetensors": two,
        "x.safetensors": b"stray",
    }
    assert tensors(files).keys() == {"a", "e"}
    with pytest.raises(ModelError, match="another file"):
        tensors({**files, "m-2.safetensors": one})
    with pytest.raises(ModelError, match="missing"):
        weight_files({"model.safetensors.index.json": index, "m-1.safetensors": one})


@pytest.mark.parametrize(
    "index", [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}']
)
def test_a_malformed_index_is_refused(index: bytes) -> None:
    with pytest.raises(ModelError):
        weight_files({"model.safetensors.index.json": index})


def test_pickled_weights_are_not_opened() -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        weight_files({"pytorch_model.bin": b"\x80\x02."})
