"""Personal adapters of a whole job: who gets them, when, and what nobody else can see of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from small import CUSTOMERS, write_job
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.job import Job
from fedark.enclave import trainer
from fedark.enclave.personal import open_personal, seal_personal
from fedark.enclave.trainer import TrainerSession
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, InputError, ProtocolError, Refused
from fedark.foundation.keys import KEMS, HpkeKey, PartyKeys
from fedark.links.link import Passed
from fedark.simulation import simulate
from fedark.v1 import enclave_pb2 as pb
from fedark.v1 import stage_pb2

BASELINE = "models.0.training.baseline_epochs=2"
MASKED = ('protection.mode="masked"', "protection.minimum_cohort=3")


class Outcome:
    """A job that was run, all that passed, and what hostile hosts were answered."""

    def __init__(self, folder: Path, *terms: str) -> None:
        self.passed: list[Passed] = []
        path = write_job(folder / "job", rounds=1, records=24)
        job = Job.load(path, (BASELINE, *terms))
        with simulate(job, folder / "work", tap=self.passed.append) as running:
            self.report = running.run()
            self.run_id = running.run_id
        self.parties = folder / "work" / "parties"

    def folder(self, party: str) -> Path:
        return self.parties / party / "runs" / self.run_id

    def adapter(self, party: str, kind: str) -> dict[str, Any]:
        folder = self.folder(party) / f"{kind}-tiny"
        return {
            **load_file(folder / "adapter_model.safetensors"),
            **load_file(folder / "head.safetensors"),
        }

    def local(self, party: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder(party) / "local.json").read_text())["tiny"]
        return found

    def sizes(self, stage: str) -> list[tuple[str, int]]:
        """Of the messages that customers sent for a stage: ciphertexts, which hold no other party's
        random numbers of another length.
        """
        return sorted(
            (message.party, len(stage_pb2.StageReply.FromString(message.data).SerializeToString()))
            for message in self.passed
            if message.stage == stage
            and message.direction == "reply"
            and message.party in CUSTOMERS
        )


REFUSED: dict[str, str] = {}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """A job in which hosts first ask for personal adapters too early and with wrong deliveries."""
    give = TrainerSession._personal_adapters

    def attacked(self: TrainerSession, call: pb.Personal) -> pb.Reply:
        altered = bytes([call.delivery[0] ^ 1]) + call.delivery[1:]
        for what, delivery in (("altered", altered), ("none", b""), ("cut", call.delivery[:90])):
            REFUSED[what] = said_of(lambda d=delivery: give(self, pb.Personal(delivery=d)))
        own, self._base = self._base, bytes(48)
        REFUSED["another state"] = said_of(lambda: give(self, call))
        self._base = own
        party, self.config.party = self.config.party, "maker"
        REFUSED["another party's"] = said_of(lambda: give(self, call))
        self.config.party = party
        return give(self, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerSession, "_personal_adapters", attacked)
        yield Outcome(tmp_path_factory.mktemp("personal"))


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """The same job in which all personal training fails."""

    def fails(*args: Any, **named: Any) -> Any:
        raise InputError("Training diverged.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_personal", fails)
        yield Outcome(tmp_path_factory.mktemp("failing"))


def said_of(call: Any) -> str:
    try:
        call()
    except FedarkError as error:
        return error.what
    return "not refused"


def test_each_customer_and_nobody_else_gets_its_own_in_the_form_of_the_shared_one(
    outcome: Outcome,
) -> None:
    for name in CUSTOMERS:
        mine, shared = outcome.adapter(name, "personal"), outcome.adapter(name, "adapter")
        assert {key: value.shape for key, value in mine.items()} == {
            key: value.shape for key, value in shared.items()
        }
    for name in ("maker", "pool"):
        assert not list(outcome.parties.glob(f"{name}/**/personal*"))


def test_it_never_crosses_to_the_host(outcome: Outcome) -> None:
    crossed = b"".join(message.data for message in outcome.passed)
    for name in CUSTOMERS:
        mine, shared = outcome.adapter(name, "personal"), outcome.adapter(name, "adapter")
        for key, value in mine.items():
            if not np.array_equal(value, shared[key]):
                assert value.tobytes()[:64] not in crossed


def test_its_customer_reads_what_it_gains(outcome: Outcome) -> None:
    for name in CUSTOMERS:
        local = outcome.local(name)
        own = local["personal"]["sets"]["own"]
        assert own["right"].keys() == {"before", "alone", "together", "personal"}
        assert own["right"]["personal"] == local["personal/own"][0]
        assert own["right"]["alone"] == local["local/own"][0]
        assert own["right"]["together"] == local["federated/own"][0]
        pair = own["personal against"]["alone"]
        assert pair["won"] - pair["lost"] == own["right"]["personal"] - own["right"]["alone"]
        assert pair["low"] <= pair["high"]


def test_everybody_reads_only_how_many_customers_gained(outcome: Outcome) -> None:
    gain = outcome.report["models"]["tiny"]["gain"]
    verdicts = [
        outcome.local(name)["personal"]["sets"]["own"]["personal against"][other]["verdict"]
        for other in ("alone", "together")
        for name in CUSTOMERS
    ]
    assert sum(gain["alone"].values()) == sum(gain["together"].values()) == len(CUSTOMERS)
    assert sum(counts["gained"] for counts in gain.values()) == verdicts.count("gained")
    assert sum(counts["lost"] for counts in gain.values()) == verdicts.count("lost")
    assert "chosen" not in json.dumps(outcome.report)


@pytest.mark.attack("personal adapters without the delivery that they were made from")
def test_attack_a_delivery_of_another_state_party_or_none_frees_no_personal_adapter(
    outcome: Outcome, refusal: Callable[[str], None]
) -> None:
    assert outcome.folder("north").exists()
    for said in REFUSED.values():
        refusal(said)
    assert REFUSED["another state"].startswith("Another shared adapter was delivered")
    assert "not refused" not in REFUSED.values(), REFUSED
    assert REFUSED.keys() == {"altered", "none", "cut", "another state", "another party's"}


def test_personal_training_that_fails_ends_nothing_and_leaves_the_shared_adapter(
    failing: Outcome,
) -> None:
    assert failing.report["passed_over"] == {}
    for name in CUSTOMERS:
        mine, shared = failing.adapter(name, "personal"), failing.adapter(name, "adapter")
        assert all(np.array_equal(mine[key], shared[key]) for key in shared)
        assert failing.local(name)["personal"]["chosen"] == "together"


@pytest.mark.attack("the size of messages as a sign of which adapter was chosen")
def test_attack_no_size_of_a_message_tells_which_adapter_was_chosen(
    outcome: Outcome, failing: Outcome, refusal: Callable[[str], None]
) -> None:
    chosen = {outcome.local(name)["personal"]["chosen"] for name in CUSTOMERS}
    assert chosen != {"together"}, "else there is nothing to tell apart"
    for stage in ("load", "round", "evaluate", "deliver"):
        assert outcome.sizes(stage) == failing.sizes(stage), stage
    assert [(m.stage, m.party, m.direction) for m in sorted(outcome.passed, key=order)] == [
        (m.stage, m.party, m.direction) for m in sorted(failing.passed, key=order)
    ]
    refusal("messages of one order, kind and length whatever is chosen")


def order(message: Passed) -> tuple[str, str, str]:
    return message.stage, message.party, message.direction


@pytest.mark.slow
def test_under_masks_the_counts_are_lanes_of_the_sum(tmp_path: Path) -> None:
    found = Outcome(tmp_path, *MASKED)
    gain = found.report["models"]["tiny"]["gain"]
    assert sum(gain["alone"].values()) == len(CUSTOMERS)
    total = sum(found.local(name)["personal/own"][0] for name in CUSTOMERS)
    assert found.report["models"]["tiny"]["metrics"]["personal/own"]["correct"] == total


@pytest.mark.slow
def test_under_a_mechanism_nothing_of_it_leaves_but_its_customer_has_it(tmp_path: Path) -> None:
    found = Outcome(
        tmp_path,
        *MASKED,
        'privacy.mechanism="customer-level"',
        "privacy.epsilon=8.0",
        "privacy.accept_noise=true",
    )
    tiny = found.report["models"]["tiny"]
    assert tiny["gain"] == {}
    assert not [key for key in tiny["metrics"] if key.startswith("personal/")]
    assert all((found.folder(name) / "personal-tiny").is_dir() for name in CUSTOMERS)
    assert "personal/own" in found.local("north")


def test_it_can_be_sealed_to_a_key_that_its_customer_alone_holds(
    outcome: Outcome, tmp_path: Path
) -> None:
    terms = {"contract": bytes(48), "run_id": outcome.run_id}
    vector = np.arange(3, dtype=np.float32)
    for kem in KEMS:
        key, other = HpkeKey(kem=kem), HpkeKey(kem=kem)
        sealed = seal_personal({"tiny": vector.tobytes()}, key.public, **terms)
        assert vector.tobytes() not in sealed
        assert open_personal(sealed, key, **terms)["tiny"].tolist() == vector.tolist()
        for wrong, about in ((other, terms), (key, terms | {"run_id": "0" * 32})):
            with pytest.raises(Refused, match="does not open"):
                open_personal(sealed, wrong, **about)
    with pytest.raises(ProtocolError, match="of no KEM"):
        seal_personal({}, b"short", **terms)
    for malformed in ({"tiny": 1}, {"tiny": b"123"}, []):
        with pytest.raises(ProtocolError, match="malformed"):
            open_personal(canonical.encode(malformed), None, **terms)


def test_a_customer_with_such_a_key_has_only_the_sealed_adapter_on_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = PartyKeys()
    keys.save(tmp_path / "key")
    path = write_job(tmp_path / "job", rounds=1, records=24)
    with simulate(Job.load(path), tmp_path / "work") as running:
        north = running.nodes["north"]
        monkeypatch.setattr(
            north, "settings", replace(north.settings, personal_key=keys.hpke.public)
        )
        running.run()
        run_id = running.run_id
    folder = tmp_path / "work" / "parties" / "north" / "runs" / run_id
    assert not list(folder.glob("personal-*"))
    assert list(folder.parents[2].glob(f"south/runs/{run_id}/personal-tiny"))
    node = str(folder.parents[1])
    done = CliRunner().invoke(
        app, ["node", "unseal", node, "small", str(tmp_path / "key"), "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "personal-tiny" / "adapter_model.safetensors").is_file()


def test_who_does_not_get_the_shared_adapter_gets_no_personal_one(tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", rounds=1, records=24, extra='[deliver]\nto = ["north"]\n')
    with simulate(Job.load(path), tmp_path / "work") as running:
        running.run()
    assert not list((tmp_path / "work").glob("parties/*/runs/*/personal-*"))
