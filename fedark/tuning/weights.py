"""Tensors of safetensors files that are already in memory.

The header is checked whole before any tensor is made: its size, its JSON, that offsets are in order
and cover the data exactly, and that each span is what shape and type ask for. So a tensor can
neither overlap another nor reach outside the file. Tensors alias the bytes where these are
writable, which keeps one copy of a model in an enclave's memory instead of two.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.foundation.modelfolder import INDEX, WEIGHTS, index_names

if TYPE_CHECKING:
    import torch

__all__ = ["Files", "TensorEntry", "read_header", "tensors", "weight_files"]

Files = Mapping[str, bytes | bytearray | memoryview]

_MAX_HEADER_BYTES = 100 << 20
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# Of quantised and packed models; what they mean stands elsewhere.
_UNREAD = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "U16", "U32", "U64", "C64"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `end` count from the first byte of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(files: Files) -> list[str]:
    """Names of the safetensors files that hold the model: the whole one, or the parts that its
    index names.

    Raises:
        ModelError: there are none, or a part is missing.
    """
    if WEIGHTS in files:
        return [WEIGHTS]
    try:
        names = index_names(files[INDEX])
    except KeyError:
        raise ModelError(
            f"The base model has no {WEIGHTS}.",
            safe="Nothing was loaded; formats that can run code when read are never opened.",
            fix="Save the model as safetensors: model.save_pretrained(folder).",
        ) from None
    except ValueError:
        names = []
    if not names or not set(names) <= files.keys():
        raise ModelError(
            f"The index {INDEX} is malformed or names files that are missing.",
            safe="Nothing was loaded.",
            fix="Download or save the model again.",
        )
    return names


def read_header(name: str, data: bytes | bytearray | memoryview) -> dict[str, TensorEntry]:
    """The table of contents of the safetensors file `name`.

    Raises:
        ModelError: it is not a well-formed safetensors file.
    """
    view = memoryview(data)
    length = int.from_bytes(view[:8], "little") if len(view) >= 8 else -1
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(view) - 8):
        raise _malformed(name, "its header is missing or cut off")
    base = 8 + length
    try:
        header = read_json(view[8:base])
        header.pop("__metadata__", None)
        types = {item["dtype"] for item in header.values()}
        if unread := sorted(types & _UNREAD):
            raise ModelError(
                f"{name} holds weights of type {unread[0]}, which fedark does not read.",
                safe="Nothing was loaded.",
                fix="Use the model in float32, float16 or bfloat16.",
            )
        entries = {key: _entry(item, base) for key, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _malformed(name, "its header is not valid") from None
    end = base
    for entry in sorted(entries.values(), key=lambda item: (item.start, item.end)):
        if (
            entry.start != end
            or entry.end - entry.start != math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
        ):
            raise _malformed(
                name, "its tensors overlap, leave gaps, or have a size other than their shape's"
            )
        end = entry.end
    if end != len(view):
        raise _malformed(name, "it is cut off or has trailing bytes")
    return entries


def tensors(files: Files, *, shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the model in `files`, by their names in the checkpoint.

    Args:
        files: file name -> content. Writable contents (bytearray) are aliased: do not change them
            while the model lives.
        shapes_only: make tensors of the right shape without values, reading headers alone.

    Raises:
        ModelError: no safetensors, malformed, or one tensor in two files.
    """
    import torch

    types = {
        **{
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        },
        **{
            "I64": torch.int64,
            "I32": torch.int32,
            "I16": torch.int16,
            "I8": torch.int8,
            "U8": torch.uint8,
        },
        "BOOL": torch.bool,
    }
    result: dict[str, torch.Tensor] = {}
    for name in weight_files(files):
        view = memoryview(files[name])
        for key, entry in read_header(name, view).items():
            if key in result:
                raise _malformed(name, "a tensor in it stands in another file of the model too")
            dtype = types[entry.dtype]
            if shapes_only or entry.start == entry.end:
                # One value seen through strides of zero: the loader refuses meta tensors, and this
                # takes no memory either.
                result[key] = torch.zeros(
                    (), dtype=torch.float32 if dtype.is_floating_point else dtype
                ).expand(entry.shape)
                continue
            part: bytearray | memoryview = view[entry.start : entry.end]
            if view.readonly or entry.start % _ITEM_BYTES[entry.dtype]:
                part = bytearray(part)
            result[key] = torch.frombuffer(part, dtype=dtype).reshape(entry.shape)
    return result


def _entry(item: dict[str, object], base: int) -> TensorEntry:
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if (
        len(item) != 3
        or not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
    ):
        raise TypeError
    if (
        dtype not in _ITEM_BYTES
        or len(offsets) != 2
        or any(type(value) is not int or value < 0 for value in shape + offsets)
    ):
        raise ValueError
    return TensorEntry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _malformed(name: str, why: str) -> ModelError:
    return ModelError(
        f"{name} is not a usable safetensors file: {why}.",
        safe="Nothing was loaded.",
        fix="Download or save the model again.",
    )
