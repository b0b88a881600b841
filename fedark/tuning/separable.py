"""Architectures in which a record's gradient depends on that record alone: what the privacy of
single records needs of a model, and who may be admitted under it.

A clipped sum bounds what one record adds only if it changes nothing of what the others add, in this
batch or a later one. A model's files bring no code, but its configuration chooses among the
library's classes, and some of these mix the rows of a batch, read padding, or change themselves for
good after an unusual input. So under such a mechanism:

1. only architectures of `ADMITTED` are trained; docs/privacy.md has the argument for each;
2. settings that make an admitted one depend on the batch are refused (`require_separable`);
3. nothing that the model holds may change while gradients are taken (`ModelState`);
4. the job's own model is tried on random and hostile batches (`fedark.tuning.self_check`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fedark.foundation.errors import ModelError

__all__ = ["ADMITTED", "ModelChanged", "ModelState", "require_separable"]

ADMITTED = frozenset(
    {
        *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mpnet"),
        *("roberta", "xlm-roberta"),
        *("gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "opt", "phi3"),
        *("qwen2", "qwen3", "smollm3"),
    }
)
"""Values of `model_type`. Their blocks are embeddings by position, attention within one row under
its own mask, layers and norms that act on each token alone, and nothing that is kept.
"""

# Tables of rotary positions that are computed once. "dynamic" and "longrope" are computed anew from
# the longest row that was ever seen, or is in the batch.
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
_OWN = frozenset(nn.Module().__dict__) - {"training"} | {"forward"}
_DEPTH = 4


def require_separable(config: Mapping[str, Any]) -> None:
    """Return if a model of this configuration may be trained under the privacy of single records.

    Args:
        config: the members of its config.json, or what `to_dict` of the library gives.

    Raises:
        ModelError: it may not, with the reason.
    """
    name = config.get("model_type")
    if name not in ADMITTED:
        raise _refused(
            f"the architecture {name!r} is not among those of which it is known that a record's"
            f" gradient depends on that record alone ({', '.join(sorted(ADMITTED))})"
        )
    for table in _tables(config):
        kind = table.get("rope_type", table.get("type", "default"))
        if kind not in _STATIC_ROPE:
            raise _refused(
                f"its rotary positions of type {kind!r} depend on the longest text of a batch"
            )
    if config.get("conv_kernel_size"):
        raise _refused("its convolution reads across the end of a text")


class ModelChanged(ModelError):
    """The model is not what it was before it saw records: its gradients bound nothing."""


class ModelState:
    """Everything that a model holds besides the tensors that are trained: attributes of its modules
    and their classes, configurations, buffers, frozen weights.
    """

    def __init__(self, model: nn.Module, trained: Iterable[torch.Tensor]) -> None:
        self._model = model
        self._trained = {id(tensor) for tensor in trained}
        self._alive: dict[int, Any] = {}  # so that no later object has the identity of one of these
        self._before = self._now(self._alive)

    def require_unchanged(self, *, classes: bool = True) -> None:
        """Return if everything is as it was.

        Args:
            classes: compare the modules' classes too; a model that was loaded beside this one
                meanwhile may have changed them.

        Raises:
            ModelChanged: something is not.
        """
        parts = 2 if classes else 1
        if self._now({})[:parts] != self._before[:parts]:
            raise ModelChanged(
                "The model changed itself while gradients were taken: records of later batches"
                " would depend on those of earlier ones.",
                safe="Nothing was made of these gradients.",
                fix="Choose another base model.",
            )

    def _now(self, alive: dict[int, Any]) -> tuple[list[Any], list[Any]]:
        """What the modules hold, and what their classes do."""
        found: list[Any] = []
        held: list[Any] = []
        classes: dict[type, None] = {}
        for module in self._model.modules():
            classes |= dict.fromkeys(type(module).__mro__)
            tensors = [*module._parameters.values(), *module._buffers.values()]
            alive |= {id(tensor): tensor for tensor in tensors}
            found.append(
                [
                    None if tensor is None else (id(tensor), tensor._version)
                    for tensor in tensors
                    if id(tensor) not in self._trained
                ]
            )
            found.append(
                [
                    (key, _token(value, _DEPTH, alive))
                    for key, value in module.__dict__.items()
                    if key not in _OWN
                ]
            )
        for one in classes:
            if not one.__module__.startswith(("torch.", "builtins")):
                kept = {key: item for key, item in vars(one).items() if not key.startswith("__")}
                held.append([(key, _token(item, 1, alive)) for key, item in kept.items()])
        return found, held


def _token(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """Something that is equal as long as `value` is the same and holds the same.

    Args:
        depth: how far to look into what it holds.
        seen: objects that have been looked into, by identity.
    """
    if value is None or isinstance(value, bool | int | str | bytes | torch.dtype):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, torch.Tensor):
        seen[id(value)] = value
        return id(value), value._version
    if isinstance(value, nn.Module) or depth == 0 or id(value) in seen:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, list | tuple):
        return [_token(item, depth - 1, seen) for item in value]
    if isinstance(value, dict):
        return [(_token(k, 0, seen), _token(item, depth - 1, seen)) for k, item in value.items()]
    if type(value).__module__.startswith(("transformers.", "peft.")) and hasattr(value, "__dict__"):
        return id(value), _token(vars(value), depth - 1, seen)
    return id(value)


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary positions, wherever they stand in a configuration."""
    if not isinstance(value, Mapping):
        return
    if "rope_type" in value:
        yield value
    for key, item in value.items():
        if key == "rope_scaling" and isinstance(item, Mapping) and "rope_type" not in item:
            yield item
        yield from _tables(item)


def _refused(why: str) -> ModelError:
    return ModelError(
        f"This model is not trained under the privacy of single records: {why}.",
        safe="Nothing was trained.",
        fix="Choose another base model; docs/privacy.md says which, and why.",
    )
