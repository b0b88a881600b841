"""`fedark audit [JOB.toml]`: train once with canaries, and put the measured lower bound on epsilon
beside the claimed one.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedark.cli.show import console, teller
from fedark.foundation.errors import InputError

__all__ = ["audit"]

_STEP = 0.3  # FedAdam's: large, so that whatever can be learned of a canary is


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
    from fedark.audit.embedded import PRIVACY, ROUNDS, small_records, small_task
    from fedark.audit.jobs import job_records, job_task
    from fedark.audit.one_run import audit as one_run
    from fedark.audit.rounds import NOISELESS, audited_contract, trainer_round
    from fedark.contract.contract import ServerTerms
    from fedark.contract.job import Job
    from fedark.tuning.self_check import self_check

    tell = teller(quiet=as_json)
    privacy, protection = PRIVACY, None
    changed = epsilon is not None or rounds is not None
    if job is None:
        task, data = small_task(), small_records(600, seed=0)
        rounds = rounds or ROUNDS
    else:
        read = Job.load(job)
        privacy, protection = read.privacy, read.protection
        task, data = job_task(read, model), job_records(read)
        rounds = rounds or read.rounds
    claimed = privacy.epsilon if epsilon is None else epsilon
    if not claimed > 0:
        raise InputError("A claim is an epsilon above 0.", safe="Nothing was trained.")
    if not math.isfinite(claimed):
        privacy = privacy.model_copy(update={"noise_multiplier": NOISELESS})
    elif changed:
        privacy = privacy.model_copy(update={"epsilon": claimed, "noise_multiplier": 0.0})
    order = np.random.default_rng(0).permutation(len(data))[: records + records // 2]
    shuffled = [data[index] for index in order]
    cut = len(shuffled) // 2 if job is None else len(shuffled) * 2 // 3
    own, spare = shuffled[:cut], shuffled[cut:]
    diracs = min(canaries, task.terms.travelling // 2)
    population = len(own) + len(spare) // 2 + diracs // 2
    tell("checking the gradients")
    self_check(task, own)
    contract = audited_contract(
        task.terms, privacy, rounds=rounds, records=population, protection=protection
    )
    tell(f"training {rounds} rounds on {len(own)} records and the canaries")
    report = one_run(
        task,
        own,
        spare,
        trainer_round(contract),
        claimed=claimed,
        delta=privacy.delta,
        rounds=rounds,
        expected=privacy.sampling_rate * population,
        clip_norm=privacy.clip_norm,
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
