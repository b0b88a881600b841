"""`fedark simulate JOB.toml`: the whole job in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.live import View
from fedark.cli.show import bases_of, console, outcome_facts, show_outcome
from fedark.contract.job import Job
from fedark.foundation.errors import InputError

__all__ = ["simulate"]


def simulate(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    work: Annotated[
        Path,
        typer.Option(
            help="Folder for keys, bundles, adapters and reports; former runs in it stay."
        ),
    ] = Path("fedark-work"),
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value in TOML's syntax; may be repeated."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            help="CUSTOMER:ROUND, a customer that is gone from that round on; may be repeated."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Print the outcome alone.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: progress, then the outcome.")
    ] = False,
) -> None:
    """Run a job with all parties in this process: same stages, messages and enclave code, no
    sandbox, no network.
    """
    # Before torch is loaded: threads that wait on a busy machine sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fedark.simulation import simulate as simulation

    gone = dict(_dropped(text) for text in drop or ())
    parsed = Job.load(job, tuple(override or ()))
    with (
        View(console, quiet=quiet, as_json=as_json) as view,
        simulation(parsed, work, say=view, drop=gone) as running,
    ):
        report = running.run()
        view.end()
        if as_json:
            typer.echo(outcome_facts(report, running.federation.contract, work))
            return
        show_outcome(report, running.federation.contract, work, bases_of(parsed))
        if running.federation.spent:
            console.print(f"\n{running.federation.spent}", soft_wrap=True)


def _dropped(text: str) -> tuple[str, int]:
    name, separator, number = text.rpartition(":")
    if not separator or not number.isdecimal():
        raise InputError(
            f"{text!r} is not of the form CUSTOMER:ROUND.", safe="Nothing was started."
        )
    return name, int(number)
