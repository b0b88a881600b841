"""A base model from the bytes of its files: nothing read from disk or network, no code of the
model's own, no pickle.

The weights go through `transformers`' own loader as a state dict, so renamed and tied tensors of
every architecture it knows are treated as `from_pretrained` treats them. What is believed of a
configuration is in `settings`.

Three kinds of model come out:
    pooled     an encoder of sentences (Reimers and Gurevych, arXiv:1908.10084): the masked mean of
               the token vectors, or the first one, at unit length, and fedark's own linear head
    sequence   any other base for classification: `transformers`' sequence classifier and its head
    causal     a causal language model for instruction tuning

Which of the first two a base is taken for is a term of the contract; `_pooling` proposes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedark.contract.contract import AdapterTerms, Pooling, TensorSpec
from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.tuning.settings import bounded, make_config, read_settings
from fedark.tuning.weights import Files, tensors

__all__ = ["PREFIX", "Base", "Kind", "load_base"]

Kind = Literal["pooled", "sequence", "causal"]
POOLING = "1_Pooling/config.json"
PREFIX = "base_model.model."  # what PEFT puts before the name of every tensor that it saves
_MAX_POOLING_BYTES = 1 << 20
_HEADS = ("classifier", "score")  # what PEFT always takes for a sequence classifier's head


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        kind: see the module's text.
        model: float32, in evaluation mode, everything frozen.
        missing: names of parameters that the files lack (a fresh classification head).
        labels: the number of classes; 0 for a causal model.
        pooling: how token vectors become one; "none" unless `kind` is "pooled".
        why: the reason for that, in a sentence; "" where it was asked for.
    """

    kind: Kind
    model: nn.Module
    missing: frozenset[str]
    labels: int
    pooling: Literal["mean", "cls", "none"] = "none"
    why: str = ""

    @property
    def longest(self) -> int | None:
        """How many tokens the model can read, or None where nothing says so."""
        limits = [getattr(self.model.config, "max_position_embeddings", None)]
        for name, module in self.model.named_modules():
            # RoBERTa and its kin count positions from the one after the padding's own.
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                limits.append(module.num_embeddings - 1 - (module.padding_idx or -1))
        whole = [limit for limit in limits if type(limit) is int and limit > 0]
        return min(whole, default=None)

    def layout(self, adapter: AdapterTerms) -> tuple[TensorSpec, ...]:
        """The tensors of `adapter` on this model, in module order, the head last.

        Raises:
            ModelError: no module or no such layer matches, a match is not linear, or a classifier
                would have no head.
        """
        specs: list[TensorSpec] = []
        for name, module in self.adapted(adapter):
            outputs, inputs = _dimensions(module)
            stem = PREFIX + name
            specs.append(
                TensorSpec(
                    name=f"{stem}.lora_A.weight",
                    shape=(adapter.rank, inputs),
                    travels=adapter.method == "lora",
                )
            )
            specs.append(
                TensorSpec(
                    name=f"{stem}.lora_B.weight", shape=(outputs, adapter.rank), travels=True
                )
            )
        if self.kind == "causal":
            if adapter.method == "head":
                raise ModelError(
                    "A language model that writes answers has no classification head to train.",
                    safe="Nothing was started.",
                    fix='Choose the method "ffa-lora" or "lora" for this model.',
                )
            return tuple(specs)
        if not adapter.head:
            raise ModelError(
                "A classification adapter without a head cannot tell its classes apart.",
                safe="Nothing was started.",
                fix="Set head = true for this model.",
            )
        if self.kind == "pooled":
            width = int(self.model.config.hidden_size)  # type: ignore[union-attr,arg-type]
            specs.append(TensorSpec(name="head.weight", shape=(self.labels, width), travels=True))
            if adapter.head_bias:
                specs.append(TensorSpec(name="head.bias", shape=(self.labels,), travels=True))
            return tuple(specs)
        if not adapter.head_bias:
            raise ModelError(
                "This model brings a classification head of its own, which has a bias.",
                safe="Nothing was started.",
                fix="Leave head_bias out for this model.",
            )
        modules = self.head_modules()
        for name, parameter in self.model.named_parameters():
            if any(name.startswith(f"{module}.") for module in modules):
                specs.append(
                    TensorSpec(name=PREFIX + name, shape=tuple(parameter.shape), travels=True)
                )
        return tuple(specs)

    def adapted(self, adapter: AdapterTerms) -> list[tuple[str, nn.Module]]:
        """The modules that get a LoRA pair: their names end in a target, and their layer is one of
        `adapter.layers`.
        """
        heads = self.head_modules()
        found: list[tuple[str, nn.Module]] = []
        layers: set[int] = set()
        for name, module in self.model.named_modules():
            if not any(name == target or name.endswith(f".{target}") for target in adapter.targets):
                continue
            if any(name == head or name.startswith(f"{head}.") for head in heads):
                continue
            if self.kind == "pooled" and name.startswith("pooler."):
                continue  # what it puts out is not used
            layer = _layer(name)
            if layer is not None:
                layers.add(layer)
            if adapter.layers and layer not in adapter.layers:
                continue
            if not isinstance(module, nn.Linear | Conv1D):
                raise ModelError(
                    f"The adapter target {name} is not a linear layer.",
                    safe="Nothing was started.",
                    fix="Name another target.",
                )
            if sharing := self._sharing(name, module):
                raise ModelError(
                    f"The adapter target {name} shares its weights with {sharing}, so that it could"
                    " not be merged without changing that too.",
                    safe="Nothing was started.",
                    fix="Name another target.",
                )
            found.append((name, module))
        strangers = [
            target
            for target in adapter.targets
            if not any(f".{name}".endswith(f".{target}") for name, _ in found)
        ]
        absent = sorted(set(adapter.layers) - layers)
        if strangers or absent:
            linear = {
                name.rsplit(".", 1)[-1]
                for name, m in self.model.named_modules()
                if isinstance(m, nn.Linear | Conv1D)
            }
            raise ModelError(
                "The adapter does not fit the model: "
                + "; ".join(
                    [f"no layer has a {target!r}" for target in strangers]
                    + [f"there is no layer {n}" for n in absent]
                )
                + ".",
                safe="Nothing was started.",
                fix=f"Targets that this model has: {', '.join(sorted(linear))}.",
            )
        return found

    def _sharing(self, name: str, module: nn.Module) -> str:
        """Another module with the same weights, such as the embeddings of a tied language head."""
        return next(
            (
                other
                for other, candidate in self.model.named_modules()
                if candidate is not module and getattr(candidate, "weight", None) is module.weight
            ),
            "",
        )

    def head_modules(self) -> list[str]:
        """The modules that are trained whole: a sequence classifier's head, and a pooler that the
        files have no weights for.
        """
        if self.kind != "sequence":
            return []
        inner = f"{self.model.base_model_prefix}."
        fresh = {name.partition(".")[0] for name in self.missing if not name.startswith(inner)}
        # A pooler stands between layers and head; language models are saved without one.
        poolers = {
            name.rpartition(".")[0] for name in self.missing if name.startswith(f"{inner}pooler.")
        }
        heads = {name for name, _ in self.model.named_children() if name in _HEADS}
        return sorted(fresh | poolers | heads)


def load_base(
    files: Files,
    task: Literal["classification", "instruction"],
    labels: Sequence[str],
    *,
    pooling: Pooling = "auto",
    shapes_only: bool = False,
) -> Base:
    """The base model in `files`.

    Args:
        files: file name -> content, those of `sources.model_files`. Writable contents are aliased
            by the weights.
        task, labels, pooling: as in `ModelTerms`.
        shapes_only: read no weights; parameters have shapes and no memory of their own.

    Raises:
        ModelError: the files are no model that `transformers` knows natively, or weights are
            missing from them.
    """
    transformers_logging.set_verbosity(logging.CRITICAL)  # its errors print the configuration
    transformers_logging.disable_progress_bar()
    settings = read_settings(files)
    state = tensors(files, shapes_only=shapes_only)
    config = make_config(settings, state)
    kind: Kind = "causal"
    taken, why = _pooling(files, settings, config, task, pooling)
    auto: Any = AutoModelForCausalLM
    if task == "classification":
        if len(labels) < 2:
            raise ModelError(
                "Classification needs at least two labels.",
                safe="Nothing was loaded.",
                fix="Name the labels.",
            )
        kind = "sequence" if taken == "none" else "pooled"
        auto = AutoModelForSequenceClassification if taken == "none" else AutoModel
        if kind == "sequence":
            config.num_labels = len(labels)
            config.problem_type = "single_label_classification"
    mapping = auto._model_mapping
    if type(config) not in mapping.keys():  # noqa: SIM118 - the mapping is lazy: only its keys are
        raise ModelError(
            f"transformers has no {task} model for the architecture {config.model_type!r}.",
            safe="Nothing was loaded.",
            fix="Choose another base model or task.",
        )
    try:
        architecture = mapping[type(config)]  # which may name a class that the library lacks
        if isinstance(architecture, list | tuple):
            architecture = architecture[0]
        with bounded(state):
            model, info = architecture.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # a configuration that fits no model makes the library fail in any way
        raise ModelError(
            "The base model cannot be built from its configuration and weights"
            f" ({type(error).__name__}).",
            safe="Nothing was kept.",
            fix="Check that transformers itself can load this model from its folder.",
        ) from None
    missing = frozenset(info["missing_keys"]) | frozenset(
        item[0] for item in info["mismatched_keys"]
    )
    model.requires_grad_(False).eval()
    base = Base(kind, model, missing, len(labels) if task == "classification" else 0, taken, why)
    own = ["pooler"] if kind == "pooled" else base.head_modules()
    unforeseen = [name for name in missing if not any(name.startswith(f"{head}.") for head in own)]
    if unforeseen:
        raise ModelError(
            f"The base model's files lack {len(unforeseen)} of its tensors, such as"
            f" {min(unforeseen)}.",
            safe="Nothing was kept.",
            fix="Check that config.json and the safetensors files belong together.",
        )
    return base


def _pooling(
    files: Files, settings: Mapping[str, Any], config: Any, task: str, asked: Pooling
) -> tuple[Literal["mean", "cls", "none"], str]:
    """What a base is taken for, and why.

    Raises:
        ModelError: its files ask for a pooling that fedark does not compute, and the job for none.
    """
    if task != "classification":
        return "none", ""
    if asked != "auto":
        return asked, ""
    if POOLING in files:
        mode = _pooling_mode(files)
        dense = ", without the Dense layer that follows it there" * _dense_follows(files)
        if mode == "mean":
            return "mean", f"{POOLING} says mean{dense}"
        if mode == "cls":
            return "cls", f"{POOLING} says cls{dense}"
        if mode == "lasttoken":
            return "none", f"{POOLING} says lasttoken, which transformers' own head reads too"
        raise ModelError(
            f"{POOLING} asks for a pooling that fedark does not compute.",
            safe="Nothing was loaded.",
            fix='Say in the job file what to take: pooling = "mean", "cls" or "none".',
        )
    names = settings.get("architectures")
    bare = MODEL_MAPPING_NAMES.get(config.model_type)
    encoder = not (config.is_encoder_decoder or getattr(config, "is_decoder", False))
    encoder = encoder and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder and isinstance(names, list) and names == [bare]:
        return "mean", f"a bare encoder ({bare}) without a head, and there is no {POOLING}"
    return "none", f"no encoder of sentences: there is no {POOLING}, and it is no bare encoder"


def _pooling_mode(files: Files) -> str:
    """The one mode of sentence-transformers' pooling, of its older and its newer form; "" if it is
    several or another.
    """
    value = _object(files, POOLING)
    mode = value.get("pooling_mode")
    if isinstance(mode, str):
        return mode
    modes = {
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, on in value.items()
        if key.startswith("pooling_mode_") and on is True
    }
    return modes.pop() if len(modes) == 1 else ""


def _dense_follows(files: Files) -> bool:
    if "modules.json" not in files:
        return False
    modules = _object(files, "modules.json", list)
    return any(
        isinstance(one, dict) and str(one.get("type", "")).endswith("Dense") for one in modules
    )


def _object(files: Files, name: str, form: type = dict) -> Any:
    value = None
    if len(files[name]) <= _MAX_POOLING_BYTES:
        with suppress(ValueError):
            value = read_json(files[name])
    if not isinstance(value, form):
        raise ModelError(
            f"{name} is malformed.", safe="Nothing was loaded.", fix="Save the model again."
        )
    return value


def _layer(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _dimensions(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: Any = module.weight  # Conv1D, GPT-2's transposed linear layer
    return int(weight.shape[1]), int(weight.shape[0])
