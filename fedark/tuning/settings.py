"""A base model's config.json, which its provider wrote: what of it is believed, and how much it may
build.

`transformers` takes the numbers of a configuration as they are. One that names two billion layers
would build them until time or memory ends. So its numbers are held against the weights that come
with it: they say how many layers there can be, and how many values the parameters have. What a
configuration means is left to `transformers`, and so is whether it fits its architecture.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.tuning.weights import Files

__all__ = ["bounded", "make_config", "read_settings"]

_MAX_BYTES = 4 << 20  # the longest hold the names of thousands of classes
_MAX_INTEGER = 1 << 40
# Numbers that a configuration's own class counts up to, before any model is built.
# Qwen's is the layer from which on windows slide, and may be any.
_COUNTS = re.compile(r"(?!max_window_layers)(.*_)?(layers?|depths?|blocks?|stages?)")
_FEWEST = 64  # layers that share their tensors outnumber them in a small model
# The first can name a file, a kernel or code to fetch, or changes how weights are read; labels are
# the contract's.
_DROPPED = re.compile(
    r"auto_map|_?attn_implementation.*|_?experts_implementation.*|fusion_config|kernel.*|use_kernels|transformers_weights"
    r"|num_labels|num_classes|id2label|label2id"
)
_FLOATS = {
    "Infinity": math.inf,
    "-Infinity": -math.inf,
    "NaN": math.nan,
}  # as `transformers` writes what JSON lacks
# A tied tensor is built once for each place that it has: an encoder-decoder has its embedding in
# four.
_COPIES = 4
_FRESH_VALUES = 1 << 24  # of heads and poolers that the files lack
_MODULES = 1024  # those without a tensor of their own, besides `_MODULES_PER_TENSOR`
_MODULES_PER_TENSOR = 16
_BUFFER_BYTES = 512 << 20  # masks and tables of positions, which no file holds


def read_settings(files: Files) -> dict[str, Any]:
    """The members of config.json, without those that would fetch or run something.

    Raises:
        ModelError: it is missing, too long or not a JSON object, or it names no architecture that
            `transformers` knows natively.
    """
    data = files.get("config.json", b"{}")
    if len(data) > _MAX_BYTES:
        raise _refused(f"is longer than {_MAX_BYTES >> 20} MiB")
    try:
        value = read_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _refused("is not a JSON object")
    if "model_type" not in value:
        raise _refused("is missing or names no model_type")
    name = value["model_type"]
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise _refused(
            "names an architecture that transformers does not know itself; fedark runs no code that"
            " comes with a model"
        )
    if any(key == "quantization_config" for key, _ in _members(value)):
        raise _refused("asks for quantised weights, which fedark does not train yet")
    cleaned: dict[str, Any] = _cleaned(value)
    return cleaned


def make_config(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """The configuration that `settings` of `read_settings` make for a model with the tensors
    `state`.

    Raises:
        ModelError: a number in it is out of all bounds, it counts more layers than there are
            tensors, or it does not fit its architecture.
    """
    most = max(_FEWEST, len(state))
    for key, item in _members(settings):
        numbers = list(_numbers(item))
        if any(isinstance(one, int) and abs(one) > _MAX_INTEGER for one in numbers):
            raise _refused("holds a number that no model has")
        if _COUNTS.fullmatch(key) and any(one > most for one in numbers):
            raise _refused("counts more layers than its weights have tensors")
    name = settings["model_type"]
    try:
        return AutoConfig.for_model(
            name, **{key: item for key, item in settings.items() if key != "model_type"}
        )
    except (
        Exception
    ):  # strict dataclasses of the library raise many types, with values in their texts
        raise _refused(f"does not fit the architecture {name!r}") from None


@contextmanager
def bounded(state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, this thread builds no model that is much larger than `state`, the tensors that
    are to go into it.

    Raises:
        ModelError: a model would be; from within the building.
    """
    thread = threading.get_ident()
    left = {
        "parameters": _COPIES * len(state) + _FEWEST,
        "values": (
            _COPIES * sum(math.prod(tensor.shape) for tensor in state.values()) + _FRESH_VALUES
        ),
        "modules": _MODULES_PER_TENSOR * len(state) + _MODULES,
        "bytes of buffers": (
            _BUFFER_BYTES + sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        ),
    }

    def spend(**amounts: int) -> None:
        if threading.get_ident() != thread:
            return
        for kind, amount in amounts.items():
            left[kind] -= amount
            if left[kind] < 0:
                raise _refused("describes a larger model than its weights fill")

    def parameter(_module: nn.Module, _name: str, value: torch.Tensor | None) -> None:
        spend(parameters=1, values=0 if value is None else value.numel())

    def buffer(_module: nn.Module, _name: str, value: torch.Tensor | None) -> None:
        spend(**{"bytes of buffers": 0 if value is None else value.numel() * value.element_size()})

    def module(_module: nn.Module, _name: str, _value: nn.Module | None) -> None:
        spend(modules=1)

    with ExitStack() as stack:
        for register, hook in (
            (hooks.register_module_parameter_registration_hook, parameter),
            (hooks.register_module_buffer_registration_hook, buffer),
            (hooks.register_module_module_registration_hook, module),
        ):
            stack.callback(register(hook).remove)
        yield


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Every member of every object in `value`."""
    for item in (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    ):
        yield from _members(item)
    if isinstance(value, Mapping):
        yield from value.items()


def _numbers(value: Any) -> Iterator[int | float]:
    """`value` itself, or what is in it if it is a list."""
    if isinstance(value, int | float):
        yield value
    for item in value if isinstance(value, list) else ():
        yield from _numbers(item)


def _cleaned(value: Any) -> Any:
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return _FLOATS.get(value["__float__"])
        return {
            key: "longrope" if (key, item) == ("type", "su") else _cleaned(item)  # Phi-3's old name
            for key, item in value.items()
            if not _DROPPED.fullmatch(key)
        }
    return value


def _refused(why: str) -> ModelError:
    return ModelError(
        f"The base model's config.json {why}.",
        safe="Nothing was loaded.",
        fix="Choose another base model.",
    )
