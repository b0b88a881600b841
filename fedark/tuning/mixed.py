"""Several adapters of one form on one base, which is in memory once: every row of a batch is
answered with its own.

Only linear layers are trained (`fedark.tuning.task`), so an adapter is a weight, and perhaps a
bias, of each of them. Where these layers stand, a row is multiplied by its own adapter's: the base
is passed once for a batch of any adapters, and LoRA's A, where it is frozen, once for all of them
(S-LoRA, arXiv:2311.03285, does so with A and B).

An architecture may put the rows of a batch together in another way before such a layer. `Mixed`
tries two adapters in one batch against each alone, and if the answers differ, batches of several
adapters are not made (`together`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedark.foundation.errors import InputError, ModelError
from fedark.tuning.batches import padded
from fedark.tuning.decoding import Decoder
from fedark.tuning.layout import Flat, unflatten
from fedark.tuning.tokens import TextEncoder

if TYPE_CHECKING:
    from fedark.tuning.task import TaskModel

__all__ = ["Asked", "Mixed", "Read", "near"]

_BATCH = 64
_TRIED = ("a", "a b c d e")
_NEAR = 1e-3  # of the largest logit


@dataclass(frozen=True)
class Asked:
    """A prompt, and the name of the adapter that it is for."""

    adapter: str
    prompt: str


@dataclass(frozen=True)
class Read:
    """What became of one prompt.

    Attributes:
        values: probabilities of the labels, or the text's vector, float32.
        tokens: of the prompt that were read, special ones included.
        cut: the prompt had more than the model reads.
    """

    values: npt.NDArray[np.float32]
    tokens: int
    cut: bool


class Mixed:
    """See the module's text. `TaskModel.mixed` makes one.

    Attributes:
        terms: of all its adapters.
        together: rows of different adapters may stand in one batch.
    """

    def __init__(
        self,
        task: TaskModel,
        encoder: TextEncoder,
        decoder: Decoder,
        tensors: Mapping[str, nn.Parameter],
    ) -> None:
        self.task, self.terms = task, task.terms
        self.encoder, self.decoder = encoder, decoder
        self._slots: dict[str, int] = {}
        self._specs = [spec for spec in task.terms.layout if spec.travels]
        self._stacks = {
            spec.name: torch.zeros(0, *spec.shape) for spec in task.terms.layout if spec.travels
        }
        self._rows: torch.Tensor | int | None = None
        self.together = self._install(tensors) and self._tried()

    # -- which adapters there are

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that are loaded."""
        return tuple(self._slots)

    def put(self, name: str, flat: Flat) -> None:
        """Load an adapter, in the place of one of that name.

        Args:
            flat: float32 [terms.travelling].

        Raises:
            ProtocolError: wrong length or type, or not finite; nothing is changed.
        """
        named = unflatten(self.terms.layout, flat, self.terms.adapter.seed)
        if name not in self._slots:
            taken = set(self._slots.values())
            self._slots[name] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        slot = self._slots[name]
        for key, stack in self._stacks.items():
            if slot == len(stack):
                stack = torch.cat([stack, torch.zeros(1, *stack.shape[1:])])
            stack[slot] = torch.from_numpy(named[key].copy())
            self._stacks[key] = stack

    def drop(self, name: str) -> None:
        """Forget an adapter: its values are overwritten. No harm if there is none."""
        slot = self._slots.pop(name, None)
        for stack in self._stacks.values() if slot is not None else ():
            stack[slot] = 0.0

    def require(self, name: str) -> None:
        """Return if there is an adapter of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self._slots:
            raise InputError("There is no adapter of that name.", safe="Nothing was asked.")

    # -- answers

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """While open, row i of a batch is computed with adapter `names[i]`; one name alone stands
        for a batch of any size.
        """
        slots = [self._slots[name] for name in names]
        alike = len(set(slots)) == 1
        self._rows = slots[0] if alike else torch.tensor(slots)
        try:
            yield
        finally:
            self._rows = None

    def batches(
        self, names: Sequence[str], lengths: Sequence[int], size: int = _BATCH
    ) -> Iterator[list[int]]:
        """Indices of rows that are computed together: of similar length, at most `size`."""
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault("" if self.together else name, []).append(index)
        for group in groups.values():
            order = sorted(group, key=lambda index: lengths[index])
            for start in range(0, len(order), size):
                yield order[start : start + size]

    @torch.no_grad()
    def label(self, asked: Sequence[Asked]) -> list[Read]:
        """The probabilities of the labels after each prompt, as `TaskModel.probabilities`.

        Raises:
            InputError: an adapter's name is unknown.
            ModelError: the model has no labels, or the tokenizer fails on a prompt.
        """
        if not self.terms.labels:
            raise ModelError("This model writes free text: it has no labels.")
        if self.task.causal:
            return self._ranked(asked)
        found = self._encoded(asked, self.task.scorer)
        return [
            Read(functional.softmax(row, dim=-1).numpy(), tokens, cut) for row, tokens, cut in found
        ]

    @torch.no_grad()
    def embed(self, asked: Sequence[Asked]) -> list[Read]:
        """The vector of each prompt, of unit length.

        Raises:
            InputError: an adapter's name is unknown.
            ModelError: the model is no encoder of sentences, or the tokenizer fails.
        """
        if self.task.scorer.head is None:
            raise ModelError("This model has no vectors of texts: it is no encoder of sentences.")
        found = self._encoded(asked, self.task.scorer.embed)
        return [Read(row.numpy(), tokens, cut) for row, tokens, cut in found]

    def _encoded(
        self, asked: Sequence[Asked], compute: Callable[..., torch.Tensor]
    ) -> list[tuple[torch.Tensor, int, bool]]:
        for one in asked:
            self.require(one.adapter)
        texts = self.encoder.cut_texts([one.prompt for one in asked])
        names, lengths = [one.adapter for one in asked], [len(ids) for ids, _ in texts]
        values: dict[int, torch.Tensor] = {}
        with self.task.uncached():
            for part in self.batches(names, lengths):
                ids, mask = padded([texts[index][0] for index in part], self.encoder.pad_id)
                with self.rows([names[index] for index in part]):
                    values |= zip(part, compute(ids, mask), strict=True)
        return [(values[index], len(ids), cut) for index, (ids, cut) in enumerate(texts)]

    def _ranked(self, asked: Sequence[Asked]) -> list[Read]:
        """Admissible answers are ranked for the prompts of one adapter at a time: each prompt is
        repeated for all of them.
        """
        for one in asked:
            self.require(one.adapter)
        longest = max(len(ids) for ids in self.encoder.answers(self.terms.labels))
        lengths = [len(ids) for ids in self.encoder.whole_prompts([one.prompt for one in asked])]
        most = self.terms.training.max_length - longest
        values: dict[int, torch.Tensor] = {}
        for name in {one.adapter for one in asked}:
            part = [index for index, one in enumerate(asked) if one.adapter == name]
            prompts = [asked[index].prompt for index in part]
            with self.rows([name]):
                scores = self.decoder.rank(prompts, self.terms.labels).softmax(1)
            values |= zip(part, scores, strict=True)
        return [
            Read(values[index].numpy(), min(length, most), length > most)
            for index, length in enumerate(lengths)
        ]

    # -- how

    def _install(self, tensors: Mapping[str, nn.Parameter]) -> bool:
        """Let every trained linear layer ask which adapter a row is for. Returns whether that is
        all that is trained.
        """
        ours = {id(tensors[spec.name]): spec.name for spec in self._specs}
        found = 0
        for module in self.task.scorer.modules():
            own = {
                kind: ours[id(value)]
                for kind, value in module.named_parameters(recurse=False)
                if id(value) in ours
            }
            if "weight" in own and isinstance(module, nn.Linear):
                module.forward = self._forward(module, own)  # type: ignore[method-assign,assignment]
                found += len(own)
        return found == len(ours)

    def _forward(
        self, module: nn.Linear, own: Mapping[str, str]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        plain = module.forward

        def tensor(kind: str) -> torch.Tensor | None:
            fixed: torch.Tensor | None = getattr(module, kind)
            return self._stacks[own[kind]][self._rows] if kind in own else fixed

        def forward(values: torch.Tensor) -> torch.Tensor:
            rows = self._rows
            if rows is None:
                return plain(values)
            weight, bias = tensor("weight"), tensor("bias")
            assert weight is not None  # of a linear layer
            if isinstance(rows, int):
                return functional.linear(values, weight, bias)
            stacked = values.reshape(len(rows), -1, values.shape[-1])
            result = torch.bmm(stacked, weight.transpose(1, 2))
            if bias is not None:
                result = result + (bias.unsqueeze(1) if "bias" in own else bias)
            return result.reshape(*values.shape[:-1], -1)

        return forward

    @torch.no_grad()
    def _tried(self) -> bool:
        """Whether two adapters in one batch answer as each of them alone."""
        generator = np.random.default_rng(0)
        for name in _TRIED:
            flat = generator.normal(size=self.terms.travelling).astype(np.float32) * 0.1
            self.put(name, flat)
        ids, mask = padded([ids for ids, _ in self.encoder.cut_texts(_TRIED)], self.encoder.pad_id)
        try:
            with self.task.uncached():
                with self.rows(_TRIED):
                    mixed = self.task.scorer(ids, mask)
                for row, name in enumerate(_TRIED):
                    with self.rows([name]):
                        alone = self.task.scorer(ids, mask)[row]
                    seen = mask[row].bool() if alone.ndim > 1 else slice(None)
                    if not near(mixed[row][seen], alone[seen]):
                        return False
        except (RuntimeError, ValueError):  # rows do not come one by one to a trained layer
            return False
        finally:
            for name in _TRIED:
                self.drop(name)
        return True


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of logits differ by rounding alone."""
    most = float(other.abs().max())
    return bool(torch.isfinite(one).all()) and float((one - other).abs().max()) <= _NEAR * most
