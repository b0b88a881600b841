"""The provider's log in a job: everyone finds its own entries there, and a log that is not one log
stops the job.

The relay may withhold, replay and swap; the provider may rewind its log or show two of them.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CUSTOMERS, HostileRelay, write_job

from fedark.bench._lies import lies, signed
from fedark.contract.job import Job
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError
from fedark.foundation.keys import PartyKeys
from fedark.operate.party import KEYS
from fedark.report.verify import DossierRefused, verify_dossier
from fedark.simulation import Simulation, simulate
from fedark.simulation.local import Federation
from fedark.stages.coordinator import coordinate
from fedark.stages.dossier import DOSSIER
from fedark.stages.node import LOG, SEEN_LOGS
from fedark.translog.head import TreeHead
from fedark.translog.log import LogContents, TransparencyLog, read_log
from fedark.translog.memory import HeadMemory
from fedark.translog.update import make_update
from fedark.v1 import stage_pb2

Change = Callable[[str, Any], None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Simulation]:
    job = write_job(tmp_path / "job", rounds=1, records=12, minimum=2)
    with simulate(Job.load(job), tmp_path / "work") as simulation:
        yield simulation


@contextmanager
def again(federation: Federation) -> Iterator[Simulation]:
    """The next run of the same parties, whose processes were restarted."""
    for used in federation.work.glob("parties/*/consent/*.used"):
        used.unlink()  # as if a new contract had been approved for it
    (federation.folder("pool") / "run").unlink()  # and its job waited at the aggregator's host
    simulation = Simulation(federation)
    try:
        yield simulation
    finally:
        simulation.close()


def run(simulation: Simulation, request: Change | None = None, reply: Change | None = None) -> str:
    """Run the job through a relay that changes requests and replies; returns all that is said about
    it.
    """

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        message = stage_pb2.StageReply() if is_reply else stage_pb2.StageRequest()
        message.ParseFromString(data)
        change = reply if is_reply else request
        if change is not None:
            change(party, message)
        return bytes(message.SerializeToString())

    try:
        return json.dumps(
            coordinate(HostileRelay(simulation, alter), simulation.host.handle)["passed_over"]
        )
    except FedarkError as error:
        return str(error)


def log_of(federation: Federation, party: str) -> LogContents:
    return read_log(federation.folder(party) / LOG, key_of(federation, party))


def key_of(federation: Federation, party: str) -> bytes:
    member = federation.contract.party(party)
    assert member is not None
    return bytes.fromhex(member.signing_key)


def seen_by(federation: Federation, party: str) -> TreeHead | None:
    return HeadMemory(federation.folder(party) / SEEN_LOGS).last(
        key_of(federation, "maker"), by="maker"
    )


def test_the_log_holds_every_attestation_and_release_and_everyone_has_seen_the_same_head(
    running: Simulation,
) -> None:
    assert run(running) == "{}"
    federation = running.federation
    log = log_of(federation, "maker")
    kinds = [(one.entry.kind, one.entry.facts["party"]) for one in log.entries]
    assert kinds == [
        ("attestation", "pool"),
        *((kind, name) for name in CUSTOMERS for kind in ("attestation", "release")),
    ]
    for name in (*CUSTOMERS, "pool"):
        assert seen_by(federation, name) == log.head
    for name in CUSTOMERS:
        own = [
            (one.entry.kind, one.entry.facts["party"]) for one in log_of(federation, name).entries
        ]
        assert own == [("attestation", "pool"), ("attestation", name)]
    with again(federation) as second:
        assert run(second) == "{}"
    grown = log_of(federation, "maker")
    assert len(grown.entries) == 14
    assert log.head is not None
    grown.check(log.head)
    assert [seen_by(federation, name) for name in (*CUSTOMERS, "pool")] == [grown.head] * 4


def test_a_refused_enclave_is_in_the_log_with_the_digest_of_the_reasons(
    running: Simulation,
) -> None:
    def request(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("release"):
            message.release.trainer_evidence["east"] = message.release.trainer_evidence["north"]

    said = run(running, request)
    assert "east" in said
    refusals = [
        one for one in log_of(running.federation, "maker").entries if one.entry.kind == "refusal"
    ]
    assert [(one.entry.facts["party"], one.entry.facts["asked"]) for one in refusals] == [
        ("east", "admission")
    ]
    assert "it is the enclave of north" in refusals[0].note


def wrong_nonce(party: str, message: stage_pb2.StageRequest) -> None:
    if message.HasField("attest") and party == "east":
        message.attest.provider_nonce = bytes(32)


def refusal_of(federation: Federation, party: str) -> dict[str, Any]:
    (path,) = federation.folder(party).glob("runs/*/refused.json")
    return json.loads(path.read_text())


def test_a_customer_whose_enclave_was_refused_gets_the_proof_that_this_is_logged(
    running: Simulation,
) -> None:
    assert "east" in run(running, wrong_nonce)
    federation = running.federation
    told = refusal_of(federation, "east")
    (refused,) = [one for one in log_of(federation, "maker").entries if one.entry.kind == "refusal"]
    assert (told["by"], told["logged"], told["entry"]) == (
        "maker",
        refused.index,
        refused.entry.encode().hex(),
    )
    assert "not issued here" in told["what"]
    assert seen_by(federation, "east") is not None
    for name in ("north", "south"):
        assert not list(federation.folder(name).glob("runs/*/refused.json"))
    (path,) = federation.folder("maker").glob(f"runs/*/{DOSSIER}")
    data = path.read_bytes()
    proven = [one.what for one in verify_dossier(data).proven]
    assert "the enclave of east was refused" in proven
    key = PartyKeys.load(federation.folder("pool") / KEYS).signing
    told = [
        lie
        for lie in lies(canonical.decode(data, max_bytes=1 << 28)["body"])
        if lie.path[:2] == ("proofs", "refused")
    ]
    assert len(told) > 5
    for lie in told:
        with pytest.raises(DossierRefused, match=r"refus|provider's log"):
            verify_dossier(signed(key, lie.body))


@pytest.mark.parametrize("change", ["withheld", "cut", "of another customer"])
def test_a_refusal_without_a_proof_of_its_entry_is_kept_as_unproven(
    running: Simulation, change: str
) -> None:
    def request(party: str, message: stage_pb2.StageRequest) -> None:
        wrong_nonce(party, message)
        if message.HasField("abort") and party == "east":
            if change == "withheld":
                message.abort.refused.ClearField("log")
            elif change == "cut":
                message.abort.refused.log = message.abort.refused.log[:-1]
            else:
                message.abort.refused.log = seen["north"]
        if message.HasField("load"):
            seen[party] = message.load.grants.log

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if message.HasField("release"):
            seen["north"] = message.release.grants["north"].log

    seen: dict[str, bytes] = {}
    run(running, request, reply)
    assert refusal_of(running.federation, "east")["logged"] is None


def test_an_aggregator_whose_enclave_was_refused_finds_that_in_the_log(running: Simulation) -> None:
    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if party == "maker" and message.HasField("enrol"):
            message.enrol.nonces["node"] = bytes(32)

    lines: list[str] = []
    running.host._on_progress = lines.append
    assert "Evidence of the aggregator of pool was refused" in run(running, reply=reply)
    assert "maker refused the aggregator enclave; entry 0 of its log says so" in lines
    assert seen_by(running.federation, "pool") is not None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda load: load.grants.ClearField("log"), "The word of maker's log was refused"),
        (
            lambda load: setattr(load.grants, "log", load.grants.log[:-1]),
            "The word of maker's log was refused",
        ),
        (lambda load: load.grants.by_model.update(tiny=b""), "grant or receipt is malformed"),
    ],
)
def test_no_record_is_opened_to_a_trainer_whose_release_the_log_does_not_show(
    running: Simulation, change: Callable[[Any], None], why: str
) -> None:
    def request(party: str, message: stage_pb2.StageRequest) -> None:
        if party == "east" and message.HasField("load"):
            change(message.load)

    assert why in run(running, request)
    assert seen_by(running.federation, "north") is not None
    assert why == "grant or receipt is malformed" or seen_by(running.federation, "east") is None


def test_a_provider_that_logs_nothing_for_an_enclave_gets_none_of_its_customers_records(
    running: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker: Any = running.nodes["maker"]
    show = maker._show_log

    def without_the_release(run_id: str, run_: Any, reply: Any, remembered: Any) -> None:
        show(run_id, run_, reply, remembered)
        evidence = run_.trainers["east"].evidence_digest
        reply.grants["east"].log = make_update(
            maker._log,
            maker.settings.keys.signing,
            party="east",
            run_id=run_id,
            head=maker._log.head(),
            since=None,
            indexes=[maker._admissions[evidence]],
        )

    monkeypatch.setattr(maker, "_show_log", without_the_release)
    assert json.loads(run(running)) == {
        "east": "load: The log does not show the release that it must hold."
    }


def test_a_log_that_is_shown_differently_to_two_customers_stops_every_update(
    running: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maker: Any = running.nodes["maker"]
    show, key = maker._show_log, maker.settings.keys.signing

    def forked(run_id: str, run_: Any, reply: Any, remembered: Any) -> None:
        show(run_id, run_, reply, remembered)
        other = TransparencyLog(
            tmp_path / "fork.sqlite", key
        )  # what was released to north is not in it
        for one in maker._log.verify().entries:
            hidden = one.entry.kind == "release" and one.entry.facts["party"] == "north"
            other.append(other.entry(0) if hidden else one.entry)
        own = [one.index for one in other.verify().entries if one.entry.facts["party"] == "east"]
        reply.grants["east"].log = make_update(
            other, key, party="east", run_id=run_id, head=other.head(), since=None, indexes=own
        )

    monkeypatch.setattr(maker, "_show_log", forked)
    said = run(running)
    assert "customers are left" in said
    assert "The log of maker was forked or rewound: " in said
    assert "was shown another tree of 7 entries" in said
    for name in CUSTOMERS:
        (proof,) = (running.federation.folder(name) / "forked-logs").iterdir()
        statements = json.loads(proof.read_bytes())
        heads = [
            TreeHead.verify(bytes.fromhex(statements[one]), key.public, by="maker")
            for one in ("earlier", "later")
        ]
        assert heads[0].size == heads[1].size
        assert heads[0].root != heads[1].root
    assert not list(tmp_path.glob("work/parties/*/runs/*/adapter-*"))


def test_an_aggregator_ends_the_job_of_a_provider_whose_log_does_not_show_its_enclave(
    running: Simulation,
) -> None:
    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if message.HasField("release"):
            message.release.log = message.release.grants["east"].log

    assert "is for another party or run" in run(running, reply=reply)


def test_an_aggregator_that_keeps_the_views_of_the_log_back_gets_no_update(
    running: Simulation,
) -> None:
    def request(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round"):
            message.round.ClearField("log_views")

    assert "Only 1 customers are known to have been shown one and the same log of maker" in run(
        running, request
    )


def test_a_provider_whose_log_was_rewound_learns_it_from_its_customers_and_releases_nothing(
    running: Simulation,
) -> None:
    assert run(running) == "{}"
    federation = running.federation
    database = sqlite3.connect(federation.folder("maker") / LOG)
    with database:
        database.execute("DELETE FROM log WHERE number > 2")
    database.close()
    with again(federation) as second:
        said = run(second)
        assert "A log was rewound: its owner signed a head over 7 entries" in said
        assert not second.nodes["maker"]._runs  # type: ignore[attr-defined]
    assert not [
        one for one in log_of(federation, "maker").entries[3:] if one.entry.kind == "release"
    ]


def test_a_relay_that_hides_the_remembered_heads_does_not_hide_a_rewound_log(
    running: Simulation,
) -> None:
    assert run(running) == "{}"
    federation = running.federation
    before = seen_by(federation, "east")
    (federation.folder("maker") / LOG).unlink()  # the provider starts its log anew

    def request(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("release"):
            message.release.ClearField("log_heads")

    with again(federation) as second:
        said = run(second, request)
    assert "two trees of 7 entries" in said
    assert seen_by(federation, "east") == before


def test_an_old_word_of_the_log_that_the_relay_replays_is_refused(running: Simulation) -> None:
    old: dict[str, bytes] = {}

    def keep(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load"):
            old[party] = message.load.grants.log

    def replay(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "east":
            message.load.grants.log = old["east"]

    assert run(running, keep) == "{}"
    with again(running.federation) as second:
        assert "east" in (said := run(second, replay))
        assert "is for another party or run" in said
