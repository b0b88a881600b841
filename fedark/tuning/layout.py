"""The shape of an adapter: which tensors it has, which travel, where A comes from, and the flat
vector of an update.

The layout is derived from a model's configuration and from the names in its weight files; no weight
is read. It goes into the contract, and a trainer enclave refuses a model whose own layout differs.
The flat vector is float32, the travelling tensors in layout order, each row-major; it is linear in
everything that travels, so the mean of vectors is the vector of means.

A of FFA-LoRA (arXiv:2403.12313) is drawn from the contract's seed by SHAKE-256 instead of a
framework's generator: every party gets the same bits on every platform and version, and nobody
needs torch to write the finished adapter.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from fedark.contract.contract import AdapterTerms, Pooling, TensorSpec
from fedark.foundation import canonical
from fedark.foundation.errors import ModelError, ProtocolError

if TYPE_CHECKING:
    from fedark.tuning.base import Base

__all__ = [
    "Flat",
    "Named",
    "adapter_layout",
    "base_shapes",
    "flatten",
    "seeded_tensor",
    "unflatten",
]

Flat = npt.NDArray[np.float32]
Named = Mapping[str, npt.NDArray[np.float32]]


def adapter_layout(
    model_dir: Path,
    task: Literal["classification", "instruction"],
    labels: Sequence[str],
    adapter: AdapterTerms,
    pooling: Pooling = "auto",
) -> tuple[TensorSpec, ...]:
    """Every tensor of the adapter that `adapter` describes on the model in `model_dir`, in the
    order of the flat vector.

    Args: see `base_shapes`.

    Raises:
        ModelError: the folder is not a usable model, or the adapter does not fit it.
    """
    return base_shapes(model_dir, task, labels, pooling).layout(adapter)


def base_shapes(
    model_dir: Path,
    task: Literal["classification", "instruction"],
    labels: Sequence[str],
    pooling: Pooling,
) -> Base:
    """The model in `model_dir`, without its weights.

    Args:
        model_dir: a folder as `sources.resolve` returns it.
        task, labels, pooling: as in `ModelTerms`.

    Raises:
        ModelError: the folder is not a usable model.
    """
    from fedark.tuning.base import load_base
    from fedark.tuning.sources import model_files

    files: dict[str, bytes | memoryview] = {}
    for name, path in model_files(model_dir).items():
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                files[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            files[name] = path.read_bytes()
    return load_base(files, task, labels, pooling=pooling, shapes_only=True)


def seeded_tensor(seed: int, spec: TensorSpec) -> npt.NDArray[np.float32]:
    """The initial value that the shared seed gives to `spec`: uniform in [-1/sqrt(fan_in),
    1/sqrt(fan_in)).

    That is PEFT's own initialisation of A (Kaiming-uniform with a = sqrt(5)), from the keystream
    SHAKE-256(["fedark/seeded-tensor/1", seed, name, shape]), 24 bits a value. fan_in is the last
    dimension.
    """
    label = canonical.encode(["fedark/seeded-tensor/1", seed, spec.name, list(spec.shape)])
    words = np.frombuffer(hashlib.shake_256(label).digest(4 * spec.size), dtype="<u4")
    # 24 bits fill a float32's significand, so every step but the last product is exact.
    unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return (unit * np.float32(1 / math.sqrt(spec.shape[-1]))).reshape(spec.shape)


def flatten(layout: Sequence[TensorSpec], named: Named) -> Flat:
    """The flat vector of the travelling tensors in `named`, which may hold others too.

    Raises:
        ModelError: a travelling tensor is missing or has another shape.
    """
    parts = []
    for spec in layout:
        if not spec.travels:
            continue
        tensor = named.get(spec.name)
        if tensor is None or tensor.shape != spec.shape:
            raise ModelError(
                f"The adapter's tensor {spec.name} is missing or has another shape than the"
                " contract's.",
                safe="Nothing was changed.",
                fix="Use the adapter with the contract that it was made under.",
            )
        parts.append(np.ascontiguousarray(tensor, dtype=np.float32).reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unflatten(
    layout: Sequence[TensorSpec], flat: Flat, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of the layout: the travelling ones from `flat`, the others from the seed.

    Raises:
        ProtocolError: `flat` has another length or type, or holds a value that is not finite.
    """
    size = sum(spec.size for spec in layout if spec.travels)
    if flat.shape != (size,) or flat.dtype != np.float32:
        raise ProtocolError(
            f"An adapter vector is not the {size} float32 values that the contract fixes."
        )
    if not np.isfinite(flat).all():
        raise ProtocolError("An adapter vector holds a value that is not a finite number.")
    named = {}
    offset = 0
    for spec in layout:
        if spec.travels:
            named[spec.name] = flat[offset : offset + spec.size].reshape(spec.shape)
            offset += spec.size
        else:
            named[spec.name] = seeded_tensor(seed, spec)
    return named
