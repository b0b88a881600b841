"""One record on which tokenizer or model fail does not end a job: its owner is told where it is,
and has it left out or refuses; the others learn nothing of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedark.contract.job import Job
from fedark.foundation.errors import DataError
from fedark.simulation import simulate

SECRET = "seven"
pytestmark = pytest.mark.usefixtures("measured_once")


def _tokenizer_fails(base: Path) -> None:
    """The tokenizer raises on words that it does not know, "six" and "seven" among them."""
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    words = value["model"]["vocab"]
    words["b"], words["c"] = words.pop("six"), words.pop(SECRET)
    value["model"]["unk_token"] = "none"
    path.write_text(json.dumps(value))
    # As it stands in the file: a class of a model family would make one anew from the vocabulary.
    settings = base / "tokenizer_config.json"
    known = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(known | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _model_fails(base: Path) -> None:
    """The model answers "seven" with no finite number."""
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(base / "model.safetensors")
    table = next(name for name in tensors if "word_embeddings" in name)
    tensors[table][words[SECRET]] = torch.tensor([3e38, -3e38] * 16)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _spoil(job: Path, fails: object, *bad: str) -> None:
    for path in job.parent.glob("*.csv"):
        path.write_text(path.read_text().replace("six", "five").replace(SECRET, "five"))
    for name in bad:
        with (job.parent / name).open("a") as file:
            file.write(f"north,{SECRET} line open,open\n")
    fails(job.parent / "base")  # type: ignore[operator]


@pytest.mark.parametrize("fails", [_tokenizer_fails, _model_fails])
def test_a_failing_record_is_left_out_and_told_to_its_owner_alone(
    fails: object, small_job: Path, tmp_path: Path
) -> None:
    _spoil(small_job, fails, "north.csv")
    said: list[str] = []
    job = Job.load(small_job, ('data.unusable="leave-out"',))
    with simulate(job, tmp_path / "work", say=said.append) as running:
        report = running.run()
    assert not report["passed_over"]
    told = [line for line in said if "fails on 1 records (lines 42)" in line]
    assert len(told) == 1
    assert told[0].startswith("north: warning: ")
    assert "fails on" not in json.dumps(report)
    assert SECRET not in "".join(said)


@pytest.mark.parametrize("fails", [_tokenizer_fails, _model_fails])
def test_a_failing_record_is_refused_with_its_line_and_the_others_learn_no_more(
    fails: object, small_job: Path, tmp_path: Path
) -> None:
    _spoil(small_job, fails, "north.csv")
    said: list[str] = []
    with simulate(Job.load(small_job), tmp_path / "work", say=said.append) as running:
        report = running.run()
    why = report["passed_over"]["north"]
    assert "The records of north do not fit" in why
    assert "42" not in why
    assert all(line.startswith("north: ") for line in said if "lines 42" in line)
    assert any("north.csv, line 42" in line and "leave-out" in line for line in said)
    assert SECRET not in "".join(said) + json.dumps(report)


def test_a_provider_is_told_of_its_own_failing_record_before_anybody_trains(
    small_job: Path, tmp_path: Path
) -> None:
    _spoil(small_job, _model_fails, "acceptance.csv")
    with (
        pytest.raises(DataError, match=r"acceptance.csv, line 14: the model tiny"),
        simulate(Job.load(small_job), tmp_path / "work"),
    ):
        pass
