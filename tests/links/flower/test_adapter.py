"""Contracts with Flower's private APIs: what the adapter relies on is there, with the meaning that
it relies on.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import threading
from importlib.metadata import entry_points, version

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    pull_objects,
    push_objects,
)
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedark.foundation.errors import FederationError
from fedark.links.flower import adapter
from fedark.links.flower.provision import provision


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_flower_is_a_version_that_the_adapter_was_written_for() -> None:
    """The pinned release, or the one before it, which `make flower-contracts` names."""
    assert version("flwr") == os.environ.get("FEDARK_FLOWER", "1.42.0")


@pytest.mark.parametrize(
    "module",
    [
        "flwr.supercore.control.control_http_client",
        "flwr.supercore.inflatable.inflatable_utils",
        "flwr.supercore.retry.http_retry",
        "flwr.superlink.grid.http_grid",
        "flwr.superlink.runtime.run_serverapp",
        "flwr.supernode.fleet_http_client",
        "flwr.supernode.fleet_http_connection",
        "flwr.supernode.node_auth_http_interceptor",
        "flwr.supernode.runtime.run_clientapp",
    ],
)
def test_what_the_adapter_uses_of_the_fleet_and_control_apis_is_http_alone(module: str) -> None:
    assert "grpc" not in inspect.getsource(importlib.import_module(module))


def test_the_fleet_connection_takes_the_keys_and_gives_the_callbacks_that_the_adapter_uses() -> (
    None
):
    assert parameters(http_request_response)[:4] == [
        "server_address",
        "insecure",
        "root_certificates",
        "authentication_keys",
    ]
    source = inspect.getsource(http_request_response)
    order = [
        "node.node_id,",
        "receive,",
        "send,",
        "get_run,",
        "get_fab,",
        "pull_object,",
        "push_object,",
        "confirm_message_received,",
    ]
    places = [source.rindex(f"                {name}\n") for name in order]
    assert places == sorted(places)


@pytest.mark.parametrize("function", [pull_objects, pull_and_inflate_object_from_tree])
def test_objects_can_be_looked_for_again_sooner_than_after_a_second(function: object) -> None:
    assert {"initial_backoff", "backoff_cap"} <= set(parameters(function))


def test_objects_are_pushed_by_id() -> None:
    assert parameters(push_objects)[:3] == ["objects", "push_object_fn", "object_ids_to_push"]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("flwr.superlink.runtime.run_serverapp", ["install_from_fab"]),
        ("flwr.superlink.grid.http_grid", ["pull_objects"]),
    ],
)
def test_the_task_processes_take_their_steps_by_names_that_can_be_replaced(
    module: str, names: list[str]
) -> None:
    loaded = importlib.import_module(module)
    source = inspect.getsource(loaded)
    for name in names:
        assert hasattr(loaded, name)
        assert f"{name}(" in source.replace(f"import {name}", "")


def test_a_task_process_does_nothing_with_a_bundle_before_it_is_checked() -> None:
    module = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    lines = [line.strip() for line in inspect.getsource(module).splitlines()]
    uses = [
        line
        for line in lines
        if "fab.content" in line or "get_fab_metadata(" in line or "get_project_dir(" in line
    ]
    assert uses[0] == "install_from_fab(fab.content, skip_prompt=True)"


def test_flowers_executor_finds_the_task_process_by_the_name_of_our_command() -> None:
    assert TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP] == "flwr-serverapp"


@pytest.mark.parametrize("name", ["flower-superlink", "flower-superexec", "flower-supernode"])
def test_flowers_commands_are_console_scripts(name: str) -> None:
    assert len(entry_points(group="console_scripts", name=name)) == 1


def test_the_control_client_has_the_calls_that_the_host_makes() -> None:
    for name in ("RegisterNode", "ListNodes", "StartRun", "ListRuns", "StopRun"):
        assert callable(getattr(ControlHttpClient, name))


def test_the_pause_between_attempts_is_read_where_it_can_be_set() -> None:
    retry = importlib.import_module("flwr.supercore.retry.http_retry")
    assert "max_delay=MAX_RETRY_DELAY" in inspect.getsource(retry.make_simple_http_retry_invoker)
    adapter.retry_soon()
    assert retry.MAX_RETRY_DELAY <= 1.0


def test_a_node_can_take_back_its_own_former_connection() -> None:
    assert callable(FleetHttpClient.DeactivateNode)
    assert [field.name for field in DeactivateNodeRequest.DESCRIPTOR.fields] == ["node_id"]
    assert parameters(NodeAuthHttpInterceptor)[:2] == ["private_key", "public_key"]


def test_a_request_that_has_to_be_made_again_is_noticed() -> None:
    connection = importlib.import_module("flwr.supernode.fleet_http_connection")
    assert "retry_invoker = make_simple_http_retry_invoker()" in inspect.getsource(
        connection.http_request_response
    )
    trouble = threading.Event()
    invoker = adapter._noted(connection.make_simple_http_retry_invoker, trouble)
    invoker.max_tries, answers = 2, iter([httpx.ConnectError("gone"), 7])

    def ask() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert invoker.invoke(ask) == 7
    assert trouble.is_set()


def test_the_superlink_says_when_a_node_connected() -> None:
    assert "last_activated_at" in [field.name for field in NodeInfo.DESCRIPTOR.fields]


def test_a_stopped_run_is_an_error_of_its_own_and_no_transport_error() -> None:
    assert not issubclass(adapter.RUN_OVER, adapter.NOT_REACHED)
    assert "raise RunNotRunningException" in inspect.getsource(
        importlib.import_module("flwr.supercore.retry.http_retry")
    )


def test_error_codes_are_flowers_own() -> None:
    assert (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    ) == (3, 4, 5)
    assert (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB) == (2, 7)


def test_a_superlink_that_is_not_there_is_a_clear_error(tmp_path) -> None:
    with (
        adapter.Control(tmp_path / "none.sock") as control,
        pytest.raises(FederationError, match="cannot be reached to list the nodes") as caught,
    ):
        control.nodes()
    assert "none.sock" in caught.value.fix


def test_the_superlink_serves_by_a_call_that_can_be_given_a_socket() -> None:
    command = importlib.import_module("flwr.superlink.cli.flower_superlink")
    tree = ast.parse(inspect.getsource(command))
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "uvicorn.run"
    ]
    given = {keyword.arg for keyword in call.keywords}
    assert not call.args
    assert {"host", "port", "ssl_keyfile", "ssl_certfile"} <= given
    assert not {"fd", "uds"} & given
    assert "uvicorn." not in ast.unparse(tree).replace("uvicorn.run(", "")
    assert "fd" in inspect.signature(uvicorn.run).parameters


def test_every_client_of_flowers_apis_holds_one_http_client_that_can_be_replaced() -> None:
    source = inspect.getsource(ProtobufClient)
    assert source.count("httpx.Client(") == 1
    assert "self._client = httpx.Client(" in source
    for kind in (ControlHttpClient, RuntimeHttpClient, FleetHttpClient):
        assert issubclass(kind, ProtobufClient)
        assert "__init__" not in vars(kind)


def test_trouble_counts_until_the_node_has_connected_anew() -> None:
    """A message that was lost with the connection is sent again only then: one that failed to
    connect must try once more.
    """
    trouble, events = threading.Event(), []
    comes_back = iter([False, False, True])

    def renew(node_id: int) -> bool:
        events.append("renew")
        return next(comes_back)

    def receive() -> None:
        events.append("receive")
        if len(events) == 1:
            trouble.set()

    fleet = adapter.Fleet((7, receive, *[None] * 6), trouble, renew)
    for _ in range(3):
        assert fleet.pull() is None
    assert events == ["receive", "renew", "renew", "receive", "renew", "receive"]
    assert not trouble.is_set()


def test_a_node_that_cannot_reach_the_superlink_has_not_connected_anew(tmp_path) -> None:
    ca = provision(tmp_path / "keys").ca
    assert (
        adapter._connect_anew("127.0.0.1:1", ca, ec.generate_private_key(ec.SECP384R1()), 7)
        is False
    )
