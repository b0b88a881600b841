"""A base model from the bytes of its files: nothing read from disk or network, no code of the
model's own, no pickle.

The weights go through `transformers`' own loader as a state dict, so renamed and tied tensors of
every architecture it knows are treated as `from_pretrained` treats them. What is believed of a
configuration is in `settings`.

Three kinds of model come out:
    mean-pool  an encoder in the sentence-transformers layout whose pooling is the mean: encoder, masked mean, unit length
               (Reimers and Gurevych, arXiv:1908.10084), and fedark's own linear head
    sequence   any other base for classification: `transformers`' sequence classifier with its own head
    causal     a causal language model for instruction tuning
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from fedark.contract.contract import AdapterTerms, TensorSpec
from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.tuning.settings import bounded, make_config, read_settings
from fedark.tuning.weights import Files, tensors

__all__ = ["PREFIX", "Base", "Kind", "load_base"]

Kind = Literal["mean-pool", "sequence", "causal"]
PREFIX = "base_model.model."  # what PEFT puts before the name of every tensor that it saves
_HEADS = ("classifier", "score")  # what PEFT always takes for a sequence classifier's head


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        kind: see the module's text.
        model: float32, in evaluation mode, everything frozen.
        missing: names of parameters that the files lack (a fresh classification head).
        labels: the number of classes; 0 for a causal model.
    """

    kind: Kind
    model: nn.Module
    missing: frozenset[str]
    labels: int

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
        if self.kind == "mean-pool":
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
    shapes_only: bool = False,
) -> Base:
    """The base model in `files`.

    Args:
        files: file name -> content, those of `sources.model_files`. Writable contents are aliased
            by the weights.
        task, labels: as in `ModelTerms`.
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
    auto: Any = AutoModelForCausalLM
    if task == "classification":
        if len(labels) < 2:
            raise ModelError(
                "Classification needs at least two labels.",
                safe="Nothing was loaded.",
                fix="Name the labels.",
            )
        kind = "mean-pool" if _mean_pooled(files) else "sequence"
        auto = AutoModel if kind == "mean-pool" else AutoModelForSequenceClassification
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
    base = Base(kind, model, missing, len(labels) if task == "classification" else 0)
    unforeseen = [
        name
        for name in missing
        if not any(name.startswith(f"{head}.") for head in base.head_modules())
    ]
    if unforeseen:
        raise ModelError(
            f"The base model's files lack {len(unforeseen)} of its tensors, such as"
            f" {min(unforeseen)}.",
            safe="Nothing was kept.",
            fix="Check that config.json and the safetensors files belong together.",
        )
    return base


def _mean_pooled(files: Files) -> bool:
    if "1_Pooling/config.json" not in files:
        return False
    try:
        return read_json(files["1_Pooling/config.json"]).get("pooling_mode_mean_tokens") is True
    except (ValueError, AttributeError):
        raise ModelError(
            "1_Pooling/config.json is malformed.",
            safe="Nothing was loaded.",
            fix="Save the model again.",
        ) from None


def _layer(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _dimensions(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: Any = module.weight  # Conv1D, GPT-2's transposed linear layer
    return int(weight.shape[1]), int(weight.shape[0])
