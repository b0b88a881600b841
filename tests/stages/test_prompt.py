"""The prompt template stands in the contract: no customer trains by another."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import tomli_w
from small import write_job

from fedark.contract.job import Job
from fedark.foundation.errors import ContractError
from fedark.operate.party import CONFIG, load_node, reference_values
from fedark.simulation.local import Federation, prepare

pytestmark = pytest.mark.usefixtures("measured_once")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("prompt")
    return prepare(Job.load(write_job(folder / "job")), folder / "work", sandbox="none")


def agreed(federation: Federation, said: list[str], **data: Any) -> None:
    """Have the node of north look at the contract, with this in its party.toml."""
    folder = federation.folder("north")
    path = folder / CONFIG
    before = path.read_text()
    value = tomllib.loads(before)
    spec = value["data"]["spec"] | {"prompt": data.pop("prompt")}
    path.write_text(tomli_w.dumps(value | {"data": value["data"] | {"spec": spec} | data}))
    node: Any = load_node(folder, None, said.append, reference=reference_values())
    try:
        node._agree(federation.contract.encode())
    finally:
        node.close()
        path.write_text(before)


@pytest.mark.parametrize("same", ["{desk}: {message}", '{"desk"}: {message}'])
def test_the_same_template_is_agreed_to_however_it_is_written(
    federation: Federation, same: str
) -> None:
    agreed(federation, [], prompt=same)


@pytest.mark.parametrize(
    "other",
    ["{message} {desk}", "{desk}:  {message}", "{desk}: {message} ", "Q: {message}", "{message}"],
)
def test_a_node_of_another_template_refuses_and_says_both_to_its_own_people_alone(
    federation: Federation, other: str
) -> None:
    said: list[str] = []
    with pytest.raises(ContractError) as refused:
        agreed(federation, said, prompt=other)
    (problem,) = refused.value.problems
    assert "its prompts are made by '{desk}: {message}', and north makes them by another" in problem
    assert repr(other) not in str(refused.value)
    assert any(repr(other) in line for line in said)


def test_finished_prompts_are_held_against_the_template_that_they_were_made_by(
    federation: Federation,
) -> None:
    agreed(federation, [], prompt="{prompt}", template="{desk}: {message}")
    with pytest.raises(ContractError, match="another template"):
        agreed(federation, [], prompt="{desk}: {message}", template="{message}")


def test_other_weights_than_the_contract_says_are_found_by_both_who_have_the_bundle(
    federation: Federation,
) -> None:
    models = [
        terms.model_copy(update={"weights": "9" * 96}) for terms in federation.contract.models
    ]
    contract = federation.contract.model_copy(update={"models": tuple(models)})
    for name in ("north", "maker"):
        node: Any = load_node(federation.folder(name), None, reference=reference_values())
        assert node._own_problems(contract) == ["the bundle of model tiny holds other weights"]
        assert node._own_problems(federation.contract) == []
        node.close()
