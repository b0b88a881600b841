"""The learning curve's rule: when rounds end, and which one is the best."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedark.enclave.curve import Curve, CurveState
from fedark.foundation import canonical

sys.path.append(str(Path(__file__).parents[1] / "stages"))
import parties

NAMES = ("north", "east", "south")


def contract(rounds: int = 6, **curve: Any) -> Any:
    return parties.contract(
        rounds=rounds, evaluation={"acceptance": "acceptance", "groups": ("all",)}, curve=curve
    )


def shown(*right: int, loss: float = 1.0, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    return {name: {"tiny": (count, 10, loss)} for name, count in zip(names, right, strict=True)}


def vector(number: int) -> dict[str, Any]:
    return {"tiny": np.full(4, number, np.float32)}


def run(curve: Curve, *each: dict[str, Any]) -> list[str]:
    """What is said after each round's measurement."""
    said = []
    for number, figures in enumerate(each, 1):
        if curve.summed(number):
            curve.add(figures, vector(number))
        said.append(curve.ended)
    return said


def test_without_a_rule_all_rounds_are_run() -> None:
    said = run(Curve(contract(rounds=3)), shown(5, 5, 5), shown(1, 1, 1), shown(0, 0, 0))
    assert said == ["", "", "rounds"]


def test_patience_counts_measurements_without_a_better_one() -> None:
    curve = Curve(contract(patience=2))
    assert run(curve, shown(3, 3, 3), shown(4, 4, 4), shown(4, 4, 3), shown(4, 3, 4)) == [
        "",
        "",
        "",
        "patience",
    ]


def test_a_target_counts_on_the_whole_acceptance_set_alone() -> None:
    part = shown(10, 10, names=("north", "east"))
    assert run(Curve(contract(target=0.9)), part, shown(9, 9, 8), shown(9, 9, 9)) == [
        "",
        "",
        "target",
    ]


def test_equally_many_right_goes_by_the_loss() -> None:
    curve = Curve(contract(deliver="best"))
    run(curve, shown(4, 4, 4, loss=2), shown(4, 4, 4, loss=1), shown(4, 4, 4, loss=3))
    assert curve.chosen(vector(3))["tiny"].tolist() == [2.0] * 4


def test_rounds_are_compared_on_what_both_were_measured_on() -> None:
    """Else a host that keeps back whose part of the set is hard would choose the round."""
    curve = Curve(contract(deliver="best"))
    run(curve, shown(9, 9, 1), shown(8, 8, names=("north", "east")))
    assert curve.chosen(vector(2))["tiny"].tolist() == [1.0] * 4
    other = Curve(contract(deliver="best"))
    run(other, shown(9, 9, 1), shown(1, 9, names=("south", "east")), shown(1, 1, 9))
    assert other.chosen(vector(3))["tiny"].tolist() == [1.0] * 4


def test_the_best_round_is_chosen_for_each_model_and_the_last_one_may_be_it() -> None:
    two = parties.contract(
        rounds=2,
        models=[parties.model(), parties.model("other")],
        evaluation={"acceptance": "acceptance", "groups": ("all",)},
        curve={"deliver": "best"},
    )
    curve = Curve(two)
    for number, (one, other) in enumerate(((5, 6), (6, 5)), 1):
        assert curve.summed(number), "the last round may be the best: it is measured too"
        figures = {name: {"tiny": (one, 10, 1.0), "other": (other, 10, 1.0)} for name in NAMES}
        curve.add(figures, {**vector(number), "other": vector(number)["tiny"]})
    assert canonical.decode(curve.encode(), max_bytes=9999)["delivered"] == {"tiny": 2, "other": 1}
    chosen = curve.chosen({**vector(2), "other": vector(2)["tiny"]})
    assert (chosen["tiny"][0], chosen["other"][0]) == (2, 1)


def test_it_goes_on_from_its_checkpoint_as_if_nothing_had_been() -> None:
    each = [shown(5, 5, 5), shown(6, 6, 6), shown(5, 5, 5), shown(4, 4, 4)]
    whole, first = (Curve(contract(patience=2, deliver="best")) for _ in range(2))
    run(whole, *each)
    run(first, *each[:3])
    again = Curve(contract(patience=2, deliver="best"))
    again.restore(CurveState.decode(first.state().encode()))
    assert again.summed(4)
    again.add(each[3], vector(4))
    assert (again.encode(), again.ended) == (whole.encode(), "patience")
    assert again.chosen(vector(4))["tiny"].tolist() == [2.0] * 4


@pytest.mark.parametrize("term", [{"patience": 1}, {"target": 0.5}, {"deliver": "best"}])
@pytest.mark.parametrize("without", ["acceptance", "every"])
def test_a_rule_without_figures_is_refused(term: dict[str, Any], without: str) -> None:
    groups = () if without == "acceptance" else ("all",)
    every = 0 if without == "every" else 1
    with pytest.raises(Exception, match="need an acceptance set"):
        parties.contract(evaluation={"groups": groups}, curve={**term, "every": every})
