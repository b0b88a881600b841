"""What a trainer enclave does in a round under a privacy mechanism for single records: draw, clip,
sum; or local noised steps.

The rules are those of `fedark.contract.privacy`. A record's gradients of all models are clipped to
C / sqrt(models) each, so that it moves the whole update by at most C. Draws are Poisson, from a
cryptographic generator of this enclave, fresh in every step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from fedark.contract.contract import Contract
from fedark.contract.privacy import mechanism, noised
from fedark.privacy.sampling import poisson_sample
from fedark.records.reading import Record
from fedark.tuning.per_example import clip_vector
from fedark.tuning.separable import ModelChanged
from fedark.tuning.task import TaskModel

__all__ = ["CHANGED", "DRAWN", "WITHOUT", "Tally", "noised_updates", "private_updates"]

DRAWN, WITHOUT, CHANGED = "drawn", "without gradient", "changed itself"

Vector = np.ndarray[Any, np.dtype[np.float32]]
Tally = Counter[tuple[str, str]]
"""(model, one of the words above) -> how many records were drawn, how many of them counted as
zeros, and in how many sums the model was found to have changed itself. It depends on records: it is
for the customer's own operator.
"""


def private_updates(
    contract: Contract,
    tasks: Mapping[str, TaskModel],
    records: Sequence[Record],
    tally: Tally | None = None,
) -> dict[str, Vector]:
    """The updates of one round: model -> float32 [travelling].

    Under "example-distributed" minus a clipped gradient sum over one draw, to which a share of the
    noise must be added before it leaves. Under "example-local" the change that noised local steps
    made, ready to leave.

    Args:
        tasks: every model of the job, at the global adapter of the round.
        records: of this customer, all.
        tally: where to count what had no gradient.
    """
    counts = Tally() if tally is None else tally
    terms, found = contract.privacy, mechanism(contract)
    if found is None or found.unit != "record":
        raise ValueError("the contract does not protect single records")
    clip = terms.clip_norm / math.sqrt(len(tasks))

    def gradients() -> dict[str, Vector]:
        drawn = [records[index] for index in poisson_sample(len(records), found.rate)]
        summed = np.concatenate(
            [_clipped_sum(*task, drawn, clip, counts) for task in tasks.items()]
        )
        # A sum beyond this norm might have its rounding drawn again, which the accounting does not
        # allow.
        return _split(clip_vector(summed, found.sum_norm), tasks)

    if found.traits.update == "gradient-sum":
        return {name: -summed for name, summed in gradients().items()}
    before = {name: task.get_flat() for name, task in tasks.items()}
    steppers = {name: task.stepper() for name, task in tasks.items()}
    expected = np.float32(terms.sampling_rate * terms.records / len(contract.customers))
    for _ in range(terms.local_steps):
        for name, summed in noised_updates(contract, gradients()).items():
            steppers[name](summed / expected)
    return {name: task.get_flat() - before[name] for name, task in tasks.items()}


def _clipped_sum(
    name: str, task: TaskModel, drawn: Sequence[Record], clip: float, tally: Tally
) -> Vector:
    """`TaskModel.gradient_sum`; a record that it fails on, or has no finite gradient, counts as
    zeros. Whether one did must not be seen, so whatever is raised ends here: `self_check` has tried
    the model on records that are nobody's. What failed is counted in `tally`.
    """
    tally[name, DRAWN] += len(drawn)
    with suppress(Exception):
        summed, norms = task.gradient_sum(drawn, clip_norm=clip)
        if np.isfinite(summed).all():
            tally[name, WITHOUT] += int((~np.isfinite(norms)).sum())
            return summed
    total = np.zeros(task.terms.travelling, np.float64)
    changed = False
    for record in drawn:
        part, found = _part(task, record, clip)
        changed |= found
        if part is None:
            tally[name, WITHOUT] += 1
        else:
            total += part
    tally[name, CHANGED] += changed
    return total.astype(np.float32)


def _part(task: TaskModel, record: Record, clip: float) -> tuple[Vector | None, bool]:
    """A record's clipped gradient, or None; and whether the model was found to have changed."""
    try:
        part, norms = task.gradient_sum([record], clip_norm=clip)
    except ModelChanged:
        return None, True
    except Exception:
        return None, False
    return (part if np.isfinite([*norms, *part]).all() else None), False


def noised_updates(contract: Contract, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
    """The updates of all models, rounded to the grid and noised."""
    return _split(noised(contract, np.concatenate(list(vectors.values()))), vectors)


def _split(whole: Vector, sizes: Mapping[str, Any]) -> dict[str, Vector]:
    found, at = {}, 0
    for name, part in sizes.items():
        size = part.size if isinstance(part, np.ndarray) else part.terms.travelling
        found[name] = whole[at : at + size]
        at += size
    return found
