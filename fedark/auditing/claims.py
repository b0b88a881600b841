"""A claim audited: of a job, or of the embedded task."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np

from fedark.auditing.embedded import PRIVACY, ROUNDS, small_records, small_task
from fedark.auditing.jobs import job_records, job_task
from fedark.auditing.one_run import AuditReport
from fedark.auditing.one_run import audit as one_run
from fedark.auditing.rounds import NOISELESS, audited_contract, trainer_round
from fedark.contract.contract import ServerTerms
from fedark.contract.job import Job
from fedark.foundation.errors import InputError
from fedark.tuning.self_check import self_check

__all__ = ["audit_claim"]

_STEP = 0.3  # FedAdam's: large, so that whatever can be learned of a canary is


def audit_claim(
    job: Job | None,
    *,
    model: str = "",
    epsilon: float | None = None,
    rounds: int | None = None,
    canaries: int = 1000,
    records: int = 2000,
    say: Callable[[str], None] = lambda text: None,
) -> AuditReport:
    """See `fedark.audit`, whose arguments these are.

    Raises:
        InputError: the claim is no epsilon, or the job has no such model.
    """
    privacy, protection = PRIVACY, None
    changed = epsilon is not None or rounds is not None
    if job is None:
        task, data = small_task(), small_records(600, seed=0)
        rounds = rounds or ROUNDS
    else:
        privacy, protection = job.privacy, job.protection
        task, data = job_task(job, model), job_records(job)
        rounds = rounds or job.rounds
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
    say("checking the gradients")
    self_check(task, own)
    contract = audited_contract(
        task.terms, privacy, rounds=rounds, records=population, protection=protection
    )
    say(f"training {rounds} rounds on {len(own)} records and the canaries")
    return one_run(
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
