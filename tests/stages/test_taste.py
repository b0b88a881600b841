"""The taster's round through the whole protocol: heads that are the same however records are spread
and whatever protects them, and moments that nobody but two enclaves ever has.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import refusing
from safetensors.numpy import load_file
from small import CUSTOMERS, write_job

from fedark.contract.job import Job
from fedark.contract.taste import TASTED
from fedark.enclave import aggregator, trainer
from fedark.enclave.protection import Payload
from fedark.foundation.errors import ContractError, FedarkError, FederationError, ProtocolError
from fedark.links.link import Passed
from fedark.simulation import InProcessEnclave, Simulation, simulate
from fedark.stages.consent import summary
from fedark.v1 import enclave_pb2 as pb

FOUR = (*CUSTOMERS, "west")
MODES = {"sealed": (), "masked": ('protection.mode="masked"', "protection.max_records=400")}
PRIVATE = (
    'privacy.mechanism="example-distributed"',
    "privacy.records=90",
    "privacy.accept_noise=true",
    "models.0.training.replay=0.0",
    "taste.first=true",
)
pytestmark = pytest.mark.usefixtures("measured_once")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    return write_job(tmp_path / "job", rounds=1, minimum=3, customers=FOUR)


def head(running: Simulation) -> dict[str, np.ndarray[Any, Any]]:
    folder = running.federation.folder("maker") / "runs" / running.run_id / "adapter-tiny"
    files = list(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def said(error: FedarkError, word: str) -> str:
    """The line of an aborted job that tells why the first customer's enclave refused."""
    line = next(line for line in error.what.splitlines() if word in line)
    return line.strip(" -").partition(": ")[2]


def redeal(folder: Path, seed: int) -> None:
    """The same records, to other customers; each keeps one at least."""
    rows: list[list[str]] = []
    for name in FOUR:
        with (folder / f"{name}.csv").open(newline="") as file:
            header, *own = csv.reader(file)
        rows += own
    random.Random(seed).shuffle(rows)
    cuts = [0, 20, 30, 90, len(rows)]
    for index, name in enumerate(FOUR):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows[cuts[index] : cuts[index + 1]]])


@pytest.mark.slow
def test_the_heads_are_the_same_for_any_split_of_the_records_masked_or_sealed(
    job_file: Path, tmp_path: Path
) -> None:
    found, said = [], []
    for seed in (0, 7):
        if seed:
            redeal(job_file.parent, seed)
        for mode, overrides in MODES.items():
            work = tmp_path / f"{mode}-{seed}"
            with simulate(Job.load(job_file, overrides).tasting(), work) as running:
                report = running.run()
                found.append(head(running))
            figures = report["models"]["tiny"]["metrics"]
            said.append(
                [
                    figures[f"{when}/{where}"]["correct"]
                    for when in ("before", "federated")
                    for where in ("own", "acceptance/north")
                ]
            )
            assert report["curve"]["taste"]["tiny"]["regularisation"] > 0
    first, *others = found
    assert any(np.abs(tensor).max() > 0.1 for tensor in first.values())
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            assert np.abs(tensor - other[name]).max() <= 1e-3 * np.abs(tensor).max()
    assert said[1:] == said[:1] * 3
    own, after = said[0][0], said[0][2]
    assert after > own


@pytest.mark.slow
@pytest.mark.parametrize("protection", sorted(MODES))
@pytest.mark.attack("reading a customer's moments on their way")
def test_moments_of_one_customer_are_nowhere_in_what_crosses(
    protection: str,
    job_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[str], None],
) -> None:
    made: list[np.ndarray[Any, Any]] = []
    opened: list[Payload] = []
    crossed: list[bytes] = []
    whole, decode = trainer.tasted, Payload.decode

    def tasted(*args: Any) -> np.ndarray[Any, Any]:
        made.append(whole(*args))
        return made[-1]

    def decoded(data: bytes) -> Payload:
        opened.append(decode(data))
        return opened[-1]

    def tap(passed: Passed) -> None:
        crossed.append(passed.data)

    monkeypatch.setattr(trainer, "tasted", tasted)
    monkeypatch.setattr(Payload, "decode", decoded)
    with simulate(
        Job.load(job_file, MODES[protection]).tasting(), tmp_path / "work", tap=tap
    ) as running:
        running.run()
        kept = [path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert len(made) == len(FOUR)
    for vector in made:
        parts = [vector.tobytes(), vector.astype(np.float64).tobytes()]
        needles = [part[at : at + 64] for part in parts for at in range(0, len(part) // 2, 4096)]
        assert all(any(needle) for needle in needles)
        assert not [n for n in needles for data in (*crossed, *kept) if n in data]
    # Even inside the aggregator enclave a masked message holds no vector at all.
    inside = [p for p in opened if any(v.size == made[0].size for v in p.vectors.values())]
    assert len(inside) == (0 if protection == "masked" else len(FOUR))
    refusal(
        "encrypted to the attested aggregator enclave" + ", and masked" * (protection == "masked")
    )


def test_a_contract_says_in_words_that_its_first_round_tastes(
    job_file: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(job_file).tasting(), tmp_path / "work") as running:
        words = summary(running.federation.contract)
    assert "taster: first yes" in words
    assert "held_out 0.2" in words


@pytest.mark.slow
def test_tuning_goes_on_from_the_tasters_head_at_a_smaller_rate(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, starts = [], []
    train = trainer.TaskModel.train

    def trained(task: Any, *args: Any, **named: Any) -> Any:
        if named.get("part"):
            rates.append((named["settings"].learning_rate, named["settings"].head_learning_rate))
            starts.append(task.get_flat())
        return train(task, *args, **named)

    monkeypatch.setattr(trainer.TaskModel, "train", trained)
    heads: list[dict[str, Any]] = []
    whole = aggregator.heads_of

    def heads_of(*args: Any) -> Any:
        found = whole(*args)
        heads.append(found[0])
        return found

    monkeypatch.setattr(aggregator, "heads_of", heads_of)
    overrides = (
        "job.rounds=2",
        "taste.first=true",
        "taste.rate=0.25",
        "curve.every=1",
        "models.0.personal.epochs=0",
        "models.0.training.baseline_epochs=0",
        *MODES["masked"],
    )
    with simulate(Job.load(job_file, overrides), tmp_path / "work") as running:
        report = running.run()
    assert rates == [(0.25e-3, 0.25e-3)] * len(FOUR)
    assert len(heads) == 1
    for start in starts:
        assert (start == heads[0]["tiny"]).all()
    assert [point["round"] for point in report["curve"]["points"]] == [1]
    assert report["curve"]["rounds"] == 2
    assert len(report["models"]["tiny"]["train_loss"]) == 1


def test_a_customer_who_is_gone_before_the_tasters_round_is_passed_over(
    job_file: Path, tmp_path: Path
) -> None:
    job = Job.load(job_file, MODES["masked"]).tasting()
    with simulate(job, tmp_path / "work", drop={"east": 1}) as running:
        report = running.run()
    assert list(report["passed_over"]) == ["east"]
    assert report["curve"]["taste"]["tiny"]["error"] > 0


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (PRIVATE, "under a privacy mechanism"),
        (('models.0.task="instruction"', "taste.first=true"), "needs a classifier"),
        (('models.0.server.mean="median-norm"', "taste.first=true"), "sums all records alike"),
    ],
)
def test_what_cannot_be_tasted_is_said_before_anything_is_started(
    job_file: Path, overrides: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ContractError, match=why):
        Job.load(job_file, overrides)


def test_tasting_needs_something_to_measure(job_file: Path) -> None:
    job = Job.load(job_file, ('provider_data.acceptance=""', "data.test_fraction=0.0"))
    with pytest.raises(ContractError, match="nothing would be measured"):
        job.tasting()


@pytest.mark.attack("a taster's round under a mechanism")
def test_a_trainer_enclave_itself_gives_no_moments_under_a_mechanism(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[str], None]
) -> None:
    """Everybody outside the enclave is fooled or colludes; it reads the contract itself."""
    monkeypatch.setattr("fedark.contract.job.taste_problems", lambda *args: [])
    monkeypatch.setattr("fedark.contract.draft.tasted_problems", lambda contract: [])
    monkeypatch.setattr("fedark.stages.settings.tasted_problems", lambda contract: [])
    with (
        simulate(Job.load(job_file, PRIVATE), tmp_path / "work") as running,
        pytest.raises(FederationError, match="taster") as caught,
    ):
        running.run()
    refusal(said(caught.value, "taster"))
    assert not list((tmp_path / "work").glob("parties/*/runs/*/adapter-*"))


@pytest.mark.attack("moments as an update, and an update as moments")
@pytest.mark.parametrize("number", [1, 2])
def test_a_message_of_one_kind_is_not_taken_for_the_other(
    number: int,
    job_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[[str], None],
) -> None:
    """A host that answers the taster's round by an update of another, or the reverse."""
    kind_of = trainer.kind_of
    monkeypatch.setattr(
        trainer,
        "kind_of",
        lambda contract, at: kind_of(contract, 3 - at) if at == number else kind_of(contract, at),
    )
    overrides = ("job.rounds=2", "taste.first=true", *MODES["masked"])
    with (
        simulate(Job.load(job_file, overrides), tmp_path / "work") as running,
        pytest.raises(FederationError, match=TASTED) as caught,
    ):
        running.run()
    refusal(said(caught.value, "kind"))


@pytest.mark.attack("moments that no records have")
def test_a_sum_of_moments_that_no_records_have_ends_the_job(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer.tasted

    def altered(*args: Any) -> np.ndarray[Any, Any]:
        vector = whole(*args)
        vector[0] += 2**22
        return vector

    monkeypatch.setattr(trainer, "tasted", altered)
    with (
        simulate(Job.load(job_file, MODES["masked"]).tasting(), tmp_path / "work") as running,
        refusing(),
        pytest.raises(FedarkError, match="No records"),
    ):
        running.run()
    assert not list((tmp_path / "work").glob("parties/*/runs/*/adapter-*"))


@pytest.mark.attack("a second taster's round")
def test_a_host_who_has_an_enclave_taste_twice_gets_nothing_the_second_time(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of two sums could be one customer's moments: no round is computed twice."""
    whole = InProcessEnclave.call
    again: list[str] = []

    def twice(enclave: InProcessEnclave, call: pb.Call, **named: Any) -> pb.Reply:
        reply = whole(enclave, call, **named)
        if call.HasField("round"):
            with refusing(), pytest.raises(ProtocolError, match="no round is trained twice"):
                whole(enclave, call)
            again.append("refused")
        return reply

    monkeypatch.setattr(InProcessEnclave, "call", twice)
    with simulate(Job.load(job_file, MODES["sealed"]).tasting(), tmp_path / "work") as running:
        running.run()
    assert len(again) == len(FOUR)
