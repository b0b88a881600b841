"""The outcome of a job in tables for the terminal: before, each alone, together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedark.contract.contract import Contract
from fedark.foundation.errors import printable
from fedark.stages.report import spared_lines

__all__ = ["gained_lines", "local_reports", "render"]

LocalFigures = Mapping[str, Mapping[str, list[float]]]
"""Model -> metric -> (correct, total, loss sum)."""


def local_reports(contract: Contract, work: Path, run_id: str) -> dict[str, LocalFigures]:
    """Each customer's own figures, which on one machine one person may read: customer -> model ->
    metric -> counts.
    """
    found = {}
    for party in contract.customers:
        path = work / "parties" / party.name / "runs" / run_id / "local.json"
        if path.is_file():
            found[party.name] = json.loads(path.read_bytes())
    return found


def render(report: Mapping[str, Any], local: Mapping[str, LocalFigures]) -> RenderableType:
    """Tables of a report: for each model the acceptance set by group, then each customer's own
    held-out records.

    Args:
        report: the aggregator's, of sums over the cohort.
        local: `local_reports`, or an empty map where only the aggregator's report is at hand.
    """
    parts: list[RenderableType] = [
        Text("\n" + _protection(report["protection"])),
        Text(_privacy(report["privacy"])),
    ]
    for name, model in report["models"].items():
        values = f"{model['values']:,} values travel"
        parts.append(Text(f"\n{name}: {model['task']}, {model['method']}, {values}", style="bold"))
        if "taken" in model:  # not in reports of earlier releases
            parts.append(Text(printable(model["taken"], 500)))
        acceptance = _acceptance(name, model["metrics"], local)
        curve = _curve(name, report.get("curve") or {}, model)
        own = _own(name, local)
        parts += [table for table in (own, acceptance, curve) if table is not None]
        parts += [Text(line) for line in gained_lines(model.get("gain", {}))]
        parts += _judged(model, model["metrics"])
        parts += _samples(name, local)
        if model.get("alone"):  # not in reports of earlier releases
            parts.append(Text(f"alone: {printable(model['alone'], 500)}."))
    parts += [
        Text(f"{customer}, {line}.")
        for customer, figures in local.items()
        for line in spared_lines(figures)
    ]
    if report["passed_over"]:
        parts.append(
            Text(
                "\npassed over: "
                + "; ".join(f"{who} ({why})" for who, why in report["passed_over"].items())
            )
        )
    return Group(*parts)


def _protection(terms: Mapping[str, Any]) -> str:
    if terms["mode"] == "masked":
        size = f"{terms['bits']} bits, {terms['bytes_per_value']:g} bytes a value"
        # Reports of earlier releases do not say how many.
        fewest = (
            f" of {terms['fewest_in_a_sum']} customers or more"
            if "fewest_in_a_sum" in terms
            else ""
        )
        return (
            f"Updates and figures were masked ({size}) and encrypted: even the aggregator's enclave"
            f" saw only sums{fewest}."
        )
    return (
        "Updates and figures were encrypted to the attested aggregator enclave, which alone summed"
        " them."
    )


def _privacy(terms: Mapping[str, Any]) -> str:
    if terms["mechanism"] == "none":
        return "No differential privacy: the adapter may remember records."
    lines = [
        f"{entry['mechanism']} gives every {entry['unit']} epsilon {entry['epsilon']:.3g} at delta"
        f" {entry['delta']:g} against {entry['view']} ({entry['accountant']})."
        for entry in terms["guarantees"]
    ]
    return "Differential privacy of this job: " + "\n  ".join(lines)


def _acceptance(
    name: str, metrics: Mapping[str, Mapping[str, float]], local: Mapping[str, LocalFigures]
) -> Table | None:
    groups = sorted({key.split("/", 2)[2] for key in metrics if "/acceptance/" in key})
    if not groups:
        return None
    table = Table(title="acceptance set, % right", title_justify="left")
    table.add_column("of" if len(groups) > 1 else "")
    for column in ("records", "before", "alone, mean", "alone, best", "together", "personal, mean"):
        table.add_column(column, justify="right")
    totals = {when: [0.0, 0.0] for when in ("before", "local", "federated", "personal")}
    rows = []
    for group in groups:
        cells = {}
        for when, total in totals.items():
            entry = metrics.get(f"{when}/acceptance/{group}") or (
                _summed(name, group, local) if when == "local" else None
            )
            if entry is not None:
                cells[when] = _percent(entry["correct"], entry["total"])
                total[0] += entry["correct"]
                total[1] += entry["total"]
        best = _best(name, [group], local)
        records = int(metrics.get(f"federated/acceptance/{group}", {}).get("total", 0))
        rows.append(
            (
                group,
                f"{records:,}",
                cells.get("before", ""),
                cells.get("local", ""),
                best,
                cells.get("federated", ""),
                cells.get("personal", ""),
            )
        )
    for row in rows:
        table.add_row(*row)
    if len(groups) > 1:
        table.add_section()
        table.add_row(
            "all",
            f"{int(totals['federated'][1]):,}",
            _percent(*totals["before"]),
            _percent(*totals["local"]),
            _best(name, groups, local),
            _percent(*totals["federated"]),
            _percent(*totals["personal"]),
            style="bold",
        )
    return table


def _curve(name: str, curve: Mapping[str, Any], model: Mapping[str, Any]) -> Table | None:
    """The learning curve: the measured rounds, between before and together."""
    points = [(point["round"], point["models"][name]) for point in curve.get("points", ())]
    if not points:
        return None
    ended = "" if curve["ended"].startswith("all") else f"; {curve['ended']}"
    table = Table(title=f"acceptance set after each measured round{ended}", title_justify="left")
    for column in ("round", "records", "% right", "loss", "training loss"):
        table.add_column(column, justify="right")
    losses, delivered = model.get("train_loss") or [], curve["delivered"][name]
    for number, found in points:
        loss = f"{losses[number - 1]:.3f}" if number <= len(losses) else ""
        table.add_row(
            f"{number}" + (", delivered" if number == delivered else ""),
            f"{found['records']:,}",
            _percent(found["correct"], found["records"]),
            f"{found['loss']:.3f}" if found["records"] else "",
            loss,
        )
    if delivered > points[-1][0]:
        table.add_row(f"{delivered}, delivered", "", "", "", "see together, above")
    return table


def _judged(
    model: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]
) -> list[RenderableType]:
    """What lies behind the percentage: loss, macro-F1 and confusions, or overlap of free text."""
    whens = (("before", "before"), ("local", "alone, mean"), ("federated", "together"))
    lines: list[str] = []
    losses = []
    for when, title in whens:
        entries = [entry for key, entry in metrics.items() if key.startswith(f"{when}/acceptance/")]
        total = sum(entry["total"] for entry in entries)
        if total:
            losses.append((title, sum(e["loss"] * e["total"] for e in entries) / total))
    if losses:
        lines.append(
            "loss, nats a record: " + ", ".join(f"{title} {loss:.3f}" for title, loss in losses)
        )
        if model["task"] == "instruction":
            lines.append(
                "perplexity, of a token of the answer: "
                + ", ".join(f"{title} {math.exp(min(loss, 700)):.4g}" for title, loss in losses)
            )
    judged = model.get("judged", {})  # not in reports of earlier releases
    for key, title in (("macro_f1", "macro-F1"), ("token_f1", "token F1"), ("rouge_l", "ROUGE-L")):
        said = [f"{t} {100 * judged[w][key]:.1f}" for w, t in whens if key in judged.get(w, {})]
        if said:
            lines.append(f"{title}, %: " + ", ".join(said))
    parts: list[RenderableType] = [Text(line) for line in lines]
    final = judged.get("federated", {})
    if "confusion" in final:
        table = Table(
            title="acceptance set, together: right label (row), answer (column), records",
            title_justify="left",
        )
        table.add_column("")
        labels = [printable(label, 40) for label in final["labels"]]
        for label in labels:
            table.add_column(label, justify="right")
        for label, row in zip(labels, final["confusion"], strict=True):
            table.add_row(label, *(str(count) if count else "" for count in row))
        parts.append(table)
    return parts


def _samples(name: str, local: Mapping[str, LocalFigures]) -> list[RenderableType]:
    """Answers to a few records of the acceptance set, as one of the customers' nodes has them."""
    rows: Any = next(
        (counts[name]["samples"] for counts in local.values() if counts[name].get("samples")), None
    )
    if rows is None:
        return []
    table = Table(title="answers to records of the acceptance set", title_justify="left")
    for column in ("prompt", "right", "before", "together"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(printable(str(text), 300)) for text in row))
    return [table]


def _summed(name: str, group: str, local: Mapping[str, LocalFigures]) -> dict[str, float] | None:
    """What those customers alone reach who train the baseline, where no sum of it left them."""
    key = f"local/acceptance/{group}"
    found = [counts[name][key] for counts in local.values() if key in counts[name]]
    correct, total = sum(one[0] for one in found), sum(one[1] for one in found)
    return {"correct": correct, "total": total} if total else None


def _best(name: str, groups: list[str], local: Mapping[str, LocalFigures]) -> str:
    """The best that one customer alone reached on these groups."""
    shares = []
    for counts in local.values():
        entries = [
            counts[name][f"local/acceptance/{group}"]
            for group in groups
            if f"local/acceptance/{group}" in counts[name]
        ]
        total = sum(entry[1] for entry in entries)
        if total:
            shares.append((sum(entry[0] for entry in entries) / total, total))
    return _percent(*max((share * total, total) for share, total in shares)) if shares else ""


def _own(name: str, local: Mapping[str, LocalFigures]) -> Table | None:
    if not any("federated/own" in counts[name] for counts in local.values()):
        return None
    table = Table(title="each customer's own held-out records, % right", title_justify="left")
    table.add_column("customer")
    for column in ("records", "before", "alone", "together", "personal"):
        table.add_column(column, justify="right")
    whens = ("before", "local", "federated", "personal")
    for customer, counts in local.items():
        entries = [counts[name].get(f"{when}/own") for when in whens]
        records = next((f"{int(entry[1]):,}" for entry in entries if entry), "")
        table.add_row(
            customer, records, *(_percent(entry[0], entry[1]) if entry else "" for entry in entries)
        )
    return table


def gained_lines(gain: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Sentences that count customers."""
    return [
        f"With its personal adapter {counts['gained']} of {sum(counts.values())} customers are"
        f" better off than {'alone' if other == 'alone' else 'with the shared one'} on their own"
        f" held-out records, {counts['lost']} worse off, {counts['even']} without a difference"
        " beyond noise (95 %)."
        for other, counts in gain.items()
    ]


def _percent(correct: float, total: float) -> str:
    return f"{100 * correct / total:.1f}" if total else ""
