"""`fedark bench dp-step` compares three ways to the same step."""

from __future__ import annotations

import numpy as np
import pytest

from fedark.bench import dp_step
from fedark.cli import bench as command


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["BERT", "GPT-2", "Llama"])
def test_ours_and_opacus_take_the_same_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_step, "_SIGMA", 0.0)
    case = dp_step._case(family, 4, 6)
    start = case.task.get_flat()
    assert np.array_equal(start, case.watched.get_flat())
    records = dp_step._records(case.task, 4, 6)
    assert {len(example.ids) for example in case.task._examples(records)} == {6}
    assert (
        max(case.task.gradient_sum(records, clip_norm=1.0)[1]) > 1.0
    )  # so that clipping is part of the step
    case.ours()
    case.opacus()
    moved = np.abs(case.task.get_flat() - start)
    # Adam divides by the gradient's size: where that is rounding alone, so is the step's direction.
    assert (
        np.mean(np.abs(case.task.get_flat() - case.watched.get_flat()) > 1e-3 * moved.max()) < 0.01
    )
    assert moved.max() > 0


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_time_and_memory_of_every_case_are_compared_with_the_plain_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (
        ("_TURNS", 1),
        ("_BATCHES", ((2, 4),)),
        ("_FAMILIES", {"BERT": dp_step._FAMILIES["BERT"]}),
    ):
        monkeypatch.setattr(dp_step, name, value)
    rows = list(dp_step.rows())
    assert [row.unit for row in rows] == ["s", "s", "MiB", "MiB"]
    assert all(
        row.ours > 0 and row.peer and row.ratio == pytest.approx(row.ours / row.peer)
        for row in rows
    )
    assert [row.ok is None for row in rows] == [False, True, False, True]


def test_its_name_on_the_command_line_has_a_hyphen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dp_step, "rows", lambda: iter(()))
    command.bench("dp-step", as_json=True)
    assert '"bench": "dp-step"' in capsys.readouterr().out
