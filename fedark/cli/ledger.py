"""`fedark ledger`: read, verify and export a customer's privacy ledger. Nothing here charges or
changes it.

An export holds no record and no digest of one, only counts, costs and the chain: it may be shown to
whoever audits the customer, and its head is what to keep, so that a ledger that is rolled back
later is found out.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedark.foundation.errors import InputError, printable
from fedark.privacy.accounting import Budget, Spend, cost
from fedark.privacy.ledger import LEDGER, Head, Ledger

__all__ = ["app"]

app = typer.Typer(
    help="Look at, verify and export the ledger of what was spent of a data set's privacy.",
    no_args_is_help=True,
)

Where = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A customer's folder, or its ledger.sqlite.")
]


@app.command("show")
def show(
    folder: Where,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what was charged and released, once the chain is verified."""
    with _open(folder) as ledger:
        entries = ledger.entries()
    released = {
        entry["charge"]: entry["number"] + 1 for entry in entries if entry["kind"] == "release"
    }
    for entry in (entry for entry in entries if entry["kind"] == "charge"):
        spend, budget = Spend.from_dict(entry["spend"]), Budget(*entry["budget"])
        alone = cost([spend], budget.delta)[0]
        done = released.get(entry["sequence"], 0)
        if as_json:
            typer.echo(json.dumps({**_readable(entry), "epsilon": alone, "released": done}))
            continue
        typer.echo(
            f"{entry['sequence']:6d}  {_time(entry['time'])}  {printable(entry['run'])}: epsilon"
            f" {alone:.3f} at delta {budget.delta:.3g} for each {spend.unit}, {entry['records']}"
            f" records, {done} of {entry['releases']} releases"
        )
    if not as_json:
        typer.echo(
            f"{len(entries)} entries. What a data set has spent in all is not the sum of these: it"
            " is composed, by record."
        )


@app.command("verify")
def verify(
    folder: Where,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="FILE.json",
            help="An export, or its head, that was kept; repeatable.",
        ),
    ] = None,
) -> None:
    """Check every entry and every record's group, and that every head that somebody kept is of this
    ledger's past.
    """
    heads = [_head(path) for path in against or ()]
    with _open(folder) as ledger:
        head = ledger.verify(heads)
    typer.echo(f"The ledger is whole: {head.sequence} entries, head {head.hash.hex()[:16]}...")
    typer.echo(
        f"{len(heads)} kept heads are of its past."
        if heads
        else (
            "Whether it was rolled back, or is not the only one, only a kept head tells: use"
            " --against."
        )
    )


@app.command("export")
def export(folder: Where) -> None:
    """Print the whole chain and its head as one JSON object, for an auditor; it holds no record."""
    with _open(folder) as ledger:
        head = ledger.verify()
        entries = ledger.entries()
    typer.echo(
        json.dumps(
            {"head": head.to_dict(), "entries": [_readable(entry) for entry in entries]}, indent=1
        )
    )


def _open(folder: Path) -> Ledger:
    return Ledger.open(folder / LEDGER if folder.is_dir() else folder)


def _head(path: Path) -> Head:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"{path} is not JSON.") from None
    return Head.from_dict(value.get("head", value) if isinstance(value, dict) else {})


def _readable(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.hex() if isinstance(value, bytes) else value for name, value in entry.items()
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00") + "Z"
