"""`fedark taste JOB.toml`: what each base model is worth on the job's records, untuned."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.show import console, teller
from fedark.contract.job import Job

__all__ = ["taste"]


def taste(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    work: Annotated[
        Path, typer.Option(help="Folder for keys, bundles, heads and reports; former runs stay.")
    ] = Path("fedark-work"),
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value in TOML's syntax; may be repeated."),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Print the table alone.")] = False,
) -> None:
    """Judge every base model of a job on its customers' records in one round, without tuning: the
    head that follows in closed form from sums over all of them, with all parties in this process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
    from fedark.mall.choice import candidates_of, ranked, reason, table
    from fedark.simulation import simulate

    tasting = Job.load(job, tuple(override or ())).tasting()
    with simulate(tasting, work, say=teller(quiet=quiet)) as running:
        found = ranked(candidates_of(running.run(), "tasted"))
    console.print(table(found))
    console.print(reason(found), soft_wrap=True, markup=False)
