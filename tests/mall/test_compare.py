"""A comparison of candidates: the best is found and tuned, who fails is named, a killed one goes
on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import _WORDS, SECRET_WORDS, write_job

from fedark.bench._small import make_base
from fedark.contract.job import Job
from fedark.foundation.errors import ContractError, InputError
from fedark.mall import compare as module
from fedark.mall.choice import Candidate, failures, ranked, reason, table
from fedark.mall.compare import compare

pytestmark = pytest.mark.usefixtures("measured_once")

MODEL = """
[[models]]
name = "{name}"
source = "dir:{name}"
task = "{task}"
[models.adapter]
rank = 2
targets = ["query", "value"]
[models.training]
max_length = 16
[models.personal]
epochs = 0
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Four candidates: two that can be tasted, one that is no model, one that writes."""
    others = [("other", "classification"), ("broken", "classification"), ("writer", "instruction")]
    extra = "".join(MODEL.format(name=name, task=task) for name, task in others)
    path = write_job(tmp_path / "job", rounds=1, records=24, extra=extra)
    torch.manual_seed(5)
    make_base(tmp_path / "job" / "other", [*_WORDS, *SECRET_WORDS, ":"], layers=1)
    (tmp_path / "job" / "broken").mkdir()
    quick = ("models.0.personal.epochs=0", "models.0.training.baseline_epochs=0")
    return Job.load(path, quick)


@pytest.mark.slow
def test_the_best_by_taste_is_tuned_and_who_fails_is_named_and_stops_nobody(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compare(job, tmp_path / "work")
    stages = {one.name: one.stage for one in found.candidates}
    assert stages["broken"] == stages["writer"] == "failed"
    assert sorted(stages[name] for name in ("tiny", "other")) == ["tasted", "tuned"]
    assert [one.stage for one in found.candidates] == ["tuned", "tasted", "failed", "failed"]
    best = found.candidates[0]
    assert found.reason.startswith(f"{best.name} answers {best.percent:.1f} %")
    told = failures(found.candidates)
    assert any("broken failed" in line and "usable base model" in line for line in told)
    assert any("writer failed" in line and "needs a classifier" in line for line in told)
    adapters = list((tmp_path / "work").glob(f"parties/maker/runs/{best.run_id}/adapter-*"))
    assert [path.name for path in adapters] == [f"adapter-{best.name}"]
    assert table(found.candidates).row_count == 4

    def never(*args: Any, **named: Any) -> Any:
        raise AssertionError("nothing is run twice")

    monkeypatch.setattr(module, "simulate", never)
    again = compare(job, tmp_path / "work")
    assert [one for one in again.candidates if one.stage != "failed"] == [
        one for one in found.candidates if one.stage != "failed"
    ]


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_runs_nothing_again_that_is_unchanged(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    whole = module.simulate

    def counted(asked: Job, *args: Any, **named: Any) -> Any:
        begun.append(asked.models[0].name + (" tasted" if asked.taste.first else " tuned"))
        if begun == ["tiny tasted", "other tasted"]:
            raise KeyboardInterrupt
        return whole(asked, *args, **named)

    monkeypatch.setattr(module, "simulate", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(job, tmp_path / "work", models=["tiny", "other"], finalists=2)
    compare(job, tmp_path / "work", models=["tiny", "other"])
    assert begun[2:3] == ["other tasted"]
    assert len(begun) == 4
    assert begun[3].endswith(" tuned")
    # Records that have changed are other records: nothing that was kept is of them.
    acceptance = job.acceptance
    assert acceptance is not None
    acceptance.write_text(acceptance.read_text() + "north,shed now,shed\n")
    compare(job, tmp_path / "work", models=["tiny"])
    assert begun[4] == "tiny tasted"


@pytest.mark.parametrize(
    ("change", "models", "error", "why"),
    [
        (None, ["tiny", "nobody"], InputError, "no model of these names: nobody"),
        ("private", ["tiny"], ContractError, "under a privacy mechanism"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_started(
    job: Job, tmp_path: Path, change: str | None, models: list[str], error: Any, why: str
) -> None:
    if change:
        job.privacy = job.privacy.model_copy(update={"mechanism": "customer-level"})
    with pytest.raises(error, match=why):
        compare(job, tmp_path / "work", models=models)
    assert not (tmp_path / "work").exists()


def tasted(name: str, right: int, **named: Any) -> Candidate:
    sets = {"own": (right, 1000), "acceptance": (900, 1000)}
    return Candidate(name, named.pop("stage", "tasted"), {}, named.pop("after", sets), **named)


def test_candidates_are_ordered_by_held_out_records_and_the_reason_names_who_is_within_noise() -> (
    None
):
    far, near, best = tasted("far", 700), tasted("near", 895), tasted("best", 900)
    failed = Candidate("gone", "failed", {}, {}, "no memory")
    order = ranked([far, failed, near, best])
    assert [one.name for one in order] == ["best", "near", "far", "gone"]
    assert "within noise of it: near." in reason(order)
    assert "no other" in reason(ranked([far, best]))
    assert reason([failed]) == "No candidate could be judged."
    assert failures(order) == ["gone failed: no memory"]


def test_without_held_out_records_the_acceptance_set_counts() -> None:
    one = tasted("one", 0, after={"acceptance": (5, 10)})
    assert (one.judged, one.percent) == ("acceptance", 50.0)
    assert "the acceptance set" in reason([one])


def test_a_tuned_candidate_stands_before_those_that_were_only_tasted() -> None:
    made: Callable[..., Candidate] = tasted
    order = ranked([made("a", 950), made("b", 910, stage="tuned")])
    assert [one.name for one in order] == ["b", "a"]
