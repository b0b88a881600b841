"""`fedark bench NAME [--json]`: run a benchmark of `fedark.bench`, ours against its peer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from typing import Annotated

import typer

import fedark.bench
from fedark.bench import Row, machine
from fedark.foundation.errors import InputError, printable

__all__ = ["bench"]


def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark, such as: seal")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Measure NAME here and now, against a peer in the same run."""
    modules = [
        module.name
        for module in pkgutil.iter_modules(fedark.bench.__path__)
        if module.name[0] != "_"
    ]
    known = {module.replace("_", "-"): module for module in sorted(modules)}
    if name not in known:
        raise InputError(
            f"There is no benchmark {printable(name)!r}.", fix=f"Known ones: {', '.join(known)}"
        )
    rows: list[Row] = list(importlib.import_module(f"fedark.bench.{known[name]}").rows())
    if as_json:
        result = {
            "bench": name,
            "machine": machine(),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
        return
    typer.echo(f"{name} on {machine()}")
    for line in _table(rows):
        typer.echo(line)


def _table(rows: list[Row]) -> list[str]:
    verdicts = {True: "met", False: "MISSED", None: ""}
    cells = [("case", "ours", "peer", "unit", "ratio", "goal", "")]
    for row in rows:
        figures = (f"{row.ours:.4g}", "-" if row.peer is None else f"{row.peer:.4g}", row.unit)
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
        cells.append((row.case, *figures, ratio, row.goal, verdicts[row.ok]))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
