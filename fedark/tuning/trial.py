"""Which records a model fails on, found out before anything is trained.

A tokenizer or a model may raise on a text: one with a special token inside, or one for which its
tables are too short; or give a loss that is no finite number. In training that would end the job
for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedark.records.reading import Record
from fedark.tuning.task import TaskModel

__all__ = ["unusable"]

_BATCH = 64


def unusable(
    task: TaskModel,
    records: Sequence[Record],
    progress: Callable[[int, int, float], None] = lambda done, total, value: None,
) -> list[int]:
    """The indices of the records on which tokenizer or model fail, ascending.

    Every record is tried beside a text that works, because some models fail only where texts of a
    batch differ: BART wants the same number of end tokens in each.
    """
    answer = task.terms.labels[0] if task.terms.labels else "a"
    beside = Record("a", answer)
    order = sorted(range(len(records)), key=lambda index: len(records[index].prompt))
    found: list[int] = []
    done = 0
    waiting = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)][::-1]
    while waiting:
        part = waiting.pop()
        try:
            with torch.no_grad():
                losses = task.losses([*(records[index] for index in part), beside])
        except Exception:  # whatever the libraries raise; its text may hold the record's
            if len(part) > 1:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
                continue
            found += part
        else:
            finite = losses.isfinite().tolist()
            found += [index for index, good in zip(part, finite, strict=False) if not good]
        done += len(part)
        progress(done, len(records), 0.0)
    return sorted(found)
