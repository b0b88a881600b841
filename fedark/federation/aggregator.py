"""The aggregator's host: it starts the aggregator enclave, keeps the jobs, and answers the ServerApp beside it.

The ServerApp process may come and go; this one holds the enclave and therefore the run. It can read nothing of what it relays.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from google.protobuf.message import DecodeError

from fedark.contract import Contract
from fedark.enclave.host import EnclaveHandle
from fedark.enclave.session import RunConfig
from fedark.errors import FedarkError, FederationError, ProtocolError
from fedark.federation.node import SEEN_LOGS, EnclaveFactory, fault_of
from fedark.files import write_atomic
from fedark.translog.memory import HeadMemory
from fedark.translog.refusals import LogRefused
from fedark.v1 import node_pb2, stage_pb2

__all__ = ["AggregatorHost"]


class AggregatorHost:
    """Holds one job, its run and its enclave.

    Args:
        contract: of the job to run.
        state: folder for the report.
        collateral: for the evidence of trainers.
        start_enclave: starts the aggregator enclave.
        timeouts: stage -> seconds, where the default is not meant.
    """

    role = "aggregator"

    def __init__(
        self,
        contract: Contract,
        state: Path,
        collateral: Mapping[str, bytes],
        start_enclave: EnclaveFactory,
        timeouts: Mapping[str, float] | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.party = contract.aggregator.name
        self.contract = contract
        self.run_id = secrets.token_hex(16)
        self.report: bytes | None = None
        self.failed: stage_pb2.StageFault | None = None
        self._state = state
        self._collateral = dict(collateral)
        self._start_enclave = start_enclave
        self._timeouts = dict(timeouts or {})
        self._on_progress = on_progress
        self._enclave: EnclaveHandle | None = None
        self._evidence: set[bytes] = set()
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._heads = HeadMemory(state / SEEN_LOGS)

    def handle(self, request: bytes) -> bytes:
        """Answer one serialised AggregatorRequest with one serialised AggregatorReply."""
        try:
            message = node_pb2.AggregatorRequest()
            try:
                message.ParseFromString(request)
            except DecodeError:
                raise ProtocolError("A request to the aggregator's host is malformed.") from None
            reply = self._dispatch(message)
        except FedarkError as error:
            reply = node_pb2.AggregatorReply(fault=fault_of(error))
        except Exception as error:
            what = f"The aggregator's host failed ({type(error).__name__})."
            reply = node_pb2.AggregatorReply(fault=stage_pb2.StageFault(code="FederationError", what=what))
        return bytes(reply.SerializeToString())

    def close(self) -> None:
        """End the enclave."""
        if self._enclave is not None:
            self._enclave.close()
            self._enclave = None

    def _dispatch(self, message: node_pb2.AggregatorRequest) -> node_pb2.AggregatorReply:
        match message.WhichOneof("body"):
            case "open":
                return node_pb2.AggregatorReply(opened=self._open())
            case "call":
                reply = self._started(message.run_id).call(message.call)
                if reply.HasField("evidence"):
                    self._evidence.add(hashlib.sha384(reply.evidence.evidence).digest())
                return node_pb2.AggregatorReply(reply=reply)
            case "log":
                self._check_log(message.log.update)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
            case "outcome":
                self._outcome(message.outcome)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
            case "progress":
                self._on_progress(message.progress.text)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
        raise ProtocolError("A request to the aggregator's host is empty.")

    def _open(self) -> node_pb2.OpenedRun:
        if self._enclave is not None or self.report is not None:
            raise FederationError("The run of this job has begun already.", safe="It goes on as it is.")
        config = RunConfig(role="aggregator", party=self.party, contract=self.contract, run_id=self.run_id)
        self._enclave = self._start_enclave("aggregator", config.encode())
        provider = self.contract.provider
        seen = self._heads.last(bytes.fromhex(provider.signing_key), by=provider.name)
        return node_pb2.OpenedRun(
            run_id=self.run_id,
            contract=self.contract.encode(),
            collateral=self._collateral,
            timeouts=self._timeouts,
            log_head=seen.encoded if seen is not None else b"",
        )

    def _check_log(self, update: bytes) -> None:
        """The provider's log holds that it admitted this enclave, and goes on from what was seen before."""
        provider = self.contract.provider
        witnessed = self._heads.take(
            update, bytes.fromhex(provider.signing_key), by=provider.name, party=self.party, run_id=self.run_id
        )
        _, entry = witnessed.find(
            "attestation", party=self.party, run_id=self.run_id, contract=self.contract.digest(), role="aggregator"
        )
        if entry.facts["evidence"] not in self._evidence:
            raise LogRefused(f"The log of {provider.name} names evidence that the aggregator enclave never gave.")

    def _started(self, run_id: str) -> EnclaveHandle:
        if self._enclave is None or run_id != self.run_id:
            raise ProtocolError("No such run is open.", safe="The aggregator enclave did nothing.")
        return self._enclave

    def _outcome(self, outcome: node_pb2.Outcome) -> None:
        folder = self._state / "runs" / self.run_id
        if outcome.HasField("failed"):
            self.failed = outcome.failed
            failed = outcome.failed
            text = {"code": failed.code, "what": failed.what, "safe": failed.safe, "fix": failed.fix}
            write_atomic(folder / "failed.json", json.dumps(text, indent=2).encode())
        else:
            self.report = outcome.report
            write_atomic(folder / "report.json", outcome.report)
        self.close()
