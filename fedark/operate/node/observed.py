"""A node under observation: what it does is counted, and what is logged meanwhile carries the job
and the session.

    fedark_stage_seconds_sum|_count{stage=}   how long stages took here
    fedark_stage_bytes_total{stage=,direction=}   bytes of requests and replies
    fedark_refusals_total{code=}              faults that this node answered with, by class
    fedark_round                              the last round that was worked on

The daemon adds what its operator decided and what was spent (`operate/node/serve.py`):
fedark_contracts{decision=} and fedark_privacy_epsilon{of=}, of a record, or the customer, that was
in every job; and the limit.
"""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary

from fedark.foundation import errors
from fedark.foundation.logs import of_run, working_on
from fedark.links.flower.service import StageHandler
from fedark.links.link import stage_of
from fedark.v1 import stage_pb2

__all__ = ["ObservedNode"]


class ObservedNode:
    """Passes everything through to `node`, and counts in `registry`."""

    def __init__(self, node: StageHandler, registry: CollectorRegistry) -> None:
        self.party, self.role = node.party, node.role
        self._node = node
        self._seconds = Summary(
            "fedark_stage_seconds",
            "Seconds that this node worked on stages.",
            ["stage"],
            registry=registry,
        )
        self._bytes = Counter(
            "fedark_stage_bytes_total",
            "Bytes of stage requests and replies.",
            ["stage", "direction"],
            registry=registry,
        )
        self._refusals = Counter(
            "fedark_refusals_total",
            "Faults that this node answered with.",
            ["code"],
            registry=registry,
        )
        self._round = Gauge("fedark_round", "The last round that was worked on.", registry=registry)

    def handle(self, request: bytes) -> bytes:
        """See `StageHandler.handle`."""
        message = stage_pb2.StageRequest()
        try:
            message.ParseFromString(request)
        except DecodeError:
            message = stage_pb2.StageRequest()
        stage = stage_of(message)
        began = time.monotonic()
        with working_on(**of_run(message.contract_digest, message.run_id)):
            reply = self._node.handle(request)
        self._seconds.labels(stage).observe(time.monotonic() - began)
        self._bytes.labels(stage, "in").inc(len(request))
        self._bytes.labels(stage, "out").inc(len(reply))
        if stage == "round":
            self._round.set(message.round.round)
        self._count_fault(reply)
        return reply

    def close(self) -> None:
        """See `StageHandler.close`."""
        self._node.close()

    def _count_fault(self, reply: bytes) -> None:
        answer = stage_pb2.StageReply()
        try:
            answer.ParseFromString(reply)
        except DecodeError:
            return
        if answer.HasField("fault"):
            code = answer.fault.code if answer.fault.code in errors.__all__ else "other"
            self._refusals.labels(code).inc()
