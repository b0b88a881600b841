"""Canaries: members of the training data that are easy to see if anything is to be seen, each
included by a fair coin.

flipped   records with a wrong answer. They go all the way: text, model, per-example gradient,
          clipping. A model that was trained on one has a lower loss on it afterwards.
dirac     gradients along one coordinate of the travelling vector, each along another, larger than
          the clipping norm allows. They stand for the worst possible record: none can be more
          visible. They take the same clipping, sampling, sum, rounding and noise, and show in the
          sums of the rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning import per_example
from fedark.tuning.layout import Flat
from fedark.tuning.per_example import Norms
from fedark.tuning.task import TaskModel

__all__ = ["AuditedTask", "Dirac", "dirac", "flipped", "losses", "quiet_coordinates"]

_CHUNK = 512


@dataclass(frozen=True, slots=True, repr=False)
class Dirac(Record):
    """A member without text: its gradient lies along one coordinate of the travelling vector."""

    coordinate: int = 0


def dirac(coordinate: int) -> Dirac:
    """The Dirac canary of one coordinate."""
    return Dirac(f"dirac {coordinate}", "", coordinate=coordinate)


class AuditedTask:
    """A `TaskModel` that takes Dirac canaries for records: everything that the trainer asks of a
    model in a round.

    Args:
        task: the model, at the adapter of the round.
        loudness: L2 norm of a Dirac canary's gradient before it is clipped.
    """

    def __init__(self, task: TaskModel, loudness: float) -> None:
        self._task = task
        self._loudness = loudness
        self.terms, self.get_flat, self.stepper = task.terms, task.get_flat, task.stepper

    def gradient_sum(self, records: Sequence[Record], *, clip_norm: float) -> tuple[Flat, Norms]:
        """`TaskModel.gradient_sum` of the true records, and the clipped canaries; the norms are
        those of the true ones.
        """
        total, norms = self._task.gradient_sum(
            [r for r in records if not isinstance(r, Dirac)], clip_norm=clip_norm
        )
        factor = float(per_example.clip_factors(torch.tensor([self._loudness]), clip_norm)[0])
        for record in records:
            if isinstance(record, Dirac):
                total[record.coordinate] += self._loudness * factor
        return total, norms


def flipped(
    records: Sequence[Record], labels: Sequence[str], generator: np.random.Generator
) -> list[Record]:
    """The records with an answer that is not theirs, each other one as likely."""
    canaries = []
    for record in records:
        others = [label for label in labels if label != record.answer]
        canaries.append(Record(record.prompt, others[int(generator.integers(len(others)))]))
    return canaries


def quiet_coordinates(
    task: TaskModel,
    records: Sequence[Record],
    count: int,
    clip_norm: float,
    generator: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """`count` coordinates on which the records' summed gradient is small, in random order: a canary
    is best heard there.

    Raises:
        InputError: the vector has not twice as many.
    """
    summed, _ = task.gradient_sum(records, clip_norm=clip_norm)
    if summed.size < 2 * count:
        raise InputError(
            f"An adapter of {summed.size} values is too small for {count} Dirac canaries.",
            safe="Nothing was trained.",
            fix="Ask for fewer canaries.",
        )
    return generator.permutation(np.argsort(np.abs(summed), kind="stable")[:count])


def losses(task: TaskModel, records: Sequence[Record]) -> npt.NDArray[np.float64]:
    """Every record's loss in nats at the present adapter."""
    found = [np.zeros(0)]
    with torch.no_grad():
        found += [
            task.losses(records[at : at + _CHUNK]).double().numpy()
            for at in range(0, len(records), _CHUNK)
        ]
    return np.concatenate(found)
