"""Jobs with a learning curve: figures after every round, rounds that end by the contract's rule,
the best round delivered; and what a lying host can make of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small import HostileRelay, why, write_job

from fedark.api import Result
from fedark.contract.job import Job
from fedark.enclave import aggregator
from fedark.enclave.trainer import TrainerSession
from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.links.link import InProcessLink
from fedark.privacy.ledger import LEDGER, Ledger
from fedark.report.verify import verify_dossier
from fedark.simulation import simulate
from fedark.stages import coordinator
from fedark.stages.coordinator import coordinate
from fedark.stages.dossier import DOSSIER
from fedark.v1 import node_pb2, stage_pb2

MODES = ("sealed", "masked")
DIVERGES = ("models.0.training.learning_rate=3.0", "models.0.training.head_learning_rate=30.0")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def job_of(folder: Path, curve: str, mode: str = "sealed", rounds: int = 3, *more: str) -> Job:
    path = write_job(folder / "job", rounds=rounds, records=16, minimum=3, curve=curve)
    overrides = (f'protection.mode="{mode}"', "protection.max_records=40", *more)
    return Job.load(path, (*overrides, "models.0.training.baseline_epochs=0"))


def vector_of(work: Path, run_id: str) -> dict[str, Any]:
    folder = work / "parties" / "maker" / "runs" / run_id / "adapter-tiny"
    return {
        f"{path.name}/{name}": value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_figures_after_every_round_are_those_that_a_job_of_so_many_rounds_ends_with(
    tmp_path: Path, mode: str
) -> None:
    said: list[str] = []
    with simulate(job_of(tmp_path, "every = 1", mode), tmp_path / "w", say=said.append) as running:
        report = running.run()
    points = report["curve"]["points"]
    assert [point["round"] for point in points] == [1, 2], "the last is measured as the final one"
    assert report["curve"]["rounds"] == report["curve"]["delivered"]["tiny"] == 3
    with simulate(job_of(tmp_path, "every = 0", mode, 2), tmp_path / "x") as running:
        two = running.run()["models"]["tiny"]["metrics"]
    found = points[1]["models"]["tiny"]
    groups = [value for key, value in two.items() if key.startswith("federated/acceptance/")]
    assert found["records"] == sum(group["total"] for group in groups) == 12
    if mode == "sealed":  # masks round an update
        assert found["correct"] == sum(group["correct"] for group in groups)
        total = sum(group["loss"] * group["total"] for group in groups)
        assert found["loss"] * 12 == pytest.approx(total, abs=0.01)
    live = [line for line in said if re.search(r"after round [12]: tiny: [\d.]+ % of 12", line)]
    assert len(live) == 2
    shown = Result(report, {}, {}, Path())
    assert "after each measured round" in str(shown)
    assert [point[0] for point in shown.learning["tiny"]] == [1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_patience_ends_the_rounds_and_the_best_of_them_is_delivered_and_measured(
    tmp_path: Path, mode: str
) -> None:
    curve = 'patience = 1\ndeliver = "best"'
    job = job_of(tmp_path, curve, mode, 6, *DIVERGES)
    with simulate(job, tmp_path / "w") as running:
        report = running.run()
        adapter = vector_of(tmp_path / "w", running.run_id)
    told = report["curve"]
    best = told["delivered"]["tiny"]
    assert told["rounds"] < 6
    assert best == told["rounds"] - 1
    assert "no measurement was better" in told["ended"]
    figures = report["models"]["tiny"]["metrics"]
    right = sum(v["correct"] for k, v in figures.items() if k.startswith("federated/acceptance"))
    assert right == told["points"][best - 1]["models"]["tiny"]["correct"]
    assert len(report["models"]["tiny"]["train_loss"]) == told["rounds"]
    if mode == "sealed":
        again = job_of(tmp_path, "every = 0", mode, 6, *DIVERGES, f"job.rounds={best}")
        with simulate(again, tmp_path / "x") as running:
            running.run()
            other = vector_of(tmp_path / "x", running.run_id)
        assert all(np.array_equal(value, other[name]) for name, value in adapter.items())


def test_a_private_job_that_ends_early_releases_as_many_updates_and_stays_charged_for_all(
    tmp_path: Path,
) -> None:
    private = (
        'privacy.mechanism="example-distributed"',
        "privacy.records=36",
        "privacy.accept_noise=true",
        "models.0.training.replay=0",
    )
    job = job_of(tmp_path, "target = 0.01", "masked", 4, *private)
    with simulate(job, tmp_path / "w") as running:
        report = running.run()
    ran = report["curve"]["rounds"]
    assert ran < 4
    with Ledger.open(tmp_path / "w" / "parties" / "north" / LEDGER) as ledger:
        entries = ledger.entries()
    assert [entry["kind"] for entry in entries] == ["charge"] + ["release"] * ran
    assert entries[0]["releases"] == 4, "nothing that was charged is given back"
    assert report["models"]["tiny"]["train_loss"] == []


def test_attack_host_skips_the_measurement_and_goes_on(tmp_path: Path) -> None:
    """The aggregator enclave takes no update of a round whose adapter is still to be measured."""

    def handle(request: bytes) -> bytes:
        message = node_pb2.AggregatorRequest.FromString(request)
        if message.call.close.curve:
            message.call.close.curve = False
        return bytes(running.host.handle(message.SerializeToString()))

    with simulate(job_of(tmp_path, "every = 1"), tmp_path / "w") as running:
        nodes = {name: node.handle for name, node in running.nodes.items()}
        with pytest.raises(FedarkError, match="cannot be closed in round"):
            coordinate(InProcessLink(nodes, parallel=1), handle)


def test_attack_host_writes_another_curve_into_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host signs what it likes; the delivery has the aggregator enclave's own word of it."""
    made = coordinator.make_report

    def forged(*args: Any) -> dict[str, Any]:
        report = made(*args)
        report["curve"]["points"][0]["models"]["tiny"]["correct"] += 1
        return report

    monkeypatch.setattr(coordinator, "make_report", forged)
    with simulate(job_of(tmp_path, "every = 1"), tmp_path / "w") as running:
        report = running.run()
        said = json.dumps(report["passed_over"])
        assert "learning curve is not that of the aggregator enclave" in said
        for name in ("maker", "north"):
            run = tmp_path / "w" / "parties" / name / "runs" / running.run_id
            assert not (run / "adapter-tiny").exists()
            assert not (run / "report.json").exists()


@pytest.mark.parametrize("what", ["other state", "other round"])
def test_attack_host_has_another_adapter_measured(tmp_path: Path, what: str) -> None:
    """A trainer measures what the aggregator enclave signed for that place of the run alone."""
    kept: list[bytes] = []

    def alter(party: str, message: bytes, reply: bool) -> bytes:
        if reply:
            return message
        request = stage_pb2.StageRequest.FromString(message)
        if request.HasField("round"):
            kept.append(request.round.state)
        if request.forward.call.HasField("measure"):
            measure = request.forward.call.measure
            if what == "other state":
                measure.state = kept[0]
            else:
                measure.round += 1
        return request.SerializeToString()

    with simulate(job_of(tmp_path, "every = 1"), tmp_path / "w") as running:
        relay = HostileRelay(running, alter)
        with pytest.raises(FedarkError) as caught:
            coordinate(relay, running.host.handle)
    assert (
        "of another" in why(caught.value)
        or "does not verify" in why(caught.value)
        or ("signature" in why(caught.value))
    )


def test_a_trainer_uses_one_global_adapter_for_each_round(tmp_path: Path) -> None:
    """Two histories of a rolled-back aggregator enclave find no trainer that serves both."""
    session = object.__new__(TrainerSession)
    session._shown = (2, b"one")
    session._require_shown(2, b"one")
    session._require_shown(3, b"another")
    for number, base in ((2, b"another"), (1, b"one")):
        with pytest.raises(ProtocolError, match="measured already"):
            session._require_shown(number, base)


def test_a_measurement_holds_nothing_but_figures_of_the_acceptance_set(tmp_path: Path) -> None:
    seen: list[Any] = []
    opened = aggregator.ProtectedUpdate.open

    def watch(self: Any, hpke: Any) -> Any:
        payload = opened(self, hpke)
        if self.context.kind == "curve":
            seen.append(payload)
        return payload

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregator.ProtectedUpdate, "open", watch)
        with simulate(job_of(tmp_path, "every = 1", "masked"), tmp_path / "w") as running:
            running.run()
    assert len(seen) == 6
    for payload in seen:
        assert (payload.weight, payload.vectors, payload.masked, payload.noised) == (
            0,
            {},
            b"",
            b"",
        )
        assert list(payload.metrics["tiny"]) == ["acceptance"]
        assert payload.metrics["tiny"]["acceptance"][1] == 4


def test_a_dossier_of_a_job_that_ended_early_verifies_and_proves_its_curve(tmp_path: Path) -> None:
    job = job_of(tmp_path, 'patience = 1\ndeliver = "best"', "sealed", 6, *DIVERGES)
    with simulate(job, tmp_path / "w") as running:
        report = running.run()
        run = tmp_path / "w" / "parties" / "maker" / "runs" / running.run_id
    verified = verify_dossier((run / DOSSIER).read_bytes())
    assert verified.report["curve"] == report["curve"]
    assert report["curve"]["rounds"] < 6
