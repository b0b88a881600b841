"""Seconds from a SIGKILL to the job's next step, for each kind of process and for all of them at
once.

A small job of real processes runs for many rounds while its processes are killed in turn, at random
moments. The figure holds the rest of the stage that was hit, done again where it must be.
FEDARK_BENCH_KILLS kills of each kind are made, 3 by default.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedark.bench import Row
from fedark.bench._faults import TARGETS, Victim, run_with_kills
from fedark.bench._small import small_job
from fedark.contract.job import Job
from fedark.sandbox import survey
from fedark.simulation.machine import Machine

__all__ = ["rows"]

_GOAL = 30.0


def rows() -> Iterator[Row]:
    """Median and longest recovery of each kind."""
    each = int(os.environ.get("FEDARK_BENCH_KILLS", "3"))
    seed = random.SystemRandom().randrange(1 << 31)
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as folder:
        # A kill costs the job one step at least.
        job = Job.load(
            small_job(Path(folder) / "job", rounds=each * len(TARGETS) + 2, mode="sealed")
        )
        with Machine(Path(folder) / "machine") as machine:
            victim = Victim(machine, machine.begin(job, sandbox=survey().mode()), seed)
            done = run_with_kills(victim, _kills(seed, each), timeout=3600)
    for target in TARGETS:
        seconds = [kill.seconds for kill in done if kill.target == target]
        if seconds:
            median, longest = statistics.median(seconds), max(seconds)
            yield Row(f"{target}, median of {len(seconds)}", median, None, "s")
            yield Row(
                f"{target}, longest", longest, None, "s", None, f"<= {_GOAL:g} s", longest <= _GOAL
            )


def _kills(seed: int, each: int) -> Iterator[tuple[str, float]]:
    order = random.Random(seed)  # noqa: S311
    for _ in range(each):
        for target in order.sample(TARGETS, len(TARGETS)):
            yield target, order.uniform(0.0, 1.0)
