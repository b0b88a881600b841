"""Many clients, or slow ones, that have no node's key: they cost little, and keep nobody out."""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import base64
import gc
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from direct import admitted, make_host, make_node
from fronted import SMALL, Running, front_before_a_recorder
from world import until

from fedark.foundation.logs import Bounded
from fedark.operate import joining
from fedark.operate.host.admission import revoke
from fedark.operate.host.front import _limits, _network
from fedark.operate.host.service import MAX_BODY, HostAnswer, HostRequest, HostService
from fedark.operate.host.visitors import Limits
from fedark.operate.joining import MAX_FILE, request_headers

PATIENT = replace(SMALL, head=120.0, silence=120.0, connections=40, per_address=12)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with front_before_a_recorder(tmp_path_factory.mktemp("keys"), PATIENT) as found:
        yield found


@contextmanager
def limited(running: Running, **changes: Any) -> Iterator[None]:
    front = running.front
    assert front is not None
    before, front._limits = front._limits, replace(front._limits, **changes)
    try:
        yield
    finally:
        front._limits = before


def _own(lines: str = "", length: int = 0, node: str = "north") -> bytes:
    return (
        f"PUT /v1/fedark/x HTTP/1.1\r\nHost: x\r\n{f'fedark-node: {node}' if node else 'a: b'}\r\n"
        f"{lines}Content-Length: {length}\r\n\r\n"
    ).encode()


def _answered(connection: socket.socket) -> bool:
    connection.sendall(_own())
    answer = b""
    while piece := connection.recv(1000):
        answer += piece
        if answer.endswith(b"own"):
            return answer.startswith(b"HTTP/1.1 200")
    return False


def _closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def _served(running: Running, source: str) -> bool:
    auth = f"flwr-public-key: {base64.b64encode(running.key).decode()}"
    asked = (
        f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n{auth}\r\nContent-Length: 0\r\n\r\n"
    )
    with running.connect(source) as connection:
        connection.sendall(asked.encode())
        return connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.attack("slow connections from one address")
@pytest.mark.parametrize("tls", [False, True], ids=["before TLS", "in a head"])
def test_one_address_full_of_slow_connections_keeps_neither_itself_nor_others_out(
    running: Running, tls: bool, refusal: Callable[[str], None]
) -> None:
    with ExitStack() as stack:
        for _ in range(60):
            slow = running.connect("127.0.0.2") if tls else running.plain("127.0.0.2")
            stack.enter_context(slow)
            slow.sendall(b"P" if tls else b"\x16")
        assert len(running.front._visitors.tasks()) <= PATIENT.per_address
        assert _served(running, "127.0.0.2")
        assert _served(running, "127.0.0.3")
    refusal("the front: an address that has too many connections loses its oldest")


@pytest.mark.attack("half-sent requests from many addresses")
def test_many_addresses_that_fill_every_place_keep_nobody_out(
    running: Running, refusal: Callable[[str], None]
) -> None:
    with ExitStack() as stack:
        for number in range(120):
            slow = stack.enter_context(running.plain(f"127.0.0.{10 + number}"))
            slow.sendall(b"\x16")
        assert len(running.front._visitors.tasks()) <= PATIENT.connections
        for source in ("127.0.0.2", "127.0.0.10", "127.0.0.200"):
            assert _served(running, source)
    refusal("the front: the oldest connection that has shown no node's key is closed")


def test_the_address_with_the_most_connections_makes_room(running: Running) -> None:
    with ExitStack() as stack:
        few = [stack.enter_context(running.connect(f"127.0.0.{20 + n}")) for n in range(30)]
        for _ in range(40):
            stack.enter_context(running.plain("127.0.0.2"))
        few[0].sendall(_own())
        assert few[0].recv(100).startswith(b"HTTP/1.1 200")


def test_whoever_has_shown_a_nodes_key_keeps_the_place(running: Running) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(running.connect("127.0.0.2")) for _ in range(12)]
        for connection in nodes:
            assert _answered(connection)
        for _ in range(20):
            refused = stack.enter_context(running.plain("127.0.0.2"))
            assert _closed(refused)
        for connection in nodes:
            assert _answered(connection)
    until(lambda: not running.front._visitors.tasks(), "places are given back")
    assert not running.front._visitors._count
    assert not running.front._visitors._strangers


@pytest.mark.attack("a request that drips")
def test_a_body_that_keeps_coming_slowly_is_cut_off_at_its_deadline(
    running: Running, refusal: Callable[[str], None]
) -> None:
    with limited(running, slack=1.0, rate=1 << 20), running.connect() as connection:
        connection.sendall(_own(length=1000))
        connection.settimeout(0.05)
        deadline, sent = time.monotonic() + 60, 0
        while True:
            assert time.monotonic() < deadline
            try:
                if not (answer := connection.recv(1000)):
                    break
                assert not answer.startswith(b"HTTP/1.1 200")
            except TimeoutError:
                connection.sendall(b"x")  # never silent
                sent += 1
            except OSError:
                break
        assert 0 < sent < 1000
    refusal("the front: a deadline for the whole request, by its length")


@pytest.mark.attack("a large body before authentication")
def test_before_authentication_a_body_is_small(
    running: Running, refusal: Callable[[str], None]
) -> None:
    """Three hundred that announce 4 MiB are told so before a byte of them is kept."""
    running.own.clear()
    for _ in range(20):
        with running.connect() as connection:
            connection.sendall(_own(length=MAX_BODY, node="") + bytes(256 << 10))
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert running.own == []
    refusal("the front: status 413, before a byte of it is kept")


def test_a_node_has_two_requests_in_memory_and_no_more(running: Running) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(running.connect()) for _ in range(2)]
        for connection in held:
            connection.sendall(_own(length=10))
        until(lambda: running.front._at_work["north"] == 2, "both are at work")
        for node, status in (("north", b"429"), ("east", b"200")):
            with running.connect() as connection:
                connection.sendall(_own(node=node))
                assert connection.recv(100).split()[1] == status
        held[0].sendall(bytes(10))
        assert held[0].recv(100).split()[1] == b"200"
        with running.connect() as connection:
            connection.sendall(_own())
            assert connection.recv(100).split()[1] == b"200"
    until(lambda: not running.front._at_work, "turns are given back")


def test_refusals_are_logged_with_the_clients_address_at_a_bounded_rate(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    front_log = logging.getLogger("fedark.operate.host.front")
    running.front._refusals = Bounded(front_log, most=3, clock=lambda: clock[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            with running.connect("127.0.0.9") as connection:
                connection.sendall(b"GET /secret HTTP/1.1\r\nHost: x\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 404")
        said = [record.getMessage() for record in caplog.records]
        assert said == ["refused GET /secret from 127.0.0.9 with 404: no such route"] * 3
        clock[0] = 61.0
        with running.connect("127.0.0.9") as connection:
            connection.sendall(b"\x00\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    said = [record.getMessage() for record in caplog.records][3:]
    assert said[0] == "7 lines like these were left out"
    assert said[1].startswith("refused a request from 127.0.0.9 with 400")


def test_addresses_are_counted_as_networks_and_not_behind_a_proxy(tmp_path: Path) -> None:
    assert _network("203.0.113.7") == "203.0.113.7"
    assert _network("2001:db8:1:2:3::4") == _network("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert _network("fe80::1%eth0") == "fe80::/64"
    host = make_host(tmp_path / "host")  # listens on loopback, nodes use a name
    assert _limits(host).per_address == Limits().connections
    direct = host.config.model_copy(update={"listen": "0.0.0.0:8443"})
    assert _limits(replace(host, config=direct)).per_address == Limits().per_address


def test_nobody_learns_who_is_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that nobody knows, a member's with another key, a member's with a bad or no
    signature: the same bytes, after the same work.
    """
    host = make_host(tmp_path / "host")
    admitted(host, tmp_path / "north", "north", "customer")
    admitted(host, tmp_path / "gone", "gone", "customer")
    make_node(host, tmp_path / "waiting", "waiting", "customer")
    revoke(host, "gone")
    service, key = HostService(host), ec.generate_private_key(ec.SECP384R1())
    verified: list[str] = []
    real = joining._verify_ecdsa
    monkeypatch.setattr(
        joining, "_verify_ecdsa", lambda *args: (verified.append(args[3]), real(*args))
    )
    for method, path in (("GET", "jobs"), ("GET", "bundle"), ("PUT", "offers"), ("GET", "x")):
        target, seen = f"/v1/fedark/{path}", set()
        for change in ({}, {"fedark-signature": "AAAA"}, {"fedark-body": "00" * 32}):
            for name in ("north", "gone", "waiting", "nobody", "pool", ""):
                headers = request_headers(key, name, method, target, b"") | change
                verified.clear()
                answer = service.begin(method, target, headers)
                assert isinstance(answer, HostAnswer)
                assert answer.status == 401
                assert verified == [name]
                seen.add((answer.status, answer.kind, answer.body))
        assert len(seen) == 1
        late = {
            service.handle(
                method, target, request_headers(key, name, method, target, b"", now=0), b""
            ).body
            for name in ("north", "gone", "nobody")
        }
        assert len({json.loads(body)["what"][:40] for body in late}) == 1


def test_a_body_is_judged_by_the_head_before_it_is_read(tmp_path: Path) -> None:
    host = make_host(tmp_path / "host")
    maker = admitted(host, tmp_path / "maker", "maker", "provider")
    service, target = HostService(host), "/v1/fedark/offers"
    join = service.begin("POST", "/v1/fedark/join", {"fedark-version": "1"})
    assert isinstance(join, HostRequest)
    assert (join.node, join.most) == ("", MAX_FILE)
    headers = request_headers(maker.transport_key(), "maker", "PUT", target, b"offer")
    call = service.begin("PUT", target, headers)
    assert isinstance(call, HostRequest)
    assert (call.node, call.most) == ("maker", MAX_BODY)
    assert service.finish(call, b"other").status == 401
    revoke(host, "maker")  # while the body was on its way
    told = json.loads(service.finish(call, b"offer").body)
    assert told["what"] == "maker is not approved."


def test_no_descriptor_and_no_buffer_is_left_behind(running: Running) -> None:
    until(lambda: not running.front._visitors.tasks(), "all have left")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(200):
        with socket.create_connection(running.address, source_address=(f"127.0.0.{number + 1}", 0)):
            pass
    until(lambda: not running.front._visitors.tasks(), "all have left")
    until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before, "descriptors are closed")
    buffers = [
        found for found in gc.get_objects() if isinstance(found, asyncio.sslproto.SSLProtocol)
    ]
    assert len(buffers) < 80  # 64 since the last look, and the recorder's
