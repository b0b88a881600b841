"""The audit itself: flip the coins, train once, guess, and compare the refuted epsilon with the
claimed one.

The guesser sees what the strongest adversary of the claim sees: the noisy sum of every round, and
every adapter. A Dirac canary is scored by the sum of what was released along its coordinate, a
flipped record by how far its loss fell. The highest scores are guessed to be in, as many lowest
ones to be out, and the rest is not guessed about. Four numbers of guesses, fixed beforehand, are
tried on both kinds; the confidence is divided among them, so the best one may be reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedark.auditing.bound import epsilon_lower_bound
from fedark.auditing.canaries import AuditedTask, dirac, flipped, losses, quiet_coordinates
from fedark.auditing.rounds import Release
from fedark.contract.contract import ServerTerms
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning.server_optimizer import server_optimizer
from fedark.tuning.task import TaskModel

__all__ = ["AuditReport", "Guesses", "audit"]

CONFIDENCE = 0.95
_SHARES = (0.05, 0.125, 0.4, 1.0)  # of the canaries that are guessed about
_LOUDNESS = 100.0


@dataclass(frozen=True)
class Guesses:
    """What one kind of canaries showed, at the number of guesses that showed most.

    Attributes:
        canaries: "dirac" or "flipped".
        total: how many, each included by a fair coin.
        guesses, right: the attacker's.
        epsilon: refuted, at a confidence that holds for all kinds and numbers of guesses together.
    """

    canaries: str
    total: int
    guesses: int
    right: int
    epsilon: float


@dataclass(frozen=True)
class AuditReport:
    """A lower bound beside the claim.

    Attributes:
        claimed: epsilon of the claim; infinite for none.
        delta: of both.
        measured: epsilon that the run refutes at `confidence`.
        reach: the most that it could have refuted, with every guess right: a larger claim was not
            put to the test.
        by: what each kind of canaries showed.
        records, rounds: the customer's own records, and rounds trained.
    """

    claimed: float
    delta: float
    measured: float
    reach: float
    confidence: float
    by: tuple[Guesses, ...]
    records: int
    rounds: int

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong."""
        return self.measured > self.claimed

    def lines(self) -> list[str]:
        """For a reader, one line each."""
        claim = (
            f"epsilon {self.claimed:g} at delta {self.delta:g}"
            if math.isfinite(self.claimed)
            else "no privacy"
        )
        shown = [
            (
                f"One run: {self.rounds} rounds on {self.records} records and canaries, each of"
                " them included by a fair coin."
            ),
            *(
                f"  {one.canaries:8} {one.total:5} canaries, {one.guesses:4} guessed about,"
                f" {one.right:4} right: epsilon >= {one.epsilon:.2f}"
                for one in self.by
            ),
            (
                f"Claimed: {claim}. Measured: epsilon >= {self.measured:.2f} at"
                f" {self.confidence:.0%} confidence."
            ),
        ]
        if self.refuted:
            return [
                *shown,
                "REFUTED: what was released tells more than the claim allows. Do not release it.",
            ]
        if math.isfinite(self.claimed):
            shown.append(
                "Not refuted. An audit misses noise that is a little short and batches that are no"
                " Poisson samples."
            )
            if self.claimed > self.reach:
                shown.append(
                    f"A claim above {self.reach:.2f} is beyond this number of canaries: take more."
                )
        return shown

    def to_dict(self) -> dict[str, Any]:
        """JSON types; a claim of infinity is None."""
        claimed = self.claimed if math.isfinite(self.claimed) else None
        return {
            **asdict(self),
            "claimed": claimed,
            "by": [asdict(one) for one in self.by],
            "refuted": self.refuted,
        }


def audit(
    task: TaskModel,
    records: Sequence[Record],
    spare: Sequence[Record],
    release: Release,
    *,
    claimed: float,
    delta: float,
    rounds: int,
    expected: float,
    clip_norm: float,
    diracs: int,
    server: ServerTerms,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> AuditReport:
    """Train once from the initial adapter, with canaries, and guess which of them were in.

    Args:
        task: a classifier; its adapter is the trained one afterwards.
        records: the customer's own.
        spare: further records of the same kind: each becomes a flipped canary.
        release: one round of the path that is audited.
        claimed, delta: of the claim; an infinite epsilon claims nothing.
        rounds: trained.
        expected: public expected size of a batch, which every sum is divided by.
        clip_norm: that the claim is about.
        diracs: Dirac canaries, at most half as many as the vector has values.
        server: optimiser of the steps.
        seed: of the coins and the canaries. Known to nobody else in an audit that counts.
        progress: called after every round with rounds done and in all.

    Raises:
        InputError: nothing to guess about, or a model without labels.
    """
    if not task.terms.labels or not records or not (diracs or spare):
        raise InputError(
            "An audit needs a classifier, records and canaries.", safe="Nothing was trained."
        )
    generator = np.random.default_rng(seed)
    task.set_flat(task.initial())
    wrong = flipped(spare, task.terms.labels, generator)
    coordinates = quiet_coordinates(task, records, diracs, clip_norm, generator)
    before = losses(task, wrong)
    coins = {
        "dirac": generator.integers(0, 2, diracs) == 1,
        "flipped": generator.integers(0, 2, len(wrong)) == 1,
    }
    inside = [record for record, coin in zip(wrong, coins["flipped"], strict=True) if coin]
    members = [*records, *inside, *map(dirac, coordinates[coins["dirac"]].tolist())]
    audited = AuditedTask(task, _LOUDNESS * clip_norm)
    optimizer = server_optimizer(server, task.terms.travelling)
    vector, released = task.initial(), np.zeros(task.terms.travelling)
    for number in range(rounds):
        task.set_flat(vector)
        update = release(audited, members)
        released += update
        vector = optimizer.step(vector, (vector + update / expected).astype(np.float32))
        if progress is not None:
            progress(number + 1, rounds)
    task.set_flat(vector)
    scores = {"dirac": -released[coordinates], "flipped": before - losses(task, wrong)}
    by = tuple(_best(kind, scores[kind], coins[kind], delta) for kind in scores if coins[kind].size)
    measured = max(one.epsilon for one in by)
    reach = max(
        _bound(one.total, guesses, guesses, delta) for one in by for guesses in _guesses(one.total)
    )
    return AuditReport(claimed, delta, measured, reach, CONFIDENCE, by, len(records), rounds)


def _best(
    kind: str, scores: npt.NDArray[np.float64], coins: npt.NDArray[np.bool_], delta: float
) -> Guesses:
    order = np.argsort(-scores, kind="stable")
    found = []
    for guesses in _guesses(coins.size):
        half = guesses // 2
        right = int(coins[order[:half]].sum() + (~coins[order[coins.size - half :]]).sum())
        found.append((_bound(coins.size, guesses, right, delta), guesses, right))
    epsilon, guesses, right = max(found)
    return Guesses(kind, coins.size, guesses, right, epsilon)


def _guesses(canaries: int) -> list[int]:
    return [2 * (int(share * canaries) // 2) for share in _SHARES]


def _bound(canaries: int, guesses: int, right: int, delta: float) -> float:
    """At a confidence that leaves room for every kind of canary and number of guesses."""
    return epsilon_lower_bound(
        canaries, guesses, right, delta, 1 - (1 - CONFIDENCE) / (2 * len(_SHARES))
    )
