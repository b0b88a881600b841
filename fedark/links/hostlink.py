"""The coordinator's way to its host, which holds the enclave and all that must last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import DecodeError

from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.links.faults import error_of, fault_of
from fedark.links.link import Handler
from fedark.v1 import enclave_pb2, node_pb2

__all__ = ["AggregatorClient"]


class AggregatorClient:
    """The ServerApp's way to the aggregator's host.

    Args:
        handle: takes a serialised AggregatorRequest, gives a serialised AggregatorReply.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._run_id = ""

    def open(self) -> node_pb2.OpenedRun:
        """Start the aggregator enclave for the waiting job, or go on with its run."""
        opened = self._send(node_pb2.AggregatorRequest(open=node_pb2.OpenRun())).opened
        self._run_id = opened.run_id
        return opened

    def call(self, call: enclave_pb2.Call) -> enclave_pb2.Reply:
        """One call of the aggregator enclave."""
        return self._send(node_pb2.AggregatorRequest(run_id=self._run_id, call=call)).reply

    def done(self, call: enclave_pb2.Call) -> enclave_pb2.Reply | None:
        """The reply to `call` if it was the last to change the enclave; None if it was not made, or
        others came after it.
        """
        reply = self._send(
            node_pb2.AggregatorRequest(run_id=self._run_id, call=call, only_if_done=True)
        )
        return reply.reply if reply.HasField("reply") else None

    def keep(self, state: bytes) -> None:
        """Have the host keep where the coordinator is."""
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, keep=node_pb2.Kept(state=state)))

    def check_log(self, update: bytes, *, refused: bool = False) -> None:
        """Whether the provider's log holds what it must of the aggregator's enclave; raises where
        it does not.
        """
        shown = node_pb2.ShownLog(update=update, refused=refused)
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, log=shown))

    def sign(self, report: bytes) -> dict[str, bytes]:
        """The report with the aggregator's signature, as a DeliverRequest names the two."""
        sign = node_pb2.SignReport(report=report)
        signed = self._send(node_pb2.AggregatorRequest(run_id=self._run_id, sign=sign)).signed
        return {"report": report, "report_signature": signed.signature}

    def sign_dossier(self, dossier: bytes) -> bytes:
        """The dossier, signed by the aggregator (`fedark.stages.dossier`)."""
        sign = node_pb2.SignReport(dossier=dossier)
        return self._send(node_pb2.AggregatorRequest(run_id=self._run_id, sign=sign)).signed.dossier

    def told(self, text: str) -> None:
        """A line for people."""
        self._send(
            node_pb2.AggregatorRequest(run_id=self._run_id, progress=node_pb2.Told(text=text))
        )

    def ended(self, stage: Mapping[str, Any]) -> None:
        """A stage that ended: its name, seconds, and bytes sent and received."""
        told = node_pb2.Told(ended=node_pb2.StageEnd(**stage))
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, progress=told))

    def outcome(
        self, *, report: bytes = b"", dossier: bytes = b"", failed: FedarkError | None = None
    ) -> None:
        """How the job ended."""
        outcome = node_pb2.Outcome(
            report=report, dossier=dossier, failed=fault_of(failed) if failed else None
        )
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, outcome=outcome))

    def _send(self, request: node_pb2.AggregatorRequest) -> node_pb2.AggregatorReply:
        reply = node_pb2.AggregatorReply()
        try:
            reply.ParseFromString(self._handle(request.SerializeToString()))
        except DecodeError:
            raise ProtocolError("The aggregator's host gave a malformed answer.") from None
        if reply.HasField("fault"):
            raise error_of(reply.fault)
        return reply
