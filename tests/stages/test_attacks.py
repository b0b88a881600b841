"""A relay that lies and enclaves that are not what they should be: each is refused, and the refusal
says why.

The relay may alter, swap, repeat and withhold every message; a host may start any program as its
enclave. In no case does a weight key, a record or an adapter reach the wrong place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from small import HostileRelay

from fedark.attestation.claims import RUN_CONFIG, SandboxFacts
from fedark.attestation.platforms.simulated import SimulatedAttester, SimulatedDevice, SimulatedRoot
from fedark.contract.contract import now
from fedark.contract.job import Job
from fedark.enclave.roles import create
from fedark.foundation.errors import ContractError, FedarkError, ProtocolError
from fedark.foundation.files import write_atomic
from fedark.links.hostlink import AggregatorClient
from fedark.measurement import run_config_register
from fedark.operate.party import DEVICE
from fedark.simulation import InProcessEnclave, Simulation, simulate
from fedark.stages.consent import Consent
from fedark.stages.coordinator import coordinate
from fedark.stages.node import LOG
from fedark.translog.log import read_log
from fedark.v1 import enclave_pb2, stage_pb2

Change = Callable[[str, Any], None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run_with(
    running: Simulation,
    change: Callable[[str, stage_pb2.StageRequest], None] | None = None,
    reply: Change | None = None,
) -> str:
    """Run the job through a relay that changes requests and replies; returns all that is said about
    it.
    """

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        wanted = reply if is_reply else change
        if wanted is None:
            return data
        message = stage_pb2.StageReply() if is_reply else stage_pb2.StageRequest()
        message.ParseFromString(data)
        wanted(party, message)
        return bytes(message.SerializeToString())

    try:
        report = coordinate(HostileRelay(running, alter), running.host.handle)
    except FedarkError as error:
        return str(error)
    return json.dumps(report["passed_over"])


def adapters(work: Path) -> list[Path]:
    return list(work.glob("parties/*/runs/*/adapter-*"))


@pytest.fixture
def running(small_job: Path, tmp_path: Path) -> Any:
    with simulate(Job.load(small_job), tmp_path / "work") as simulation:
        yield simulation


# -- the relay


def test_an_update_that_the_relay_alters_is_dropped(running: Simulation) -> None:
    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if party == "east" and message.HasField("round"):
            update = bytearray(message.round.protected_update)
            update[-1] ^= 1
            message.round.protected_update = bytes(update)

    assert "signature of the trainer enclave of east" in run_with(running, reply=reply)


def test_an_update_of_an_earlier_round_does_not_count_again(running: Simulation) -> None:
    seen: dict[str, bytes] = {}

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if party == "east" and message.HasField("round"):
            message.round.protected_update = seen.setdefault(
                "first", message.round.protected_update
            )

    assert "does not verify" in run_with(running, reply=reply)


def test_an_update_of_one_customer_does_not_count_as_anothers(running: Simulation) -> None:
    seen: dict[str, bytes] = {}

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if message.HasField("round"):
            seen[party] = message.round.protected_update
            if party == "east":
                message.round.protected_update = seen["north"]

    assert "does not verify" in run_with(running, reply=reply)


def test_a_stale_global_adapter_is_refused_by_the_trainer(running: Simulation) -> None:
    seen: dict[int, bytes] = {}

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round"):
            seen[message.round.round] = message.round.state
            if message.round.round == 2 and party == "east":
                message.round.state = seen[1]

    assert "signature of the aggregator enclave" in run_with(running, change)


def test_a_round_is_not_trained_twice(running: Simulation) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round") and message.round.round == 2:
            message.round.round = 1

    said = run_with(running, change)
    assert "signature of the aggregator enclave" in said or "no round is trained twice" in said


def test_a_contract_that_the_relay_alters_is_not_signed(
    running: Simulation, tmp_path: Path
) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("enrol") and party == "north":
            other = running.federation.contract.model_copy(update={"rounds": 9})
            message.enrol.contract = other.encode()

    said = run_with(running, change)
    assert "the operator of north has not approved it" in said
    assert not adapters(tmp_path / "work")


def test_a_contract_with_a_strangers_key_is_refused_with_every_problem(running: Simulation) -> None:
    contract = running.federation.contract
    aggregator = contract.aggregator.model_copy(update={"signing_key": "ab" * 32})
    parties = tuple(
        aggregator if party.role == "aggregator" else party for party in contract.parties
    )
    terms = contract.attestation.model_copy(update={"simulated_root": "cd" * 32})
    other = contract.model_copy(update={"parties": parties, "attestation": terms})
    consent = Consent(running.federation.folder("north"))
    with pytest.raises(ContractError, match="pool has other keys"):
        consent.approve(other)
    write_atomic(consent._path(other, "approved"), b"a hasty operator: the node still knows better")

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("enrol") and party == "north":
            message.enrol.contract = other.encode()

    said = run_with(running, change)
    assert "the keys of pool are not those in the roster of north" in said
    assert "simulated platform root is not the one that this node trusts" in said


def test_evidence_of_another_customers_enclave_gets_no_key(running: Simulation) -> None:
    seen: dict[str, bytes] = {}

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if message.HasField("attest"):
            seen[party] = message.attest.provider_evidence
            if party == "east":
                message.attest.provider_evidence = seen["north"]

    said = run_with(running, reply=reply)
    assert "release: Evidence of the trainer of east was refused" in said


def test_a_provider_nonce_that_the_relay_chose_gets_no_key(running: Simulation) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("attest") and party == "east":
            message.attest.provider_nonce = bytes(32)

    assert "release: Evidence of the trainer of east was refused" in run_with(running, change)


def test_evidence_that_was_used_once_gets_no_second_key(running: Simulation) -> None:
    maker = running.nodes["maker"]
    requests: list[bytes] = []

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        message = stage_pb2.StageRequest()
        if party == "maker" and not is_reply:
            message.ParseFromString(data)
            if message.HasField("release"):
                requests.append(data)
        return data

    coordinate(HostileRelay(running, alter), running.host.handle)
    again = stage_pb2.StageRequest()
    again.ParseFromString(requests[0])
    del again.release.trainer_evidence[
        "south"
    ]  # another request with the same evidence, so not a repeated one
    reply = stage_pb2.StageReply()
    reply.ParseFromString(maker.handle(again.SerializeToString()))
    assert not reply.release.grants, "no key for used evidence"
    assert reply.HasField("fault") or set(reply.release.refused) == {"north", "east"}


def test_an_attestation_that_is_brought_again_late_gets_the_answer_that_it_got(
    running: Simulation,
) -> None:
    east = running.nodes["east"]
    attested: list[bytes] = []
    late: list[bytes] = []

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        if party == "east":
            message = (
                stage_pb2.StageReply.FromString(data)
                if is_reply
                else stage_pb2.StageRequest.FromString(data)
            )
            stage = message.WhichOneof("body")
            if stage == "attest":
                attested.append(data)
            elif stage == "deliver" and not is_reply:
                late.append(east.handle(attested[0]))
        return data

    coordinate(HostileRelay(running, alter), running.host.handle)
    assert late == attested[1:]


def test_a_grant_for_another_enclave_does_not_open(running: Simulation) -> None:
    seen: dict[str, stage_pb2.Grants] = {}

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load"):
            seen[party] = stage_pb2.Grants()
            seen[party].CopyFrom(message.load.grants)
            if party == "east":
                message.load.grants.CopyFrom(seen["north"])

    said = run_with(running, change)
    assert (
        "is for another party or run" in said
    )  # the node sees it first: these are not its entries of the provider's log


def test_a_group_key_from_the_relay_is_refused(running: Simulation) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "east":
            message.load.group_grant = bytes(64) + message.load.group_grant[64:]

    assert "signature of the aggregator enclave" in run_with(running, change)


def test_an_adapter_delivered_by_the_relay_is_not_stored(
    running: Simulation, tmp_path: Path
) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("deliver"):
            message.deliver.delivery = bytes(64) + message.deliver.delivery[64:]

    run_with(running, change)
    assert not adapters(tmp_path / "work")


@pytest.mark.parametrize("change", ["altered", "unsigned", "another signature"])
def test_a_report_that_the_relay_changes_is_stored_by_nobody(
    running: Simulation, change: str
) -> None:
    def request(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("deliver") and party == "north":
            if change == "altered":
                message.deliver.report = message.deliver.report.replace(
                    b'"correct": ', b'"correct": 1'
                )
            elif change == "unsigned":
                message.deliver.report_signature = b""
            else:
                message.deliver.report_signature = bytes(64)

    run_with(running, request)
    assert not list(running.federation.folder("north").glob("runs/*/report.json"))
    assert not list(running.federation.folder("north").glob("runs/*/adapter-*"))
    assert list(running.federation.folder("east").glob("runs/*/report.json"))


def test_the_aggregators_host_signs_no_report_of_another_run(running: Simulation) -> None:
    client = AggregatorClient(running.host.handle)
    client.open()
    digest = running.federation.contract.digest().hex()
    client.sign(json.dumps({"contract": digest, "run_id": running.run_id}).encode())
    for report in (
        {"contract": digest, "run_id": "another"},
        {"contract": "00" * 48, "run_id": running.run_id},
        [1],
        {},
    ):
        with pytest.raises(ProtocolError):
            client.sign(json.dumps(report).encode())


def test_stages_out_of_order_open_nothing(running: Simulation) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("attest") and party == "east":
            message.load.SetInParent()

    said = run_with(running, change)
    assert "not proven yet" in said


# -- enclaves that are not what they should be


class Impostor(InProcessEnclave):
    """An enclave whose launcher lies in one respect."""

    def __init__(
        self,
        role: str,
        run_config: bytes,
        device: SimulatedDevice,
        registers: Mapping[str, bytes],
        **facts: Any,
    ) -> None:
        platform = facts.pop("platform", "simulated")
        bend = facts.pop("bend", lambda report, nonce: (report, nonce))
        keep = facts.pop("keep", None)
        measured = {
            **registers,
            RUN_CONFIG: run_config_register(run_config),
            **facts.pop("changed", {}),
        }
        attester = SimulatedAttester(
            device, measurements=measured, sandbox=SandboxFacts("none"), **facts
        )

        def quote(report: bytes, nonce: bytes) -> tuple[str, bytes]:
            token = attester.quote(*bend(report, nonce))
            if keep is not None:
                keep.append(token)
                token = keep[0]
            return platform, token

        self._session = create(run_config, quote)
        self.call(enclave_pb2.Call(start=enclave_pb2.Start(run_config=run_config)))


def with_impostor(
    running: Simulation,
    make: Callable[[str, bytes, SimulatedDevice, Mapping[str, bytes]], InProcessEnclave],
) -> str:
    """Run the job with such an enclave at "east"; returns what is said about it, after checking
    that nothing reached it.
    """
    node = running.nodes["east"]
    device = SimulatedDevice.load(running.federation.folder("east") / DEVICE)
    registers = node.settings.reference["trainer"]
    node.settings.__dict__["start_enclave"] = lambda role, config, checkpoint=b"": make(
        role, config, device, registers
    )
    said = run_with(running)
    log = read_log(
        running.federation.folder("maker") / LOG,
        running.nodes["maker"].settings.keys.signing.public,
    )
    assert not [
        one
        for one in log.entries
        if one.entry.facts["party"] == "east" and one.entry.kind != "refusal"
    ]
    return said


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "changed file": ({"changed": {"application": bytes(48)}}, "application"),
    "changed runtime": ({"changed": {"runtime": bytes(48)}}, "runtime"),
    "another run configuration": ({"changed": {RUN_CONFIG: bytes(48)}}, "run configuration"),
    "debug mode": ({"debug": True}, "debug"),
    "low security version": ({"svn": 0}, "security version"),
    "swapped keys": ({"bend": lambda report, nonce: (bytes(64), nonce)}, "report data"),
    "wrong nonce in the token": ({"bend": lambda report, nonce: (report, bytes(32))}, "nonce"),
    "old evidence": ({"clock": lambda: now() - timedelta(days=2)}, "stale"),
    "unknown platform": ({"platform": "nitro"}, "does not admit evidence of platform"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_enclave_gets_no_key_and_no_data_with(case: str, running: Simulation) -> None:
    facts, reason = CASES[case]
    said = with_impostor(
        running,
        lambda role, config, device, registers: Impostor(role, config, device, registers, **facts),
    )
    assert "attest: Evidence of the trainer of east was refused" in said
    assert reason in said


def test_an_enclave_on_a_device_of_a_foreign_root_gets_nothing(running: Simulation) -> None:
    foreign = SimulatedRoot(now=now()).issue(now=now())
    said = with_impostor(
        running, lambda role, config, device, registers: Impostor(role, config, foreign, registers)
    )
    assert "Evidence of the trainer of east was refused" in said


def test_an_enclave_that_repeats_its_first_evidence_gets_nothing(running: Simulation) -> None:
    tokens: list[bytes] = []
    said = with_impostor(
        running,
        lambda role, config, device, registers: Impostor(
            role, config, device, registers, keep=tokens
        ),
    )
    assert "Evidence of the trainer of east was refused" in said
    assert len(tokens) > 1


def test_an_aggregator_that_is_not_what_the_contract_names_gets_no_record(
    running: Simulation, tmp_path: Path
) -> None:
    device = SimulatedDevice.load(running.federation.folder("pool") / DEVICE)
    registers = {
        **running.nodes["north"].settings.reference["aggregator"],
        "application": bytes(48),
    }
    running.host._start_enclave = lambda role, config, checkpoint=b"": Impostor(
        role, config, device, registers
    )
    said = run_with(running)
    assert "Evidence of the aggregator of pool was refused" in said
    assert "application" in said
    assert not adapters(tmp_path / "work")
