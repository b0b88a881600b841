"""The exposed port: every route that Flower's server has, and every trick to reach one, against a
recorder in its place.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fronted import Running, front_before_a_recorder
from routes import flower_routes
from world import free_port

from fedark.links.flower.provision import provision, provision_node_key
from fedark.operate.host.front import FLEET_ROUTES, Front, server_context
from fedark.operate.host.service import MAX_BODY


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with front_before_a_recorder(tmp_path_factory.mktemp("keys")) as found:
        yield found


def test_of_every_route_that_flower_has_only_the_node_api_is_passed_on(running: Running) -> None:
    routes = flower_routes()
    paths = {path for _, path in routes}
    assert {
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/docs",
    } <= paths
    assert paths >= FLEET_ROUTES
    running.seen.clear()
    for path in sorted(paths):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"):
            status = running.request(method, path)
            assert status == (200 if method == "POST" and path in FLEET_ROUTES else 404), (
                method,
                path,
            )
    assert {(method, target) for method, target, _ in running.seen} == {
        ("POST", path) for path in FLEET_ROUTES
    }


def test_a_node_may_neither_register_nor_unregister_itself(running: Running) -> None:
    assert {"/v1/fleet/register-node", "/v1/fleet/unregister-node"} <= {
        path for _, path in flower_routes()
    } - FLEET_ROUTES


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages#/v1/control/list-nodes",
        "/V1/FLEET/pull-messages",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet/pull-messages;/../../control/list-nodes",
        "/v1/fedark/../control/list-nodes",
        "https://127.0.0.1/v1/control/list-nodes",
        "http://x/v1/fleet/pull-messages",
        "*",
        "/v1/fleet/pull-messages\\..\\control",
        "/",
    ],
)
def test_no_spelling_of_a_target_reaches_another_route(running: Running, target: str) -> None:
    running.seen.clear()
    assert running.request("POST", target) in (200, 400, 404)
    assert running.seen == []


def test_a_key_that_is_not_admitted_reaches_nothing_and_a_revoked_one_nothing_more(
    running: Running, tmp_path: Path
) -> None:
    stranger = provision_node_key(tmp_path, "stranger")[1]
    running.seen.clear()
    for key in (stranger, b"", b"x", b"\xff\xfe"):
        assert running.request("POST", "/v1/fleet/pull-messages", key=key) == 401
    twice = f"flwr-public-key: {base64.b64encode(stranger).decode()}\r\n"
    assert running.request("POST", "/v1/fleet/pull-messages", extra=twice) == 401
    mine = running.key.decode().strip()
    running.admitted.discard(mine)
    assert running.request("POST", "/v1/fleet/pull-messages") == 401
    assert running.seen == []
    running.admitted.add(mine)
    assert running.request("POST", "/v1/fleet/pull-messages") == 200


def test_a_refusal_arrives_although_a_large_body_is_still_on_its_way(
    running: Running, tmp_path: Path
) -> None:
    stranger = provision_node_key(tmp_path, "stranger")[1]
    for _ in range(20):
        assert running.request("POST", "/v1/fleet/push-object", bytes(8 << 20), key=stranger) == 401


def _head(running: Running, *lines: str, target: str = "/v1/fleet/pull-messages") -> bytes:
    auth = f"flwr-public-key: {base64.b64encode(running.key).decode()}"
    return "\r\n".join([f"POST {target} HTTP/1.1", "Host: x", auth, *lines, "", ""]).encode(
        "latin-1"
    )


INNER = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.attack("request smuggling")
@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 0", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked",),
        ("Transfer-Encoding: identity", "Content-Length: 0"),
        ("Transfer-Encoding : chunked", "Content-Length: 0"),
        ("Content-Length: 0", f"Content-Length: {len(INNER)}"),
        (f"Content-Length: {len(INNER)}", "Content-Length: 0"),
        ("Content-Length: +0",),
        ("Content-Length: -1",),
        ("Content-Length: 0x0",),
        (" Content-Length: 0",),
        ("Content-Length: 0", "Upgrade: h2c", "Connection: Upgrade"),
        ("Content-Length: 0", "Expect: 100-continue"),
        ("X: a\rb", "Content-Length: 0"),
        ("X: a\x00b", "Content-Length: 0"),
    ],
)
def test_a_request_whose_end_two_parsers_could_see_differently_is_refused_whole(
    running: Running, lines: tuple[str, ...], refusal: Callable[[str], None]
) -> None:
    running.seen.clear()
    answer = running.raw(_head(running, *lines) + INNER)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401")), answer[
        :100
    ]  # a folded line becomes part of the key
    assert answer.count(b"HTTP/1.1 ") == 1
    assert running.seen == []
    refusal("the front: the whole request, with status 400 or 401")


def test_a_second_request_in_the_first_ones_body_stays_a_body(running: Running) -> None:
    running.seen.clear()
    answer = running.raw(
        _head(running, f"Content-Length: {len(INNER)}", "Connection: close") + INNER
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert running.seen == [("POST", "/v1/fleet/pull-messages", INNER)]


@pytest.mark.parametrize(
    "length", ["0", "0, 0"]
)  # the latter means the same (RFC 9110, 8.6), and is passed on as the former
def test_a_second_request_on_a_connection_is_judged_like_the_first(
    running: Running, length: str
) -> None:
    running.seen.clear()
    answer = running.raw(_head(running, f"Content-Length: {length}") + INNER)
    assert [part.split()[0] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404"]
    assert len(running.seen) == 1


def test_headers_outside_the_list_are_dropped_on_both_ways(running: Running) -> None:
    lines = (
        "X-Forwarded-For: 1",
        "Cookie: a",
        "Authorization: b",
        "Flwr-Timestamp: now",
        "Content-Length: 0",
        "Connection: close",
    )
    answer = running.raw(_head(running, *lines))
    passed = running.headers[-1]
    assert set(passed) == {b"host", b"content-length", b"flwr-public-key", b"flwr-timestamp"}
    assert b"recorder" not in answer
    assert b"set-cookie" not in answer.lower()
    assert b"flwr-x: y" in answer.lower()


def test_large_bodies_pass_piece_by_piece_and_too_large_ones_are_refused(running: Running) -> None:
    running.seen.clear()
    body = bytes(range(256)) * 4000
    assert running.request("POST", "/v1/fleet/push-object", body) == 200
    assert running.seen[-1][2] == body
    head = _head(running, f"Content-Length: {(1 << 20) + 1}", target="/v1/fleet/push-object")
    assert running.raw(head).startswith(b"HTTP/1.1 413")
    own = f"PUT /v1/fedark/x HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n".encode()
    assert running.raw(own).startswith(b"HTTP/1.1 413")
    assert len(running.seen) == 1


def test_the_hosts_own_routes_are_answered_here_and_never_passed_on(running: Running) -> None:
    running.seen.clear()
    assert running.request("GET", "/v1/fedark/hello", key=b"") == 200
    assert running.own[-1][:2] == ("GET", "/v1/fedark/hello")
    assert running.seen == []


def test_a_silent_or_slow_client_is_cut_off(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        running.front, "_limits", replace(running.front._limits, head=1.0, silence=1.0)
    )
    for data in (b"", b"POST /v1/fl", _head(running, "Content-Length: 10") + b"abc"):
        began = time.monotonic()
        answer = running.raw(data, wait=60)
        assert time.monotonic() - began < 15
        assert not answer.startswith(b"HTTP/1.1 200")


def test_an_endless_head_is_refused(running: Running) -> None:
    answer = running.raw(b"GET / HTTP/1.1\r\nX: " + b"a" * (64 << 10))
    assert answer.startswith(b"HTTP/1.1 4") or answer == b""


def test_old_tls_is_refused(running: Running) -> None:
    context = ssl.create_default_context(cafile=str(running.ca))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        pytest.raises(ssl.SSLError),
        socket.create_connection(running.address, timeout=60) as plain,
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_superlink_that_is_down_is_a_503_that_nodes_try_again(tmp_path: Path) -> None:
    keys = provision(tmp_path)
    public = provision_node_key(tmp_path, "north")[1]

    async def main() -> bytes:
        front = Front(
            tls=server_context(keys.certificate, keys.key),
            upstream=tmp_path / "none.sock",
            admits=lambda key: True,
            service=None,  # type: ignore[arg-type]
        )
        await front.start(address := f"127.0.0.1:{free_port()}")
        running = Running(("127.0.0.1", int(address.split(":")[1])), keys.ca, public, set())
        status = await asyncio.to_thread(running.request, "POST", "/v1/fleet/pull-messages")
        await front.close()
        return status

    assert asyncio.run(main()) == 503
