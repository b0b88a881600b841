"""A job file is checked whole at the start: every problem in one answer, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation.errors import ContractError, InputError

GOOD = """
[job]
name = "demo"
rounds = 2
[provider]
name = "maker"
[aggregator]
name = "pool"
[[customers]]
name = "north"
data = "north.csv"
[[customers]]
name = "south"
data = "south.csv"
[data]
prompt = "{message}"
answer = "action"
labels = ["open", "close"]
[[models]]
name = "tiny"
source = "dir:base"
task = "classification"
[protection]
minimum_cohort = 2
"""


def write(tmp_path: Path, text: str) -> Path:
    for name in ("north.csv", "south.csv"):
        (tmp_path / name).write_text("message,action\nx,open\n")
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ContractError) as caught:
        Job.load(write(tmp_path, text), overrides)
    return str(caught.value)


def test_a_good_one_is_read(tmp_path: Path) -> None:
    job = Job.load(write(tmp_path, GOOD))
    assert job.customer_names == ("north", "south")
    assert job.deliver_to == ("maker", "north", "south")


def test_every_problem_is_in_one_answer_with_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("rounds = 2", "rounds = 0\nzap = 1").replace(
        'name = "south"', 'name = "South Pole"'
    )
    said = problems(tmp_path, text.replace('source = "dir:base"', 'source = "ftp:base"'))
    assert "4 problems" in said
    assert "line 4: job.rounds" in said
    assert "line 5: job.zap: unknown key" in said
    assert "customers.1.name" in said
    assert "models.0.source" in said


def test_what_only_the_whole_shows_is_found_too(tmp_path: Path) -> None:
    text = GOOD.replace('name = "pool"', 'name = "maker"').replace(
        'data = "north.csv"', 'data = "gone.csv"'
    )
    said = problems(tmp_path, text + '[deliver]\nto = ["stranger"]\n')
    for part in ("party 'maker' stands twice", "gone.csv does not exist", "stranger: 'stranger'"):
        assert part in said


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    assert "line 3" in problems(tmp_path, "[job]\nname = 'x'\nrounds = = 2\n")


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"[job]\nname = '\xff'\n")
    with pytest.raises(ContractError, match="line 2: not UTF-8"):
        Job.load(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Job.load(tmp_path / "none.toml")


def test_classification_needs_labels(tmp_path: Path) -> None:
    assert "must name two or more" in problems(
        tmp_path, GOOD.replace('labels = ["open", "close"]', "")
    )


@pytest.mark.parametrize("prompt", ["{", "no column", "{message", "{message!r:>{width}}"])
def test_a_prompt_that_is_no_template_is_refused(tmp_path: Path, prompt: str) -> None:
    problems(tmp_path, GOOD.replace('prompt = "{message}"', f'prompt = "{prompt}"'))


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert (
        Job.load(path, ("job.rounds=7", "models.0.training.epochs=3")).models[0].training.epochs
        == 3
    )
    assert "job.rounds" in problems(tmp_path, GOOD, "job.rounds=0")
    with pytest.raises(InputError, match="not of the form"):
        Job.load(path, ("rounds",))


@pytest.mark.parametrize(
    ("method", "why"),
    [("flora", "2409.05976"), ("fedex-lora", "2410.09432"), ("fed-sb", "2502.15436")],
)
def test_a_method_that_is_not_built_is_refused_with_what_is_known_of_it(
    tmp_path: Path, method: str, why: str
) -> None:
    said = problems(tmp_path, GOOD, f'models.0.adapter.method="{method}"')
    assert f"does not train '{method}', only ffa-lora, lora, head." in said
    assert why in said
    for junk in ('"other"', "[1]", "7"):
        assert "models.0.adapter.method" in problems(
            tmp_path, GOOD, f"models.0.adapter.method={junk}"
        )


def test_a_contract_lists_every_problem_of_its_parts() -> None:
    with pytest.raises(ContractError) as caught:
        Contract.build({"job": "X Y", "rounds": 0, "zap": 1})
    assert len(caught.value.problems) >= 10
    assert "zap: unknown key" in caught.value.problems


@pytest.mark.parametrize(
    "term", ['schedule="cosine"', "warmup=0.1", "weight_decay=0.01", "lora_dropout=0.1"]
)
@pytest.mark.parametrize("mechanism", ["example-distributed", "example-local", "customer-level"])
def test_terms_of_local_training_are_refused_where_single_records_are_private(
    small_job: Path, term: str, mechanism: str
) -> None:
    overrides = (
        f'privacy.mechanism="{mechanism}"',
        "privacy.records=90",
        "models.0.training.replay=0",
        f"models.0.training.{term}",
    )
    name = term.partition("=")[0]
    if mechanism == "customer-level":  # its whole update is clipped, however it was made
        Job.load(small_job, overrides)
        return
    with pytest.raises(ContractError) as refused:
        Job.load(small_job, overrides)
    assert len(refused.value.problems) == 1
    assert f"training.{name} is of local training" in refused.value.problems[0]
