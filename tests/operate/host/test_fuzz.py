"""Whatever bytes come to a host, or from it to a node: an answer that is a refusal of ours, and
nothing that stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from direct import admitted, make_host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.operate.host.admission import file_request
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.service import PREFIX, HostService
from fedark.operate.joining import Admission, JoinRequest, parse, request_headers
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostclient import HostClient, _refusal
from fedark.operate.offer import Offer

# `FEDARK_FUZZ` sets the number of inputs; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "100")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[HostFolder, NodeFolder, NodeFolder]:
    root = tmp_path_factory.mktemp("fuzz")
    host = make_host(root / "host")
    return (
        host,
        admitted(host, root / "maker", "maker", "provider"),
        admitted(host, root / "north", "north", "customer"),
    )


@FUZZ
@given(data=st.binary(max_size=600) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_join_requests_file_nothing(world: Any, data: bytes) -> None:
    host = world[0]
    with pytest.raises(FedarkError):
        file_request(host, data)
    assert [row.name for row in host.store.nodes()] == ["maker", "north"]


@FUZZ
@given(name=st.sampled_from(sorted(JoinRequest.model_fields)), value=JSON)
def test_a_request_with_any_field_changed_files_nothing(world: Any, name: str, value: Any) -> None:
    host, _, north = world
    changed = json.loads((north.path / "request.json").read_bytes())
    if changed[name] == value:
        return
    with pytest.raises(FedarkError):
        file_request(host, json.dumps(changed | {name: value}).encode())


@FUZZ
@given(name=st.sampled_from(sorted(Admission.model_fields)), value=JSON)
def test_a_bundle_with_any_field_changed_is_not_installed(
    world: Any, name: str, value: Any
) -> None:
    north = world[2]
    before = (north.path / "host.json").read_bytes()
    changed = json.loads(before)
    if changed[name] == value:
        return
    with pytest.raises(FedarkError):
        north.install(json.dumps(changed | {name: value}).encode())
    assert (north.path / "host.json").read_bytes() == before


@FUZZ
@given(
    method=st.sampled_from(["GET", "PUT", "POST", "HEAD"]) | st.text(max_size=8),
    path=st.sampled_from(
        [
            "jobs",
            "offers",
            "bundle",
            "join",
            f"jobs/{'0' * 96}/answer",
            f"catalogue/{'0' * 96}/manifest",
        ]
    )
    | st.builds(lambda number: f"catalogue/{'1' * 96}/payload/{number}", st.integers())
    | st.text(max_size=40),
    body=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()),
    signed=st.booleans(),
    who=st.sampled_from([1, 2]),
)
def test_arbitrary_calls_are_answered_and_change_nothing(
    world: Any, method: str, path: str, body: bytes, signed: bool, who: int
) -> None:
    host, node = world[0], world[who]
    target = PREFIX + path
    headers = {"fedark-version": "1"}
    if signed:
        headers = request_headers(node.transport_key(), node.config.name, method, target, body)
    answer = HostService(host).handle(method, target, headers, body)
    assert answer.status in ((200, 400, 401, 404) if signed else (200, 400, 401))
    assert answer.status != 200 or (method, path) in {
        ("GET", "jobs"),
        ("GET", "bundle"),
        ("GET", "hello"),
    }
    assert host.store.jobs() == ()
    assert host.store.offer("dispatch") is None
    assert list(host.catalogue.iterdir()) == []


@FUZZ
@given(
    headers=st.dictionaries(
        st.sampled_from(["fedark-node", "fedark-time", "fedark-signature", "fedark-version"]),
        st.text(),
    )
)
def test_arbitrary_headers_authenticate_nobody(world: Any, headers: dict[str, str]) -> None:
    answer = HostService(world[0]).handle(
        "GET", f"{PREFIX}jobs", headers | {"fedark-version": "1"}, b""
    )
    assert answer.status == 401


@FUZZ
@given(data=st.binary(max_size=400))
@pytest.mark.parametrize(
    "read",
    [
        lambda data: Offer.verify(data, bytes(32), by="maker"),
        lambda data: parse(data, Admission, "it"),
    ],
    ids=["offer", "bundle"],
)
def test_arbitrary_offers_and_bundles_are_refused(
    read: Callable[[bytes], object], data: bytes
) -> None:
    with pytest.raises(FedarkError):
        read(data)


DEEP = b"[" * 100_000


def test_what_nests_without_end_is_refused_like_anything_else(world: Any) -> None:
    host, _, north = world
    for deep in (
        DEEP,
        b"[" * 600 + b"]" * 600,
        b'{"party": ' + b'{"x": ' * 500 + b"1" + b"}" * 501,
    ):
        with pytest.raises(FedarkError):
            file_request(host, deep)
    headers = request_headers(
        north.transport_key(), "north", "PUT", f"{PREFIX}jobs/{'0' * 96}/answer", DEEP
    )
    assert HostService(host).handle(
        "PUT", f"{PREFIX}jobs/{'0' * 96}/answer", headers, DEEP
    ).status in (400, 401, 404)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b"[1]",
        b'{"time": "x"}',
        b'{"time": NaN}',
        b'{"size": 1}',
        DEEP,
        b'{"size": -1, "total": 2}',
        b'{"size": 3, "total": 2}',
        b'{"size": 1.0, "total": 2}',
        b'{"size": 1, "total": 1180591620717411303424}',
    ],
)
def test_an_answer_of_the_host_that_makes_no_sense_is_an_error_of_ours(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = object.__new__(HostClient)
    monkeypatch.setattr(client, "_call_or_none", lambda *_: said, raising=False)
    for read in (
        client.hello,
        lambda: client.held("0" * 96),
        lambda: client.put_piece("0" * 96, 0, b"x"),
    ):
        with pytest.raises(ProtocolError, match="malformed"):
            read()
    if said not in (b"[]",):
        with pytest.raises(ProtocolError, match="malformed"):
            client.jobs()
    if said in (b"", b"\xff", DEEP):
        with pytest.raises(ProtocolError, match="malformed"):
            client.bundle()
    for digest in ("", "\n", "./" + "0" * 94, "0" * 95, "A" * 96, 7, None):
        jobs = json.dumps([{"digest": digest, "name": "x", "status": "proposed"}]).encode()
        monkeypatch.setattr(client, "_call_or_none", lambda *_, jobs=jobs: jobs, raising=False)
        with pytest.raises(ProtocolError, match="malformed"):
            client.jobs()
    assert "status 400" in str(_refusal(400, said)) or said.startswith(b"{")


def test_the_fuzzed_world_is_one_in_which_the_right_bytes_do_pass(world: Any) -> None:
    host, _, north = world
    file_request(host, (north.path / "request.json").read_bytes())
    north.install((north.path / "host.json").read_bytes())
    headers = request_headers(north.transport_key(), "north", "GET", f"{PREFIX}jobs", b"")
    assert HostService(host).handle("GET", f"{PREFIX}jobs", headers, b"").status == 200
