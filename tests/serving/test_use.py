"""`fedark predict`, `eval` and `merge` give what the job's own evaluation gives, from the folder
that a run leaves.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fedark.cli import _register, app
from fedark.cli.show import how_to_use
from fedark.foundation.errors import DataError, InputError, ModelError
from fedark.records.reading import Record
from fedark.tuning.judged import details

ANSWERS = ("open line", "close the breaker", "shed load now", "hold")
if not app.registered_commands:
    _register()


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exception is None, (result.output, result.exception)
    return result.stdout


def failure(kind: type[Exception], *arguments: Any) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, kind), (result.output, result.exception)
    return str(result.exception)


def write(path: Path, records: list[Record]) -> Path:
    rows = [{"text": record.prompt, "label": record.answer} for record in records]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "labels", "method"),
    [
        ("minilm", None, "ffa-lora"),
        ("bert", None, "lora"),
        ("minilm", None, "head"),
        ("llama", ANSWERS, "ffa-lora"),
        ("gpt2", (), "ffa-lora"),
    ],
)
def test_eval_gives_the_figures_of_the_jobs_own_evaluation_and_predict_the_same_answers(
    finish: Callable[..., Any],
    records: Callable[..., list[Record]],
    tmp_path: Path,
    name: str,
    labels: tuple[str, ...] | None,
    method: str,
) -> None:
    done = finish(name, labels=labels, method=method)
    own = records(done.terms.labels or ANSWERS)
    task = done.tiny.load(done.terms)
    task.set_flat(done.flat)
    job = task.evaluate(own)
    source = write(tmp_path / "in.csv", own)
    found = json.loads(output("eval", done.folder, source, "--base", done.base, "--json"))
    assert (found["records"], found["correct"]) == (job.total, job.correct)
    assert found["loss"] == job.loss_sum / job.total
    out = tmp_path / "out.jsonl"
    output("predict", done.folder, source, out, "--base", done.base)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(2, 2 + len(own)))
    if done.terms.labels:
        given = [row["label"] for row in rows]
        assert sum(a == r.answer for a, r in zip(given, own, strict=True)) == job.correct
        best = task.probabilities([record.prompt for record in own]).argmax(1)
        assert given == [done.terms.labels[index] for index in best]
        assert len(set(given)) > 1 or method == "head"
    else:
        assert [row["answer"] for row in rows] == task.answers([r.prompt for r in own])
        figures = details(task, own, {})
        assert found["rouge_l"] == figures["rouge-l"][2] / figures["rouge-l"][1]


def test_all_gives_every_labels_probability_in_csv_and_json_alike(
    finish: Callable[..., Any], records: Callable[..., list[Record]], tmp_path: Path
) -> None:
    done = finish("minilm")
    source = write(tmp_path / "in.jsonl", records(done.terms.labels))
    for kind in ("csv", "jsonl"):
        output("predict", done.folder, source, tmp_path / f"o.{kind}", "--base", done.base, "--all")
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    others = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for row, other in zip(rows, others, strict=True):
        likely = {n: float(row[f"probability: {n}"]) for n in done.terms.labels}
        assert likely == other["probabilities"]
        assert sum(likely.values()) == pytest.approx(1, abs=1e-5)
        assert max(likely, key=likely.__getitem__) == row["label"] == other["label"]
        assert float(row["probability"]) == max(likely.values())


def test_an_answer_ends_at_a_stop_text_and_at_the_most_tokens(
    finish: Callable[..., Any], texts: list[str], tmp_path: Path
) -> None:
    done = finish("gpt2", labels=())
    source = write(tmp_path / "in.csv", [Record(text, "x") for text in texts])
    asked = ("predict", done.folder, source, tmp_path / "o.jsonl", "--base", done.base)

    def answers(*options: str) -> list[str]:
        output(*asked, *options)
        lines = (tmp_path / "o.jsonl").read_text().splitlines()
        return [json.loads(line)["answer"] for line in lines]

    whole = answers("--max-tokens", "10")
    assert max(len(text.split()) for text in whole) == 10
    word = next(words[1] for text in whole if len(words := text.split()) > 2)
    stopped = answers("--max-tokens", "10", "--stop", word)
    assert stopped == [text.split(word)[0].strip() for text in whole]
    assert any(a != b for a, b in zip(whole, stopped, strict=True))
    assert "1 to 23 tokens" in failure(InputError, *asked, "--max-tokens", "24")


def test_bad_input_is_told_by_file_and_line_and_leaves_the_old_output(
    finish: Callable[..., Any], tmp_path: Path
) -> None:
    done = finish("minilm")
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text,label\nopen line,open_line\n,shed_load\nhold,nonsense\n")
    out.write_text("as it was")
    told = failure(DataError, "predict", done.folder, source, out, "--base", done.base)
    assert f"{source}, line 3: column 'text' is empty" in told
    assert "--leave-out" in told
    assert out.read_text() == "as it was"
    told = failure(DataError, "eval", done.folder, source, "--base", done.base)
    assert f"{source}, line 3" in told
    result = run("predict", done.folder, source, out, "--base", done.base, "--leave-out")
    assert "1 records were left out, the first in line 3" in result.stderr
    assert [row["line"] for row in csv.DictReader(out.open())] == ["2", "4"]
    told = failure(InputError, "predict", done.folder, source, tmp_path / "o", "--base", done.base)
    assert "neither in .csv nor in .jsonl" in told
    told = failure(
        InputError, "predict", done.folder, source, out, "--base", done.base, "--stop", "x"
    )
    assert "no text whose length or end" in told


def test_an_adapter_of_another_base_is_refused(finish: Callable[..., Any], tmp_path: Path) -> None:
    """Though it would fit: same architecture, same shapes, other weights."""
    from safetensors.torch import load_file, save_file

    done = finish("minilm")
    other = Path(shutil.copytree(done.base, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["embeddings.word_embeddings.weight"] += 1e-3
    save_file(state, other / "model.safetensors", {"format": "pt"})
    source = write(tmp_path / "in.csv", [Record("hold", "open_line")])
    for command in (
        ("predict", done.folder, source, tmp_path / "o.csv"),
        ("eval", done.folder, source),
        ("merge", done.folder, tmp_path / "m"),
    ):
        told = failure(ModelError, *command, "--base", other)
        assert "holds other weights than the base that this adapter was trained on" in told
    assert not (tmp_path / "o.csv").exists()
    assert not (tmp_path / "m").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [("minilm", "ffa-lora"), ("bert", "lora"), ("bert", "head"), ("gpt2", "ffa-lora")],
)
def test_a_merged_folder_answers_by_its_readmes_lines_as_base_and_adapter_do(
    finish: Callable[..., Any], texts: list[str], tmp_path: Path, name: str, method: str
) -> None:
    done = finish(name, method=method)
    out = tmp_path / "merged"
    assert ".from_pretrained loads" in output("merge", done.folder, out, "--base", done.base)
    code = re.search(r"```python\n(.*)```", (out / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {"folder": str(out), "texts": texts}
    exec(code[1], scope)
    task = done.tiny.load(done.terms)
    task.set_flat(done.flat)
    with torch.no_grad():
        if done.terms.task == "classification":
            likely = scope["logits"].softmax(1).numpy()
            np.testing.assert_allclose(likely, task.probabilities(texts), atol=1e-5)
            assert set(scope["answers"]) <= set(done.terms.labels)
        else:
            ids = torch.tensor(task._encoder.prompts(texts[:1], [4]))
            ours = task.scorer(ids, torch.ones_like(ids))
            torch.testing.assert_close(scope["model"](ids).logits, ours, atol=1e-4, rtol=1e-4)
    assert "exists already" in failure(InputError, "merge", done.folder, out, "--base", done.base)


def test_the_commands_of_the_page_do_what_it_says(
    finish: Callable[..., Any],
    records: Callable[..., list[Record]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = finish("minilm")
    shutil.copytree(done.folder, tmp_path / "adapter-base")
    shutil.copytree(done.base, tmp_path / "base-model")
    monkeypatch.chdir(tmp_path)
    own = records(done.terms.labels)
    write(tmp_path / "incidents.csv", own)
    write(tmp_path / "labelled.csv", own)
    page = (Path(__file__).parents[2] / "docs" / "use.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", page, re.MULTILINE)]
    assert [command[1] for command in commands] == ["predict", "predict", "eval", "merge"]
    for command in commands:
        output(*command[1:])
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(own)
    assert (tmp_path / "merged" / "head.safetensors").exists()


def test_the_command_that_a_run_prints_names_the_folder_and_a_public_base(
    finish: Callable[..., Any],
) -> None:
    done = finish("minilm")
    assert how_to_use(done.folder).split()[1:5] == [
        "predict", str(done.folder), "--base", "FOLDER_OF_THE_BASE",
    ]  # fmt: skip
    path = done.folder / "fedark.json"
    value = json.loads(path.read_text())
    value["terms"]["base"] = "org/name@abc"
    path.write_text(json.dumps(value))
    assert " --base hub:org/name@abc " in how_to_use(done.folder)
