"""What one update tells about the records that it was made from, with and without protection.

    python examples/leak/leak.py --out leak.svg             the grid example's messages: seconds
    python examples/leak/leak.py JOB.toml --out leak.svg    a job's own records and model

The update is the clipped gradient sum of a classification head, `TaskModel.gradient_sum`, as a
customer computes it in a round. The attacker knows the model and a pool of sentences that contains
the right ones among thousands, and wants to know which sentences the batch held, and their labels.
It knows what each sentence with each label would add, and picks greedily what explains most of the
update that is left (orthogonal matching pursuit; Tropp and Gilbert, 2007). Four updates are
attacked:

plain      as it would leave without protection
sum of 8   what a masked sum of eight customers shows; the attacker still has to say whose a
           sentence was
epsilon    the same sum with the noise of `example-distributed` for that epsilon (delta 1e-5, 60
           rounds, rate 0.1): each customer rounds its own sum to the grid and adds its share, by
           the functions of the trainer enclave
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedark.auditing.embedded import small_task
from fedark.auditing.jobs import job_records, job_task
from fedark.auditing.rounds import audited_contract
from fedark.contract.contract import Contract, PrivacyTerms
from fedark.contract.job import Job
from fedark.enclave.private import noised_updates
from fedark.records.reading import Record
from fedark.tuning.layout import Flat
from fedark.tuning.task import TaskModel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "grid")]

from picture import draw  # noqa: E402

BATCHES = (1, 8, 32)
CUSTOMERS = 8
EPSILONS = (8.0, 3.0, 1.0)
CLIP_NORM, ROUNDS = 1.0, 60
PRIVACY = PrivacyTerms(
    mechanism="example-distributed", delta=1e-5, clip_norm=CLIP_NORM, sampling_rate=0.1
)
SHOWN = 4
_MOST = 2**14  # sentences of the pool
_RECORDS = 1250  # of every customer
_SILENT = 1e-3


@dataclass(frozen=True)
class Found:
    """What an attack on one update came to.

    Attributes:
        protection: "plain", "sum of 8" or "epsilon 3".
        batch: records of the customer.
        recovered: share of its sentences that the attacker named.
        named: share of the attacker's named sentences that were really there, in anybody's batch.
        chance: what `recovered` is for one who names as many sentences of the pool blindly.
    """

    protection: str
    batch: int
    recovered: float
    named: float
    chance: float


class Attacker:
    """Knows the model at the adapter of the round, and a pool of sentences."""

    def __init__(self, task: TaskModel, pool: Sequence[Record]) -> None:
        self._rows = task.features(pool)
        self._labels = len(task.terms.labels)
        self._chances = torch.softmax(
            self._rows @ torch.from_numpy(task.get_flat()).view(self._labels, -1).T, dim=1
        )
        residual = self._chances.square().sum(1, keepdim=True) + 1 - 2 * self._chances
        self._norms = residual.clamp(min=0).sqrt() * self._rows.norm(dim=1, keepdim=True)

    def read(self, update: Flat, count: int) -> list[int]:
        """The `count` sentences of the pool that explain the update best, the best first."""
        target = torch.from_numpy(update).view(self._labels, -1)
        left, chosen = target, []
        atoms = torch.empty(count, target.numel())
        products, aims = torch.empty(count, count), torch.empty(count)
        for place in range(count):
            along = self._rows @ left.T
            scores = ((self._chances * along).sum(1, keepdim=True) - along) / self._norms
            scores[self._norms < _SILENT] = -torch.inf  # what the model is sure of leaves no trace
            scores[chosen] = -torch.inf
            index, label = divmod(int(scores.argmax()), self._labels)
            chosen.append(index)
            atoms[place] = self._atom(index, label).flatten()
            known = place + 1
            products[place, :known] = products[:known, place] = atoms[:known] @ atoms[place]
            aims[place] = atoms[place] @ target.flatten()
            parts = torch.linalg.solve(
                products[:known, :known] + 1e-6 * torch.eye(known), aims[:known]
            )
            left = target - (parts @ atoms[:known]).view_as(target)
        return chosen

    def _atom(self, index: int, label: int) -> torch.Tensor:
        residual = self._chances[index].clone()
        residual[label] -= 1
        atom = torch.outer(residual, self._rows[index])
        return atom * min(1.0, CLIP_NORM / float(atom.norm()))


def protected_sum(contract: Contract, sums: Sequence[Flat]) -> Flat:
    """What is unmasked of one round, given every customer's clipped gradient sum."""
    name = contract.models[0].name
    noised = [noised_updates(contract, {name: summed})[name].astype(np.float64) for summed in sums]
    return np.sum(noised, axis=0).astype(np.float32)


def demonstrate(
    task: TaskModel,
    pool: Sequence[Record],
    *,
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    seed: int = 0,
) -> tuple[list[Found], dict[str, list[str]]]:
    """Attack every kind of update at every size of batch, some times each.

    Returns:
        The attacks, and for the picture: the sentences of one batch of four, and what the attacker
        reads out of each update.
    """
    draws = random.Random(seed)
    attacker = Attacker(task, pool)
    contracts = {
        f"epsilon {epsilon:g}": audited_contract(
            task.terms,
            PRIVACY.model_copy(update={"epsilon": epsilon}),
            rounds=ROUNDS,
            records=_RECORDS,
        )
        for epsilon in EPSILONS
    }
    found: list[Found] = []
    shown: dict[str, list[str]] = {}
    for batch in dict.fromkeys([SHOWN, *batches]):
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(repeats):
            drawn = draws.sample(range(len(pool)), batch * CUSTOMERS)
            mine, everyone = set(drawn[:batch]), set(drawn)
            sums = [
                task.gradient_sum(
                    [pool[index] for index in drawn[at : at + batch]], clip_norm=CLIP_NORM
                )[0]
                for at in range(0, len(drawn), batch)
            ]
            guesses = {"plain": attacker.read(sums[0], batch)}
            guesses[f"sum of {CUSTOMERS}"] = attacker.read(np.sum(sums, axis=0), batch * CUSTOMERS)
            for name, contract in contracts.items():
                guesses[name] = attacker.read(protected_sum(contract, sums), batch * CUSTOMERS)
            for name, guess in guesses.items():
                truth = mine if name == "plain" else everyone
                rates.setdefault(name, []).append(
                    (len(mine & set(guess)) / batch, len(truth & set(guess)) / len(guess))
                )
            if not shown:
                shown = {"in the batch": [pool[index].prompt for index in drawn[:batch]]}
                shown |= {
                    name: [pool[index].prompt for index in guess[:batch]]
                    for name, guess in guesses.items()
                }
        if batch in batches:
            for name, values in rates.items():
                names = batch if name == "plain" else batch * CUSTOMERS
                found.append(
                    Found(name, batch, *np.mean(values, axis=0).tolist(), names / len(pool))
                )
    return found, shown


def grid_messages(count: int) -> tuple[TaskModel, list[Record]]:
    """The small encoder, and messages of all desks of the grid example with their actions."""
    from story import World, messages, split_orders

    world = World.load(HERE.parent / "grid" / "desks.toml")
    orders = sum(split_orders(7), ())
    rows = [
        row
        for desk in world.desks
        for row in messages(
            world, desk, count // len(world.desks), orders, random.Random(7), (0, 1)
        )
    ]
    records = list({row.message: Record(row.message, row.action) for row in rows}.values())
    words = sorted({word for record in records for word in record.prompt.split()})
    return small_task(words=words, labels=world.actions), records


def main() -> None:
    """Run the demonstration, print a table, write the picture."""
    parser = argparse.ArgumentParser(
        description="What an update tells about the records it was made from."
    )
    parser.add_argument(
        "job",
        nargs="?",
        type=Path,
        help="a job file with a classifier; without one, the grid's messages",
    )
    parser.add_argument("--out", type=Path, default=Path("leak.svg"), help="the picture, SVG")
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size")
    given = parser.parse_args()
    if given.job is None:
        task, pool = grid_messages(4000)
    else:
        job = Job.load(given.job, ('models.0.adapter={ method = "head", head_bias = false }',))
        task, pool = job_task(job), job_records(job)[:_MOST]
    found, shown = demonstrate(task, pool, repeats=given.repeats)
    for one in found:
        told = (
            f"{one.recovered:6.1%} of the batch named (blindly {one.chance:.1%}), {one.named:6.1%}"
            " of the names right"
        )
        print(f"{one.protection:12} batch {one.batch:3}: {told}")
    given.out.write_text(draw(found, shown, len(pool)), encoding="utf-8")
    print(f"picture: {given.out}")


if __name__ == "__main__":
    main()
