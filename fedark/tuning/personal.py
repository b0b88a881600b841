"""A personal adapter: one for a single customer, made from the shared adapter and its own records.

Local fine-tuning of the shared adapter (FedDPA-F, arXiv:2403.19211), then a choice. The candidates:

    before      the base with its fresh adapter
    alone       the local-only baseline, where the job trains one
    together    the last shared adapter
    personal    the shared adapter after some passes over the customer's own records
    mixtures    (1 - a) of "personal" and a of "alone" or "together"

What travels of FFA-LoRA (one A for everybody) and of a head enters the model linearly, so a mixture
is again one adapter of the same rank. Plain LoRA has an A in each, which cannot be mixed so: there
are no mixtures.

The choice is made on a validation part of the customer's own training records, which neither the
judged form of "personal" nor that of "alone" has seen (the shared adapter has: every customer's
training records are in it). What is delivered has had one more pass, over all of them. The part is
drawn by a hash under the digest of all of the customer's records, which nobody else knows: a base
model cannot be made to behave well on just this part. A candidate that forgets the provider's own
records (its replay set) by more than `_FORGOTTEN` loses as much in the choice.

All candidates are always made and measured, whichever is chosen: how long it takes tells nothing of
the choice. Deterministic: a function of the model, records, salt and seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedark.contract.contract import ModelTerms
from fedark.records.reading import Record
from fedark.records.splits import split_train_test
from fedark.tuning.layout import Flat
from fedark.tuning.task import OnStep, TaskModel

__all__ = ["Personal", "make_personal", "validation_split"]

_MIXED = (1 / 3, 2 / 3)
_FORGOTTEN = 0.02
"""Share of the provider's records that a candidate may get wrong and the base gets right."""
_MOST_REPLAY = 200


@dataclass(frozen=True)
class Personal:
    """The adapter that was chosen.

    Attributes:
        vector: float32 [travelling].
        chosen: which candidate it is, in words.
    """

    vector: Flat
    chosen: str


def validation_split(
    terms: ModelTerms, records: Sequence[Record], salt: bytes
) -> tuple[list[Record], list[Record]]:
    """The customer's training records, as (to train on, to choose by).

    Args:
        salt: what nobody but the customer knows.
    """
    return split_train_test(records, terms.personal.validation, salt="personal/" + salt.hex())


def make_personal(
    task: TaskModel,
    split: tuple[Sequence[Record], Sequence[Record]],
    replay: Sequence[Record],
    others: Mapping[str, Flat],
    judged: Mapping[str, Flat],
    *,
    seed: int,
    progress: OnStep | None = None,
) -> Personal:
    """Train personal adapters and choose; the model is left with any of them.

    Args:
        split: of `validation_split`. Where either part is empty, "together" is chosen.
        replay: the provider's own records, mixed in as the contract says.
        others: "before", "together" and, where there is one, "alone".
        judged: by which of them are judged those that have been trained on the validation part: the
            same without it. "alone" is a candidate where it is in here.
        seed: of the order of records.

    Raises:
        FedarkError: training diverged, or the model fails on a record.
    """
    train, held = split
    together = others["together"]
    if not train or not held:
        return Personal(together, "together")
    judge = _Judge(task, held, replay, others["before"])
    shown, given = {**others, **judged}, dict(others)
    if "alone" not in judged:
        shown.pop("alone", None)
    shown["personal"], given["personal"] = _passes(task, split, replay, together, seed, progress)
    if task.terms.adapter.method != "lora":
        for name in shown.keys() & {"together", "alone"}:
            for part in _MIXED:
                mixed = f"{part:.0%} {name}, {1 - part:.0%} personal"
                for vectors in (shown, given):
                    vectors[mixed] = _mixture(vectors[name], vectors["personal"], part)
    chosen = judge.best(shown)
    return Personal(given[chosen], chosen)


def _passes(
    task: TaskModel,
    split: tuple[Sequence[Record], Sequence[Record]],
    replay: Sequence[Record],
    start: Flat,
    seed: int,
    progress: OnStep | None,
) -> tuple[Flat, Flat]:
    """From `start`: the adapter after all passes over the first part, and after one more over
    both.
    """
    terms, own = task.terms.personal, task.terms.training
    settings = own.model_copy(
        update={
            "optimizer": "adamw",
            "learning_rate": terms.learning_rate,
            "head_learning_rate": terms.head_learning_rate,
            "schedule": "constant",
        }
    )
    task.set_flat(start)
    found = []
    for number, (records, epochs) in enumerate(
        ((split[0], terms.epochs), ([*split[0], *split[1]], 1))
    ):
        task.train(
            records, replay, epochs=epochs, seed=seed + number, progress=progress, settings=settings
        )
        found.append(task.get_flat())
    return found[0], found[1]


class _Judge:
    """Measures candidates on the validation part and on the provider's own records."""

    def __init__(
        self, task: TaskModel, held: Sequence[Record], replay: Sequence[Record], before: Flat
    ) -> None:
        self._task, self._held = task, held
        self._replay = replay[:: max(1, -(-len(replay) // _MOST_REPLAY))]
        self._known = self._share(before, self._replay)[0] if self._replay else 0.0

    def best(self, candidates: Mapping[str, Flat]) -> str:
        """The one with the smallest loss among those whose share of right answers, less what they
        forget, is within one standard error of the largest: a small part says little of small
        differences, and losses say more than counts.
        """
        scores = {name: self._score(vector) for name, vector in candidates.items()}
        top = max(share for share, _ in scores.values())
        noise = math.sqrt(max(0.0, top * (1 - top)) / len(self._held))
        near = [name for name, (share, _) in scores.items() if share >= top - noise]
        return min(near, key=lambda name: scores[name][1])

    def _score(self, vector: Flat) -> tuple[float, float]:
        right, loss = self._share(vector, self._held)
        forgotten = 0.0
        if self._replay:
            forgotten = self._known - self._share(vector, self._replay)[0] - _FORGOTTEN
        return (right - max(0.0, forgotten) if math.isfinite(loss) else -1.0), loss

    def _share(self, vector: Flat, records: Sequence[Record]) -> tuple[float, float]:
        self._task.set_flat(vector)
        measured = self._task.evaluate(records)
        return measured.correct / measured.total, measured.loss_sum / measured.total


def _mixture(one: Flat, other: Flat, part: float) -> Flat:
    return (part * one + (1 - part) * other).astype(np.float32)
