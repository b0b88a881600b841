"""`fedark init`: a job file from a person's own data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.show import console
from fedark.foundation.errors import InputError
from fedark.foundation.files import write_new

__all__ = ["init"]


def init(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILES", help="Further data files, one a customer.", exists=False),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help="A data file; more may follow without the option."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The job file to write.")] = Path("job.toml"),
    text: Annotated[
        str, typer.Option(help='Column of the text, or a template such as "{a}: {b}".')
    ] = "",
    label: Annotated[str, typer.Option(help="Column of the answer.")] = "",
    model: Annotated[
        str, typer.Option(help="Base model: package:NAME, dir:PATH or hub:ORG/NAME.")
    ] = "",
) -> None:
    """Make a job from your own files: fedark init --data a.csv b.csv c.csv.

    One file a customer; of one file alone three are made. Nothing is copied.
    """
    from fedark.simulation.propose import propose

    found = [*(data or ()), *(files or ())]
    if not found:
        raise InputError(
            "No data file was named.",
            safe="Nothing was written.",
            fix="fedark init --data a.csv b.csv c.csv",
        )
    if out.exists():
        raise InputError(
            f"{out} exists already.", safe="It was left as it is.", fix="Name another: --out FILE"
        )
    made = propose(found, out.parent, text=text, label=label, model=model)
    if made.labels:
        labels = json.dumps(made.labels, ensure_ascii=False, indent=1).encode()
        write_new(out.parent / "labels.json", lambda file: file.write(labels))
    content = made.text.encode()
    write_new(out, lambda file: file.write(content))
    console.print("What was guessed:")
    for guess in made.guesses:
        console.print(f"  - {guess}", soft_wrap=True, markup=False)
    console.print(f"\n{out} is written. Next:", soft_wrap=True, markup=False)
    for command in ("check", "simulate"):
        console.print(f"  fedark {command} {out}", soft_wrap=True, markup=False)
