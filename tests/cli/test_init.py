"""`fedark init` and `fedark check` on files as people have them."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.job import Job
from fedark.foundation.errors import ContractError, DataError, FedarkError, InputError, ModelError
from fedark.simulation.check import check
from fedark.simulation.propose import propose

LABELS = ("open", "close", "shed")


def table(path: Path, columns: dict[str, list[str]], **options: str) -> Path:
    encoding = options.pop("encoding", "utf-8")
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=options.get("delimiter", ","))
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def records(count: int, word: str = "line") -> dict[str, list[str]]:
    rows = range(count)
    return {
        "id": [str(row) for row in rows],
        "Load [kW]": [f"{word} {LABELS[row % 3]} now bus {row}" for row in rows],
        "Kind": [LABELS[row % 3] + " " * (row % 2) for row in rows],
    }


@pytest.fixture
def base(small_job: Path) -> Path:
    return small_job.parent / "base"


def files(folder: Path) -> list[Path]:
    return [
        table(folder / "north.csv", records(30)),
        table(
            folder / "S\u00fcd 2.csv", records(24, "St\u00f6rung"), delimiter=";", encoding="cp1252"
        ),
        table(folder / "provider.tsv", records(27), delimiter="\t"),
    ]


def test_a_job_is_proposed_that_loads_and_says_what_was_guessed(tmp_path: Path, base: Path) -> None:
    made = propose(files(tmp_path), tmp_path, label="Kind", model=f"dir:{base}")
    path = tmp_path / "job.toml"
    path.write_text(made.text)
    job = Job.load(path)
    assert job.customer_names == ("north", "sud-2", "customer-3")
    assert (job.data.prompt, job.data.answer) == ("{Load [kW]}", "Kind")
    assert job.labels == ("close", "open", "shed")
    assert job.data.encoding == "cp1252"
    assert job.models[0].adapter.targets == ("query", "value")
    assert any("S\u00fcd 2.csv: not UTF-8" in guess for guess in made.guesses)
    found = check(job)
    assert any("24 records" in line or "sud-2" in line for line in found.lines)
    assert found.seconds > 0
    assert found.traffic > 0
    assert found.mebibytes > 0


@pytest.mark.parametrize(
    ("columns", "text", "label", "expected"),
    [
        (
            {"instruction": ["a"] * 9, "input": [""] * 9, "output": ["x", "y", "z"] * 3},
            "",
            "",
            ("{instruction}\n{input}", "output"),
        ),
        ({"a": ["x", "y"] * 4, "b": ["long text here"] * 8}, "", "", ("{b}", "a")),
        ({"a": ["x", "y"] * 4, "{b": ["long text"] * 8}, "", "a", ('{"{b"}', "a")),
        ({"text": ["x"] * 6, "label": ["p", "q"] * 3}, "{text}!", "", ("{text}!", "label")),
    ],
)
def test_text_and_answer_are_found(
    columns: dict[str, list[str]],
    text: str,
    label: str,
    expected: tuple[str, str],
    tmp_path: Path,
    base: Path,
) -> None:
    path = table(tmp_path / "a.csv", columns)
    made = propose([path], tmp_path, text=text, label=label, model=f"dir:{base}")
    data = tomllib.loads(made.text)["data"]
    assert (data["prompt"], data["answer"]) == expected
    assert tomllib.loads(made.text)["split"]["customers"] == 3


def test_what_cannot_be_guessed_is_said_with_what_to_do(tmp_path: Path, base: Path) -> None:
    texts = {"u": [f"a text {row}" for row in range(9)], "v": [f"more {row}" for row in range(9)]}
    path = table(tmp_path / "a.csv", texts)
    with pytest.raises(InputError, match="--label"):
        propose([path], tmp_path, model=f"dir:{base}")
    other = table(tmp_path / "b.csv", {"w": ["a"], "v": ["b"]})
    with pytest.raises(InputError, match="1 columns in common"):
        propose([path, other], tmp_path)
    with pytest.raises(InputError, match="--model"):
        propose([path], tmp_path, label="v")
    with pytest.raises(ModelError):
        propose(files(tmp_path), tmp_path, label="Kind", model="dir:nowhere")
    (tmp_path / "c.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="CSV UTF-8"):
        propose([tmp_path / "c.xlsx"], tmp_path)


def test_the_command_writes_once_and_takes_files_as_people_type_them(
    tmp_path: Path, base: Path
) -> None:
    names = [str(path) for path in files(tmp_path)]
    out = tmp_path / "job.toml"
    command = ["init", "--data", *names, "--out", str(out), "--label", "Kind"]
    command += ["--model", f"dir:{base}"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "What was guessed" in done.output
    before = out.read_bytes()
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, InputError)
    assert out.read_bytes() == before
    assert isinstance(CliRunner().invoke(app, ["init"]).exception, InputError)


def test_many_labels_go_to_a_file_of_their_own(tmp_path: Path, base: Path) -> None:
    rows = [f"label {row % 250}" for row in range(1000)]
    path = table(tmp_path / "a.csv", {"text": ["now"] * 1000, "label": rows})
    out = tmp_path / "job.toml"
    command = ["init", "--data", str(path), "--out", str(out), "--model", f"dir:{base}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(json.loads((tmp_path / "labels.json").read_text())) == 250
    assert len(Job.load(out).labels) == 250


def test_a_check_names_every_problem_at_once_with_what_to_do(small_job: Path) -> None:
    folder = small_job.parent
    (folder / "north.csv").write_text("desk,message,action\nnorth,line,explode\n")
    (folder / "south.csv").write_text("desk,message,action\nsouth,,open\n,,open\n")
    (folder / "base" / "config.json").unlink()
    with pytest.raises(ContractError) as caught:
        check(Job.load(small_job))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "north.csv, line 2" in text
    assert "south.csv, line 3" in text
    assert "config.json" in text
    assert text.count("data.unusable") == 2


def test_a_check_says_that_no_noise_gives_an_epsilon(small_job: Path) -> None:
    sets = ('privacy={mechanism="example-distributed", epsilon=1e-9, records=90}',)
    sets += ("models.0.training.replay=0", "protection.minimum_cohort=3")
    with pytest.raises(FedarkError, match=r"privacy: no noise reaches epsilon .*larger epsilon"):
        check(Job.load(small_job, sets))
