"""What a frozen body puts before a lone linear head, computed once per text.

Where nothing but one linear layer is trained, the input of that layer is a constant of the text:
with the row kept, a step is one matrix product. For an encoder the row is the pooled vector; a
decoder's head reads every token, and the row is that of the last one. Which it is is not assumed:
the head's answer from the rows is compared with the model's own for every batch that is computed,
and a model that decides otherwise, or whose rows change with the padding beside a text, is computed
in full ever after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedark.tuning.trunk import Ids

__all__ = ["Features"]

_LIMIT_BYTES = 512 << 20
_BATCH = 64


class Features:
    """The cache for one model and its head."""

    def __init__(self, head: nn.Linear, run: Callable[[Sequence[Ids]], torch.Tensor]) -> None:
        """Args:
        head: the only layer that is trained.
        run: computes the model's logits [texts, labels], by way of `head`.
        """
        self._head = head
        self._run = run
        self._places: dict[Ids, int] = {}
        self._rows = torch.empty(0, head.in_features)
        self._limit = _LIMIT_BYTES // (4 * head.in_features)
        self._sound = True

    @classmethod
    def before(
        cls, model: nn.Module, run: Callable[[Sequence[Ids]], torch.Tensor]
    ) -> Features | None:
        """The cache for `model`, or None if it trains more than one linear layer."""
        trained = [
            module
            for module in model.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        ]
        return cls(trained[0], run) if len(trained) == 1 and type(trained[0]) is nn.Linear else None

    def fill(self, texts: Sequence[Ids]) -> None:
        """Compute what is not yet known, up to a limit in memory; texts beyond it are computed in
        full at every step.
        """
        unknown = sorted({ids for ids in texts if ids not in self._places}, key=len)[
            : self._limit - len(self._places)
        ]
        fresh: list[torch.Tensor] = []
        for start in range(0, len(unknown), _BATCH):
            batch = unknown[start : start + _BATCH]
            rows = self._compute(batch)
            if rows is None:
                self._sound = False
                self._places.clear()
                return
            fresh.append(rows)
        if fresh:
            known = len(self._places)
            self._places |= {ids: known + index for index, ids in enumerate(unknown)}
            self._rows = torch.cat([self._rows, *fresh])

    def rows(self, texts: Sequence[Ids]) -> torch.Tensor | None:
        """The rows [texts, width], or None where a text is not known."""
        places = [self._places.get(ids, -1) for ids in texts]
        return (
            self._rows[torch.tensor(places, dtype=torch.long)]
            if self._sound and min(places, default=0) >= 0
            else None
        )

    def logits(self, texts: Sequence[Ids]) -> torch.Tensor | None:
        """The head's answer [texts, labels], or None where a text is not known."""
        rows = self.rows(texts)
        if rows is None:
            return None
        answer: torch.Tensor = self._head(rows)
        return answer

    @torch.no_grad()
    def _compute(self, batch: Sequence[Ids]) -> torch.Tensor | None:
        if not self._sound:
            return None
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])

        handle = self._head.register_forward_pre_hook(keep)
        try:
            logits = self._run(batch)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].ndim not in (2, 3) or len(seen[0]) != len(batch):
            return None
        rows = (
            seen[0]
            if seen[0].ndim == 2
            else seen[0][torch.arange(len(batch)), torch.tensor([len(ids) - 1 for ids in batch])]
        )
        again = functional.linear(rows, self._head.weight, self._head.bias)
        sound = _alike(logits, again)
        if sound and not self._places:
            sound = _alike(logits[:1], self._run(batch[:1]))  # the shortest, without padding
        return rows.clone() if sound else None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())
    )
