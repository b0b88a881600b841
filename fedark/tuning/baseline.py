"""What one customer reaches alone: the local-only baseline that a job is compared with.

Without a privacy mechanism it trains as a round does. Under one, a round's learning rates say
nothing of training without noise, so the baseline chooses its own: AdamW at each pair of rates of a
small grid, and the job's own settings, each tried for a while and measured on a fifth of the
customer's own training records; the best is trained on all of them. What was chosen stays in the
enclave, as does the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedark.contract.contract import TrainingTerms
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.records.splits import split_train_test
from fedark.tuning.layout import Flat
from fedark.tuning.task import OnStep, TaskModel

__all__ = ["train_alone"]

# Learning rates of LoRA's matrices and of the head.
_GRID = ((3e-4, 1e-3), (1e-3, 3e-3), (3e-3, 1e-2), (3e-3, 3e-2), (3e-3, 1e-1))
_TRIED_ON = 0.2
_SHORTER = (
    5  # a trial has a fifth of the passes: the whole grid costs about as much as the baseline
)


def train_alone(
    task: TaskModel,
    records: Sequence[Record],
    *,
    private: bool,
    seed: int,
    progress: OnStep | None = None,
    part: Sequence[Record] = (),
) -> Flat | None:
    """Train the adapter from where it is for `terms.training.baseline_epochs` passes.

    Args:
        private: the job has a privacy mechanism: settings are chosen, and training that diverges
            leaves the adapter as it was instead of ending the job.
        part: some of `records`. If they are given, the first half of the passes is over these, so
            that there is an adapter which has not seen the others.

    Returns:
        That adapter, if there is one.

    Raises:
        InputError: the loss left the finite numbers, without a mechanism.
    """
    own = task.terms.training
    epochs, start = own.baseline_epochs, task.get_flat()
    best = (private and _chosen(task, records, start, seed)) or own
    first = epochs // 2 if part else 0
    turn = first / epochs
    passes = [(part, first, (0.0, turn)), (records, epochs - first, (turn, 1.0))]
    passes = passes if first else passes[1:]
    seen = []
    for number, (chosen, count, place) in enumerate(passes):
        try:
            task.train(
                chosen,
                epochs=count,
                seed=seed + number,
                progress=progress,
                settings=best,
                part=place,
            )
            if not np.isfinite(task.get_flat()).all():
                raise InputError("Training diverged.", safe="No update was made from it.")
        except InputError:
            if not private:
                raise
            task.set_flat(start)
            return None
        seen.append(task.get_flat())
    return seen[0] if len(seen) > 1 else None


def _chosen(
    task: TaskModel, records: Sequence[Record], start: Flat, seed: int
) -> TrainingTerms | None:
    own = task.terms.training
    train, held = split_train_test(records, _TRIED_ON, salt="baseline")
    if not train or not held:
        return None
    passes = own.baseline_epochs
    # Of a lone head features are kept, so that a whole training costs little.
    passes = passes if task.terms.adapter.method == "head" else math.ceil(passes / _SHORTER)
    tried = [own] + [
        own.model_copy(
            update={"optimizer": "adamw", "learning_rate": lora, "head_learning_rate": head}
        )
        for lora, head in _GRID
    ]
    found: list[tuple[float, float, int]] = []
    for number, settings in enumerate(tried):
        if _trained(task, train, start, settings, passes, seed, None):
            measured = task.evaluate(held)
            if math.isfinite(measured.loss_sum):
                found.append((-measured.correct, measured.loss_sum, number))
    return tried[min(found)[2]] if found else None


def _trained(
    task: TaskModel,
    records: Sequence[Record],
    start: Flat,
    settings: TrainingTerms,
    epochs: int,
    seed: int,
    progress: OnStep | None,
) -> bool:
    """Train from `start`; False where the loss or the adapter left the finite numbers."""
    task.set_flat(start)
    try:
        task.train(records, epochs=epochs, seed=seed, progress=progress, settings=settings)
    except InputError:
        return False
    return bool(math.isfinite(float(abs(task.get_flat()).max(initial=0.0))))
