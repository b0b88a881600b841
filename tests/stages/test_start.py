"""A job that goes on from an earlier result: the same head and adapter, other customers, one
ledger; and what is refused to start from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import write_job
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.contract import Contract, ModelTerms
from fedark.contract.job import Job
from fedark.foundation.errors import ContractError, FedarkError, ModelError
from fedark.operate import offer
from fedark.privacy.ledger import LEDGER, Ledger
from fedark.simulation import simulate
from fedark.tuning.adapter import read_adapter
from fedark.tuning.start import Start, open_start, read_start, start_digest

FIRST, LATER = ("north", "east", "south"), ("north", "south", "west", "far")
MASKED = ('protection.mode="masked"', "protection.minimum_cohort=3")
PRIVATE = (
    *MASKED,
    'privacy.mechanism="customer-level"',
    "privacy.epsilon=8.0",
    "privacy.accept_noise=true",
)


class Ran:
    """A job that was run in `work`, and its provider's folder of the run."""

    def __init__(
        self, folder: Path, work: Path, *terms: str, customers: tuple[str, ...] = FIRST
    ) -> None:
        path = write_job(folder, rounds=1, records=24, customers=customers)
        shutil.copy(path.with_name("north.csv"), path.with_name("acceptance.csv"))
        with simulate(Job.load(path, terms), work) as running:
            self.report = running.run()
            self.result = work / "parties" / "maker" / "runs" / running.run_id
            self.contract = running.federation.contract
        (work / "contract.cbor").write_bytes(self.contract.encode())

    @property
    def tiny(self) -> ModelTerms:
        return self.contract.models[0]

    def acceptance(self, when: str) -> dict[str, Any]:
        metrics = self.report["models"]["tiny"]["metrics"]
        return {
            key: found for key, found in metrics.items() if key.startswith(f"{when}/acceptance")
        }


def start(folder: Path) -> str:
    return f"models.0.start={json.dumps(str(folder))}"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("first")
    return Ran(folder / "job", folder / "work")


@pytest.fixture
def adapter(first: Ran, tmp_path: Path) -> Path:
    """A copy of the first job's adapter."""
    return Path(shutil.copytree(first.result / "adapter-tiny", tmp_path / "adapter"))


@pytest.mark.parametrize("mode", [(), MASKED], ids=["sealed", "masked"])
def test_a_job_begins_with_the_head_and_adapter_of_a_finished_run_and_other_customers(
    first: Ran, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    later = Ran(tmp_path / "job", tmp_path / "work", *mode, start(first.result), customers=LATER)
    assert [party.name for party in later.contract.customers] == list(LATER)
    before, together = later.acceptance("before"), first.acceptance("federated")
    assert before.keys() == {key.replace("federated", "before") for key in together}
    for key, found in together.items():
        now = before[key.replace("federated", "before")]
        assert (now["correct"], now["total"]) == (found["correct"], found["total"])
        assert now["loss"] == pytest.approx(found["loss"], abs=0.01)
    assert later.tiny.start == read_start(first.result / "adapter-tiny", later.tiny).digest


@pytest.mark.slow
def test_two_jobs_in_a_row_of_gradient_descent_are_one_of_as_many_rounds(tmp_path: Path) -> None:
    plain = (
        'models.0.training.optimizer="sgd"',
        "models.0.training.batch_size=4096",
        "models.0.training.replay=0",
        "models.0.training.head_learning_rate=0.5",
        "models.0.training.baseline_epochs=0",
        "models.0.personal.epochs=0",
    )
    one = Ran(tmp_path / "a", tmp_path / "one", *plain)
    two = Ran(tmp_path / "a", tmp_path / "two", *plain, start(one.result))
    whole = Ran(tmp_path / "a", tmp_path / "whole", *plain, "job.rounds=2")
    vectors = [read_adapter(ran.result / "adapter-tiny").flat for ran in (one, two, whole)]
    assert not np.allclose(vectors[0], vectors[1], atol=1e-4)
    assert np.allclose(vectors[1], vectors[2], atol=1e-5)


@pytest.mark.slow
def test_the_ledger_of_a_customer_goes_on_and_composes_both_jobs(tmp_path: Path) -> None:
    one = Ran(tmp_path / "a", tmp_path / "work", *PRIVATE)
    two = Ran(tmp_path / "b", tmp_path / "work", *PRIVATE, start(one.result), customers=LATER)
    charged = {}
    for name in ("north", "west"):
        with Ledger.open(tmp_path / "work" / "parties" / name / LEDGER) as ledger:
            charged[name] = [e for e in ledger.entries() if e["kind"] == "charge"]
    assert (len(charged["north"]), len(charged["west"])) == (2, 1)
    assert two.tiny.start


def test_any_party_compares_what_a_contract_starts_from_with_what_it_holds(
    first: Ran, adapter: Path, tmp_path: Path
) -> None:
    later = Ran(tmp_path / "job", tmp_path / "work", start(adapter))
    contract = str(tmp_path / "work" / "contract.cbor")
    held = first.result.parents[2] / "north" / "runs" / first.result.name
    alike = CliRunner().invoke(app, ["contract", "start", contract, str(held)])
    assert alike.exit_code == 0, alike.output
    shown = CliRunner().invoke(app, ["contract", "show", contract])
    assert f"starts from the adapter {later.tiny.start}" in shown.output
    change(adapter, "head.safetensors", lambda v: np.add(v, 1))
    other = CliRunner().invoke(app, ["contract", "start", contract, str(adapter)])
    assert other.exit_code != 0
    from_base = first.result.parents[3] / "contract.cbor"
    none = CliRunner().invoke(app, ["contract", "start", str(from_base), str(held)])
    assert none.exit_code != 0


def change(folder: Path, file: str, alter: Callable[[Any], Any]) -> None:
    named = load_file(folder / file)
    key = next(name for name in named if "lora_A" not in name)
    named[key] = named[key].copy()
    found = alter(named[key])
    if found is not None:
        named[key] = found
    save_file(named, folder / file)


def put(value: float) -> Callable[[Path], None]:
    return lambda folder: change(folder, "head.safetensors", lambda v: v.put(0, value))


def terms(**new: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        path = folder / "fedark.json"
        value = json.loads(path.read_text())
        value["terms"] |= new
        path.write_text(json.dumps(value))

    return alter


def linked(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.rename(folder / "elsewhere")
    os.symlink("elsewhere", path)


def pickled(folder: Path) -> None:
    (folder / "head.safetensors").rename(folder / "pytorch_model.bin")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a value that is no number": (put(np.nan), "not finite"),
    "an endless value": (put(np.inf), "not finite"),
    "a huge value": (put(1e30), "larger than 10000"),
    "another shape": (
        lambda f: change(f, "head.safetensors", lambda v: np.append(v, v)),
        "and not F32",
    ),
    "another base": (terms(weights="ab" * 48), "it is of another base"),
    "a link": (linked, "is a link"),
    "a pickle": (pickled, "there is no head.safetensors"),
}


@pytest.mark.attack(
    {
        "a value that is no number": "a start of numbers that harm",
        "an endless value": "a start of numbers that harm",
        "a huge value": "a start of numbers that harm",
        "another shape": "a start of another shape or base",
        "another base": "a start of another shape or base",
        "a link": "a start with links or pickles",
        "a pickle": "a start with links or pickles",
    },
    param="name",
)
@pytest.mark.parametrize("name", BAD)
def test_attack_a_start_that_harms_is_refused_before_anything_is_sealed(
    first: Ran, adapter: Path, tmp_path: Path, name: str
) -> None:
    alter, words = BAD[name]
    alter(adapter)
    path = write_job(tmp_path / "job", rounds=1, records=24)
    with (
        pytest.raises(ModelError) as error,
        simulate(Job.load(path, (start(adapter),)), tmp_path / "work"),
    ):
        pass
    assert words in error.value.what
    assert not list((tmp_path / "work" / "catalogue").glob("*.fedark"))


def test_a_start_of_another_method_rank_or_other_labels_is_refused_with_every_reason(
    adapter: Path, tmp_path: Path
) -> None:
    path = write_job(tmp_path / "job", rounds=1, records=24)
    changed = ("models.0.adapter.rank=3", 'data.labels=["close", "open", "shed"]')
    with (
        pytest.raises(ModelError) as error,
        simulate(Job.load(path, (start(adapter), *changed)), tmp_path / "work"),
    ):
        pass
    for words in ("its labels", "its layout", "adapter.rank is 2, the job's 3"):
        assert words in error.value.what
    with pytest.raises(ContractError, match="there is no folder"):
        Job.load(path, (start(tmp_path / "nowhere"),))


@pytest.mark.attack("another start in the bundle than in the contract")
def test_attack_a_provider_that_seals_another_start_than_it_offers_trains_nobody(
    first: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[str], None]
) -> None:
    def forged(folder: Path, terms: ModelTerms) -> Start:
        found = read_start(folder, terms)
        values = np.frombuffer(found.values, "<f4") + np.float32(1)
        return Start(values.tobytes(), found.digest)

    monkeypatch.setattr(offer, "read_start", forged)
    path = write_job(tmp_path / "job", rounds=1, records=24)
    with (
        pytest.raises(FedarkError) as error,
        simulate(Job.load(path, (start(first.result),)), tmp_path / "work") as running,
    ):
        running.run()
    assert "is not the one in the contract" in error.value.what
    refusal("ModelError: The adapter that model tiny starts from is not the one in the contract.")


def test_attack_a_start_under_its_own_digest_must_still_be_usable(first: Ran) -> None:
    def opened(values: Any) -> Any:
        data = np.asarray(values, "<f4").tobytes()
        digest = start_digest(first.tiny, hashlib.sha384(data).digest())
        return open_start(data, first.tiny.model_copy(update={"start": digest}))

    size = first.tiny.travelling
    assert opened(np.ones(size)).tolist() == [1.0] * size
    for bad in (np.full(size, 1e30), np.full(size, np.nan), np.ones(size + 1), []):
        with pytest.raises(ModelError, match="another length"):
            opened(bad)
    for data, digest in ((None, "ab" * 48), (b"", ""), (b"abc", "ab" * 48)):
        with pytest.raises(ModelError, match="is not the one in the contract"):
            open_start(data, first.tiny.model_copy(update={"start": digest}))


def test_a_job_without_a_start_keeps_the_term_empty(first: Ran) -> None:
    assert Contract.decode(first.contract.encode()).models[0].start == ""
    assert open_start(None, first.tiny) is None
