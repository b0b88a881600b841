"""A whole job over the in-process link, with an honest relay: what comes out, and what must never
cross.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from small import CUSTOMERS, SECRET_WORDS, HostileRelay, write_job
from transformers import AutoModelForSequenceClassification

from fedark.contract.job import Job
from fedark.foundation.errors import (
    ContractError,
    FedarkError,
    FederationError,
    Refused,
    StorageError,
)
from fedark.links.link import Passed
from fedark.simulation import Simulation, simulate
from fedark.stages.coordinator import coordinate
from fedark.v1 import stage_pb2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_everyone_named_gets_the_same_standard_adapter_and_the_report(
    small_job: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with simulate(Job.load(small_job), work) as running:
        report = running.run()
        run = Path("runs") / running.run_id
    adapters = [
        load_file(work / "parties" / name / run / "adapter-tiny" / "adapter_model.safetensors")
        for name in ("maker", *CUSTOMERS)
    ]
    for other in adapters[1:]:
        assert all(np.array_equal(value, other[name]) for name, value in adapters[0].items())
    assert any(
        np.abs(value).max() > 0 for name, value in adapters[0].items() if "lora_B" in name
    ), "B was trained"
    assert not (work / "parties" / "pool" / run / "adapter-tiny").exists(), (
        "the aggregator's host gets no adapter"
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        small_job.parent / "base", num_labels=3
    )
    PeftModel.from_pretrained(base, str(work / "parties" / "north" / run / "adapter-tiny"))
    stored = json.loads((work / "parties" / "pool" / run / "report.json").read_text())
    assert stored["customers"] == list(CUSTOMERS)
    assert report["models"]["tiny"]["metrics"]["federated/acceptance/north"]["total"] == 12, (
        "each record counted once"
    )
    local = json.loads((work / "parties" / "north" / run / "local.json").read_text())
    assert {"before/own", "local/own", "federated/own"} <= set(local["tiny"])
    assert local["tiny"]["local/acceptance/north"][1] == 12, (
        "alone is measured on the whole acceptance set"
    )


def test_the_same_job_gives_the_same_adapter_twice(small_job: Path, tmp_path: Path) -> None:
    vectors = []
    for name in ("one", "two"):
        with simulate(Job.load(small_job), tmp_path / name) as running:
            running.run()
            folder = (
                tmp_path / name / "parties" / "maker" / "runs" / running.run_id / "adapter-tiny"
            )
        vectors.append(load_file(folder / "adapter_model.safetensors"))
    assert all(np.array_equal(value, vectors[1][name]) for name, value in vectors[0].items())


def test_no_run_of_weights_and_no_record_crosses_the_link(small_job: Path, tmp_path: Path) -> None:
    passed: list[Passed] = []
    with simulate(Job.load(small_job), tmp_path / "work", tap=passed.append) as running:
        running.run()
    crossed = b"".join(message.data for message in passed)
    assert {message.stage for message in passed} == {
        "enrol",
        "attest",
        "release",
        "load",
        "round",
        "evaluate",
        "deliver",
    }
    for name, tensor in load_file(small_job.parent / "base" / "model.safetensors").items():
        raw = tensor.tobytes()
        for start in range(0, len(raw) - 63, 64):
            run = raw[start : start + 64]
            if len(set(run)) >= 24:  # zeros and ones are in every file of the world
                assert run not in crossed, name
    for customer in CUSTOMERS:
        for row in csv.DictReader((small_job.parent / f"{customer}.csv").open()):
            assert row["message"].encode() not in crossed
    for word in SECRET_WORDS:
        assert word.encode() not in crossed


def test_the_search_finds_what_is_planted(small_job: Path) -> None:
    """The control of the test above: a tensor's bytes would be found."""
    tensors = load_file(small_job.parent / "base" / "model.safetensors")
    raw = tensors["embeddings.word_embeddings.weight"].tobytes()
    assert raw[128:192] in b"x" * 100 + raw


def test_the_aggregators_report_holds_no_customers_own_figures(
    small_job: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        report = running.run()
    own = report["models"]["tiny"]["metrics"]["federated/own"]
    singles = [
        json.loads(
            (
                tmp_path / "work" / "parties" / name / "runs" / report["run_id"] / "local.json"
            ).read_text()
        )["tiny"]["federated/own"]
        for name in CUSTOMERS
    ]
    assert own["total"] == sum(single[1] for single in singles)
    assert own["correct"] == sum(single[0] for single in singles)


def test_a_node_that_asks_for_a_sandbox_refuses_a_simulation(
    small_job: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        running.nodes["north"].settings.__dict__["sandbox"] = "landlock"
        with pytest.raises(
            FederationError, match="admits sandbox mode 'none'; north asks for 'landlock' or better"
        ):
            running.run()


def test_bad_data_is_found_before_anything_is_made_and_all_of_it_at_once(
    small_job: Path, tmp_path: Path
) -> None:
    (small_job.parent / "north.csv").write_text(
        "desk,message,action\nnorth,a secret message,explode\n"
    )
    (small_job.parent / "east.csv").write_bytes(b"desk,message,action\nnorth,\xff\xfe,open\n")
    (small_job.parent / "south.csv").write_text("")
    with pytest.raises(ContractError) as caught, simulate(Job.load(small_job), tmp_path / "work"):
        pass
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "north.csv, line 2" in text
    assert "east.csv, line 2: it is not UTF-8" in text
    assert "south.csv: it is empty" in text
    assert "secret" not in text
    assert not (tmp_path / "work").exists()


def test_data_that_went_bad_after_the_start_stops_the_job_before_it_is_signed(
    small_job: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    with simulate(Job.load(small_job), tmp_path / "work", say=said.append) as running:
        (small_job.parent / "east.csv").write_text(
            "desk,message,action\neast,hidden words,explode\n"
        )
        with pytest.raises(FederationError, match="not every party signed") as caught:
            running.run()
    assert "The records of east do not fit this contract; its own log says where" in str(
        caught.value
    )
    assert "east.csv" not in str(caught.value), "where and how many is for its own people"
    assert any("east.csv, line 2" in line for line in said)
    assert not any("hidden" in line for line in said)


@pytest.mark.parametrize("kind", [StorageError, Refused])
def test_where_things_lie_on_a_nodes_disk_is_told_to_its_own_people_alone(
    small_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[FedarkError]
) -> None:
    said: list[str] = []
    with simulate(Job.load(small_job), tmp_path / "work", say=said.append) as running:
        node = running.nodes["east"]
        place = node.settings.state

        def fail(*args: object, **more: object) -> None:
            raise kind(
                f"{place}/privacy was altered.", safe=f"{place} stands.", fix=f"Look at {place}."
            )

        monkeypatch.setattr(node._memory, "keep", fail)
        with pytest.raises(FederationError, match="not every party signed") as caught:
            running.run()
    assert "/privacy was altered." in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert any(line.startswith(f"east: {place}/privacy was altered.") for line in said)


@pytest.mark.parametrize("stage", ["load", "round"])
def test_data_that_went_bad_after_it_was_signed_is_told_to_its_own_people_alone(
    small_job: Path, tmp_path: Path, stage: str
) -> None:
    said: list[str] = []
    with simulate(Job.load(small_job), tmp_path / "work", say=said.append) as running:

        def spoil(party: str, data: bytes, is_reply: bool) -> bytes:
            if (
                party == "east"
                and not is_reply
                and stage_pb2.StageRequest.FromString(data).WhichOneof("body") == stage
            ):
                (small_job.parent / "east.csv").write_text(
                    "desk,message,action\neast,hidden words,explode\n"
                )
                running.nodes["east"].close()  # its enclave needs the records once more
            return data

        report = coordinate(HostileRelay(running, spoil), running.host.handle)
    told = "The records of east do not fit this contract; its own log says where."
    assert report["passed_over"] == {"east": f"{stage}: {told}"}
    assert any(line.startswith("east: ") and "east.csv, line 2" in line for line in said)
    assert not any("hidden" in line for line in said)


def test_a_contract_that_no_person_approved_is_not_signed(small_job: Path, tmp_path: Path) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        contract = running.federation.contract
        running.host.contract = contract.model_copy(update={"deliver_to": ("pool",)})
        with pytest.raises(FederationError, match="the operator of north has not approved it"):
            running.run()


def test_a_contract_is_good_for_one_run(small_job: Path, tmp_path: Path) -> None:
    """Two runs with different survivors would differ by one customer's contribution."""
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        running.run()
        finished = Simulation(running.federation)
        assert finished.run() == {}, "the host knows that this run is over"
        finished.close()
        (running.federation.folder("pool") / "run").unlink()
        again = Simulation(running.federation)
        with pytest.raises(FederationError, match="north has taken part in a run of it"):
            again.run()
        again.close()


def test_a_base_model_of_pickles_is_refused(small_job: Path, tmp_path: Path) -> None:
    base = small_job.parent / "base"
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with (
        pytest.raises(ContractError, match="safetensors"),
        simulate(Job.load(small_job), tmp_path / "work"),
    ):
        pass


def test_an_optional_model_that_is_not_here_is_left_out_and_said(tmp_path: Path) -> None:
    extra = (
        '[[models]]\nname = "absent"\nsource = "package:no_such_package"\ntask ='
        ' "classification"\noptional = true\n'
    )
    job = Job.load(write_job(tmp_path / "job", extra=extra))
    with simulate(job, tmp_path / "work") as running:
        assert [terms.name for terms in running.federation.contract.models] == ["tiny"]
        assert "no_such_package" in running.federation.left_out["absent"]


def test_a_customer_that_fails_is_passed_over_while_the_cohort_is_large_enough(
    small_job: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        node = running.nodes["east"]
        whole = node.handle

        calls = {"count": 0}

        def dies_later(request: bytes) -> bytes:
            calls["count"] += 1
            if calls["count"] > 3:
                raise RuntimeError("secret detail")
            return whole(request)

        running._link._handlers["east"] = dies_later
        report = running.run()
    assert report["customers"] == ["north", "south"]
    assert report["passed_over"]["east"].startswith("round")
    assert "secret" not in json.dumps(report)


def test_the_job_is_aborted_everywhere_when_too_few_are_left(tmp_path: Path) -> None:
    job = Job.load(write_job(tmp_path / "job", minimum=3))
    with simulate(job, tmp_path / "work") as running:
        whole = running.nodes["east"].handle
        calls = {"count": 0}

        def dies_later(request: bytes) -> bytes:
            calls["count"] += 1
            if calls["count"] > 3:
                raise RuntimeError
            return whole(request)

        running._link._handlers["east"] = dies_later
        with pytest.raises(FederationError, match="2 customers are left, the contract asks for 3"):
            running.run()
        assert running.host.failed is not None
        assert not running.nodes["north"]._runs, "the trainer enclave was ended"
    assert not list((tmp_path / "work").glob("parties/*/runs/*/adapter-*"))
