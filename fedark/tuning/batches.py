"""How encoded texts are put together into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedark.tuning.trunk import Ids

__all__ = ["Example", "by_length", "drawn", "padded", "shuffled"]

_POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True, slots=True)
class Example:
    """A record as a model reads it.

    Attributes:
        ids: its tokens.
        target: for classification the label's index; for instruction tuning the number of tokens
            of the prompt.
    """

    ids: Ids
    target: int


def padded(
    texts: Sequence[Sequence[int]], pad_id: int, length: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [texts, the longest's tokens or `length`], padded on the right."""
    longest = max(length, *(len(ids) for ids in texts))
    rows = [[*ids, *[pad_id] * (longest - len(ids))] for ids in texts]
    lengths = torch.tensor([len(ids) for ids in texts])
    return torch.tensor(rows), (torch.arange(longest).unsqueeze(0) < lengths.unsqueeze(1)).long()


def drawn(population: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` of range(population), each as often as any other, give or take one."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += torch.randperm(population, generator=generator).tolist()
    return chosen[:count]


def shuffled(
    examples: Sequence[Example], size: int, generator: torch.Generator
) -> Iterator[list[Example]]:
    """A fresh random order, in batches of similar length: sorted within pools of some batches,
    batches shuffled.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(
            order[start : start + size * _POOL], key=lambda index: len(examples[index].ids)
        )
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    for position in torch.randperm(len(batches), generator=generator).tolist():
        yield [examples[index] for index in batches[position]]


def by_length(lengths: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Each length, the shortest first, with the indices that have it, at most `size` at a time."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length, group in sorted(groups.items()):
        for start in range(0, len(group), size):
            yield length, group[start : start + size]
