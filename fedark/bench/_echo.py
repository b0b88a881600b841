"""Parties that answer at once, so that what a stage costs is the transport: for `fedark bench
stage`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedark.foundation.errors import FederationError
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.v1 import stage_pb2

__all__ = ["EchoNode", "coordinate", "make"]


class EchoNode:
    """Answers a round with the bytes that it brought."""

    role = "customer"

    def __init__(self, party: str) -> None:
        self.party = party

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


def make(settings: Mapping[str, Any]) -> EchoNode:
    """The node of `settings["party"]`."""
    return EchoNode(settings["party"])


def coordinate(link: Link, aggregator: NodeClient, settings: Mapping[str, Any]) -> None:
    """Run stages of `settings["sizes"]` bytes; writes the seconds of each to `settings["out"]`."""
    found = link.broadcast(_request(0, b""), expect=settings["expect"], stage="enrol", timeout=60)
    parties = [party for party, reply in found.items() if isinstance(reply, bytes)]
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


def _request(number: int, payload: bytes) -> bytes:
    round_ = stage_pb2.RoundRequest(round=number, state=payload)
    return bytes(stage_pb2.StageRequest(run_id="bench", round=round_).SerializeToString())
