"""The report page: one HTML file that needs no script and no network, for people who look rather
than read. Everything on it comes from a dossier that was verified (`fedark.report.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from fedark.report.charts import bars, curves, dots, sequence
from fedark.report.outcome import gained_lines
from fedark.report.verify import Verified

__all__ = ["interval", "page"]

_WHENS = {
    "before": "before",
    "local": "alone, mean",
    "federated": "together",
    "personal": "personal, mean",
}
_LANES = ("provider", "aggregator", "customers")
Local = Mapping[str, Mapping[str, Mapping[str, Any]]]


def page(verified: Verified, local: Local | None = None) -> str:
    """The page of a run.

    Args:
        verified: the run's dossier.
        local: customer -> model -> key -> (right, records, loss), of customers whose own figures
            the reader may see (`fedark.report.outcome.local_reports`).
    """
    environment = Environment(
        loader=PackageLoader("fedark.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report, contract = verified.report, verified.contract
    stages, crossed = _stages(report["stages"]), _crossed(verified)
    models = [
        _model(name, model, report, local or {}) for name, model in sorted(report["models"].items())
    ]
    return environment.get_template("page.html").render(
        job=contract.job,
        run_id=report["run_id"],
        contract=contract.digest().hex(),
        story=_story(verified).replace(" %", "\N{NO-BREAK SPACE}%"),
        models=models,
        candidates=_candidates(models),
        spent=_spent(verified),
        protection=report["protection"],
        guarantees=report["privacy"].get("guarantees", []),
        mechanism=report["privacy"]["mechanism"],
        crossed=[{"from": source, "to": to, "what": what} for source, to, what in crossed],
        way=sequence(
            _LANES,
            [(source, _lanes(to, verified), what) for source, to, what in crossed],
            "Who sent what to whom, in order; the list below says the same",
        ),
        seconds=bars({k: v[0] for k, v in stages.items()}, "seconds", "Seconds of each stage"),
        megabytes=bars(
            {k: v[1] for k, v in stages.items()}, "megabytes", "Megabytes of each stage"
        ),
        stages=stages,
        refused=[one.what for one in verified.proven if one.what.endswith("was refused")],
        passed_over=report["passed_over"],
        proven=verified.proven,
        trusted=verified.trusted,
        root=contract.attestation.simulated_root,
    )


def interval(right: float, total: float) -> tuple[float, float]:
    """The 95 % interval of a share, in percent (Wilson 1927, with the score's z of 1.96)."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    reach /= 1 + z * z / total
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def _story(verified: Verified) -> str:
    """The outcome in one sentence a model, counted from the figures."""
    report = verified.report
    customers = len(report["customers"])
    lines = []
    for name, model in sorted(report["models"].items()):
        place, told = "acceptance", "the acceptance set"
        if _share(model["metrics"], "federated", place) is None:
            place, told = "own", "their own held-out records"
        shares = {when: _share(model["metrics"], when, place) for when in _WHENS}
        after, before = shares["federated"], shares["before"]
        if after is None or before is None:
            lines.append(f"{customers} customers tuned {name}; it has no figures.")
            continue
        text = (
            f"{customers} customers tuned {name} together: {after[0]:.1f} % right on {told},"
            f" {before[0]:.1f} % before"
        )
        if alone := shares["local"]:
            text += f", {alone[0]:.1f} % for each alone, on average"
        if personal := shares["personal"]:
            text += f", {personal[0]:.1f} % with each customer's personal adapter"
        lines.append(f"{text}.")
    return " ".join(lines)


def _share(
    metrics: Mapping[str, Mapping[str, float]], when: str, place: str
) -> tuple[float, float, float, float] | None:
    """Percent right, its interval, and how many records, over all groups of a place."""
    found = [m for key, m in metrics.items() if key.split("/")[:2] == [when, place]]
    right, total = sum(m["correct"] for m in found), sum(m["total"] for m in found)
    return (100 * right / total, *interval(right, total), total) if total else None


def _model(
    name: str, model: Mapping[str, Any], report: Mapping[str, Any], local: Local
) -> dict[str, Any]:
    metrics = model["metrics"]
    groups = sorted({key.split("/", 2)[2] for key in metrics if "/acceptance/" in key})
    rows: dict[str, dict[str, Any]] = {}
    for group in groups:
        rows[f"acceptance: {group}" if len(groups) > 1 else "acceptance set"] = {
            when: metrics.get(f"{when}/acceptance/{group}") for when in _WHENS
        }
    if any(key.endswith("/own") for key in metrics):
        rows["own held-out records"] = {when: metrics.get(f"{when}/own") for when in _WHENS}
    for customer, figures in sorted(local.items()):
        rows[f"own records of {customer}"] = {
            when: _entry(figures.get(name, {}).get(f"{when}/own")) for when in _WHENS
        }
    table = {row: _cells(cells) for row, cells in rows.items()}
    place = "acceptance" if groups else "own"
    overall = {when: _share(metrics, when, place) for when in _WHENS}
    if len(groups) > 1:
        table = {"acceptance: all": overall, **table}
    table = {row: cells for row, cells in table.items() if any(cells.values())}
    points = {
        row: [(_WHENS[when], *cell[:3]) for when, cell in cells.items() if cell]
        for row, cells in table.items()
    }
    curve = _curve(name, model, report.get("curve") or {})
    judged = model.get("judged", {}).get("federated", {})
    return {
        "name": name,
        "task": model["task"],
        "method": model["method"],
        "values": model["values"],
        "taken": model.get("taken", ""),
        "alone": model.get("alone", ""),
        "table": table,
        "overall": overall,
        "whens": _WHENS,
        "figure": dots(points, f"Percent right of {name}, with intervals") if points else "",
        "curve": curve,
        "gained": gained_lines(model.get("gain", {})),
        "confusion": judged.get("confusion"),
        "labels": judged.get("labels", []),
    }


def _curve(name: str, model: Mapping[str, Any], curve: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures and rows of the learning curve: what was measured after each round, and the losses
    in training. Round 0 is the base.
    """
    rows = []
    trained = list(enumerate(model["train_loss"], 1))
    measured = [(one["round"], one["models"][name]) for one in curve.get("points", ())]
    measured = [(number, found) for number, found in measured if found["records"]]
    right = [(number, 100 * found["accuracy"]) for number, found in measured]
    losses = {
        "measured": [(number, found["loss"]) for number, found in measured],
        "training": trained,
    }
    losses = {series: points for series, points in losses.items() if points}
    base = _share(model["metrics"], "before", "acceptance")
    if right and base:
        right.insert(0, (0, base[0]))
    by_round, drawn = dict(measured), any(len(points) > 1 for points in losses.values())
    for number in sorted({number for points in losses.values() for number, _ in points}):
        found = by_round.get(number)
        rows.append(
            {
                "round": number,
                "right": 100 * found["accuracy"] if found else None,
                "interval": interval(found["correct"], found["records"]) if found else None,
                "loss": found["loss"] if found else None,
                "training": dict(trained).get(number),
            }
        )
    return {
        "rows": rows,
        "ended": curve.get("ended", ""),
        "delivered": curve.get("delivered", {}).get(name),
        "right": curves({"right": right}, "% right", f"Percent right of {name} by round")
        if len(right) > 1
        else "",
        "loss": curves(losses, "loss, nats", f"Loss of {name} by round") if drawn else "",
    }


def _candidates(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model, where a job has several to choose from: its figures over all groups."""
    return [
        {
            "name": one["name"],
            "task": one["task"],
            "cells": one["overall"],
            "kilobytes": 4 * one["values"] / 1e3,
        }
        for one in models
    ] * (len(models) > 1)


def _spent(verified: Verified) -> str:
    """Whether the customers' privacy ledgers were charged."""
    return next((one.what for one in verified.proven if "privacy ledgers" in one.what), "")


def _entry(counts: Any) -> dict[str, float] | None:
    return {"correct": counts[0], "total": counts[1]} if counts else None


def _cells(cells: Mapping[str, Mapping[str, float] | None]) -> dict[str, Any]:
    return {
        when: (
            100 * cell["correct"] / cell["total"],
            *interval(cell["correct"], cell["total"]),
            int(cell["total"]),
        )
        if cell and cell["total"]
        else None
        for when, cell in cells.items()
    }


def _stages(stages: list[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Kind of stage -> seconds and megabytes, summed over its rounds."""
    found: dict[str, tuple[float, float]] = {}
    for stage in stages:
        name = stage["stage"].partition(" ")[0]
        seconds, size = found.get(name, (0.0, 0.0))
        moved = (stage["sent"] + stage["received"]) / 1e6
        found[name] = seconds + stage["seconds"], size + moved
    return found


def _crossed(verified: Verified) -> list[tuple[str, str, str]]:
    """Who released what to whom, in order: (from, to, what)."""
    contract, report = verified.contract, verified.report
    count = len(report["customers"])
    masked = contract.protection.mode == "masked"
    sums = "masked updates" if masked else "updates, encrypted to the aggregator enclave"
    models = len(contract.models)
    refused = sum(one.what.endswith("was refused") for one in verified.proven)
    rounds = (report.get("curve") or {}).get("rounds", report["rounds"])
    steps = [
        ("customers", "everybody", "signed contract"),
        ("provider", "everybody", "signed contract"),
        ("customers", "provider", f"evidence of {count + refused} trainer enclaves"),
        ("aggregator", "provider", "evidence of the aggregator enclave"),
        ("provider", "customers", f"{models * count} weight keys, each for one attested enclave"),
        ("customers", "provider", "receipts of the trainer enclaves"),
        ("customers", "aggregator", f"{rounds} rounds of {sums}"),
        ("aggregator", "customers", "global adapters, encrypted for the cohort"),
        ("customers", "aggregator", "measurements, under the same protection"),
        ("aggregator", ", ".join(contract.deliver_to), "the finished adapter"),
    ]
    if refused:
        steps.insert(5, ("provider", "customers", f"{refused} refusals, in the provider's log"))
    return steps


def _lanes(to: str, verified: Verified) -> list[str]:
    """The lanes of the drawing at which an arrow ends."""
    if to in _LANES:
        return [to]
    provider = verified.contract.provider.name
    names = set(_LANES) if to == "everybody" else set(to.split(", "))
    if to == "everybody":
        return sorted(names)
    return ["provider"] * (provider in names) + ["customers"] * bool(names - {provider})
