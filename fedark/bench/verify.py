"""`fedark bench verify`: how large a dossier is and how long its verification takes, at 3, 50 and
500 customers; and how many changes of its leaves are found.

Seconds are the processor time of the one thread that verifies, the median of three; on a quiet
machine that is the time by the clock. Leaves are those of real runs of every mode, each change
signed again by the aggregator, who holds the key over the whole file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedark.bench import Row
from fedark.bench._dossiers import MODES, Run, enlarged, run
from fedark.bench._lies import lies, signed
from fedark.foundation import canonical
from fedark.report.verify import DossierRefused, verify_dossier
from fedark.stages.dossier import MAX_DOSSIER

__all__ = ["rows"]

_CUSTOMERS, _RUNS, _GOAL = (3, 50, 500), 3, 5.0


def rows() -> Iterator[Row]:
    """Kilobytes, seconds, and shares of changes that were found."""
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as name:
        runs = {mode: run(Path(name) / mode, mode) for mode in MODES}
        for customers in _CUSTOMERS:
            data = enlarged(runs["sealed"], customers, Path(name) / f"{customers}.sqlite")
            yield Row(f"dossier of {customers} customers", len(data) / 1e3, None, "kB")
            seconds = statistics.median(_seconds(data) for _ in range(_RUNS))
            goal = f"<= {_GOAL:g} s"
            text = f"verified, {customers} customers"
            yield Row(text, seconds, None, "s", None, goal, seconds <= _GOAL)
        for mode, one in runs.items():
            made, found = _caught(one)
            yield Row(
                f"changes of leaves found, {mode}, of {made}",
                found,
                made,
                "changes",
                found / made,
                ">= 1",
                found == made,
            )


def _seconds(data: bytes) -> float:
    begun = time.thread_time()
    verify_dossier(data)
    return time.thread_time() - begun


def _caught(one: Run) -> tuple[int, int]:
    """How many lies were told, and how many were found."""
    made = found = 0
    key = one.aggregator.signing
    for lie in lies(canonical.decode(one.dossier, max_bytes=MAX_DOSSIER)["body"]):
        made += 1
        try:
            verify_dossier(signed(key, lie.body))
        except DossierRefused:
            found += 1
    return made, found
