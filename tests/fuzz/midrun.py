"""Targets of nodes, hosts, enclaves and the coordinator: what comes in the midst of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from engine import Target
from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.enclave.checkpoint import Sealer
from fedark.enclave.session import RunConfig
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError
from fedark.foundation.keys import SigningKey
from fedark.privacy.ledger import Head
from fedark.stages.aggregator import STAGES
from fedark.stages.budget import read_head, show_head
from fedark.stages.report import read_report, sign_report
from fedark.translog.entry import Entry
from fedark.translog.log import TransparencyLog
from fedark.translog.update import make_update
from fedark.tuning.weights import tensors
from fedark.v1 import broker_pb2, enclave_pb2, node_pb2, stage_pb2

NOW = datetime(2030, 6, 1, 12, 0, tzinfo=UTC)
Made = Iterator[Target]


def parties(world: Any) -> Made:
    contract = world.contract
    encoded = contract.encode()
    yield Target("contract", [encoded], lambda data: Contract.decode(data).encode(), "exact")
    config = RunConfig(role="trainer", party="north", contract=contract, run_id="run-1").encode()
    yield Target(
        "run configuration", [config], lambda data: RunConfig.decode(data).encode(), "exact"
    )
    about = world.about()
    challenge = broker_pb2.BrokerChallengeRequest(about=about).SerializeToString()
    claim = broker_pb2.BrokerReleaseRequest(
        about=about, evidence=world.evidence
    ).SerializeToString()

    def ask(data: bytes) -> None:
        world.broker.challenge(broker_pb2.BrokerChallengeRequest.FromString(data))

    def release(data: bytes) -> None:
        world.broker.release(broker_pb2.BrokerReleaseRequest.FromString(data))

    expected = (FedarkError, DecodeError)  # gRPC answers the second by itself
    yield Target("broker challenge", [challenge], ask, "open", structure=False, expected=expected)
    # The evidence was spent: not one key may leave.
    yield Target(
        "broker release", [claim, claim[:-1]], release, "closed", structure=False, expected=expected
    )
    for name, recorded, party in (
        ("provider", world.recorded, "maker"),
        ("customer", world.recorded, "east"),
        ("customer, masked", world.recorded_masked, "east"),
    ):
        yield _stage_request(f"stage request, {name}", recorded, party)
    yield _aggregator_request(world)
    for masks, recorded in (("", world.recorded), (", masked", world.recorded_masked)):
        for role, party in (("trainer", "north"), ("aggregator", "pool")):
            yield _enclave_call(f"enclave call, {role}{masks}", recorded, party)
    yield from _sent_by_others(world)
    text = world.job_path.read_bytes()
    path = world.job_path.parent / "fuzzed.toml"

    def load(data: bytes) -> None:
        path.write_bytes(data)
        Job.load(path)

    words = (
        b"[",
        b"]]",
        b'"""',
        b" = ",
        b"\n",
        b"inf",
        b"nan",
        b"1979-05-27",
        b"0x",
        b"{",
        b"[attestation]\n",
        b"[[models]]\n",
    )
    yield Target("job file", [text], load, "open", structure=False, words=words)


def _sent_by_others(world: Any) -> Made:
    """What hosts bring to enclaves, nodes to the coordinator, customers to the provider, and the
    aggregator to all.
    """
    recorded = world.recorded
    contract = recorded.contract
    sealer = Sealer(lambda: bytes(32))
    state = recorded.enclaves["north"].session._snapshot()
    yield Target(
        "checkpoint",
        [sealer.seal(state)],
        lambda data: sealer.open(data, type(state)),
        "closed",
        structure=False,
    )
    yield Target(
        "checkpoint, sealed", [state.encode()], lambda data: type(state).decode(data), "open"
    )

    customer = contract.customers[0]
    key = SigningKey()
    own = customer.model_copy(update={"signing_key": key.public.hex()})
    head = Head(b"l" * 32, 7, b"h" * 48)
    shown = show_head(key, SimpleNamespace(head=head), "run-1", contract)

    def witnessed(data: bytes) -> Entry:
        return read_head(data, contract, "run-1", own, now=NOW)

    witnessed(shown)
    yield Target("ledger head", [shown], witnessed, "closed")
    body = canonical.decode(shown)[0]
    label = "fedark/ledger-head/1"
    yield Target(
        "ledger head, signed",
        [body],
        lambda data: witnessed(canonical.encode([data, key.sign(label, data)])),
        "open",
    )

    digest = contract.digest()
    signed_by = SimpleNamespace(
        aggregator=SimpleNamespace(name="pool", signing_key=key.public.hex()), digest=lambda: digest
    )
    text = stage_pb2.StageRequest.FromString(recorded.requests["east"]["deliver"]).deliver.report
    signature = sign_report(key, text, digest, recorded.run_id)
    words = (b'{"', b"null", b"1e999", b"[[[[", b"\\u0000", b"NaN", b"-1")

    def read(data: bytes) -> None:
        read_report(data[64:], data[:64], signed_by, recorded.run_id)

    def sign(data: bytes) -> None:
        read_report(
            data, sign_report(key, data, digest, recorded.run_id), signed_by, recorded.run_id
        )

    read(signature + text)
    yield Target("report", [signature + text], read, "closed", structure=False)
    yield Target("report, signed", [text], sign, "open", structure=False, words=words)

    yield _stage_reply("stage reply", recorded)
    yield _stage_reply("stage reply, masked", world.recorded_masked)

    base = world.job_path.parent / "base"
    weights = (base / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little")
    small = _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 8)
    rest = len(weights) - length
    yield Target(
        "safetensors",
        [small, _safetensors(json.loads(weights[8:length]), rest)],
        lambda data: tensors({"model.safetensors": data}),
        "open",
        structure=False,
        words=(
            b'"shape":[-1]',
            b'"F64"',
            b"1e999",
            b"[[[[",
            b"null",
            b'"__metadata__":1',
            b"18446744073709551616",
        ),
    )


def _safetensors(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def _stage_reply(name: str, recorded: Any) -> Target:
    """Each answer of a customer and of the provider, in the stage of the coordinator that asks for
    it.
    """
    replies = [
        stage[party]
        for party in ("east", "maker")
        for stage in recorded.replies.values()
        if party in stage
    ]
    coordinated = recorded.coordinated()
    for reply in replies:
        assert coordinated(reply)
    return Target(name, replies, coordinated, "open", structure=False, message=stage_pb2.StageReply)


def _enclave_call(name: str, recorded: Any, party: str) -> Target:
    """Each call of a whole run, made of an enclave that stands where that call finds it."""
    enclave = recorded.enclaves[party]

    def handle(data: bytes) -> None:
        with recorded.clock():
            enclave.handle(data)

    calls = list(enclave.calls.values())
    for data in calls:
        handle(data)
    expected = (FedarkError, DecodeError)
    return Target(
        name, calls, handle, "open", structure=False, expected=expected, message=enclave_pb2.Call
    )


def _stage_request(name: str, recorded: Any, party: str) -> Target:
    """Each stage of a whole run, brought to a node that stands where that stage finds it."""
    handle, requests = recorded.node(party), dict(recorded.requests[party])
    abort = stage_pb2.StageRequest.FromString(requests["enrol"])
    abort.abort.CopyFrom(
        stage_pb2.AbortRequest(reason="x", refused=stage_pb2.StageFault(code="Refused", what="x"))
    )
    requests["abort"] = abort.SerializeToString()
    if (
        "release" in requests
    ):  # each trainer is looked at alone, and all alike: with one of them more is tried
        one = stage_pb2.StageRequest.FromString(requests["release"])
        for peer in set(one.release.trainer_evidence) - {"east"}:
            del one.release.trainer_evidence[peer]
        requests["release"] = one.SerializeToString()
    for stage, request in requests.items():
        reply = handle(request)
        body = "forward" if stage in ("endorse", "unmask") else stage
        assert reply.WhichOneof("body") == body, (stage, reply.fault.what)

    def parse(data: bytes) -> None:
        reply = handle(data)
        if reply.fault.what.startswith("The node of") and " failed (" in reply.fault.what:
            raise RuntimeError(reply.fault.what)

    return Target(
        name,
        list(requests.values()),
        parse,
        "open",
        structure=False,
        message=stage_pb2.StageRequest,
    )


def _aggregator_request(world: Any) -> Target:
    """The host has its run open, an enclave that says the same to all, and a provider's log that
    names that enclave.
    """
    host, contract = world.host, world.contract
    opened = node_pb2.AggregatorReply.FromString(
        host.handle(node_pb2.AggregatorRequest(open=node_pb2.OpenRun()).SerializeToString())
    )
    run_id, evidence = opened.opened.run_id, hashlib.sha384(b"evidence").digest()
    host._note_evidence(b"evidence")
    key = world.provider_keys.signing
    log = TransparencyLog(world.job_path.parent / "host-log.sqlite", key)
    facts: dict[str, Any] = {
        "party": "pool", "run_id": run_id, "contract": contract.digest(), "role": "aggregator",
        "platform": "simulated",
        "evidence": evidence, "measurements": bytes(48), "signing": bytes(32),
    }  # fmt: skip
    log.append(Entry("attestation", int(NOW.timestamp()), facts))
    update = make_update(
        log, key, party="pool", run_id=run_id, head=log.head(), since=None, indexes=[0]
    )
    report = json.dumps({"contract": contract.digest().hex(), "run_id": run_id}).encode()
    bodies: tuple[dict[str, Any], ...] = (
        {"open": node_pb2.OpenRun()},
        {"log": node_pb2.ShownLog(update=update)},
        {"call": enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer="north"))},
        {
            "call": enclave_pb2.Call(
                submit=enclave_pb2.Submit(round=0, party="north", protected=bytes(90))
            )
        },
        {"call": enclave_pb2.Call(close=enclave_pb2.Close(round=0)), "only_if_done": True},
        {"keep": node_pb2.Kept(state=bytes(40))},
        {"sign": node_pb2.SignReport(report=report)},
        {"progress": node_pb2.Told(text="x")},
        {
            "progress": node_pb2.Told(
                ended=node_pb2.StageEnd(stage="load", seconds=1.5, sent=1, received=2)
            )
        },
    )
    samples = [
        node_pb2.AggregatorRequest(run_id=run_id, **body).SerializeToString() for body in bodies
    ]

    def answered(data: bytes) -> Any:
        with world.recorded.clock():
            reply = node_pb2.AggregatorReply.FromString(host.handle(data))
        if " failed (" in reply.fault.what:
            raise RuntimeError(reply.fault.what)
        return reply

    for sample in samples:
        assert not answered(sample).HasField("fault")

    def parse(data: bytes) -> None:
        try:
            if node_pb2.AggregatorRequest.FromString(data).HasField(
                "outcome"
            ):  # it ends the job: not what is tested
                return
        except DecodeError:
            pass
        answered(data)
        host._enclave._forget()
        (host._folder / STAGES).unlink(missing_ok=True)

    return Target(
        "aggregator request",
        samples,
        parse,
        "open",
        structure=False,
        message=node_pb2.AggregatorRequest,
    )
