"""`fedark audit [JOB.toml]`: train once with canaries, and put the measured lower bound on epsilon beside the claimed one."""

from __future__ import annotations

import json
import math
import secrets
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedark.cli.show import console, teller
from fedark.errors import InputError

__all__ = ["audit"]

_CLIP_NORM = 1.0
_STEP = 0.3  # FedAdam's: large, so that whatever can be learned of a canary is


def audit(
    job: Annotated[Path | None, typer.Argument(help="A job file; without one, a small embedded task is audited.")] = None,
    model: Annotated[str, typer.Option(help="Which of the job's models; by default the first.")] = "",
    epsilon: Annotated[float, typer.Option(help="The claim; inf trains without noise.")] = 3.0,
    delta: Annotated[float, typer.Option(help="Of the claim.")] = 1e-5,
    rounds: Annotated[int, typer.Option(help="Rounds trained.", min=1)] = 60,
    rate: Annotated[str, typer.Option(help="Poisson sampling rate, such as 0.1 or 1/16.")] = "0.1",
    canaries: Annotated[int, typer.Option(help="Dirac canaries.", min=0)] = 1000,
    records: Annotated[
        int, typer.Option(help="At most so many of the job's records, and half as many flipped ones.", min=2)
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a text.")] = False,
) -> None:
    """Refute a privacy claim, if one training run can: exit status 1 if it is refuted, 0 if not."""
    from fedark.audit.embedded import small_records, small_task
    from fedark.audit.jobs import job_records, job_task
    from fedark.audit.one_run import audit as one_run
    from fedark.audit.rounds import grid_round
    from fedark.contract import ServerTerms
    from fedark.job import Job
    from fedark.privacy.mechanisms import calibrated
    from fedark.tuning.self_check import self_check

    if not epsilon > 0 or not 0 < delta < 1:
        raise InputError("A claim needs an epsilon above 0 and a delta between 0 and 1.", safe="Nothing was trained.")
    tell = teller(quiet=as_json)
    sampling = _fraction(rate)
    if job is None:
        task, data = small_task(), small_records(600, seed=0)
        own, spare = data[:300], data[300:]
    else:
        read = Job.load(job)
        task, data = job_task(read, model), job_records(read)
        order = np.random.default_rng(0).permutation(len(data))[: records + records // 2]
        cut = len(order) * 2 // 3
        own, spare = [data[index] for index in order[:cut]], [data[index] for index in order[cut:]]
    diracs = min(canaries, task.terms.travelling // 2)
    population = len(own) + len(spare) // 2 + diracs // 2
    tell("checking the gradients")
    self_check(task, own)
    release = grid_round(
        task.terms.travelling,
        noise_multiplier=calibrated(epsilon, delta, sampling, rounds) if math.isfinite(epsilon) else None,
        clip_norm=_CLIP_NORM,
        rate=sampling,
        rounds=rounds,
        delta=delta,
        population=population,
    )
    tell(f"training {rounds} rounds on {len(own)} records and the canaries")
    report = one_run(
        task,
        own,
        spare,
        release,
        claimed=epsilon,
        delta=delta,
        rounds=rounds,
        expected=float(sampling) * population,
        clip_norm=_CLIP_NORM,
        diracs=diracs,
        server=ServerTerms(optimizer="fedadam", learning_rate=_STEP),
        seed=secrets.randbits(64),
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        for line in report.lines():
            console.print(line, soft_wrap=True)
    if report.refuted:
        raise typer.Exit(1)


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise InputError("--rate is no fraction in (0, 1].", safe="Nothing was trained.", fix="Write it like 0.1 or 1/16.")
    return value
