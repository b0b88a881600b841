"""`fedark audit [JOB.toml]`: train once with canaries, and put the measured lower bound on epsilon
beside the claimed one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.show import console, teller

__all__ = ["audit"]


def audit(
    job: Annotated[
        Path | None,
        typer.Argument(
            help="A job file with a privacy mechanism; without one, a small embedded task."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Which of the job's models; by default the first.")
    ] = "",
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The claim, if not the job's (3 for the embedded task); inf trains without noise."
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds claimed and trained, if not the job's (60).", min=1)
    ] = None,
    canaries: Annotated[int, typer.Option(help="Dirac canaries.", min=0)] = 1000,
    records: Annotated[
        int,
        typer.Option(
            help="At most so many of the job's records, and half as many flipped ones.", min=2
        ),
    ] = 2000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a text.")
    ] = False,
) -> None:
    """Refute a privacy claim, if one training run can: exit status 1 if it is refuted, 0 if not."""
    # Before torch is loaded: threads that wait on a busy machine sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fedark.auditing.claims import audit_claim
    from fedark.contract.job import Job

    report = audit_claim(
        Job.load(job) if job is not None else None,
        model=model,
        epsilon=epsilon,
        rounds=rounds,
        canaries=canaries,
        records=records,
        say=teller(quiet=as_json),
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        for line in report.lines():
            console.print(line, soft_wrap=True)
    if report.refuted:
        raise typer.Exit(1)
