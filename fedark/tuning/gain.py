"""What a customer's personal adapter is worth on records that no adapter was trained on: its own
held-out ones, and the provider's acceptance set. Both sides of each comparison answer the same
records, so the comparisons are paired (`fedark.tuning.paired`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedark.records.reading import Record
from fedark.tuning.layout import Flat
from fedark.tuning.paired import Paired, compare
from fedark.tuning.task import Evaluation, TaskModel

__all__ = ["compared", "in_words", "measure_all"]


def measure_all(
    task: TaskModel, sets: Mapping[str, Sequence[Record]], vectors: Mapping[str, Flat]
) -> dict[str, dict[str, Evaluation]]:
    """Every adapter on every set of records: set -> adapter -> what was measured. The model is left
    with the last one.
    """
    found: dict[str, dict[str, Evaluation]] = {name: {} for name in sets}
    for adapter, vector in vectors.items():
        task.set_flat(vector)
        for name, records in sets.items():
            found[name][adapter] = task.evaluate(records)
    return found


def compared(figures: Mapping[str, Evaluation]) -> dict[str, Paired]:
    """Adapter -> "personal" beside it, on one set of records."""
    mine = figures["personal"].right
    return {name: compare(mine, one.right) for name, one in figures.items() if name != "personal"}


def in_words(sets: Mapping[str, Mapping[str, Evaluation]], chosen: str) -> dict[str, Any]:
    """All of it, for the customer's own people, of types that JSON and canonical CBOR take."""
    return {
        "chosen": chosen,
        "sets": {
            name: {
                "right": {adapter: one.correct for adapter, one in figures.items()},
                "records": figures["personal"].total,
                "personal against": {
                    adapter: _said(pair) for adapter, pair in compared(figures).items()
                },
            }
            | _shared(figures)
            for name, figures in sets.items()
            if figures["personal"].total
        },
    }


def _shared(figures: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The shared adapter beside the local-only one, where there is one."""
    if not figures.keys() >= {"alone", "together"}:
        return {}
    pair = compare(figures["together"].right, figures["alone"].right)
    return {"together against": {"alone": _said(pair)}}


def _said(pair: Paired) -> dict[str, Any]:
    return {**vars(pair), "verdict": pair.verdict}
