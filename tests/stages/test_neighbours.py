"""Under a privacy mechanism faults, progress and the shape of every message are outputs too: two
data sets that differ in one record, on which everything fails that can, give the same but for
noise.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import write_job

from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.trainer import TrainerSession
from fedark.foundation.errors import FedarkError
from fedark.records.reading import Record
from fedark.records.splits import split_train_test
from fedark.simulation import simulate
from fedark.stages.report import spared_lines
from fedark.tuning.task import TaskModel
from fedark.v1 import enclave_pb2 as pb

TERMS = {
    "example-distributed": ("privacy.records=90", "privacy.sampling_rate=1.0"),
    "example-local": ("privacy.records=90", "privacy.sampling_rate=1.0", "privacy.local_steps=2"),
    "customer-level": (),
}
HOSTILE, HARMLESS = "open hostile", "open harmless"
RECORDS = 16
OWN: dict[str, Any] = {}  # what south's own operator is told, by the text of its record


def _on_side(text: str, part: str) -> str:
    """`text` with a number behind it by which its record is trained on, or held out."""
    texts = [f"{text} {number}" for number in range(100)]
    sides = split_train_test([Record(f"south: {text}", "open") for text in texts], 0.25)
    return sides[part != "trained on"][0].prompt.removeprefix("south: ")


def _fails(patch: pytest.MonkeyPatch, how: str) -> None:
    """Everything that touches the hostile record fails."""
    encoded, score = TaskModel._encoded, TaskModel._score

    def encode(self: TaskModel, records: Any) -> Any:
        bad = [record.prompt for record in records if "hostile" in record.prompt]
        if bad and how == "tokenizer":
            raise RuntimeError(f"cannot read {bad[0]}")
        if bad and how == "memory":
            raise MemoryError(bad[0])
        # Ids of its own: else it would be the record that stands beside it.
        return [
            dataclasses.replace(example, ids=(*example.ids[:-2], 5, 6, 5, 7))
            if "hostile" in record.prompt
            else example
            for record, example in zip(records, encoded(self, records), strict=True)
        ]

    def scored(self: TaskModel, batch: Any, *length: int) -> Any:
        losses, right = score(self, batch, *length)
        bad = torch.tensor([tuple(example.ids[-4:]) == (5, 6, 5, 7) for example in batch])
        return losses * torch.where(bad, float("nan"), 1.0), right

    patch.setattr(TaskModel, "_encoded", encode)
    if how == "loss":
        patch.setattr(TaskModel, "_score", scored)


def _described(payload: Any) -> Any:
    """A message's plaintext, its noised values left out."""
    vectors = {name: (vector.shape, vector.dtype) for name, vector in payload.vectors.items()}
    figures = {model: sorted(items) for model, items in payload.metrics.items()}
    return payload.weight, vectors, figures, len(payload.masked), len(payload.noised)


def _run(
    folder: Path, mechanism: str, mode: str, text: str, part: str, patch: pytest.MonkeyPatch
) -> tuple[list[Any], Any]:
    """What leaves south's trainer, call by call, and what the job says of it."""
    path = write_job(folder / "job", rounds=1, minimum=3, records=RECORDS)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    file = folder / "job" / "south.csv"
    with file.open() as opened:
        rows = list(csv.reader(opened))
    rows[1][1:] = [_on_side(text, part), "open"]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    left: list[Any] = []
    handle, protect = TrainerSession.handle, TrainerSession._protect

    def handled(self: TrainerSession, call: pb.Call, progress: Any) -> pb.Reply:
        if self.config.party != "south":
            return handle(self, call, progress)
        told: list[Any] = []
        try:
            reply = handle(self, call, told.append)
        except BaseException as error:
            left.append((call.WhichOneof("body"), told, type(error), str(error)))
            raise
        # Checkpoints and figures of its own stay with the customer's node.
        size = reply.update.ByteSize() or len(reply.measured.protected)
        if call.WhichOneof("body") == "evaluate":
            size = 0  # figures of the noised adapter on public records: as random as its noise
        left.append((call.WhichOneof("body"), told, reply.WhichOneof("body"), size))
        return reply

    def protected(self: TrainerSession, payload: Any, context: Any) -> Any:
        if self.config.party == "south":
            left.append(_described(payload))
            assert all(np.isfinite(vector).all() for vector in payload.vectors.values())
        return protect(self, payload, context)

    patch.setattr(TrainerSession, "handle", handled)
    patch.setattr(TrainerSession, "_protect", protected)
    terms = (
        f'privacy.mechanism="{mechanism}"',
        "privacy.epsilon=8.0",
        "privacy.accept_noise=true",
        *TERMS[mechanism],
        f'protection.mode="{mode}"',
    )
    try:
        with simulate(Job.load(path, terms), folder / "work") as running:
            report = running.run()
            run = folder / "work" / "parties" / "south" / "runs" / running.run_id
            OWN[text] = json.loads((run / "local.json").read_text())
    finally:
        patch.setattr(TrainerSession, "handle", handle)
        patch.setattr(TrainerSession, "_protect", protect)
    model = report["models"]["tiny"]
    return left, (report["passed_over"], sorted(model["metrics"]), model["train_loss"])


@pytest.mark.parametrize(
    ("mechanism", "mode", "how", "part"),
    [
        ("example-distributed", "masked", "tokenizer", "trained on"),
        ("example-distributed", "sealed", "loss", "trained on"),
        ("example-distributed", "masked", "loss", "held out"),
        ("example-local", "sealed", "memory", "trained on"),
        ("customer-level", "masked", "tokenizer", "trained on"),
        ("customer-level", "sealed", "loss", "trained on"),
    ],
)
def test_one_record_on_which_everything_fails_changes_nothing_that_leaves(
    mechanism: str, mode: str, how: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fails(monkeypatch, how)
    one, other = (
        _run(tmp_path / name, mechanism, mode, text, part, monkeypatch)
        for name, text in (("harmless", HARMLESS), ("hostile", HOSTILE))
    )
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == theirs
    assert one == other
    assert any(entry[0] == "round" and entry[2] == "update" for entry in one[0])
    assert one[1][0] == {}
    # Its own operator is told, and nobody else.
    assert spared_lines(OWN[HARMLESS]) == []
    assert bool(spared_lines(OWN[HOSTILE])) == (part == "trained on")


def test_a_model_that_changes_itself_is_told_to_the_customers_own_operator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = TaskModel._score

    def scored(self: TaskModel, batch: Any, *length: int) -> Any:
        if any(tuple(example.ids[-4:]) == (5, 6, 5, 7) for example in batch):
            self.scorer.body.config.poisoned = True
        return score(self, batch, *length)

    _fails(monkeypatch, "never")
    monkeypatch.setattr(TaskModel, "_score", scored)
    one, other = (
        _run(tmp_path / name, "example-distributed", "masked", text, "trained on", monkeypatch)
        for name, text in (("harmless", HARMLESS), ("hostile", HOSTILE))
    )
    assert one == other
    assert spared_lines(OWN[HARMLESS]) == []
    *_, line = spared_lines(OWN[HOSTILE])
    assert "changed itself" in line
    assert "poisoned" in line


def test_control_without_a_mechanism_the_record_ends_its_owners_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fails(monkeypatch, "loss")
    with pytest.raises(FedarkError, match="2 customers are left"):
        _run(tmp_path, "none", "masked", HOSTILE, "trained on", monkeypatch)


TERMS["none"] = ()


def test_records_that_no_contract_allows_are_left_out_without_a_word(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", rounds=1, minimum=3, records=RECORDS)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    mechanism = 'privacy.mechanism="customer-level"'
    terms = (mechanism, "privacy.epsilon=8.0", "privacy.accept_noise=true")
    with simulate(Job.load(path, terms), tmp_path / "work") as running:
        contract = running.federation.contract
    session = TrainerSession(
        RunConfig(role="trainer", party="south", contract=contract, run_id="r" * 32),
        lambda report, nonce: ("simulated", b""),
    )
    rows = [("a", "open"), ("a" * (2 << 20), "open"), ("a", "no label of the contract")]
    records = pb.Records(records=[pb.Record(prompt=p, answer=a) for p, a in rows], last=True)
    session._take(records)
    assert [record.prompt for record in session._records.train] == ["a"]
    session._records.drop()
    session._records.digest = None
    session._take(pb.Records(last=True))
