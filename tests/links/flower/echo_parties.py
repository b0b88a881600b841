"""Parties and a coordinator for tests of the transport, behind a real host and real nodes: they
echo, fail, sleep or die on request. Run as a host (`host SETTINGS FOLDER`) or a node (`node
FOLDER`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedark.bench._echo import write_outcome
from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.foundation.logs import teller
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.operate import pinned
from fedark.operate.daemon import Served
from fedark.operate.host.supervisor import run_host
from fedark.operate.host.work import Work
from fedark.operate.node.supervisor import run_node
from fedark.operate.party import PartyConfig
from fedark.operate.processes import module
from fedark.v1 import stage_pb2


class EchoNode:
    """Answers a RoundRequest with its own bytes; `abort` requests carry a command as reason."""

    def __init__(self, party: str, role: str = "customer") -> None:
        self.party = party
        self.role = role

    def handle(self, request: bytes) -> bytes:
        message = stage_pb2.StageRequest.FromString(request)
        word, _, value = message.abort.reason.partition(" ")
        if word == "refuse":
            raise ProtocolError("said no")
        if word == "crash":
            raise RuntimeError("a secret that must not travel")
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "sleep":
            time.sleep(float(value))
        party = value if word == "impersonate" else self.party
        update = stage_pb2.RoundReply(protected_update=message.round.state)
        return stage_pb2.StageReply(
            run_id=message.run_id, party=party, round=update
        ).SerializeToString()

    def close(self) -> None:
        pass


class EchoAggregator(EchoNode):
    """Writes how the job ended once it is told."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__("pool", "aggregator")
        self._settings = settings

    def handle(self, request: bytes) -> bytes:
        word, _, reason = stage_pb2.StageRequest.FromString(request).abort.reason.partition(" ")
        if word == "over":
            write_outcome(self._settings, reason)
        return super().handle(request)


def node(settings: Mapping[str, Any]) -> Served:
    config = PartyConfig.read(Path(settings["folder"]))
    return Served(EchoNode(config.name, config.role))


def aggregator(settings: Mapping[str, Any]) -> Served:
    return Served(EchoAggregator(settings))


NODE_UP = module("echo_parties", "node")


def host_up(settings: Mapping[str, Any], commands: str = "") -> list[str]:
    """`commands`: module:function in the place of `pinned.write_commands`."""
    return module("echo_parties", "host", json.dumps(settings), commands)


def request(payload: bytes = b"", command: str = "") -> bytes:
    message = stage_pb2.StageRequest(run_id="run")
    if command:
        message.abort.reason = command
    else:
        message.round.CopyFrom(stage_pb2.RoundRequest(round=1, state=payload))
    return message.SerializeToString()


def payload(reply: bytes | FedarkError) -> bytes:
    assert isinstance(reply, bytes), reply
    return stage_pb2.StageReply.FromString(reply).round.protected_update


def coordinate(link: Link, aggregator: NodeClient, settings: Mapping[str, Any]) -> None:
    """Broadcast, then some stages; what happened and how long goes to settings["report"]."""
    report: dict[str, Any] = {"stages": []}
    started = time.monotonic()
    first = link.broadcast(request(b"hello"), expect=settings["expect"], stage="enrol", timeout=100)
    report["broadcast"] = {party: isinstance(reply, bytes) for party, reply in first.items()}
    report["first"] = time.monotonic() - started
    for command in settings["stages"]:
        size = int(command.get("bytes", 1000))
        requests = {
            party: request(
                os.urandom(size) if command.get("random") else bytes(size),
                command.get("command", {}).get(party, ""),
            )
            for party in command.get("to", sorted(first))
        }
        started = time.monotonic()
        replies = link.exchange(
            requests, stage=command.get("stage", "round"), timeout=command.get("timeout", 100)
        )
        report["stages"].append(
            {
                "seconds": time.monotonic() - started,
                "replies": {
                    p: (
                        "echo"
                        if isinstance(r, bytes) and r == _expected(requests[p], p)
                        else "other"
                        if isinstance(r, bytes)
                        else str(r)
                    )
                    for p, r in replies.items()
                },
            }
        )
    report["aggregator"] = payload(
        aggregator.handle(request(b"for the aggregator"), timeout=60)
    ).decode()
    Path(settings["report"]).write_text(json.dumps(report))
    aggregator.handle(request(command=f"over {settings.get('fail', '')}"), timeout=60)


def _expected(sent: bytes, party: str) -> bytes:
    return EchoNode(party).handle(request(payload_of(sent)))


def payload_of(sent: bytes) -> bytes:
    return stage_pb2.StageRequest.FromString(sent).round.state


if __name__ == "__main__":
    where = Path(sys.argv[-1])
    if sys.argv[1] == "host":
        if sys.argv[3]:
            from fedark.links.flower.configuration import resolve

            pinned.write_commands = resolve(sys.argv[3])  # type: ignore[assignment]
        work = Work("echo_parties:aggregator", "echo_parties:coordinate", json.loads(sys.argv[2]))
        run_host(where, teller("host"), work)
    else:
        run_node(where, teller("node"), factory="echo_parties:node")
