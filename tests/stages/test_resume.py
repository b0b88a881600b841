"""Whatever is killed goes on where it was: the same adapter comes out, no round counts twice,
nothing is lost.

One process, every message and file as in a deployment; `tests/chaos` does the same to real
processes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from mortal import Fate, World
from small import SECRET_WORDS, write_job

from fedark.contract.job import Job
from fedark.foundation.errors import EnclaveFailed
from fedark.simulation.local import Federation, prepare

pytestmark = pytest.mark.usefixtures("measured_once")

TRAINER_CALLS = (
    "challenge",
    "admit_peer",
    "attest",
    "grant",
    "sealed",
    "records",
    "begin",
    "round",
    "measure",
    "evaluate",
)
MASKED_CALLS = ("peer_nonce", "announce", "join", "endorse", "unmask")
POOL_CALLS = ("challenge", "attest", "admit_peer", "submit", "close", "deliver")
MASKED_POOL_CALLS = ("join", "open_round", "survivors")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Federation]:
    """One federation for each protection, to be copied: a contract has one run."""
    folder = tmp_path_factory.mktemp("prepared")
    path = write_job(folder / "job", rounds=2, minimum=3, records=16, curve="every = 1")
    found = {}
    for mode in ("sealed", "masked"):
        job = Job.load(path, (f'protection.mode="{mode}"', "protection.max_records=40"))
        found[mode] = prepare(job, folder / mode, sandbox="none")
    return found


@pytest.fixture
def world(prepared: dict[str, Federation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[World] = []

    def make(mode: str, fate: Fate) -> World:
        original = prepared[mode]
        work = tmp_path / f"{mode}-{len(made)}"
        shutil.copytree(original.work, work)
        made.append(World(Federation(work, original.contract, {}), fate, monkeypatch))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def undisturbed(prepared: dict[str, Federation], tmp_path_factory: pytest.TempPathFactory):
    """Report and adapter of a sealed run without a death."""
    work = tmp_path_factory.mktemp("undisturbed") / "work"
    shutil.copytree(prepared["sealed"].work, work)
    with pytest.MonkeyPatch.context() as patch:
        running = World(Federation(work, prepared["sealed"].contract, {}), Fate(), patch)
        report = running.run()
        adapter = running.adapter()
        running.close()
    return report, adapter


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[name], other[name], atol=tolerance) for name in one
    )


def check_whole(report, undisturbed, mode: str) -> None:
    """Nobody was passed over, and every figure is there, over the same records."""
    before = undisturbed[0]
    assert report["passed_over"] == {}
    assert report["customers"] == before["customers"]
    figures, expected = report["models"]["tiny"]["metrics"], before["models"]["tiny"]["metrics"]
    assert {name: value["total"] for name, value in figures.items()} == {
        name: value["total"] for name, value in expected.items()
    }
    assert len(report["models"]["tiny"]["train_loss"]) == len(
        before["models"]["tiny"]["train_loss"]
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_trainer_enclave_may_die_before_and_after_every_call(
    world, undisturbed, when: str
) -> None:
    fate = Fate()
    fate.planned = {("north", kind, when): 1 for kind in TRAINER_CALLS}
    running = world("sealed", fate)
    check_whole(running.run(), undisturbed, "sealed")
    assert len(fate.deaths) == len(TRAINER_CALLS)
    assert same(running.adapter(), undisturbed[1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_aggregator_enclave_may_die_before_and_after_every_call(
    world, undisturbed, when: str
) -> None:
    fate = Fate()
    fate.planned = {("pool", kind, when): 1 for kind in POOL_CALLS}
    running = world("sealed", fate)
    report = running.run()
    assert report["passed_over"] == {}
    assert len(fate.deaths) == len(POOL_CALLS)
    assert same(running.adapter(), undisturbed[1])


@pytest.mark.parametrize("when", ["before", "after"])
def test_under_masks_any_enclave_may_die_before_and_after_every_call(
    world, undisturbed, when: str
) -> None:
    fate = Fate()
    fate.planned = {("north", kind, when): 1 for kind in (*TRAINER_CALLS, *MASKED_CALLS)}
    fate.planned |= {("pool", kind, when): 1 for kind in (*POOL_CALLS, *MASKED_POOL_CALLS)}
    running = world("masked", fate)
    check_whole(running.run(), undisturbed, "masked")
    assert len(fate.deaths) == len(TRAINER_CALLS + MASKED_CALLS + POOL_CALLS + MASKED_POOL_CALLS)
    assert same(running.adapter(), undisturbed[1], 1e-2)


@pytest.mark.parametrize("mode", ["sealed", "masked"])
@pytest.mark.parametrize("seed", [1, 2])
def test_everybody_may_die_at_any_write_and_call(world, undisturbed, mode: str, seed: int) -> None:
    print(f"seed {seed}")
    fate = Fate(seed, enclaves=0.02, hosts=0.2, coordinator=0.05)
    running = world(mode, fate)
    report = running.run()
    assert report["passed_over"] == {}
    assert len(fate.deaths) >= 10, "the chances are such that there are some forty"
    assert len({who for who, _ in fate.deaths}) >= 4
    assert same(running.adapter(), undisturbed[1], 1e-6 if mode == "sealed" else 1e-2)
    assert {same(running.adapter(name), running.adapter()) for name in ("east", "south")} == {True}


def test_an_aggregator_enclave_that_keeps_dying_ends_the_job_and_is_no_customers_fault(
    world,
) -> None:
    fate = Fate()
    fate.planned["pool", "submit", "before"] = 99
    running = world("sealed", fate)
    with pytest.raises(EnclaveFailed, match="was killed"):
        running.run()
    assert not any("passed over" in line for line in running.said)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Federation]:
    """Four customers, of whom three make a round."""
    folder = tmp_path_factory.mktemp("four")
    names = ("north", "east", "south", "west")
    path = write_job(folder / "job", rounds=3, minimum=3, records=16, customers=names[:3])
    text = path.read_text().replace(
        "[data]\n", '[[customers]]\nname = "west"\ndata = "east.csv"\n[data]\n'
    )
    path.write_text(text)
    found = {}
    for mode in ("sealed", "masked"):
        job = Job.load(path, (f'protection.mode="{mode}"', "protection.max_records=40"))
        found[mode] = prepare(job, folder / mode, sandbox="none")
    return found


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_a_customer_that_is_away_for_a_round_returns_with_the_next(
    four: dict[str, Federation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    shutil.copytree(four[mode].work, tmp_path / "work")
    running = World(Federation(tmp_path / "work", four[mode].contract, {}), Fate(), monkeypatch)
    running.away = {"west": {"round 2"}}
    report = running.run()
    running.close()
    assert "pool: west is back" in running.said
    assert report["passed_over"] == {}
    assert "west" in report["customers"]
    rounds = [line for line in running.said if line.startswith("pool: round")]
    assert [line.rpartition(": ")[2] for line in rounds] == ["4 parties", "4 parties", "4 parties"]
    figures = report["models"]["tiny"]
    # Figures are over those who were there in every round, and all of them are there.
    assert len(figures["train_loss"]) == 3
    assert running.adapter("west")


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_a_customer_that_stays_away_is_passed_over_and_the_job_finishes(
    four: dict[str, Federation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    shutil.copytree(four[mode].work, tmp_path / "work")
    running = World(Federation(tmp_path / "work", four[mode].contract, {}), Fate(), monkeypatch)
    real = running.ask

    def ask(party: str, request: bytes) -> bytes:
        if party == "east" and any(line.startswith("pool: round 2") for line in running.said):
            running.away["west"] = {""}
        return real(party, request)

    running.ask = ask
    report = running.run()
    running.close()
    assert set(report["passed_over"]) == {"west"}
    assert report["customers"] == ["north", "east", "south"]
    assert len(report["models"]["tiny"]["train_loss"]) == 3


def test_no_secret_is_in_anything_that_was_kept(world, tmp_path: Path) -> None:
    running = world("masked", Fate())
    secrets = [word.encode() for word in SECRET_WORDS]
    keep = {}
    real = shutil.rmtree

    def copied(path, **options):
        for file in Path(path).rglob("*"):
            if file.is_file():
                keep[str(file)] = file.read_bytes()
        real(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", copied)
        running.run()
    assert sum("enclave/state" in name for name in keep) == 4
    own = {"party.keys", "device.key", "records.jsonl"}
    files = {
        str(path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in own
    }
    for name, data in (files | keep).items():
        assert not any(secret in data for secret in secrets), name
