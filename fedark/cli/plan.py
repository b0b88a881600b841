"""`fedark plan`: terms for a private job, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedark.cli.show import console
from fedark.foundation.errors import InputError

__all__ = ["plan"]


def plan(
    job: Annotated[
        Path | None,
        typer.Argument(help="A job file: its records, customers, adapters and privacy count."),
    ] = None,
    records: Annotated[int, typer.Option(help="Of all customers together.")] = 0,
    customers: Annotated[int, typer.Option()] = 0,
    values: Annotated[int, typer.Option(help="That travel in a round.")] = 0,
    epsilon: Annotated[float, typer.Option(help="3 where neither it nor a job says more.")] = 0.0,
    delta: Annotated[float, typer.Option()] = 0.0,
    mechanism: Annotated[
        str, typer.Option(help="example-distributed, example-local or customer-level.")
    ] = "",
    rounds: Annotated[int, typer.Option()] = 0,
    rate: Annotated[float, typer.Option(help="Sampling rate.")] = 0.0,
    clip_norm: Annotated[float, typer.Option()] = 0.0,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value in TOML's syntax; may be repeated."),
    ] = None,
) -> None:
    """Propose rounds, sampling, clipping and learning rate for an epsilon, and say what noise
    leaves of the job. Nothing is started, and no file is changed.
    """
    from fedark.api import plan as propose

    given: dict[str, Any] = {
        "records": records,
        "customers": customers,
        "values": values,
        "epsilon": epsilon,
        "delta": delta,
        "mechanism": mechanism,
        "rounds": rounds,
        "sampling_rate": rate,
        "clip_norm": clip_norm,
    }
    if job is None and not (records and customers and values):
        raise InputError(
            "A plan needs a job file, or the number of records, customers and travelling values.",
            safe="Nothing was written.",
            fix="fedark plan JOB.toml, or the three as options: see fedark plan --help",
        )
    found = propose(job, override=tuple(override or ()), **{k: v for k, v in given.items() if v})
    lines = [
        f"epsilon: {found.epsilon:.3g} at delta {found.privacy.delta:g} for the whole job, noise"
        f" {found.privacy.noise_multiplier:.3g} times the sensitivity",
        *found.said,
        *(f"this would be refused: {problem}" for problem in found.problems),
        "",
        found.toml(),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
