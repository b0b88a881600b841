"""Parties that answer at once, behind a real host and real nodes, so that what a stage costs is the
transport: for `fedark bench stage` and for tests of the transport.

    python -m fedark.bench._echo host SETTINGS FOLDER     as `fedark aggregator up FOLDER`
    python -m fedark.bench._echo node FOLDER              as `fedark node up FOLDER`
    python -m fedark.bench._echo stock FOLDER             the same with Flower's own SuperNode
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedark.contract.contract import Contract
from fedark.foundation.errors import FedarkError, FederationError
from fedark.foundation.files import private_directory, write_atomic
from fedark.foundation.logs import teller
from fedark.links.flower import configuration
from fedark.links.flower.bundle import SOCKET_KEY
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.operate import daemon
from fedark.operate.daemon import Served
from fedark.operate.host.supervisor import run_host
from fedark.operate.host.work import Work
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostsync import HostSync
from fedark.operate.node.supervisor import await_approval, run_node
from fedark.operate.party import PartyConfig
from fedark.operate.processes import child_environment, console_script, flower_environment, module
from fedark.operate.state import socket_of
from fedark.operate.supervisor import LOOK, Supervisor, told_to_stop
from fedark.simulation.machine import free_port
from fedark.v1 import stage_pb2

__all__ = ["NODE_UP", "STOCK_UP", "EchoNode", "coordinate", "host_up", "write_outcome"]

NODE_UP = module("fedark.bench._echo", "node")
STOCK_UP = module("fedark.bench._echo", "stock")


def host_up(settings: Mapping[str, Any]) -> list[str]:
    """The command of a host whose jobs are `coordinate` with these settings: "parties" to ask,
    "expect" so many nodes at first, "sizes" of the stages, "out" for the seconds of each.
    """
    return module("fedark.bench._echo", "host", json.dumps(settings))


class EchoNode:
    """Answers a round with the bytes that it brought."""

    def __init__(self, party: str, role: str) -> None:
        self.party, self.role = party, role

    def handle(self, request: bytes) -> bytes:
        """See `fedark.stages.node.Node.handle`."""
        message = stage_pb2.StageRequest.FromString(request)
        update = stage_pb2.RoundReply(protected_update=message.round.state)
        reply = stage_pb2.StageReply(run_id=message.run_id, party=self.party, round=update)
        return bytes(reply.SerializeToString())

    def wake(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing runs."""


class _EchoAggregator(EchoNode):
    """Asked once, when the job is over."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__("pool", "aggregator")
        self._settings = settings

    def handle(self, request: bytes) -> bytes:
        write_outcome(self._settings)
        return super().handle(request)


def write_outcome(settings: Mapping[str, Any], failed: str = "") -> None:
    """Have a host see that its job is over: what the aggregator of a real job writes."""
    digest = Contract.decode(Path(settings["contract"]).read_bytes()).digest().hex()
    folder = private_directory(Path(settings["folder"]) / "runs" / digest[:16])
    value = {"contract": digest, "stages": [], "passed_over": {}, "what": failed, "safe": ""}
    value |= {"code": "FederationError", "fix": ""}
    name = "failed.json" if failed else "report.json"
    write_atomic(folder / name, json.dumps(value).encode())


def make_node(settings: Mapping[str, Any]) -> Served:
    """The node of `settings["folder"]`."""
    config = PartyConfig.read(Path(settings["folder"]))
    return Served(EchoNode(config.name, config.role))


def make_aggregator(settings: Mapping[str, Any]) -> Served:
    """The aggregator of the contract in `settings["contract"]`."""
    return Served(_EchoAggregator(settings))


def coordinate(link: Link, aggregator: NodeClient, settings: Mapping[str, Any]) -> None:
    """Run stages of `settings["sizes"]` bytes; writes the seconds of each to `settings["out"]`."""
    link.broadcast(_request(0, b""), expect=settings["expect"], stage="enrol", timeout=60)
    parties = settings["parties"]
    seconds = []
    for number, size in enumerate(settings["sizes"], start=1):
        payload = os.urandom(size)
        began = time.monotonic()
        replies = link.exchange(
            dict.fromkeys(parties, _request(number, payload)), stage="round", timeout=300
        )
        seconds.append(time.monotonic() - began)
        for party in parties:
            reply = replies[party]
            if (
                not isinstance(reply, bytes)
                or stage_pb2.StageReply.FromString(reply).round.protected_update != payload
            ):
                raise FederationError(
                    f"{party} did not answer stage {number}:"
                    f" {reply if not isinstance(reply, bytes) else ''}"
                )
    Path(settings["out"]).write_text(json.dumps(seconds))
    aggregator.handle(_request(0, b""), timeout=60)


def _request(number: int, payload: bytes) -> bytes:
    round_ = stage_pb2.RoundRequest(round=number, state=payload)
    return bytes(stage_pb2.StageRequest(run_id="bench", round=round_).SerializeToString())


def _run_stock(path: Path) -> None:
    """A node whose connection is Flower's own SuperNode with its ClientApp processes."""
    say, stop, node = teller("node"), told_to_stop(), NodeFolder(path)
    await_approval(node, say, stop)
    run = private_directory(node.path / "run")
    where = socket_of(node.path)
    private_directory(where.parent)
    settings = daemon.DaemonSettings(
        str(where), "fedark.bench._echo:make_node", {"folder": str(node.path)}
    )
    file = configuration.write(run / "daemon.json", settings)
    key = node.transport_key().private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )  # the form that Flower wants
    configuration.write_private(run / "openssh.key", key)
    environment = flower_environment(private_directory(run / "flower"))
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join((scripts, environment.get("PATH", "")))
    supernode = console_script(
        "flower-supernode",
        *("--superlink", node.admission.address, "--root-certificates", str(node.ca)),
        *("--auth-supernode-private-key", str(run / "openssh.key")),
        *("--node-config", f'{SOCKET_KEY}="{where}"'),
        *("--host", "127.0.0.1", "--port", str(free_port())),
    )
    with Supervisor(private_directory(node.path / "logs"), say) as children:
        children.keep("daemon", module(daemon.__name__, str(file)), child_environment({}))
        children.keep("supernode", supernode, environment)
        sync = HostSync(node, where, say)
        while not stop.wait(LOOK):
            children.look()
            with suppress(FedarkError):
                sync.step()


def _main(role: str, *arguments: str) -> None:
    folder = Path(arguments[-1])
    if role == "host":
        work = Work(
            "fedark.bench._echo:make_aggregator",
            "fedark.bench._echo:coordinate",
            json.loads(arguments[0]),
        )
        run_host(folder, teller("host"), work)
    elif role == "node":
        run_node(folder, teller("node"), factory="fedark.bench._echo:make_node")
    else:
        _run_stock(folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
