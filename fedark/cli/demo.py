"""`fedark demo`: a host and its nodes as real processes on one machine, on the embedded example."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.live import View
from fedark.cli.show import (
    adapters_of,
    bases_of,
    console,
    outcome_facts,
    show_outcome,
    show_questions,
)
from fedark.contract.job import Job

__all__ = ["demo"]


def demo(
    job: Annotated[
        Path | None, typer.Argument(help="A job file; without one, the power-grid example.")
    ] = None,
    work: Annotated[
        Path,
        typer.Option(help="Folder for everything that the demo makes; former runs in it stay."),
    ] = Path("fedark-demo"),
    seed: Annotated[int, typer.Option(help="Of the example.")] = 7,
    port: Annotated[
        int, typer.Option(help="Port of a new host on loopback; 0 takes a free one.")
    ] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after which the demo gives up.")] = 900.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: progress, then the outcome.")
    ] = False,
) -> None:
    """Run a host, a provider and customers as their operators would, each customer with a sandboxed
    trainer enclave.
    """
    from fedark.cli.examples import write_example
    from fedark.sandbox import survey
    from fedark.simulation.machine import Machine

    began = time.monotonic()
    mode = survey().mode()
    with View(console, as_json=as_json) as view:
        path = job or write_example("grid", work / "job", seed=seed, progress=view)
        view(
            f"sandbox mode {mode}; simulated platform: it does not protect from this machine's root"
            " user"
        )
        with Machine(work / "federation", view) as machine:
            loaded = Job.load(path)
            contract = machine.begin(loaded, sandbox=mode, port=port)
            left = timeout - (time.monotonic() - began)
            report = machine.finish(contract, timeout=left)
    if as_json:
        typer.echo(outcome_facts(report, contract, machine.root))
        return
    show_outcome(report, contract, machine.root, bases_of(loaded))
    for last in adapters_of(contract, machine.root, report["run_id"])[-1:]:
        show_questions(last, loaded)
    for name, reason in machine.left_out.items():
        console.print(f"Left out: model {name}. {reason}")
    console.print(f"All processes have ended; {time.monotonic() - began:.0f} s in all.")
