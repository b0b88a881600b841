"""The same job under masks: the same outcome as sealed, with customers that drop, and nothing but
sums for the aggregator.
"""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import parties
import pytest
import torch
from safetensors.numpy import load_file
from small import CUSTOMERS, SECRET_WORDS, write_job

from fedark.attestation.nonces import NonceBook
from fedark.contract.job import Job
from fedark.contract.protection import bytes_per_value, masked_terms
from fedark.enclave import masking
from fedark.enclave.aggregator import AggregatorSession
from fedark.enclave.masking import AggregatorMasks, TrainerMasks
from fedark.enclave.protection import Payload
from fedark.enclave.session import RunConfig
from fedark.enclave.trainer import TrainerSession
from fedark.foundation.errors import ContractError, FedarkError, FederationError
from fedark.foundation.keys import SigningKey
from fedark.links.link import Passed, stage_of
from fedark.records.reading import Record, read_records
from fedark.records.splits import split_train_test
from fedark.simulation import Simulation, simulate
from fedark.v1 import enclave_pb2 as pb
from fedark.v1 import stage_pb2

FOUR = (*CUSTOMERS, "west")
VALUES = 3_000_000
MASKED = ('protection.mode="masked"', "protection.max_records=40")
pytestmark = pytest.mark.usefixtures("measured_once")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    return write_job(tmp_path / "job", rounds=1, minimum=3, customers=FOUR)


def adapter(running: Simulation, party: str = "maker") -> dict[str, np.ndarray[Any, Any]]:
    folder = running.federation.folder(party) / "runs" / running.run_id / "adapter-tiny"
    return load_file(folder / "adapter_model.safetensors")


def silence(running: Simulation, party: str, stage: str) -> None:
    """From `stage` on, the node of `party` answers nothing any more."""
    whole: Callable[[bytes], bytes] = running.nodes[party].handle
    gone = False

    def dies(request: bytes) -> bytes:
        nonlocal gone
        message = stage_pb2.StageRequest()
        message.ParseFromString(request)
        gone = gone or stage_of(message) == stage
        if gone:
            raise RuntimeError
        return whole(request)

    running._link._handlers[party] = dies


def outcomes(
    job_file: Path, tmp_path: Path, before: Callable[[Simulation], None]
) -> Iterator[tuple[Any, Any]]:
    """Report and adapter of the job sealed, then masked."""
    for mode, overrides in (("sealed", ()), ("masked", MASKED)):
        with simulate(Job.load(job_file, overrides), tmp_path / mode) as running:
            before(running)
            report = running.run()
            yield report, adapter(running)


def rounding(records: int, customers: int, value_range: float = 8.0) -> float:
    """How far one round of the masked mean can be from the sealed one: less than a step of the grid
    for each customer.
    """
    return customers * (value_range / (2**15 - 1)) * 40 / records + 1e-6


@pytest.mark.parametrize("lost", [(), ("east",)])
def test_a_masked_job_gives_the_adapter_and_figures_of_the_sealed_one(
    job_file: Path, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    def before(running: Simulation) -> None:
        for party in lost:
            silence(running, party, "round")

    (sealed, plain), (masked, vectors) = outcomes(job_file, tmp_path, before)
    assert (
        list(sealed["customers"])
        == list(masked["customers"])
        == [name for name in FOUR if name not in lost]
    )
    moved = 0.0
    for name, tensor in plain.items():
        assert np.abs(tensor - vectors[name]).max() < rounding(25 * (4 - len(lost)), 4), name
        moved = max(moved, np.abs(tensor).max() if "lora_B" in name else 0.0)
    assert moved > 10 * rounding(100, 4), "what was trained is far more than the rounding"
    assert masked["models"]["tiny"]["train_loss"] == pytest.approx(
        sealed["models"]["tiny"]["train_loss"], abs=1e-3
    )
    # Sealed figures are of those who stayed to the end; under masks each round's are of that
    # round's survivors.
    for key, figure in sealed["models"]["tiny"]["metrics"].items() if not lost else ():
        other = masked["models"]["tiny"]["metrics"][key]
        assert other["total"] == figure["total"]
        assert abs(other["correct"] - figure["correct"]) <= (
            1 if key.startswith("federated") else 0
        )
        assert other["loss"] == pytest.approx(figure["loss"], abs=0.01)
    assert masked["protection"] == {
        "mode": "masked",
        "minimum_cohort": 3,
        "fewest_in_a_sum": 3,
        "bits": 16,
        "bytes_per_value": 2.68,
    }
    assert sealed["protection"] == {"mode": "sealed", "minimum_cohort": 3}


def test_a_member_that_fails_while_unmasking_still_counts_in_that_round(
    job_file: Path, tmp_path: Path
) -> None:
    results = {}
    for stage in ("", "round", "unmask"):
        with simulate(
            Job.load(job_file, (*MASKED, "protection.value_range=1.0")), tmp_path / f"work-{stage}"
        ) as running:
            if stage:
                silence(running, "west", stage)
            report = running.run()
            results[stage] = adapter(running)
        assert list(report["customers"]) == [name for name in FOUR if not stage or name != "west"]
        if stage:
            assert report["passed_over"]["west"].startswith(f"{stage}: west failed")

    def apart(one: str, other: str) -> float:
        return max(
            float(np.abs(tensor - results[other][name]).max())
            for name, tensor in results[one].items()
        )

    assert apart("", "unmask") < 2 * rounding(100, 4, 1.0), "its update is in the sum"
    assert apart("", "round") > 10 * rounding(100, 4, 1.0), (
        "the control: without its update the sum is another"
    )


def test_figures_are_those_of_the_customers_that_stayed(job_file: Path, tmp_path: Path) -> None:
    with simulate(Job.load(job_file, (*MASKED, "job.rounds=2")), tmp_path / "work") as running:
        whole: Callable[[bytes], bytes] = running.nodes["west"].handle

        def dies_in_round_2(request: bytes) -> bytes:
            message = stage_pb2.StageRequest.FromString(request)
            if message.HasField("round") and message.round.round == 2:
                raise RuntimeError
            return whole(request)

        running._link._handlers["west"] = dies_in_round_2
        report = running.run()
        local = {
            name: json.loads(
                (
                    running.federation.folder(name) / "runs" / running.run_id / "local.json"
                ).read_text()
            )["tiny"]
            for name in CUSTOMERS
        }
    tiny = report["models"]["tiny"]
    for key, figure in tiny["metrics"].items():
        assert figure["total"] == sum(counts[key][1] for counts in local.values()), key
        assert figure["correct"] == sum(counts[key][0] for counts in local.values()), key
        assert figure["loss"] == pytest.approx(
            sum(counts[key][2] for counts in local.values()) / figure["total"], abs=1e-3
        )
    assert len(tiny["train_loss"]) == 2


def test_too_few_members_end_the_job_and_are_named(job_file: Path, tmp_path: Path) -> None:
    with simulate(Job.load(job_file, MASKED), tmp_path / "work") as running:
        for party in ("east", "west"):
            silence(running, party, "unmask")
        with pytest.raises(
            FederationError, match=r"takes 3 of 4 committee members; these have not .*: east, west"
        ):
            running.run()
    assert not list((tmp_path / "work").glob("parties/*/runs/*/adapter-*"))


def test_nothing_of_one_customer_crosses_in_clear_and_no_share_can_be_read(
    job_file: Path, tmp_path: Path
) -> None:
    passed: list[Passed] = []
    with simulate(Job.load(job_file, MASKED), tmp_path / "work", tap=passed.append) as running:
        report = running.run()
    assert {"endorse", "unmask"} <= {message.stage for message in passed}
    crossed = b"".join(message.data for message in passed)
    for name in FOUR:
        local = json.loads(
            (
                tmp_path / "work" / "parties" / name / "runs" / report["run_id"] / "local.json"
            ).read_text()
        )
        assert {"before/class/0", "federated/said/0/0", "samples"} <= local["tiny"].keys()
        for key, figure in local["tiny"].items():
            if ("/acceptance/" in key or "/own" in key) and figure[1]:  # others are whole numbers
                loss = figure[2]
                assert struct.pack(">d", loss) not in crossed
                assert struct.pack("<d", loss) not in crossed
    assert not any(word.encode() in crossed for word in SECRET_WORDS)
    answers = [
        m.data for m in passed if m.direction == "reply" and m.stage not in ("attest", "deliver")
    ]
    assert b"FSA1" not in b"".join(answers), (
        "uploads, endorsements and shares are readable by the aggregator enclave alone"
    )
    assert b"FSA1" in b"".join(m.data for m in passed if m.stage == "attest"), (
        "the control: announcements can be read"
    )


@pytest.mark.parametrize("agreement", [False, True, None])
def test_a_masked_round_takes_two_stages_and_one_more_where_survivors_are_agreed(
    job_file: Path, tmp_path: Path, agreement: bool | None
) -> None:
    passed: list[Passed] = []
    terms = (
        *MASKED,
        *([] if agreement is None else [f"protection.agreement={str(agreement).lower()}"]),
        "job.rounds=2",
    )
    with simulate(Job.load(job_file, terms), tmp_path / "work", tap=passed.append) as running:
        assert running.run()["passed_over"] == {}
    for party in FOUR:
        asked = [
            message.stage
            for message in passed
            if message.party == party and message.direction == "request"
        ]
        stages = asked[asked.index("round") :]
        one = ["round", "unmask"] if agreement is False else ["round", "endorse", "unmask"]
        assert stages[: 2 * len(one)] == one * 2, party


def test_the_aggregator_enclave_sees_no_weight_no_figure_and_no_update(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Payload] = []
    words: dict[str, list[np.ndarray[Any, Any]]] = {}
    weights: list[int] = []
    decode, receive, finish = (
        Payload.decode,
        masking.ServerRound.receive,
        masking.ServerRound.finish,
    )

    def decoded(data: bytes) -> Payload:
        opened.append(decode(data))
        return opened[-1]

    def received(self: Any, message: bytes, sender: str) -> None:
        receive(self, message, sender)
        layout = self._layout
        words.setdefault(layout.name, []).append(
            np.frombuffer(message[-8 * layout.words(len(self._cohort)) :], np.uint64)
        )

    def finished(self: Any) -> Any:
        total = finish(self)
        weights.append(total.weight)
        return total

    monkeypatch.setattr(Payload, "decode", staticmethod(decoded))
    monkeypatch.setattr(masking.ServerRound, "receive", received)
    monkeypatch.setattr(masking.ServerRound, "finish", finished)
    with simulate(Job.load(job_file, MASKED), tmp_path / "work") as running:
        running.run()
    assert all(payload.weight == 0 and not payload.metrics for payload in opened)
    initial = [payload.vectors["tiny"] for payload in opened if payload.vectors]
    assert len(initial) == len(FOUR)
    assert all(bool(payload.masked) != bool(payload.vectors) for payload in opened)
    assert all(np.array_equal(vector, initial[0]) for vector in initial), (
        "the seeded initial adapter, the same from everybody"
    )
    assert set(words) == {"update", "evaluated"}
    for uploads in words.values():
        assert len(uploads) == len(FOUR)
        lanes = np.concatenate(uploads)
        assert (lanes > 1 << 40).mean() > 0.99, "counts and weights would be small numbers"
        bits = np.unpackbits(lanes.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 6 * 0.5 / np.sqrt(lanes.size * 64), "masked words are uniform"
    trained = sum(len(part) for part in _trained(job_file))
    assert weights == [trained, 4], "the sum of the weights is there, and only the sum"


def _trained(job_file: Path, customers: tuple[str, ...] = FOUR) -> list[list[Record]]:
    """Every customer's training records."""
    spec = Job.load(job_file).data
    files = [job_file.parent / f"{name}.csv" for name in customers]
    return [
        split_train_test(read_records(file, spec.prompt, spec.answer), spec.test_fraction)[0]
        for file in files
    ]


def test_an_update_that_is_not_masked_is_dropped(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = TrainerSession._leave

    def bare(self: Any, *arguments: Any) -> Any:
        if self.config.party == "east" and self._number == 1:
            self._masks = None
        return leave(self, *arguments)

    monkeypatch.setattr(TrainerSession, "_leave", bare)
    with simulate(Job.load(job_file, MASKED), tmp_path / "work") as running:
        report = running.run()
    assert report["passed_over"]["east"] == "sum: A message is not masked, as the contract asks."


def test_a_masked_message_is_nothing_to_a_sealed_job(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect = TrainerSession._protect

    def dressed(self: Any, payload: Payload, context: Any) -> Any:
        other = (
            Payload(payload.weight, payload.vectors, payload.metrics, b"FSA1")
            if context.party == "east"
            else payload
        )
        return protect(self, other, context)

    monkeypatch.setattr(TrainerSession, "_protect", dressed)
    with simulate(Job.load(job_file), tmp_path / "work") as running:
        assert "does not speak for the models" in running.run()["passed_over"]["east"]


def test_an_update_beyond_the_contracts_bounds_is_clipped_and_its_owner_told(
    tmp_path: Path,
) -> None:
    job = Job.load(
        write_job(tmp_path / "job", rounds=1, minimum=3), (*MASKED, "protection.value_range=1e-4")
    )
    said: list[str] = []
    with simulate(job, tmp_path / "work", say=said.append) as running:
        running.run()
        change = max(
            float(np.abs(tensor).max())
            for name, tensor in adapter(running).items()
            if "lora_B" in name
        )
    assert change <= 1e-4 * 40 * len(CUSTOMERS) / sum(map(len, _trained(job.path, CUSTOMERS))) * (
        1 + 1e-4
    )
    assert sum("the update was clipped" in line for line in said) == len(CUSTOMERS)


# -- the job file


def test_every_problem_of_masks_is_found_when_the_job_file_is_read(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", minimum=2)
    wanted = (
        *MASKED,
        "protection.value_range=8.0",
        "protection.clip_norm=1.0",
        "protection.colluders=4",
    )
    with pytest.raises(ContractError) as caught:
        Job.load(path, wanted)
    text = str(caught.value)
    assert "protection: the minimum cohort 2 is not in 3..3" in text
    assert "protection: a sum must cover at least two clients that do not collude" in text
    assert "protection: layout 'update': 2^-100 <= value_range <= clip_norm does not hold" in text


def test_a_job_of_two_customers_cannot_be_masked(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", customers=("north", "east"))
    with pytest.raises(ContractError, match="a masked session has 3 to 2048 customers, not 2"):
        Job.load(path, MASKED)


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_an_inexact_method_is_allowed_with_a_warning(tmp_path: Path, mode: str) -> None:
    path = write_job(tmp_path / "job", minimum=3)
    path.write_text(
        path.read_text().replace("[models.adapter]", '[models.adapter]\nmethod = "lora"')
    )
    said: list[str] = []
    with simulate(
        Job.load(path, (f'protection.mode="{mode}"',)), tmp_path / "work", say=said.append
    ):
        assert any("model 'tiny': 'lora' averages inexactly" in line for line in said)


def test_trainer_and_aggregator_derive_one_policy_and_the_run_is_part_of_it(
    job_file: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(job_file, MASKED), tmp_path / "work") as running:
        contract = running.federation.contract
    terms = masked_terms(contract, "run-1")
    assert terms.digest == masked_terms(type(contract).decode(contract.encode()), "run-1").digest
    assert terms.digest != masked_terms(contract, "run-2").digest
    assert terms.agreement, "a cohort agrees on its survivors unless the contract says otherwise"
    assert terms.roster == tuple(sorted(FOUR))
    assert bytes_per_value(terms) < 2.7
    names = {metric.name for metric in terms.by_name["evaluated"].metrics}
    assert {
        "tiny/before/own/correct",
        "tiny/local/acceptance/north/loss",
        "tiny/train/1/total",
    } <= names
    assert not terms.by_name["update"].metrics
    terms = contract.protection.model_copy(update={"mode": "sealed"})
    sealed = contract.model_copy(update={"protection": terms})
    with pytest.raises(ContractError, match="its updates are not masked"):
        masked_terms(sealed, "run-1")


def test_a_customer_that_holds_nothing_out_does_not_sign_a_contract_that_sums_such_figures(
    job_file: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(job_file, MASKED), tmp_path / "work") as running:
        assert running.federation.contract.evaluation.own
        node = running.nodes["east"]
        spec = node._loader._data.spec.model_copy(update={"test_fraction": 0.0})
        object.__setattr__(node._loader._data, "spec", spec)
        with pytest.raises(
            FederationError, match="held-out records under masks, and east holds none out"
        ):
            running.run()


def test_without_held_out_records_the_job_runs_and_sums_the_acceptance_set_alone(
    job_file: Path, tmp_path: Path
) -> None:
    with simulate(
        Job.load(job_file, (*MASKED, "data.test_fraction=0.0")), tmp_path / "work"
    ) as running:
        report = running.run()
    assert not running.federation.contract.evaluation.own
    assert not any(key.endswith("/own") for key in report["models"]["tiny"]["metrics"])
    assert report["models"]["tiny"]["metrics"]["federated/acceptance/north"]["total"] == 12


def test_an_acceptance_group_that_the_contract_does_not_name_is_refused(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedark.simulation.local.groups_of", lambda job: ("elsewhere",))
    with (
        simulate(Job.load(job_file, MASKED), tmp_path / "work") as running,
        pytest.raises(FedarkError, match="has a group that the contract does not name"),
    ):
        running.run()


def test_a_sealed_contract_answers_no_masked_call(job_file: Path, tmp_path: Path) -> None:
    with simulate(Job.load(job_file), tmp_path / "work") as running:
        contract = running.federation.contract
    calls = [
        pb.Call(peer_nonce=pb.PeerNonce()),
        pb.Call(endorse=pb.Endorse()),
        pb.Call(unmask=pb.Unmask()),
    ]
    trainer = TrainerSession(
        RunConfig(role="trainer", party="north", contract=contract, run_id="r"), _never
    )
    aggregator = AggregatorSession(
        RunConfig(role="aggregator", party="pool", contract=contract, run_id="r"), _never
    )
    said = []
    for session, call in [
        *((trainer, call) for call in calls),
        (aggregator, pb.Call(join=pb.Join())),
    ]:
        with pytest.raises(FedarkError) as caught:
            session.handle(call, lambda progress: None)
        said.append(caught.value.what)
    assert all(re.fullmatch("The contract does not mask its updates.", text) for text in said)


def _never(report: bytes, nonce: bytes) -> tuple[str, bytes]:
    raise AssertionError("nothing was asked for")


def waiting(models: int) -> tuple[TrainerMasks, dict[str, np.ndarray[Any, Any]], int]:
    """A trainer's end that has begun a round of an update, the update, and the bytes of its packed
    vector.
    """
    length = VALUES // models
    terms = [
        parties.model(f"m{at}")
        | {"layout": ({"name": "head.weight", "shape": (1000, length // 1000), "travels": True},)}
        for at in range(models)
    ]
    contract = parties.contract(protection={"minimum_cohort": 3, "mode": "masked"}, models=terms)
    names, run = [party.name for party in contract.customers], "0" * 32
    keys = {name: SigningKey() for name in names}
    ends = {name: TrainerMasks(contract, run, name, keys[name], NonceBook()) for name in names}
    peers = {
        name: SimpleNamespace(
            party=name,
            role="trainer",
            signing_public=keys[name].public,
            contract_digest=contract.digest(),
            run_id=run,
        )
        for name in names
    }
    mine, *others = names
    ends[mine].join([peers[name] for name in others], [ends[name].hello() for name in others])
    everybody = [end.hello() for end in ends.values()]
    server = AggregatorMasks(contract, run)
    server.join(list(peers.values()), everybody)
    ends[mine].begin("update", server.open(1, "update", names, b"m" * 48), b"m" * 48)
    draws = np.random.default_rng(0)
    vectors = {
        model.name: draws.normal(0, 0.01, length).astype(np.float32) for model in contract.models
    }
    return ends[mine], vectors, 8 * masked_terms(contract, run).by_name["update"].words(len(names))


@pytest.mark.parametrize(("models", "most"), [(1, 1.5), (2, 3.0)])
def test_masking_an_update_takes_little_memory_beside_the_message(models: int, most: float) -> None:
    """Found in review: 4.5 times the packed vector. Two models' vectors are copied in a row: half
    as much again as the packed one.
    """
    end, vectors, packed = waiting(models)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        message = end.upload("update", vectors, 30, {}, lambda: None)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert len(message) > packed
    assert peak <= most * packed


@pytest.mark.parametrize(
    ("value", "clipped"), [(7.9, False), (8.1, True), (-8.1, True), (float("nan"), False)]
)
def test_an_update_beyond_the_grid_is_told_to_its_customer(value: float, clipped: bool) -> None:
    end, vectors, _ = waiting(1)
    told: list[bool] = []
    vectors["m0"][5] = value
    records = 10_000  # the heaviest
    if np.isnan(value):
        with pytest.raises(FedarkError, match="not finite"):
            end.upload("update", vectors, records, {}, lambda: told.append(True))
    else:
        end.upload("update", vectors, records, {}, lambda: told.append(True))
    assert told == [True] * clipped
