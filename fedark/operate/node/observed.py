"""A node under observation: what it does is counted, and what is logged meanwhile carries the job
and the session.
"""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from fedark.foundation import errors
from fedark.foundation.logs import of_run, working_on
from fedark.foundation.metrics import Metrics
from fedark.links.flower.service import Node
from fedark.links.link import stage_of
from fedark.v1 import stage_pb2

__all__ = ["ObservedNode"]

_SECONDS = ("fedark_stage_seconds", "Seconds that this node worked on stages.")
_BYTES = ("fedark_stage_bytes_total", "Bytes of stage requests and replies.")
_REFUSALS = ("fedark_refusals_total", "Faults that this node answered with.")


class ObservedNode:
    """Passes everything through to `node`."""

    def __init__(self, node: Node, metrics: Metrics) -> None:
        self.party, self.role = node.party, node.role
        self._node, self._metrics = node, metrics

    def handle(self, request: bytes) -> bytes:
        """See `Node.handle`."""
        message = stage_pb2.StageRequest()
        try:
            message.ParseFromString(request)
        except DecodeError:
            message = stage_pb2.StageRequest()
        stage = stage_of(message)
        began = time.monotonic()
        with working_on(**of_run(message.contract_digest, message.run_id)):
            reply = self._node.handle(request)
        self._metrics.observe(*_SECONDS, time.monotonic() - began, stage=stage)
        self._metrics.count(*_BYTES, len(request), stage=stage, direction="in")
        self._metrics.count(*_BYTES, len(reply), stage=stage, direction="out")
        if stage == "round":
            self._metrics.set(
                "fedark_round", "The last round that was worked on.", message.round.round
            )
        self._count_fault(reply)
        return reply

    def close(self) -> None:
        """See `Node.close`."""
        self._node.close()

    def _count_fault(self, reply: bytes) -> None:
        answer = stage_pb2.StageReply()
        try:
            answer.ParseFromString(reply)
        except DecodeError:
            return
        if answer.HasField("fault"):
            code = answer.fault.code if answer.fault.code in errors.__all__ else "other"
            self._metrics.count(*_REFUSALS, code=code)
