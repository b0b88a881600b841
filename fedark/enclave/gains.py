"""What a personal adapter is worth, as it leaves a trainer enclave: figures for the sums, and all
of it for its own customer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedark.contract.contract import Contract
from fedark.contract.protection import Figure, gain_keys
from fedark.enclave.intake import OpenModel
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning.gain import compared, in_words, measure_all
from fedark.tuning.personal import Personal
from fedark.tuning.task import Evaluation

__all__ = ["figure_of", "gained"]

_LOSS_STEP = 2.0**-10

Vector = np.ndarray[Any, np.dtype[np.float32]]


def gained(
    contract: Contract,
    model: OpenModel,
    test: list[Record],
    vectors: Mapping[str, Vector],
    made: Personal,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures of a personal adapter, and all that its own customer is told.

    Args:
        test: the customer's held-out records.
        vectors: what it is compared with.
    """
    sets = {"own": test} | {
        f"acceptance/{group}": [record for one, record in model.acceptance if one == group]
        for group in contract.evaluation.groups
    }
    found = measure_all(model.task, sets, {**vectors, "personal": made.vector})
    figures = {
        f"personal/{name}": figure_of(adapters["personal"])
        for name, adapters in found.items()
        if name != "own" or test
    }
    pairs = compared(found["own"]) if test else {}
    for key in gain_keys(model.terms):
        pair = pairs.get(key.removeprefix("gain/"))
        if pair is not None:
            figures[key] = int(pair.verdict == "gained"), 1, float(pair.verdict == "lost")
    return figures, in_words(found, made.chosen)


def figure_of(measured: Evaluation) -> Figure:
    """Counts of right answers, and the sum of losses to `_LOSS_STEP`: a finer one would be a
    precise oracle of the secret base.
    """
    if not math.isfinite(measured.loss_sum):
        raise InputError(
            "A measured loss is not a finite number.",
            safe="Nothing was made of it.",
            fix="Look for weights or records that no training could use.",
        )
    return measured.correct, measured.total, round(measured.loss_sum / _LOSS_STEP) * _LOSS_STEP
