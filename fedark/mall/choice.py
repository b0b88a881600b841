"""Candidates with what was measured of them, in order.

The figure that candidates are ordered by is the share of right answers on the records that the
customers held out, where these are summed, and else on the acceptance set: `Candidate.judged`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.table import Table

from fedark.foundation.errors import printable
from fedark.report.page import interval

__all__ = ["Candidate", "Stage", "candidates_of", "failures", "ranked", "reason", "table"]

Stage = Literal["tasted", "tuned", "failed"]
"""What was done with a candidate."""
_OWN, _ACCEPTANCE = "own", "acceptance"


@dataclass(frozen=True)
class Candidate:
    """A model that was tasted or tuned.

    Attributes:
        name: of the model.
        stage: what was done with it.
        before, after: set of records -> right answers and records.
        why: why it failed; "" where it did not.
        seconds: that it took on this machine, by the clock.
        run_id: of its run; its adapter lies in that run's folder.
    """

    name: str
    stage: Stage
    before: Mapping[str, tuple[int, int]]
    after: Mapping[str, tuple[int, int]]
    why: str = ""
    seconds: float = 0.0
    run_id: str = ""

    def timed(self, seconds: float) -> Candidate:
        """The same, which took so long."""
        return replace(self, seconds=seconds)

    @property
    def judged(self) -> str:
        """The set of records that counts: "own" or "acceptance"; "" where there is none."""
        return next((place for place in (_OWN, _ACCEPTANCE) if place in self.after), "")

    @property
    def percent(self) -> float:
        """Right answers on the judged set, 0 to 100; -1 where nothing was measured."""
        if not self.judged:
            return -1.0
        right, total = self.after[self.judged]
        return 100 * right / total

    @property
    def bounds(self) -> tuple[float, float]:
        """95 % interval of `percent`."""
        return interval(*self.after[self.judged]) if self.judged else (0.0, 100.0)


def candidates_of(report: Mapping[str, Any], stage: Stage) -> list[Candidate]:
    """The candidates of a run's report."""
    return [
        Candidate(
            name,
            stage,
            _sets(model["metrics"], "before"),
            _sets(model["metrics"], "federated"),
            seconds=report["seconds"],
            run_id=report["run_id"],
        )
        for name, model in report["models"].items()
    ]


def _sets(metrics: Mapping[str, Mapping[str, Any]], when: str) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for key, entry in metrics.items():
        stage, _, place = key.partition("/")
        place = place.partition("/")[0]
        if stage == when and entry["total"]:
            right, total = found.get(place, (0, 0))
            found[place] = right + int(entry["correct"]), total + int(entry["total"])
    return found


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The tuned ones before those that were only tasted, and those that failed last; among each,
    the best first, and by name where two are alike.
    """
    order = {"tuned": 0, "tasted": 1, "failed": 2}
    return sorted(candidates, key=lambda one: (order[one.stage], -one.percent, one.name))


def reason(candidates: Sequence[Candidate]) -> str:
    """Which candidate is the best, and which others are within noise of it."""
    best = next((one for one in candidates if one.stage != "failed" and one.judged), None)
    if best is None:
        return "No candidate could be judged."
    where = "the customers' held-out records" if best.judged == _OWN else "the acceptance set"
    said = (
        f"{best.name} answers {best.percent:.1f} % of {where} right"
        f" (95 %: {best.bounds[0]:.1f} to {best.bounds[1]:.1f}), the most of those {best.stage}"
    )
    near = [
        one.name
        for one in candidates
        if one is not best and one.stage == best.stage and one.percent >= best.bounds[0]
    ]
    if near:
        return f"{said}; within noise of it: {', '.join(near)}."
    return f"{said}; no other comes within its interval."


def table(candidates: Sequence[Candidate]) -> Table:
    """The candidates for a terminal, in their order."""
    shown = Table(title="candidates, % right", title_justify="left")
    shown.add_column("model")
    shown.add_column("")
    for column in ("records", "before", "after", "95 %", "acceptance set", "s"):
        shown.add_column(column, justify="right")
    for one in candidates:
        if not one.judged:
            shown.add_row(one.name, one.stage)
            continue
        low, high = one.bounds
        shown.add_row(
            one.name,
            one.stage,
            f"{one.after[one.judged][1]:,}",
            _percent(one.before.get(one.judged)),
            f"{one.percent:.1f}",
            f"{low:.1f} to {high:.1f}",
            _percent(one.after.get(_ACCEPTANCE)),
            f"{one.seconds:.0f}",
        )
    return shown


def failures(candidates: Iterable[Candidate]) -> list[str]:
    """A line for each candidate that failed."""
    return [f"{one.name} failed: {printable(one.why, 1000)}" for one in candidates if one.why]


def _percent(found: tuple[int, int] | None) -> str:
    return f"{100 * found[0] / found[1]:.1f}" if found else ""
