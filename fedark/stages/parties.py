"""The parties of a run, as its coordinator asks them: who takes part, who answered what, who was
passed over and why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract
from fedark.foundation import canonical
from fedark.foundation.errors import (
    EnclaveFailed,
    FedarkError,
    FederationError,
    ProtocolError,
    Refused,
    StorageError,
)
from fedark.links.faults import error_of
from fedark.links.hostlink import AggregatorClient
from fedark.links.link import VERSION, Link, Unavailable
from fedark.stages.dossier import Proofs
from fedark.v1 import stage_pb2

__all__ = ["Parties", "CoordinatorState"]

_FORMAT = 1
_MAX_BYTES = 1 << 30
_MAY_RETURN = ("round", "measure", "evaluate", "endorse", "unmask")
"""Stages that a customer may miss and yet return."""
_FORWARDED = ("measure", "endorse", "unmask")
"""Stages that a node passes on to its trainer enclave."""


@dataclass
class CoordinatorState:
    """Where a run is, in the form that one coordinator leaves to the next.

    The aggregator's host keeps it, whole or not at all, before each phase begins; whoever
    coordinates next begins that phase again. Nothing in it is secret: it is what crosses the
    coordinator anyway.

    Attributes:
        phase: "enrol", "attest", "release", "load", "round", "measure", "evaluate" or "deliver".
        number: of the round; in "measure" and "evaluate" of the one that would follow.
        inputs: what the phase starts from.
        requests: of a phase whose requests cannot be made the same again: those that were made;
            party -> StageRequest.
        customers: who takes part in the phase.
        absent: customers who were not reached, and may return with the next round.
        missed: customers who missed a round: figures over all rounds are without them.
        passed_over: party -> stage and reason.
        stages, metrics: for the report.
        curve: the learning curve so far, as the aggregator enclave encodes it.
        seconds: spent by earlier coordinators.
        proofs: for the dossier (`fedark.stages.dossier.Proofs`).
    """

    phase: str = "enrol"
    number: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, bytes] = field(default_factory=dict)
    customers: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    log_views: dict[str, bytes] = field(default_factory=dict)
    receipts: dict[str, bytes] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, dict[str, list[float]]]] = field(default_factory=list)
    curve: bytes = b""
    seconds: float = 0.0
    proofs: dict[str, Any] = field(default_factory=lambda: Proofs.none().model_dump())

    def encode(self) -> bytes:
        return canonical.encode({"version": _FORMAT, "progress": vars(self)})

    @classmethod
    def decode(cls, data: bytes) -> CoordinatorState:
        """Read what `encode` gave.

        Raises:
            StorageError: it is damaged, or of another version of fedark.
        """
        try:
            value = canonical.decode(data, max_bytes=_MAX_BYTES)
            if value["version"] != _FORMAT:
                raise ValueError
            return cls(**value["progress"])
        except (ProtocolError, KeyError, TypeError, ValueError):
            raise StorageError(
                "What is kept of the run's progress is damaged, or of another version of fedark.",
                safe="The run was not gone on with.",
                fix="End the run with the release that it began with, or submit the job again.",
            ) from None


class Parties:
    """The parties that take part in a run, and the way to them.

    Attributes:
        state: where the run is; its lists of customers are changed here.
        refusal: what the provider's log says of its refusal of the aggregator enclave.
    """

    def __init__(
        self,
        link: Link,
        host: AggregatorClient,
        contract: Contract,
        run_id: str,
        state: CoordinatorState,
        timeouts: Mapping[str, float],
    ) -> None:
        self.state = state
        self.refusal = b""
        self._link, self._host, self._timeouts = link, host, timeouts
        self._contract, self._digest, self._run_id = contract, contract.digest(), run_id
        self._provider = contract.provider.name

    @property
    def customers(self) -> list[str]:
        """Who takes part in the phase."""
        return self.state.customers

    def welcome_back(self) -> None:
        """Customers who were not reached before, and are there now, take part again."""
        back = [name for name in self.state.absent if name in self._link.present()]
        for name in back:
            self._host.told(f"{name} is back")
            self.state.absent.remove(name)
            del self.state.passed_over[name]
        order = [party.name for party in self._contract.customers]
        self.state.customers = sorted({*self.customers, *back}, key=order.index)

    def request(self, **body: Any) -> bytes:
        message = stage_pb2.StageRequest(
            version=VERSION, run_id=self._run_id, contract_digest=self._digest, **body
        )
        # Deterministic: whoever makes the same request again makes the same bytes.
        return bytes(message.SerializeToString(deterministic=True))

    def exchange(
        self, stage: str, requests: dict[str, bytes], *, note: str = "", minimum: int | None = None
    ) -> dict[str, stage_pb2.StageReply]:
        """The replies to a stage, of those who answered it; the others are passed over.

        Raises:
            FederationError: too few customers are left; not raised with `minimum`.
        """
        self._host.told(
            f"{stage} {note}".strip()
            + f": {len(requests)} {'party' if len(requests) == 1 else 'parties'}"
        )
        began = time.monotonic()
        outcome = self._link.exchange(requests, stage=stage, timeout=self._timeouts[stage])
        replies, failed = self.sort(stage, outcome)
        self.account(f"{stage} {note}".strip(), began, requests, outcome)
        for name, error in failed.items():
            self.pass_over(name, stage, error)
            if name == self._provider and isinstance(error, Refused):
                self.refusal = error.proof
        if minimum is None:
            self.enough()
        return replies

    def sort(
        self, stage: str, outcome: Mapping[str, bytes | FedarkError]
    ) -> tuple[dict[str, stage_pb2.StageReply], dict[str, FedarkError]]:
        """Replies of the stage that was asked for, and errors, by party."""
        body = "forward" if stage in _FORWARDED else stage
        replies: dict[str, stage_pb2.StageReply] = {}
        failed: dict[str, FedarkError] = {}
        for name, answer in outcome.items():
            if not isinstance(answer, bytes):
                failed[name] = answer
                continue
            reply = stage_pb2.StageReply()
            try:
                reply.ParseFromString(answer)
            except DecodeError:
                failed[name] = ProtocolError(f"{name} gave a malformed answer.")
                continue
            if reply.HasField("fault"):
                failed[name] = error_of(reply.fault)
            elif (reply.version, reply.run_id, reply.party, reply.WhichOneof("body")) != (
                VERSION,
                self._run_id,
                name,
                body,
            ):
                failed[name] = ProtocolError(f"{name} answered something else than stage {stage}.")
            else:
                replies[name] = reply
        return replies, failed

    def pass_over(self, name: str, stage: str, error: FedarkError) -> None:
        self.state.passed_over[name] = f"{stage}: {error.what}"
        if name in self.customers:
            self.customers.remove(name)
            if stage in _MAY_RETURN and isinstance(error, Unavailable | EnclaveFailed):
                self.state.absent.append(name)
                if stage != "measure":  # of the global adapter, whose figures are apart
                    self.state.missed.append(name)
        self._host.told(f"{name} is passed over in stage {stage}: {error.what}")

    def passed_over_lines(self) -> list[str]:
        return [f"  - {name}, {why}" for name, why in self.state.passed_over.items()]

    def enough(self) -> None:
        minimum = self._contract.protection.minimum_cohort
        if len(self.customers) < minimum:
            head = f"{len(self.customers)} customers are left, the contract asks for {minimum}:"
            raise FederationError(
                "\n".join([head, *self.passed_over_lines()]),
                safe="The job was ended at every party; no adapter was delivered.",
                fix="Mend what the parties name, then submit the job again.",
            )

    def account(
        self,
        stage: str,
        began: float,
        requests: Mapping[str, bytes],
        outcome: Mapping[str, bytes | FedarkError],
    ) -> None:
        sent = sum(map(len, requests.values()))
        received = sum(len(answer) for answer in outcome.values() if isinstance(answer, bytes))
        seconds = round(time.monotonic() - began, 2)
        entry = {"stage": stage, "seconds": seconds, "sent": sent, "received": received}
        self.state.stages.append(entry)
        self._host.ended(entry)
