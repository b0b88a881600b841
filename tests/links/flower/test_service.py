"""The local service of a node daemon."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from echo_parties import EchoNode, payload, request

from fedark.foundation.errors import EvidenceRefused, FederationError, ProtocolError
from fedark.links.flower import service
from fedark.links.flower.service import NodeClient, NodeServer
from fedark.v1 import node_pb2


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedark-") as path:
        yield Path(path)


@pytest.fixture
def client(directory: Path) -> Iterator[NodeClient]:
    server = NodeServer(EchoNode("north"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client:
        yield client
    server.close()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (3 << 20) + 7])
def test_a_stage_of_any_size_comes_back(client: NodeClient, size: int) -> None:
    data = os.urandom(size)
    assert payload(client.handle(request(data), timeout=60)) == data


def test_a_refusal_keeps_its_class_and_its_texts(client: NodeClient) -> None:
    with pytest.raises(ProtocolError, match="said no"):
        client.handle(request(command="refuse"), timeout=60)


def test_a_refusal_keeps_its_reasons(directory: Path) -> None:
    class Refusing(EchoNode):
        def handle(self, request: bytes) -> bytes:
            raise EvidenceRefused("south", ["stale", "debug"])

    server = NodeServer(Refusing("north"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client, pytest.raises(EvidenceRefused) as caught:
        client.handle(b"", timeout=60)
    server.close()
    assert caught.value.reasons == ("stale", "debug")
    assert "No weight key" in caught.value.safe


def test_what_a_crash_says_stays_inside(client: NodeClient) -> None:
    with pytest.raises(FederationError) as caught:
        client.handle(request(command="crash"), timeout=60)
    assert "RuntimeError" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_call_that_takes_too_long_is_an_error(client: NodeClient) -> None:
    with pytest.raises(FederationError, match="did not answer"):
        client.handle(request(command="sleep 2"), timeout=0.2)


def test_status_answers_while_a_stage_is_at_work_and_names_it(directory: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(EchoNode):
        def handle(self, request: bytes) -> bytes:
            entered.set()
            leave.wait(60)
            return super().handle(request)

    server = NodeServer(Slow("north", "provider"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client:
        work = threading.Thread(target=client.handle, args=(request(b"x"),), kwargs={"timeout": 60})
        work.start()
        assert entered.wait(60)
        busy = client.status(timeout=60)
        leave.set()
        work.join()
        idle = client.status(timeout=60)
    server.close()
    assert (busy.party, busy.role, busy.run_id, busy.stage) == ("north", "provider", "run", "round")
    assert (idle.run_id, idle.stage) == ("", "")


def test_callers_that_gave_up_waiting_for_a_stage_take_no_place_and_an_abort_is_done_after_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave, arrived, aborted = (
        threading.Event(),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )
    handled: list[bytes] = []

    class Slow(EchoNode):
        def handle(self, request: bytes) -> bytes:
            handled.append(request)
            if len(handled) == 1:
                entered.set()
                leave.wait(60)
            if b"enough" in request:
                aborted.set()
                return b""
            return super().handle(request)

    server = NodeServer(Slow("north"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client:
        work = threading.Thread(
            target=client.handle, args=(request(b"first"),), kwargs={"timeout": 60}
        )
        work.start()
        assert entered.wait(60)
        named = service._run_and_stage
        monkeypatch.setattr(
            service,
            "_run_and_stage",
            lambda data: (b"enough" in data and arrived.set(), named(data))[1],
        )
        with NodeClient(directory / "n.sock") as impatient:
            call = impatient._stub.Handle(service._pieces(request(command="enough")), timeout=60)
            assert arrived.wait(60)
            call.cancel()
        for _ in range(12):
            with pytest.raises(FederationError, match="did not answer"):
                client.handle(request(b"later"), timeout=0.1)
        assert client.status(timeout=60).stage == "round"
        leave.set()
        work.join()
        assert aborted.wait(60)
        assert payload(client.handle(request(b"last"), timeout=60)) == b"last"
    server.close()
    assert handled == [request(b"first"), request(command="enough"), request(b"last")]


def test_patience_begins_when_the_daemon_is_gone_and_not_with_the_call(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    clock, calls = [0.0], list[float]()

    def attempt(lasts: float, answers: bool) -> list[node_pb2.Piece]:
        calls.append(clock[0])
        clock[0] += lasts
        if not answers:
            raise Gone
        return list(service._pieces(b"done"))

    ticking = SimpleNamespace(
        monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    monkeypatch.setattr(service, "time", ticking)
    with NodeClient(directory / "n.sock") as client:
        script = iter([(500.0, False), (0.0, False), (0.0, False), (700.0, False), (0.0, True)])
        monkeypatch.setattr(client._stub, "Handle", lambda pieces, timeout: attempt(*next(script)))
        assert client.handle(b"", timeout=3600, patience=60) == b"done"
        assert len(calls) == 5
        monkeypatch.setattr(client._stub, "Handle", lambda pieces, timeout: attempt(0.0, False))
        began = clock[0]
        with pytest.raises(FederationError, match="cannot be reached"):
            client.handle(b"", timeout=3600, patience=60)
        assert 60 <= clock[0] - began < 61
        calls.clear()
        monkeypatch.setattr(
            client._stub, "Handle", lambda pieces, timeout: attempt(10.0, False)
        )  # each time it dies of this
        with pytest.raises(FederationError, match="cannot be reached"):
            client.handle(b"", timeout=3600, patience=60)
        assert len(calls) == service._OUTAGES + 1


def test_stages_are_done_one_at_a_time(directory: Path) -> None:
    inside = 0
    most = 0

    class Counting(EchoNode):
        def handle(self, request: bytes) -> bytes:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1
            return super().handle(request)

    server = NodeServer(Counting("north"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client:
        threads = [
            threading.Thread(target=client.handle, args=(request(b"x"),), kwargs={"timeout": 60})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    server.close()
    assert most == 1


def test_only_the_owner_can_open_the_socket(client: NodeClient, directory: Path) -> None:
    mode = (directory / "n.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0


def test_a_directory_that_is_open_to_others_is_refused(directory: Path) -> None:
    directory.chmod(0o755)
    with pytest.raises(FederationError, match="open to other users"):
        NodeServer(EchoNode("north"), directory / "n.sock")


def test_a_path_that_is_too_long_for_a_socket_is_refused(directory: Path) -> None:
    with pytest.raises(FederationError, match="longer than"):
        NodeServer(EchoNode("north"), directory / ("n" * 110))


def test_a_second_daemon_on_the_same_socket_is_refused_and_the_first_still_serves(
    client: NodeClient, directory: Path
) -> None:
    with pytest.raises(FederationError, match="Another daemon"):
        NodeServer(EchoNode("south"), directory / "n.sock")
    assert client.status(timeout=60).party == "north"


def test_a_daemon_too_busy_to_answer_keeps_its_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "n.sock"))
        silent.listen(1)
        with pytest.raises(FederationError, match="Another daemon"):
            NodeServer(EchoNode("south"), directory / "n.sock")
        assert (directory / "n.sock").exists()


def test_a_socket_that_a_dead_daemon_left_is_replaced(directory: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(directory / "n.sock"))
    left.close()
    server = NodeServer(EchoNode("north"), directory / "n.sock")
    with NodeClient(directory / "n.sock") as client:
        assert client.status(timeout=60).party == "north"
    server.close()
    assert not (directory / "n.sock").exists()


def test_a_daemon_that_is_not_there_is_a_clear_error(directory: Path) -> None:
    with (
        NodeClient(directory / "n.sock") as client,
        pytest.raises(FederationError, match="cannot be reached"),
    ):
        client.status(timeout=60)
