"""The frozen layers below the first adapted one, computed once per text instead of once per step.

They see nothing that training changes, so what they put out for a text is a constant. `Trunk` keeps
that output and lets the model's own forward run with the frozen layers answering from memory:
embeddings, masks and the layers above run as ever, so every architecture that keeps its layers in
one list is covered. Results equal the full computation up to float32 rounding (a matrix product's
last bit depends on the shape of the batch). Before anything is kept, cut texts of many lengths are
computed both ways. A model that runs its layers in an unusual way (shared, read again further up,
padded or pooled inside) fails at that or gives another answer, and is computed in full ever after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Trunk"]

Ids = tuple[int, ...]
_LIMIT_BYTES = 512 << 20
_BATCH = 64
_PROOF = (1, 2, 3, 5, 7, 11, 13, 23, 37, 61, 131)  # lengths of the texts that are tried both ways


class Trunk:
    """The cache for one model."""

    def __init__(
        self, layers: Sequence[nn.Module], run: Callable[[Sequence[Ids]], torch.Tensor]
    ) -> None:
        """Args:
        layers: the frozen layers, lowest first, at least one.
        run: computes the model on texts; stopped as soon as the last of `layers` has answered.
        """
        self._layers = layers
        self._run = run
        self._states: dict[Ids, torch.Tensor] = {}
        self._bytes = 0
        self._more: tuple[None, ...] | None = (
            None  # what follows the states where layers give tuples
        )
        self._proven: bool | None = None

    @classmethod
    def below(
        cls, model: nn.Module, trained: Sequence[str], run: Callable[[Sequence[Ids]], torch.Tensor]
    ) -> Trunk | None:
        """The trunk of `model` under the lowest of the `trained` parameters, or None where nothing
        lies safely below.

        Args:
            model: has the layers in one `nn.ModuleList`.
            trained: names, in `model`, of every parameter that differs from the base, LoRA's and
                others.
            run: see the constructor; gives logits [texts, ...] or [texts, tokens, ...].
        """
        lists = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        found: set[str] = set()
        depth = None
        for name in trained:
            match = re.match(r"(.+?)\.(\d+)\.", name)
            if match and match[1] in lists:
                found.add(match[1])
                depth = min(int(match[2]), len(lists[match[1]]) if depth is None else depth)
            elif not re.search(r"(^|\.)(classifier|score|pooler|pre_classifier|head)\.", name):
                return None  # not known to lie above the layers
        if not found and trained and len(lists) == 1:  # heads alone: every layer lies below them
            return cls(list(next(iter(lists.values()))), run)
        if len(found) != 1 or not depth:
            return None
        return cls(list(lists[found.pop()])[:depth], run)

    def fill(self, texts: Sequence[Ids]) -> None:
        """Compute what is not yet known, up to a limit in memory; texts beyond it are computed in
        full at every step.
        """
        unknown = sorted({ids for ids in texts if ids not in self._states}, key=len)
        if self._proven is None and unknown:
            self._proven = self._prove(unknown)
        for start in range(0, len(unknown), _BATCH):
            if self._bytes >= _LIMIT_BYTES or not self._proven:
                return
            self._proven = self._keep(unknown[start : start + _BATCH])
            if not self._proven:
                self._states.clear()

    @contextmanager
    def replaying(self, texts: Sequence[Ids], length: int = 0) -> Iterator[None]:
        """While open, the model run on exactly the batch `texts` (padded on the right, to `length`
        at least) takes the layers' answers from memory.
        """
        states = [self._states.get(ids) for ids in texts]
        known = [state for state in states if state is not None]
        if len(known) < len(states):
            yield
            return
        hidden = pad_sequence(known, batch_first=True)
        hidden = functional.pad(hidden, (0, 0, 0, max(0, length - hidden.shape[1])))
        answer = hidden if self._more is None else (hidden, *self._more)

        def forward(*_: Any, **__: Any) -> Any:
            return answer

        try:
            for layer in self._layers:
                layer.forward = forward
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _prove(self, texts: Sequence[Ids]) -> bool:
        """Whether texts cut to lengths that no block divides come out the same both ways."""
        longest = texts[-1]
        batch = [longest[:length] for length in _PROOF if length < len(longest)] + [longest]
        try:
            proven = self._keep(batch) and self._agrees(batch)
            together = dict(self._states)
            for part in (batch[:-1], batch[:1]):
                proven = proven and (not part or (self._keep(part) and self._agrees(part)))
            # Less padding beside it may not change a text's own states.
            proven = proven and all(_alike(self._states[ids], one) for ids, one in together.items())
        except Exception:
            proven = False
        self._states.clear()
        self._bytes = 0
        return proven

    def _agrees(self, batch: Sequence[Ids]) -> bool:
        with torch.no_grad():
            full = self._run(batch)
            with self.replaying(batch):
                replayed = self._run(batch)
        # Positions of padding are no one's answer, and may differ.
        lengths = [len(ids) if full.ndim == 3 else None for ids in batch]
        return full.shape == replayed.shape and all(
            _alike(a[:n], b[:n]) for a, b, n in zip(full, replayed, lengths, strict=True)
        )

    def _keep(self, batch: Sequence[Ids]) -> bool:
        """Compute and keep the states of `batch`; False where they are not one row a token."""
        captured: list[Any] = []

        def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured.append(output)
            raise _Reached

        handle = self._layers[-1].register_forward_hook(capture)
        try:
            with torch.no_grad():
                self._run(batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        output = captured[0] if captured else None
        states, *more = output if isinstance(output, tuple) else (output,)
        if not isinstance(states, torch.Tensor) or any(part is not None for part in more):
            return False
        if states.shape[:-1] != (len(batch), max(map(len, batch))):
            return False
        self._more = (None,) * len(more) if isinstance(output, tuple) else None
        for ids, state in zip(batch, states, strict=True):
            kept = state[: len(ids)].clone()
            self._states[ids] = kept
            self._bytes += kept.numel() * kept.element_size()
        return True


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


class _Reached(Exception):
    """The last frozen layer has answered: the rest of the forward pass is not needed."""
