"""Nodes and coordinators for tests of the transport: they echo, fail, sleep or die on request."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.v1 import stage_pb2


class EchoNode:
    """Answers a RoundRequest with its own bytes; `abort` requests carry a command as their reason."""

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


def node(settings: Mapping[str, Any]) -> EchoNode:
    return EchoNode(settings["party"], settings.get("role", "customer"))


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
    """Broadcast, then some stages; writes what happened and how long it took to settings["report"]."""
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
    if settings.get("fail"):
        raise ProtocolError("the coordinator gave up")


def _expected(sent: bytes, party: str) -> bytes:
    return EchoNode(party).handle(request(payload_of(sent)))


def payload_of(sent: bytes) -> bytes:
    return stage_pb2.StageRequest.FromString(sent).round.state
