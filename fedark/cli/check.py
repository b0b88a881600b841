"""`fedark check JOB`: what a job is and takes, or all that is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.show import console
from fedark.contract.job import Job

__all__ = ["check"]


def check(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value in TOML's syntax; may be repeated."),
    ] = None,
) -> None:
    """Explain a job in plain words, with the time, memory and bytes that it will take here; or name
    every problem at once, with what to do. Nothing is started.
    """
    # Before torch is loaded: threads that wait on a busy machine sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fedark.simulation.check import check as look

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    found = look(Job.load(job, tuple(override or ())), say)
    for line in found.lines:
        say(line)
    for warning in found.warnings:
        say(f"warning: {warning}")
    say(f"\nNo problem was found. Next:\n  fedark simulate {job}")
