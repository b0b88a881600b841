"""Base, adapter and head as one module, and where in it every tensor of the contract's layout
lives.

PEFT places the LoRA pairs; a head of fedark's own stands above a pooled encoder, and a lone
head needs no PEFT at all. All trainable tensors are those that travel, all of them belong to
`nn.Linear` layers, and only these layers are in training mode: the base stays in evaluation mode,
so that its dropout is off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from fedark.contract.contract import ModelTerms, TensorSpec
from fedark.foundation.errors import ModelError
from fedark.tuning.base import PREFIX, Base

__all__ = ["Scorer", "SeededDropout", "by_layout", "dropping", "with_adapter"]

_TASK_TYPES = {"pooled": "FEATURE_EXTRACTION", "sequence": "SEQ_CLS", "causal": "CAUSAL_LM"}


class Scorer(nn.Module):
    """Base, adapter and head as one module: token ids and mask [batch, tokens] to logits.

    Logits are [batch, labels] for classification and [batch, tokens, vocabulary] for a causal
    model. `head` is None where the base brings its own.
    """

    def __init__(self, body: nn.Module, head: nn.Linear | None, *, first: bool = False) -> None:
        """`first`: what stands for a text is its first token's vector, and not the mean."""
        super().__init__()
        self._first = first
        self.body = body
        self.head = head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            logits: torch.Tensor = self.head(self.embed(input_ids, attention_mask))
            return logits
        scores: torch.Tensor = self.body(input_ids=input_ids, attention_mask=attention_mask).logits
        return scores

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, width]: the masked mean of the last hidden states, or the first of
        them, normalised.
        """
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self._first:
            return functional.normalize(hidden[:, 0], dim=-1)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def with_adapter(base: Base, terms: ModelTerms) -> nn.Module:
    """The base with the LoRA pairs of `terms`; as it is where a head alone is trained."""
    if terms.adapter.method == "head":
        return base.model
    config = LoraConfig(
        task_type=_TASK_TYPES[base.kind],
        r=terms.adapter.rank,
        lora_alpha=terms.adapter.alpha,
        lora_dropout=0.0,  # `SeededDropout` stands where PEFT's would: that one has no seed
        bias="none",
        target_modules=[name for name, _ in base.adapted(terms.adapter)],
        modules_to_save=base.head_modules() or None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT mentions that it sets fan_in_fan_out for GPT-2's transposed layers
        model: nn.Module = get_peft_model(base.model, config)
    if terms.training.lora_dropout:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout["default"] = SeededDropout(terms.training.lora_dropout)
    return model


class SeededDropout(nn.Module):
    """Dropout (JMLR 15:1929) that draws from a generator of the training's own, so that the same
    seed trains the same adapter however many threads draw beside it. Without one it does nothing.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share
        self.generator: torch.Generator | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            return values
        kept = torch.rand(values.shape, generator=self.generator) >= self._share
        return values * kept / (1 - self._share)


@contextmanager
def dropping(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """While open, the dropout of the LoRA matrices in `model` is on, and draws from `generator`."""
    found = [module for module in model.modules() if isinstance(module, SeededDropout)]
    for module in found:
        module.generator = generator
    try:
        yield
    finally:
        for module in found:
            module.generator = None


def by_layout(scorer: Scorer, layout: Sequence[TensorSpec]) -> dict[str, nn.Parameter]:
    """The module's parameter for every tensor of the layout; these that travel, and only they, are
    trainable.

    In memory PEFT puts the adapter's name ("default") into a tensor's name; in a saved adapter it
    does not.
    """
    saved: dict[str, nn.Parameter] = {}
    untouched = not isinstance(scorer.body, PeftModel)
    wanted = {spec.name for spec in layout}
    for name, parameter in scorer.body.named_parameters():
        parameter.requires_grad_(False)
        if untouched and PREFIX + name in wanted:
            saved[PREFIX + name] = parameter
        for inner, outer in (
            (".lora_A.default.", ".lora_A."),
            (".lora_B.default.", ".lora_B."),
            (".modules_to_save.default.", "."),
        ):
            if inner in name:
                saved[name.replace(inner, outer)] = parameter
    if scorer.head is not None:
        saved |= {f"head.{name}": parameter for name, parameter in scorer.head.named_parameters()}
    if saved.keys() != {spec.name for spec in layout} or any(
        tuple(saved[s.name].shape) != s.shape for s in layout
    ):
        raise ModelError(
            "PEFT placed the adapter elsewhere than the contract's layout says.",
            safe="Nothing was trained.",
            fix="Name targets that are plain linear layers.",
        )
    for spec in layout:
        saved[spec.name].requires_grad_(spec.travels)
    for module in scorer.modules():
        # Per-example gradient hooks (Opacus) watch training modules alone; the base stays in
        # evaluation mode, so that its dropout is off, and for a linear layer the mode means nothing
        # else.
        if isinstance(module, nn.Linear) and any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.train()
    return {spec.name: saved[spec.name] for spec in layout}
