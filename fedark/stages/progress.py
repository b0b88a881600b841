"""Where a run is, in the form that one coordinator leaves to the next: each phase with what it
starts from, and what the report says.

The aggregator's host keeps it (`Kept`), whole or not at all, before each phase begins; whoever
coordinates next begins that phase again. Nothing in it is secret: it is what crosses the
coordinator anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedark.contract.contract import Contract
from fedark.contract.privacy import guarantees
from fedark.contract.protection import UPDATE, bytes_per_value, fewest_in_a_sum, masked_policy
from fedark.enclave.usage import peak_mib
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, StorageError

__all__ = ["Progress", "report_of"]

_VERSION = 1
_MAX_BYTES = 1 << 30


@dataclass
class Progress:
    """See the module's docstring.

    Attributes:
        phase: "enrol", "attest", "release", "load", "round", "evaluate" or "deliver".
        number: of the round, in phase "round".
        inputs: what the phase starts from.
        requests: of a phase whose requests cannot be made the same again: those that were made;
            party -> StageRequest.
        customers: who takes part in the phase.
        absent: customers who were not reached, and may return with the next round.
        missed: customers who missed a round: figures over all rounds are without them.
        passed_over: party -> stage and reason.
        stages, metrics: for the report.
        seconds: spent by earlier coordinators.
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
    seconds: float = 0.0

    def encode(self) -> bytes:
        return canonical.encode({"version": _VERSION, "progress": vars(self)})

    @classmethod
    def decode(cls, data: bytes) -> Progress:
        """Read what `encode` gave.

        Raises:
            StorageError: it is damaged, or of another version of fedark.
        """
        try:
            value = canonical.decode(data, max_bytes=_MAX_BYTES)
            if value["version"] != _VERSION:
                raise ValueError
            return cls(**value["progress"])
        except (ProtocolError, KeyError, TypeError, ValueError):
            raise StorageError(
                "What is kept of the run's progress is damaged, or of another version of fedark.",
                safe="The run was not gone on with.",
                fix="End the run with the release that it began with, or submit the job again.",
            ) from None


def report_of(
    contract: Contract, run_id: str, progress: Progress, seconds: float
) -> dict[str, Any]:
    """The report: sums over the cohort only; a customer's own figures stay at its node."""
    models: dict[str, Any] = {}
    for terms in contract.models:
        measured: dict[str, Any] = {}
        losses: list[float] = []
        for entry in progress.metrics:
            for key, (correct, total, loss) in entry[terms.name].items():
                if key == "train":
                    losses.append(loss / total if total else 0.0)
                elif total:
                    measured[key] = {
                        "correct": correct,
                        "total": total,
                        "accuracy": correct / total,
                        "loss": loss / total,
                    }
        models[terms.name] = {
            "task": terms.task,
            "method": terms.adapter.method,
            "values": terms.travelling,
            "train_loss": losses,
            "metrics": measured,
        }
    return {
        "job": contract.job,
        "run_id": run_id,
        "contract": contract.digest().hex(),
        "rounds": contract.rounds,
        "protection": _protection(contract, run_id),
        "privacy": _privacy(contract),
        "customers": list(progress.customers),
        "passed_over": progress.passed_over,
        "seconds": round(progress.seconds + seconds, 2),
        "stages": progress.stages,
        "peak_mib": {"coordinator": round(peak_mib(), 1)},
        "models": models,
    }


def _protection(contract: Contract, run_id: str) -> dict[str, Any]:
    protection = contract.protection
    said: dict[str, Any] = {"mode": protection.mode, "minimum_cohort": protection.minimum_cohort}
    if protection.mode == "masked":
        policy = masked_policy(contract, run_id)
        said |= {"fewest_in_a_sum": fewest_in_a_sum(contract), "bits": policy.by_name[UPDATE].bits}
        said |= {"bytes_per_value": round(bytes_per_value(policy), 2)}
    return said


def _privacy(contract: Contract) -> dict[str, Any]:
    terms = contract.privacy
    if terms.mechanism == "none":
        return {"mechanism": "none"}
    return {
        **terms.model_dump(),
        "guarantees": [guarantee.to_dict() for guarantee in guarantees(contract)],
    }
