"""Per-example gradients of linear layers, clipped and summed, for what a plain training step costs.

The gradient of a linear layer for one example is G^T X, with X [tokens, in] what went in and G
[tokens, out] what came back. A rank of an adapter is smaller than the number of tokens, so forming
this small product example by example (one batched matrix product) costs no more than the sum that a
plain step forms. Where it would be large, as for a classification head, only its norm is formed, by
|G^T X|^2 = <G G^T, X X^T> (Goodfellow, arXiv:1510.01799; Li et al.,
arXiv:2110.05679), and the clipped sum is one product of the rescaled G with X. Nothing is
approximated, and no noise is added here.

Rules: every trained parameter is the weight or bias of a plain `nn.Linear` that is reached only by
calling it with examples along the first dimension; a layer that is called several times counts with
the sum of its calls. What breaks a rule is refused with `ModelError`. An example whose gradient is
not finite contributes zero, which is a clipping like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedark.foundation.errors import ModelError
from fedark.tuning.layout import Flat

__all__ = ["Norms", "PerExample", "clip_factors", "clip_vector"]

Norms = npt.NDArray[np.float32]
_Pair = tuple[torch.Tensor, torch.Tensor]


def clip_factors(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """What brings vectors of these L2 norms [examples] to at most `clip_norm`: min(1, clip_norm /
    norm), 0 if it is not finite.
    """
    factors = (clip_norm / norms.double()).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clip_vector(vector: Flat, clip_norm: float) -> Flat:
    """A whole update [travelling] brought to an L2 norm of at most `clip_norm`: the clipping of
    customer-level privacy.

    The bound holds for the float32 values that are returned. A vector that is not finite becomes
    zeros.
    """
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm):
        return np.zeros_like(vector)
    clipped = vector
    shrink = 1.0
    while norm > clip_norm:  # rounding to float32 may leave a norm just above the bound, once
        shrink *= clip_norm / norm * (1 - 2.0**-24)
        clipped = (vector.astype(np.float64) * shrink).astype(np.float32)
        norm = float(np.linalg.norm(clipped.astype(np.float64)))
    return clipped


class PerExample:
    """Watches the trained layers of one model.

    Usage: `with watch.batch(n) as pending: pending.backward(losses)`, then
    `pending.clipped_sum(clip_norm)`.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Args:
        model: what is run.
        parameters: the trained ones, in the order of the flat vector.

        Raises:
            ModelError: the model has something that would make the gradients inexact, with
                everything found.
        """
        self._parameters = list(parameters)
        self._layers: list[nn.Linear] = []
        problems: list[str] = []
        wanted, reached = {id(parameter) for parameter in parameters}, set()
        for name, module in model.named_modules():
            own = {
                id(parameter)
                for parameter in module.parameters(recurse=False)
                if parameter.requires_grad
            }
            reached |= own
            if own - wanted:
                problems.append(f"{name} is trained and does not travel")
            if not own:
                if module.training:
                    problems.append(f"{name} is in training mode")
            elif type(module) is not nn.Linear:
                problems.append(f"{name} is trained and not a plain linear layer")
            elif "forward" in module.__dict__:
                problems.append(f"the forward of {name} was replaced")
            else:
                self._layers.append(module)
            if getattr(module, "gradient_checkpointing", False):
                problems.append(f"{name} recomputes its activations")
        if wanted - reached:
            problems.append("a tensor of the adapter is not in the model, or frozen")
        if problems:
            raise _inexact(problems)

    @contextmanager
    def batch(self, examples: int) -> Iterator[Pending]:
        """While open, the backward pass over a batch of so many examples is taken apart.

        Raises:
            ModelError: on leaving, if a trained parameter was reached otherwise than by its layer.
        """
        pending = Pending(self._parameters, examples)
        for parameter in self._parameters:
            parameter.grad = None  # of an earlier plain step
        try:
            for layer in self._layers:
                layer.forward = partial(_watched, layer, pending)  # type: ignore[method-assign]
            yield pending
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            past = [parameter for parameter in self._parameters if parameter.grad is not None]
            for parameter in past:
                parameter.grad = None
        if past:
            raise _inexact(["a trained weight is used otherwise than by calling its layer"])


class Pending:
    """The gradients of one batch: per parameter, either each example's own or the two factors that
    make it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], examples: int) -> None:
        self._parameters = parameters
        self._examples = examples
        self._formed: dict[int, torch.Tensor] = {}
        self._factors: dict[int, _Pair] = {}

    def backward(self, losses: torch.Tensor) -> None:
        """Run the backward pass of `losses` [examples], each of which depends on its own example
        alone.

        Raises:
            ModelError: they do not depend on the trained layers, or a layer's input is not ordered
                by example.
        """
        if not losses.requires_grad:
            raise _inexact(["the loss does not depend on the adapter"])
        losses.sum().backward()  # type: ignore[no-untyped-call]

    def add(self, layer: nn.Linear, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        """Take a layer's input [examples, ..., in] and what came back [examples, ..., out]."""
        if inputs.ndim < 2 or len(inputs) != self._examples:
            raise _inexact(
                [
                    "a trained layer reads something else than one row or one sequence for each"
                    " example"
                ]
            )
        inputs = inputs.detach().reshape(self._examples, -1, layer.in_features)
        grads = grads.reshape(self._examples, -1, layer.out_features)
        tokens = inputs.shape[1]
        if layer.weight.requires_grad:
            key = id(layer.weight)
            if key in self._factors:  # called again: only the sum of both calls has a norm
                self._form(key, *self._factors.pop(key))
            large = layer.in_features * layer.out_features > tokens * (
                layer.in_features + layer.out_features
            )
            if large and key not in self._formed:
                self._factors[key] = grads, inputs
            else:
                self._form(key, grads, inputs)
        bias: torch.Tensor | None = layer.bias
        if bias is not None and bias.requires_grad:
            self._put(id(bias), grads.sum(1))

    def clipped_sum(self, clip_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum [travelling] of the examples' gradients, each clipped to `clip_norm`, and their
        norms [examples] before it.
        """
        squares = torch.zeros(self._examples, dtype=torch.float64)
        for gradient in self._formed.values():
            squares += torch.linalg.vector_norm(gradient.flatten(1), dim=1).double().square()
        for grads, inputs in self._factors.values():
            if grads.shape[1] == 1:
                squares += (
                    torch.linalg.vector_norm(grads, dim=(1, 2)).double()
                    * inputs.flatten(1).norm(dim=1)
                ).square()
            else:
                gram = torch.bmm(grads, grads.transpose(1, 2)) * torch.bmm(
                    inputs, inputs.transpose(1, 2)
                )
                squares += gram.sum((1, 2)).clamp(min=0)
        norms = squares.sqrt()
        factors = clip_factors(norms, clip_norm).float()
        sound = torch.isfinite(norms)
        kept = slice(None) if bool(sound.all()) else sound.nonzero().squeeze(1)
        return (
            torch.cat(
                [self._sum(parameter, factors[kept], kept) for parameter in self._parameters]
            ),
            norms.float(),
        )

    def _sum(self, parameter: nn.Parameter, factors: torch.Tensor, kept: Any) -> torch.Tensor:
        key = id(parameter)
        if key in self._formed:
            return factors @ self._formed[key][kept].flatten(1)
        if key in self._factors:
            grads, inputs = (side[kept] for side in self._factors[key])
            scaled = (grads * factors.view(-1, 1, 1)).flatten(0, 1)
            return (scaled.T @ inputs.flatten(0, 1)).flatten()
        return torch.zeros(parameter.numel())

    def _form(self, key: int, grads: torch.Tensor, inputs: torch.Tensor) -> None:
        self._put(key, torch.bmm(grads.transpose(1, 2), inputs))

    def _put(self, key: int, gradient: torch.Tensor) -> None:
        self._formed[key] = self._formed[key] + gradient if key in self._formed else gradient


class _Watched(torch.autograd.Function):
    """A linear layer that gives its weight's gradient to `Pending` instead of summing it."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: nn.Linear,
        pending: Pending,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer, ctx.pending = layer, pending
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.pending.add(ctx.layer, inputs, grads)
        return (grads @ weight if ctx.needs_input_grad[0] else None), None, None, None, None


def _watched(layer: nn.Linear, pending: Pending, inputs: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = _Watched.apply(inputs, layer.weight, layer.bias, layer, pending)  # type: ignore[no-untyped-call]
    return answer


def _inexact(problems: Sequence[str]) -> ModelError:
    shown = "; ".join(problems[:5]) + ("; and more" if len(problems) > 5 else "")
    return ModelError(
        f"Per-example gradients of this model would not be exact: {shown}.",
        safe="Nothing was trained.",
        fix="Use a base model and adapter targets whose trained layers are plain linear ones.",
    )
