"""Rounds at the highest rate for FEDARK_SOAK_MINUTES minutes (1 by default): is the memory of every
process flat?

Each process's resident memory is read once a second. Reported are its peak, and how much its median
of the last third of the run lies above that of the second third: the first third is for caches to
fill. 30 minutes are asked of a release.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedark.bench import Row
from fedark.bench._faults import TARGETS, Victim
from fedark.bench._small import small_job
from fedark.contract.job import Job
from fedark.foundation.errors import FederationError
from fedark.sandbox import survey
from fedark.simulation.machine import Machine

__all__ = ["rows"]

_GROWTH_MIB = 8.0
_MOST_ROUNDS = 10_000


class _Enough(Exception):
    pass


def rows() -> Iterator[Row]:
    """Rate, and peak and growth of each kind of process."""
    minutes = float(os.environ.get("FEDARK_SOAK_MINUTES", "1"))
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as folder:
        job = Job.load(small_job(Path(folder) / "job", rounds=_MOST_ROUNDS, mode="masked"))
        seen: dict[str, list[float]] = defaultdict(list)
        with Machine(Path(folder) / "machine") as machine:
            contract = machine.begin(job, sandbox=survey().mode())
            victim = Victim(machine, contract, 0)
            began = 0.0
            first = 0

            def look() -> None:
                nonlocal began, first
                if victim.failed is not None:
                    raise FederationError("The job failed during the soak.")
                number = victim.furthest()[0]
                if not began and number >= 1:
                    began, first = time.monotonic(), number
                if began and time.monotonic() - began > 60 * minutes:
                    raise _Enough
                for target in TARGETS if began else ():
                    if target != "all at once":
                        seen[target] += [
                            mib for pid in victim.pids(target) if (mib := _resident_mib(pid))
                        ]

            with suppress(_Enough):
                machine.finish(contract, timeout=60 * minutes + 300, on_look=look, pause=1.0)
            rounds = victim.furthest()[0] - first
    yield Row(f"masked rounds in {minutes:g} min", float(rounds), None, "rounds")
    for target, series in seen.items():
        third = len(series) // 3
        growth = statistics.median(series[2 * third :]) - statistics.median(
            series[third : 2 * third]
        )
        yield Row(f"{target}, peak", max(series), None, "MiB")
        yield Row(
            f"{target}, growth",
            growth,
            None,
            "MiB",
            None,
            f"<= {_GROWTH_MIB:g} MiB",
            growth <= _GROWTH_MIB,
        )


def _resident_mib(pid: int) -> float:
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    return 0.0
