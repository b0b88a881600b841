"""A node's connection: only the pinned bundle, no message lost to another's failure."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_parties import EchoNode, payload, request
from fake_grid import use_identity
from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import RunNotRunningException

from fedark.links.flower import bundle, supernode
from fedark.links.flower.adapter import Fleet
from fedark.links.flower.payload import MESSAGE_TYPE, pack, unpack
from fedark.links.flower.service import NodeServer


class Done(Exception):
    """The fake SuperLink has no more messages."""


class FakeSuperLink:
    """The eight callbacks of a Fleet connection, over messages in memory."""

    def __init__(self, messages: list[Message], content: bytes) -> None:
        use_identity()
        self.objects: dict[str, bytes] = {}
        self.waiting = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.objects |= {
                key: item.deflate() for key, item in get_all_nested_objects(message).items()
            }
            self.waiting.append((message, get_object_tree(message)))
        self.content = content
        self.fetched: list[str] = []
        self.replies: list[Message] = []
        self.fab_calls = 0
        self.failures: list[Exception] = []

    def fleet(self) -> Fleet:
        return Fleet(
            (7, self.receive, self.send, self.run, self.fab, self.pull, self.push, lambda *_: None)
        )

    def receive(self) -> Any:
        if self.failures:
            raise self.failures.pop()
        if not self.waiting:
            raise KeyboardInterrupt
        return self.waiting.pop(0)

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.replies.append(message)
        return set(), "session"

    def run(self, run_id: int) -> Any:
        return SimpleNamespace(fab_hash=bundle.PINNED_SHA256)

    def fab(self, digest: str, run_id: int) -> Any:
        self.fab_calls += 1
        return SimpleNamespace(content=self.content, hash_str=bundle.PINNED_SHA256)

    def pull(self, run_id: int, object_id: str) -> bytes:
        self.fetched.append(object_id)
        return self.objects[object_id]

    def push(self, *_: Any) -> None: ...


def message(data: bytes, ttl: float = 30.0) -> Message:
    use_identity()
    return Message(pack(data), dst_node_id=7, message_type=MESSAGE_TYPE, ttl=ttl)


@pytest.fixture
def socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="fedark-") as directory:
        path = Path(directory) / "north.sock"
        server = NodeServer(EchoNode("north"), path)
        yield str(path)
        server.close()


def serve(
    link: FakeSuperLink, socket: str, sleep: Callable[[float], None] = lambda _: None
) -> list[Message]:
    with pytest.raises(KeyboardInterrupt):
        supernode.serve(link.fleet(), socket, sleep)
    return link.replies


def test_messages_of_a_run_with_the_pinned_bundle_are_answered_and_the_bundle_is_looked_at_once(
    socket: str,
) -> None:
    link = FakeSuperLink([message(request(b"one")), message(request(b"two"))], bundle.build())
    assert [payload(unpack(reply.content)) for reply in serve(link, socket)] == [b"one", b"two"]
    assert link.fab_calls == 1


def test_another_bundle_under_the_pinned_name_is_refused_before_the_message_is_fetched(
    socket: str,
) -> None:
    link = FakeSuperLink([message(request(b"one"))], bundle.build() + b"evil")
    (reply,) = serve(link, socket)
    assert reply.has_error()
    assert reply.error.code == ErrorCode.INVALID_FAB
    assert "not fedark's" in (reply.error.reason or "")
    assert link.fetched == []


def test_a_refused_run_stays_refused(socket: str) -> None:
    link = FakeSuperLink([message(request(b"one")), message(request(b"two"))], b"evil")
    assert all(reply.has_error() for reply in serve(link, socket))
    assert link.fab_calls == 2


def test_a_message_of_a_run_that_is_over_is_dropped_and_the_next_one_answered(socket: str) -> None:
    link = FakeSuperLink([message(request(b"one")), message(request(b"two"))], bundle.build())
    calls = iter([RunNotRunningException(), None])

    def run(run_id: int) -> Any:
        if (error := next(calls)) is not None:
            raise error
        return SimpleNamespace(fab_hash="")

    link.run = run  # type: ignore[method-assign]
    (reply,) = serve(link, socket)
    assert payload(unpack(reply.content)) == b"two"


def test_whatever_the_superlink_sends_the_node_stays(socket: str) -> None:
    link = FakeSuperLink([message(request(b"one"))], bundle.build())
    link.failures = [ValueError("malformed"), RuntimeError("?")]
    (reply,) = serve(link, socket)
    assert payload(unpack(reply.content)) == b"one"


def test_a_message_without_our_payload_is_an_error_reply(socket: str) -> None:
    broken = message(b"")
    broken.content["more"] = broken.content["fedark"]
    (reply,) = serve(FakeSuperLink([broken], bundle.build()), socket)
    assert "does not carry one fedark payload" in reply.error.reason


def test_a_nodes_refusal_is_told_and_its_crash_is_not(socket: str) -> None:
    link = FakeSuperLink(
        [message(request(command="refuse")), message(request(command="crash"))], bundle.build()
    )
    refusal, crash = serve(link, socket)
    assert "ProtocolError: said no" in refusal.error.reason
    assert "RuntimeError" in crash.error.reason
    assert "secret" not in crash.error.reason


def test_a_daemon_that_is_gone_is_an_error_reply(tmp_path: Path) -> None:
    (reply,) = serve(
        FakeSuperLink([message(request(b"x"), ttl=3)], bundle.build()), str(tmp_path / "none.sock")
    )
    assert reply.has_error()
    assert "cannot be reached" in reply.error.reason
    assert str(tmp_path) not in reply.error.reason
