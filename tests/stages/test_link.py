"""One behaviour, two bodies: the link in process and the link over a Flower grid."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest
from echo_parties import EchoNode, payload, request
from fake_grid import FakeGrid
from flwr.proto.node_pb2 import NodeInfo

from fedark.foundation.errors import FederationError
from fedark.links import link as link_module
from fedark.links.flower.adapter import sending
from fedark.links.flower.link import FlowerLink
from fedark.links.link import InProcessLink, Link, Passed, Tap

PARTIES = ("north", "south", "west")
Make = Callable[..., Link]


def in_process(handlers: Mapping[str, Callable[[bytes], bytes]], tap: Tap | None = None) -> Link:
    return InProcessLink(handlers, tap=tap)


def flower(handlers: Mapping[str, Callable[[bytes], bytes]], tap: Tap | None = None) -> Link:
    return FlowerLink(
        FakeGrid(handlers), {party: f"key-{party}".encode() for party in handlers}, tap=tap
    )


@pytest.fixture(params=[in_process, flower])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def echoes() -> dict[str, Callable[[bytes], bytes]]:
    return {party: EchoNode(party).handle for party in PARTIES}


def test_each_party_gets_its_own_request_and_its_reply_stands_in_its_place(make: Make) -> None:
    requests = {party: request(party.encode()) for party in PARTIES}
    outcome = make(echoes()).exchange(requests, stage="round", timeout=60)
    assert {party: payload(reply) for party, reply in outcome.items()} == {
        party: party.encode() for party in PARTIES
    }


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (6 << 20) + 1])
def test_payloads_of_any_size_arrive_unchanged(make: Make, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    outcome = make(echoes()).exchange({"north": request(data)}, stage="round", timeout=60)
    assert payload(outcome["north"]) == data


def test_a_party_that_fails_gives_an_error_in_its_place_and_its_own_words_do_not_travel(
    make: Make,
) -> None:
    requests = {"north": request(b"x"), "south": request(command="crash"), "west": request(b"y")}
    outcome = make(echoes()).exchange(requests, stage="round", timeout=60)
    assert payload(outcome["north"]) == b"x"
    assert payload(outcome["west"]) == b"y"
    error = outcome["south"]
    assert isinstance(error, FederationError)
    assert "south failed in stage round" in str(error)
    assert "RuntimeError" in str(error)
    assert "secret" not in str(error)


def test_a_refusal_says_why(make: Make) -> None:
    outcome = make(echoes()).exchange(
        {"south": request(command="refuse")}, stage="round", timeout=60
    )
    assert isinstance(outcome["south"], FederationError)
    assert "ProtocolError: said no" in str(outcome["south"])


def test_a_party_that_hangs_is_late_and_the_others_replies_are_kept(make: Make) -> None:
    release = threading.Event()
    handlers = echoes() | {"south": lambda _: bytes(release.wait(60))}
    started = time.monotonic()
    outcome = make(handlers).exchange(
        {party: request(b"x") for party in PARTIES}, stage="round", timeout=6
    )
    release.set()
    assert time.monotonic() - started < 30
    assert payload(outcome["north"]) == payload(outcome["west"]) == b"x"
    assert "did not answer stage round within 6 s" in str(outcome["south"])


def test_a_stranger_gives_an_error_in_its_place(make: Make) -> None:
    outcome = make(echoes()).exchange(
        {"north": request(b"x"), "nobody": request(b"y")}, stage="round", timeout=60
    )
    assert payload(outcome["north"]) == b"x"
    assert "No node of nobody" in str(outcome["nobody"])


def test_first_contact_names_every_party(make: Make) -> None:
    outcome = make(echoes()).broadcast(request(b"hello"), expect=3, stage="enrol", timeout=60)
    assert {party: payload(reply) for party, reply in outcome.items()} == dict.fromkeys(
        PARTIES, b"hello"
    )


def test_a_party_cannot_answer_in_another_ones_name(make: Make) -> None:
    handlers = echoes() | {"south": EchoNode("north").handle}
    outcome = make(handlers).broadcast(request(b"hello"), expect=3, stage="enrol", timeout=60)
    assert payload(outcome["north"]) == b"hello"
    assert "south answered in the name of 'north'" in str(outcome["south"])


def test_a_reply_that_is_not_a_stage_reply_is_an_error(make: Make) -> None:
    outcome = make(echoes() | {"south": lambda _: b"\xff\xff"}).broadcast(
        request(b"x"), expect=3, stage="enrol", timeout=60
    )
    assert isinstance(outcome["south"], FederationError)
    assert payload(outcome["west"]) == b"x"


def test_first_contact_with_too_few_parties_sends_nothing(make: Make) -> None:
    seen: list[Passed] = []
    link = make(echoes(), tap=seen.append)
    with pytest.raises(FederationError, match="3 of 4 nodes"):
        link.broadcast(request(b"hello"), expect=4, stage="enrol", timeout=0.3)
    assert seen == []


def test_the_tap_sees_every_byte_that_crosses(make: Make) -> None:
    seen: list[Passed] = []
    requests = {party: request(party.encode()) for party in PARTIES}
    outcome = make(echoes(), tap=seen.append).exchange(requests, stage="round", timeout=60)
    assert {p.party: p.data for p in seen if p.direction == "request"} == requests
    assert {p.party: p.data for p in seen if p.direction == "reply"} == outcome
    assert {p.stage for p in seen} == {"round"}


def test_a_message_over_the_limit_is_not_passed_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MAX_MESSAGE_BYTES", 100)
    seen: list[Passed] = []
    requests = {"north": request(bytes(200)), "south": request(b"x")}
    outcome = make(echoes(), tap=seen.append).exchange(requests, stage="round", timeout=60)
    assert "over the limit" in str(outcome["north"])
    assert payload(outcome["south"]) == b"x"
    assert {p.party for p in seen} == {"south"}


def test_a_late_handler_does_not_answer_the_next_stage() -> None:
    release = threading.Event()
    calls: list[bytes] = []

    def slow(data: bytes) -> bytes:
        calls.append(data)
        release.wait(60)
        return EchoNode("north").handle(data)

    link = InProcessLink({"north": slow})
    link.exchange({"north": request(b"first")}, stage="one", timeout=0.1)
    threading.Timer(0.1, release.set).start()
    outcome = link.exchange({"north": request(b"second")}, stage="two", timeout=60)
    assert payload(outcome["north"]) == b"second"
    assert calls == [request(b"first"), request(b"second")]


def test_a_node_outside_the_roster_gets_no_message() -> None:
    grid = FakeGrid(echoes())
    grid.strangers.append(NodeInfo(node_id=666, public_key=b"key-666"))
    link = FlowerLink(grid, {party: f"key-{party}".encode() for party in ("north", "south")})
    outcome = link.broadcast(request(b"x"), expect=2, stage="enrol", timeout=60)
    assert set(outcome) == {"north", "south"}
    assert {message.metadata.dst_node_id for message in grid.sent} == {101, 102}


def test_first_contact_waits_for_the_last_node() -> None:
    grid = FakeGrid(echoes())
    grid.offline.add("west")
    told: list[str] = []

    def progress(text: str) -> None:
        told.append(text)
        grid.offline.clear()

    link = FlowerLink(
        grid, {party: f"key-{party}".encode() for party in PARTIES}, progress=progress
    )
    outcome = link.broadcast(request(b"x"), expect=3, stage="enrol", timeout=60)
    assert set(outcome) == set(PARTIES)
    assert told == [
        "2 of 3 nodes are online: north, south",
        "3 of 3 nodes are online: north, south, west",
    ]


def test_a_message_that_the_superlink_does_not_take_is_an_error_of_that_party() -> None:
    grid = FakeGrid(echoes())
    grid.rejects.add("south")
    link = FlowerLink(grid, {party: f"key-{party}".encode() for party in PARTIES})
    outcome = link.exchange({party: request(b"x") for party in PARTIES}, stage="round", timeout=60)
    assert "did not take the message for south" in str(outcome["south"])
    assert payload(outcome["west"]) == b"x"


def test_a_message_lives_no_longer_than_its_stage() -> None:
    grid = FakeGrid(echoes())
    link = FlowerLink(grid, {party: f"key-{party}".encode() for party in PARTIES})
    link.exchange({"north": request(b"x")}, stage="round", timeout=7)
    (message,) = grid.sent
    assert message.metadata.ttl <= 12
    assert message.metadata.group_id == "round"


def test_after_trouble_on_the_wire_the_unanswered_is_sent_again_and_the_first_answer_counts() -> (
    None
):
    calls: list[bytes] = []
    never = threading.Event()

    def twice(data: bytes) -> bytes:
        calls.append(data)
        if len(calls) == 1:
            sending.trouble.set()
            never.wait()  # the first answer does not come
        return EchoNode("north").handle(data)

    grid = FakeGrid({"north": twice})
    outcome = FlowerLink(grid, {"north": b"key-north"}).exchange(
        {"north": request(b"x")}, stage="round", timeout=60
    )
    never.set()
    assert payload(outcome["north"]) == b"x"
    assert len(calls) == 2
    assert calls[0] == calls[1]
