"""`fedark compare JOB.toml`: which of a job's base models is the one, at the price of a few."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.show import console, teller
from fedark.contract.job import Job

__all__ = ["compare"]


def compare(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    models: Annotated[
        str, typer.Option(help="Names of the candidates, with commas; all of the job's without.")
    ] = "",
    finalists: Annotated[
        int, typer.Option(help="How many are tuned; 0: as the job file says.", min=0)
    ] = 0,
    work: Annotated[
        Path,
        typer.Option(help="Folder of all its jobs; a comparison that was ended goes on in it."),
    ] = Path("fedark-work"),
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value in TOML's syntax; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Print the table alone.")] = False,
) -> None:
    """Taste every candidate of a job, tune the best of them by the job's own terms, and say which
    is the one and why. All parties run in this process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    from fedark.mall.choice import failures, table
    from fedark.mall.compare import compare as comparison

    named = [name.strip() for name in models.split(",") if name.strip()]
    read = Job.load(job, tuple(override or ()))
    found = comparison(read, work, models=named, finalists=finalists, say=teller(quiet=quiet))
    console.print(table(found.candidates))
    for line in failures(found.candidates):
        console.print(line, soft_wrap=True, markup=False)
    console.print(found.reason, soft_wrap=True, markup=False)
