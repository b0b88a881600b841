"""The report of a run: what it says, and the aggregator's signature of it.

The sums in it come from the aggregator enclave, but the text is made by the aggregator's host. The
signature covers the bytes, the contract and the run: no node stores a report that was altered on
the way, or is of another run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fedark.contract.contract import Contract, ModelTerms
from fedark.contract.privacy import guarantees
from fedark.contract.protection import (
    UPDATE,
    bytes_per_value,
    detail_keys,
    fewest_in_a_sum,
    masked_terms,
)
from fedark.enclave.usage import peak_mib
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.jsontext import read_json
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.terms import Finite, Terms
from fedark.stages.parties import CoordinatorState

__all__ = [
    "HostsWord",
    "curve_lines",
    "curve_of",
    "make_report",
    "models_of",
    "privacy_of",
    "protection_of",
    "read_report",
    "require_curve",
    "sign_report",
    "spared_lines",
]

FigureHistory = Sequence[Mapping[str, Mapping[str, Sequence[float]]]]

_LABEL = "fedark/report/1"
_MAX_REPORT = 16 << 20
_MAX_CURVE = 64 << 20
_ENDED = {
    "rounds": "all rounds of the contract were run",
    "patience": "the rounds ended: no measurement was better for as long as the contract waits",
    "target": "the rounds ended: the contract's target was reached",
    "": "the rounds go on",
}


class StageEnd(Terms):
    """One exchange with the parties: seconds, and bytes sent and received."""

    stage: str
    seconds: Finite
    sent: int
    received: int


class HostsWord(Terms):
    """What a report says on the word of the aggregator's host alone.

    Attributes:
        customers: who was there to the end.
        passed_over: party -> stage and reason.
        seconds, stages: of the run.
        peak_mib: process -> most resident memory.
    """

    customers: tuple[str, ...]
    passed_over: dict[str, str]
    seconds: Finite
    stages: tuple[StageEnd, ...]
    peak_mib: dict[str, Finite]


def spared_lines(local: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a customer's operator should know of records that taught nothing under a mechanism: no
    message to another party says it.

    Args:
        local: what its trainer enclave measured, by model.
    """
    lines = []
    for name, figures in local.items():
        spared = figures.get("spared", {})
        if without := spared.get("without gradient"):
            lines.append(
                f"model {name}: {without} of {spared['drawn']} drawn records had no usable gradient"
                " and counted as zeros"
            )
        if silent := spared.get("rounds without an update"):
            lines.append(f"model {name}: in {silent} rounds training failed; zeros were sent")
        if changed := spared.get("changed itself"):
            lines.append(
                f"model {name}: in {changed} sums the model was found to have changed itself, and"
                " nothing of them was used: its provider may have poisoned it; take part in no"
                " further job with it"
            )
    return lines


def make_report(
    contract: Contract, run_id: str, state: CoordinatorState, seconds: float
) -> dict[str, Any]:
    """The report: sums over the cohort only; a customer's own figures stay at its node."""
    return {
        "job": contract.job,
        "run_id": run_id,
        "contract": contract.digest().hex(),
        "rounds": contract.rounds,
        "curve": curve_of(state.curve),
        "protection": protection_of(contract, run_id),
        "privacy": privacy_of(contract),
        "customers": list(state.customers),
        "passed_over": state.passed_over,
        "seconds": round(state.seconds + seconds, 2),
        "stages": state.stages,
        "peak_mib": {"coordinator": round(peak_mib(), 1)},
        "models": models_of(contract, state.metrics),
    }


def models_of(contract: Contract, metrics: FigureHistory) -> dict[str, Any]:
    """What the report says of each model: nothing but the contract and the aggregator enclave's
    figures is in it.

    Args:
        metrics: of each closed round that gave figures: model -> key -> (correct, total, loss sum).
    """
    models: dict[str, Any] = {}
    for terms in contract.models:
        measured: dict[str, Any] = {}
        losses: list[float] = []
        for entry in metrics:
            for key, (correct, total, loss) in entry[terms.name].items():
                if key == "train":
                    if total:  # else of a round that the contract's rule spared
                        losses.append(loss / total)
                elif key.split("/")[1] in ("acceptance", "own") and total:
                    measured[key] = {
                        "correct": correct,
                        "total": total,
                        "accuracy": correct / total,
                        "loss": loss / total,
                    }
        models[terms.name] = {
            "task": terms.task,
            "method": terms.adapter.method,
            "taken": terms.taken,
            "values": terms.travelling,
            "alone": _alone(contract, terms),
            "train_loss": losses,
            "gain": _gain(terms, metrics[-1:]),
            "metrics": measured,
            "judged": {
                when: judged
                for when, found in (("before", metrics[:1]), ("federated", metrics[-1:]))
                for entry in found
                if (judged := _judged(terms, entry[terms.name], when))
            },
        }
    return models


def curve_of(curve: bytes) -> dict[str, Any]:
    """The learning curve as the report has it, of what `fedark.enclave.curve` encoded.

    Raises:
        ProtocolError: malformed.
    """
    if not curve:
        return {}
    value = canonical.decode(curve, max_bytes=_MAX_CURVE)
    try:
        return {
            "rounds": value["rounds"],
            "ended": _ENDED[value["ended"]],
            "delivered": dict(value["delivered"]),
            "points": [
                {"round": number, "models": {name: _point(*found) for name, found in each.items()}}
                for number, each in value["points"]
            ],
            "taste": {
                name: {"regularisation": float(chosen), "error": float(error)}
                for name, (chosen, error) in value["taste"].items()
            },
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ProtocolError("A learning curve is malformed.") from None


def _point(correct: int, total: int, loss: float) -> dict[str, Any]:
    share = {"accuracy": correct / total, "loss": loss / total} if total else {}
    return {"correct": correct, "records": total, **share}


def curve_lines(curve: Mapping[str, Any]) -> list[str]:
    """What the latest measurement says, a line for each model, and whether it was the last."""
    point = curve["points"][-1]
    lines = [
        f"after round {point['round']}: {name}: {100 * found['accuracy']:.1f} % of"
        f" {found['records']} records of the acceptance set right, loss {found['loss']:.3f}"
        for name, found in point["models"].items()
        if found["records"]
    ]
    return lines + ([curve["ended"]] if curve["ended"] != _ENDED[""] else [])


def require_curve(report: Mapping[str, Any], curve: bytes) -> None:
    """Return if the report, which the aggregator's host wrote, says of the rounds what the
    aggregator enclave says in the delivery.

    Raises:
        Refused: it says something else.
    """
    if report.get("curve") != curve_of(curve):
        raise Refused(
            "The report's learning curve is not that of the aggregator enclave.",
            safe="Neither the report nor the adapter was stored.",
            fix="Whoever runs the aggregator altered it: ask for an explanation.",
        )


def _alone(contract: Contract, terms: ModelTerms) -> str:
    """How the local-only baseline was trained (`fedark.tuning.baseline`); "" if there is none."""
    epochs = terms.training.baseline_epochs
    if not epochs:
        return ""
    passes = "one pass" if epochs == 1 else f"{epochs} passes"
    said = f"{passes} over each customer's own training records, without privacy"
    if contract.privacy.mechanism != "none":
        said += ", at the learning rates that did best on a fifth of them"
    drawn, everybody = len(contract.alone(terms)), len(contract.customers)
    return said + (
        f"; by {drawn} of {everybody} customers, drawn by the job's seed" * (drawn < everybody)
    )


def _gain(terms: ModelTerms, final: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Adapter -> for how many customers the personal one is better or worse beside it on their own
    held-out records, by more than noise; {} where nobody counts it.
    """
    found = {}
    for key, count in (item for entry in final for item in entry[terms.name].items()):
        if key.startswith("gain/"):
            gained, customers, lost = map(int, count)
            found[key.removeprefix("gain/")] = {
                "gained": gained,
                "lost": lost,
                "even": customers - gained - lost,
            }
    return found


def _judged(terms: ModelTerms, entry: Mapping[str, Sequence[float]], when: str) -> dict[str, Any]:
    """Macro-F1, classes and confusions, or overlap of free text, on the acceptance set, from the
    sums of `detail_keys`. A label without a record there has no part in the mean.
    """
    found = {key: entry[f"{when}/{key}"] for key in detail_keys(terms) if f"{when}/{key}" in entry}
    if "token-f1" in found:
        kinds = ("token-f1", "rouge-l")
        return {
            kind.replace("-", "_"): found[kind][2] / found[kind][1]
            for kind in kinds
            if found[kind][1]
        }
    classes: dict[str, dict[str, float]] = {}
    for index, label in enumerate(terms.labels):
        right, gold, given = found.get(f"class/{index}", (0, 0, 0.0))
        if gold:
            classes[label] = {
                "records": gold,
                "precision": right / given if given else 0.0,
                "recall": right / gold,
                "f1": 2 * right / (gold + given),
            }
    if not classes:
        return {}
    judged: dict[str, Any] = {
        "macro_f1": sum(one["f1"] for one in classes.values()) / len(classes),
        "classes": classes,
    }
    count = range(len(terms.labels))
    if "said/0/0" in found:
        judged["confusion"] = [[found[f"said/{i}/{j}"][0] for j in count] for i in count]
        judged["labels"] = list(terms.labels)
    return judged


def protection_of(contract: Contract, run_id: str) -> dict[str, Any]:
    """What the report says of how updates were protected."""
    protection = contract.protection
    said: dict[str, Any] = {"mode": protection.mode, "minimum_cohort": protection.minimum_cohort}
    if protection.mode == "masked":
        terms = masked_terms(contract, run_id)
        said |= {"fewest_in_a_sum": fewest_in_a_sum(contract), "bits": terms.by_name[UPDATE].bits}
        said |= {"bytes_per_value": round(bytes_per_value(terms), 2)}
    return said


def privacy_of(contract: Contract) -> dict[str, Any]:
    """What the report says of differential privacy, with the guarantees of its terms."""
    terms = contract.privacy
    if terms.mechanism == "none":
        return {"mechanism": "none"}
    return {
        **terms.model_dump(),
        "guarantees": [guarantee.to_dict() for guarantee in guarantees(contract)],
    }


def sign_report(key: SigningKey, report: bytes, contract: bytes, run_id: str) -> bytes:
    """The signature of the aggregator whose key it is.

    Args:
        contract: digest, 48 bytes.

    Raises:
        ProtocolError: the report is not of this contract and run.
    """
    value = _parsed(report)
    if (value.get("contract"), value.get("run_id")) != (contract.hex(), run_id):
        raise ProtocolError("The report is of another contract or run.", safe="It was not signed.")
    return key.sign(_LABEL, _covered(report, contract, run_id))


def read_report(report: bytes, signature: bytes, contract: Contract, run_id: str) -> dict[str, Any]:
    """The report, if the contract's aggregator signed it for this run.

    Raises:
        ProtocolError: it is malformed.
        Refused: it was altered, is of another contract or run, or is not signed.
    """
    aggregator = contract.aggregator
    public = bytes.fromhex(aggregator.signing_key)
    verify_signature(
        public, _LABEL, _covered(report, contract.digest(), run_id), signature, by=aggregator.name
    )
    return _parsed(report)


def _covered(report: bytes, contract: bytes, run_id: str) -> bytes:
    return canonical.encode(
        {"contract": contract, "run_id": run_id, "sha384": hashlib.sha384(report).digest()}
    )


def _parsed(report: bytes) -> dict[str, Any]:
    try:
        value = read_json(report) if len(report) <= _MAX_REPORT else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError("The report is not JSON, or too large.", safe="It was not stored.")
    return value
