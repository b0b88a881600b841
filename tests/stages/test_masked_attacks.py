"""A relay that lies between masked trainers, and fellows that are not what they should be: what is
refused, and what is said.

The relay stands for a lying aggregator too where it forges what only that one can: a trainer trusts
neither more than the other. Attacks on the protocol's own messages, one by one, are in
tests/secagg; these are the ones that a whole job can be tried with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CUSTOMERS, HostileRelay, write_job

from fedark.contract.job import Job
from fedark.contract.protection import masked_terms
from fedark.foundation.errors import FedarkError
from fedark.foundation.keys import SigningKey
from fedark.secagg import Client, wire
from fedark.simulation import Simulation, simulate
from fedark.stages.coordinator import coordinate
from fedark.v1 import enclave_pb2 as pb
from fedark.v1 import stage_pb2

pytestmark = pytest.mark.usefixtures("measured_once")

FOUR = (*CUSTOMERS, "west")
MASKED = (
    'protection.mode="masked"',
    "protection.max_records=40",
    "models.0.training.baseline_epochs=0",
)
NO_AGREEMENT = (*MASKED, "protection.agreement=false")
NO_DROP = (*MASKED, "protection.minimum_cohort=4")

Request = Callable[[str, stage_pb2.StageRequest], None]
Reply = Callable[[str, stage_pb2.StageReply], None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts the job of four customers with the given overrides."""
    opened = []

    def start(overrides: tuple[str, ...] = MASKED, rounds: int = 1) -> Simulation:
        job = Job.load(
            write_job(tmp_path / "job", rounds=rounds, minimum=3, customers=FOUR), overrides
        )
        opened.append(simulate(job, tmp_path / "work"))
        return opened[-1].__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def run_with(
    running: Simulation,
    change: Request = lambda party, message: None,
    reply: Reply = lambda party, message: None,
) -> tuple[dict[str, str], str]:
    """Run the job through a relay that changes requests and replies.

    Returns:
        Who was passed over and why, and the error that ended the job or "".
    """

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        if is_reply:
            answer = stage_pb2.StageReply.FromString(data)
            reply(party, answer)
            return answer.SerializeToString()
        message = stage_pb2.StageRequest.FromString(data)
        change(party, message)
        return message.SerializeToString()

    try:
        report = coordinate(HostileRelay(running, alter), running.host.handle)
    except FedarkError as error:
        return {}, str(error)
    passed_over: dict[str, str] = report["passed_over"]
    return passed_over, ""


def adapters(running: Simulation) -> list[Path]:
    return list(running.federation.work.glob("parties/*/runs/*/adapter-*"))


def header(request: bytes, kind: str) -> dict[str, Any]:
    """The values of an unsigned message of the aggregator's."""
    frame = wire.parse(request, 1 << 20)
    shape = {
        "round": {"round": int, "layout": str, "participants": list},
        "survivors": {"ctx": 32, "survivors": list},
        "unmask": {"ctx": 32, "survivors": list, "endorsements": list},
    }[kind]
    return wire.fields(frame.header, kind, shape)


def rebuilt(kind: str, values: dict[str, Any], body: bytes = b"") -> bytes:
    return wire.message(wire.unsigned(kind, values), body)


# -- who the fellows are


def test_a_session_key_that_the_relay_puts_in_is_refused_by_every_fellow(start: Any) -> None:
    running = start()
    terms = masked_terms(running.federation.contract, running.run_id)
    forged = Client(terms, "east", SigningKey()).hello()

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load"):
            message.load.announced["east"].hello = forged

    _, ended = run_with(running, change)
    assert "A signature of east (fedark/secagg/1/hello) does not verify" in ended
    assert not adapters(running)


def test_a_fellow_with_the_evidence_of_another_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "north":
            message.load.announced["east"].CopyFrom(message.load.announced["south"])

    passed_over, _ = run_with(start(), change)
    assert "load: Evidence of the trainer of east was refused" in passed_over["north"]
    assert "it is the enclave of south" in passed_over["north"]


def test_a_fellow_without_evidence_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "north":
            message.load.announced["east"].evidence = b""

    passed_over, _ = run_with(start(), change)
    assert "load: Evidence of the trainer of east was refused" in passed_over["north"]


def test_evidence_for_the_aggregator_does_not_admit_a_fellow(start: Any) -> None:
    seen: dict[str, bytes] = {}

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if message.HasField("attest"):
            seen[party] = message.attest.aggregator_evidence

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "north":
            message.load.announced["east"].evidence = seen["east"]

    passed_over, _ = run_with(start(), change, reply)
    assert "its nonce was not issued here" in passed_over["north"]


def test_a_trainer_whose_own_nonce_is_altered_announces_nothing(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("attest") and party == "north":
            message.attest.peer_nonces["north"] = bytes(32)

    passed_over, _ = run_with(start(), change)
    assert passed_over["north"].startswith(
        "attest: The nonce of the trainer enclave of north was altered"
    )


@pytest.mark.parametrize("alter", ["another's nonce", "a stranger", "one fewer"])
def test_trainers_that_were_shown_different_lists_of_nonces_admit_nobody_of_the_other_list(
    start: Any, alter: str
) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("attest") and party == "north":
            nonces = message.attest.peer_nonces
            if alter == "another's nonce":
                nonces["east"] = bytes(32)
            elif alter == "a stranger":
                nonces["mallory"] = bytes(32)
            else:
                del nonces["east"]

    passed_over, ended = run_with(start(NO_DROP if alter == "another's nonce" else MASKED), change)
    if alter == "another's nonce":
        assert "Evidence of the trainer of north was refused" in ended
        assert "its nonce was not issued here" in ended
    else:
        assert (
            "attest: The nonces are not one for every customer of the contract"
            in passed_over["north"]
        )


def test_a_trainer_that_was_not_shown_a_fellow_is_in_another_session_and_its_upload_counts_nowhere(
    start: Any,
) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load") and party == "north":
            del message.load.announced["west"]

    passed_over, _ = run_with(start(), change)
    # In its session of three the fourth participant does not exist.
    assert (
        "round: A list of clients is not ascending, has a duplicate or names a stranger"
        in passed_over["north"]
    )


def test_a_job_with_too_few_fellows_is_not_joined(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("load"):
            for other in [name for name in FOUR if name != party][:2]:
                del message.load.announced[other]

    running = start()
    _, ended = run_with(running, change)
    assert "2 clients are fewer than the minimum cohort of 3" in ended
    assert not adapters(running)


# -- what a round is


def test_a_masked_update_that_the_relay_alters_is_dropped(start: Any) -> None:
    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if party == "east" and message.HasField("round"):
            update = bytearray(message.round.protected_update)
            update[-1] ^= 1
            message.round.protected_update = bytes(update)

    passed_over, _ = run_with(start(), reply=reply)
    assert passed_over["east"].startswith("sum: A signature of the trainer enclave of east")


def test_a_round_is_not_masked_twice(start: Any) -> None:
    seen: dict[int, bytes] = {}

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round"):
            seen.setdefault(message.round.round, message.round.masked)
            if party == "east" and message.round.round == 2:
                message.round.masked = seen[1]

    passed_over, _ = run_with(start(rounds=2), change)
    assert "round: Round 1 is not new: round 1 was begun" in passed_over["east"]


def test_a_round_of_another_kind_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round") and party == "east":
            values = header(message.round.masked, "round")
            message.round.masked = rebuilt("round", {**values, "layout": "evaluated"})

    passed_over, _ = run_with(start(), change)
    assert "round: A masked round of kind 'evaluated' came for 'update'" in passed_over["east"]


def test_a_round_for_too_small_a_cohort_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round"):
            values = header(message.round.masked, "round")
            message.round.masked = rebuilt("round", {**values, "participants": [0, 1]})

    running = start()
    _, ended = run_with(running, change)
    assert "2 clients are fewer than the minimum cohort of 3" in ended
    assert not adapters(running)


def test_a_round_for_another_cohort_has_other_masks(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round") and party == "east":
            values = header(message.round.masked, "round")
            message.round.masked = rebuilt("round", {**values, "participants": [0, 1, 2]})

    passed_over, _ = run_with(start(), change)
    assert "sum: The upload of east is for another round, model or cohort" in passed_over["east"]


def test_a_round_that_the_relay_leaves_unopened_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("round") and party == "east":
            message.round.masked = b""

    passed_over, _ = run_with(start(), change)
    assert "round: A message of 0 bytes" in passed_over["east"]


# -- whom the committee unmasks


def test_a_member_signs_one_survivor_set_and_unmasks_no_other(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("endorse") and party == "east":
            values = header(call.endorse.request, "survivors")
            call.endorse.request = rebuilt(
                "survivors", {**values, "survivors": values["survivors"][:3]}
            )

    passed_over, _ = run_with(start(), change)
    assert (
        "endorse: The message of east is for another round or another survivor set"
        in passed_over["east"]
    )


def test_members_release_nothing_for_a_set_that_the_others_did_not_sign(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("unmask") and party == "east":
            values = header(call.unmask.request, "unmask")
            call.unmask.request = rebuilt(
                "unmask", {**values, "survivors": values["survivors"][:3]}
            )

    passed_over, _ = run_with(start(), change)
    assert "unmask: Another survivor set of this round was signed already" in passed_over["east"]


def test_members_release_nothing_without_the_others_signatures(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("unmask"):
            frame = wire.parse(call.unmask.request, 1 << 20)
            values = header(call.unmask.request, "unmask")
            call.unmask.request = rebuilt(
                "unmask", {**values, "endorsements": []}, bytes(frame.tail)
            )

    running = start()
    _, ended = run_with(running, change)
    # All four refuse: passed over, and what is left is no committee.
    assert (
        "members; these have not given the shares that unmask it: east, north, south, west" in ended
    )
    assert not adapters(running)


def forged_unmask(request: bytes, without: int, member: int) -> bytes:
    """The aggregator's request, for the survivors but one: what it would ask if that one had
    dropped.
    """
    values = header(request, "unmask")
    frame = wire.parse(request, 1 << 20)
    senders = [u for u in values["survivors"] if u != member]
    size = len(frame.tail) // len(senders)
    pieces = {u: bytes(frame.tail[at * size : (at + 1) * size]) for at, u in enumerate(senders)}
    survivors = [u for u in values["survivors"] if u != without]
    return rebuilt(
        "unmask",
        {**values, "survivors": survivors},
        b"".join(pieces[u] for u in survivors if u != member),
    )


def test_a_member_answers_one_of_two_survivor_sets_also_without_agreement(start: Any) -> None:
    """The relay tells one member that "west" had dropped. Its answer is for that set, and the true
    set gets none.
    """
    running = start(NO_AGREEMENT)
    names = sorted(FOUR)
    said: list[str] = []

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("unmask") and not said and party == "east":
            true = call.unmask.request
            call.unmask.request = forged_unmask(true, names.index("west"), names.index("east"))
            first = stage_pb2.StageReply.FromString(
                running.nodes["east"].handle(message.SerializeToString())
            )
            assert first.forward.protected
            again = stage_pb2.StageRequest()
            again.CopyFrom(message)
            again.forward.call.unmask.request = true
            said.append(
                stage_pb2.StageReply.FromString(
                    running.nodes["east"].handle(again.SerializeToString())
                ).fault.what
            )

    passed_over, _ = run_with(running, change)
    assert said == ["Another survivor set of this round was answered already."]
    assert (
        "unmask: The message of east is for another round or another survivor set"
        in passed_over["east"]
    )


def test_a_survivor_set_below_the_minimum_is_refused(start: Any) -> None:
    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("endorse") and party == "east":
            values = header(call.endorse.request, "survivors")
            call.endorse.request = rebuilt("survivors", {**values, "survivors": [0, 1]})

    passed_over, _ = run_with(start(), change)
    assert "endorse: 2 clients are fewer than the minimum cohort of 3" in passed_over["east"]


def test_a_survivor_set_with_a_party_that_did_not_take_part_is_refused(start: Any) -> None:
    """East drops while loading, so it is no participant of round 1; the relay names it as a
    survivor of that round.
    """

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        call = message.forward.call
        if call.HasField("endorse") and party == "north":
            values = header(call.endorse.request, "survivors")
            call.endorse.request = rebuilt("survivors", {**values, "survivors": [0, 1, 2, 3]})

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if party == "east" and message.HasField("load"):
            message.load.protected_metrics = bytes(100)

    _, ended = run_with(start(rounds=1), change, reply)
    assert (
        "takes 3 of 4 committee members; these have not signed its survivors: east, north" in ended
    )
    assert "east, sum: A signature of the trainer enclave of east" in ended
    assert "north, endorse: A survivor is not a participant of the round" in ended


@pytest.mark.parametrize(
    "call",
    [
        pb.Call(attest=pb.Attest(nonce=bytes(32))),
        pb.Call(records=pb.Records(last=True)),
        pb.Call(round=pb.Round(round=1)),
        pb.Call(resume=pb.Resume(checkpoint=b"x")),
        pb.Call(),
    ],
)
def test_a_node_passes_no_other_call_on_to_its_trainer(start: Any, call: pb.Call) -> None:
    running = start(rounds=1)
    said: list[str] = []

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        if message.HasField("forward") and not said:
            other = stage_pb2.StageRequest()
            other.CopyFrom(message)
            other.forward.call.CopyFrom(call)
            answer = running.nodes[party].handle(other.SerializeToString())
            said.append(stage_pb2.StageReply.FromString(answer).fault.what)

    assert run_with(running, change) == ({}, "")
    assert said == [f"A node does not pass on the call {call.WhichOneof('body')!r}."]


def test_the_shares_of_one_member_do_not_count_as_anothers(start: Any) -> None:
    seen: list[bytes] = []
    asked: dict[str, bool] = {}

    def change(party: str, message: stage_pb2.StageRequest) -> None:
        asked[party] = message.forward.call.HasField("unmask")

    def reply(party: str, message: stage_pb2.StageReply) -> None:
        if asked[party]:
            seen.append(message.forward.protected)
            if len(seen) == 2:
                message.forward.protected = seen[0]

    passed_over, _ = run_with(start(), change, reply)
    ((name, why),) = passed_over.items()
    assert why.startswith(f"unmask: A signature of the trainer enclave of {name}")


def test_an_update_that_comes_after_the_survivors_were_declared_is_dropped(start: Any) -> None:
    """The aggregator's host brings the upload late; it stays masked for ever."""
    from fedark.v1 import node_pb2

    running = start()
    late: list[bytes] = []
    said: list[str] = []
    handle = running.host.handle

    def withheld(request: bytes) -> bytes:
        message = node_pb2.AggregatorRequest.FromString(request)
        call = message.call
        if call.HasField("submit") and call.submit.round == 1:
            if call.submit.party == "east" and call.submit.part == pb.Submit.UPDATE and not late:
                late.append(request)
                return node_pb2.AggregatorReply(reply=pb.Reply(done=pb.Done())).SerializeToString()
            if call.submit.part == pb.Submit.ENDORSEMENT and not said:
                reply = node_pb2.AggregatorReply.FromString(handle(late[0]))
                said.append(reply.fault.what)
        return handle(request)

    report = coordinate(running._link, withheld)
    assert said == ["The upload of east came after the survivors were declared."]
    assert list(report["customers"]) == list(FOUR), (
        "it may unmask the others' sum, and takes part in the next round"
    )
