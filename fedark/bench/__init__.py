"""`fedark bench NAME`: ours against a peer, in one run, as ratios.

A benchmark is a module `fedark.bench.NAME` with `def rows() -> Iterator[Row]`. Measurements of the
two sides are interleaved and reported as medians; a peer that is not installed gives a row with
`peer=None` and no verdict.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Row", "interleaved", "machine"]


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        case: what was measured.
        ours, peer: figures in `unit`; `peer` is None where there is nothing to compare with.
        unit: of both figures.
        ratio: ours / peer, or peer / ours: whichever `goal` speaks of.
        goal: the bound in words, such as ">= 0.60".
        ok: whether it was met; None where there is no verdict.
    """

    case: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None = None
    goal: str = ""
    ok: bool | None = None


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], *, runs: int = 7, warmup: int = 1
) -> tuple[float, float]:
    """Median wall seconds of `ours` and of `peer`, run in turn: A B A B ..."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(warmup + runs):
        for side, call in enumerate((ours, peer)):
            start = time.perf_counter()
            call()
            if run >= warmup:
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def machine() -> str:
    """Processor, cores and versions: what a figure depends on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, Linux"
        f" {platform.release()}"
    )
