"""A host's metrics: its processes, nodes and jobs, and the stages of the jobs while they run.

fedark_process_up|fedark_process_restarts{process=}   fedark_nodes{status=}   fedark_jobs{status=}
fedark_job_stage_seconds_sum|_count{stage=}   fedark_job_stage_bytes_total{stage=,direction=}
fedark_job_rounds_total   fedark_job_passed_over_total{stage=}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedark.foundation.metrics import Metrics
from fedark.operate.host.store import HostStore
from fedark.operate.supervisor import Kept
from fedark.stages.aggregator import STAGES
from fedark.stages.coordinator import DEFAULT_TIMEOUTS

__all__ = ["StageWatch", "host_metrics", "observe_passed_over"]


def host_metrics(store: HostStore, processes: Callable[[], Iterable[Kept]]) -> Metrics:
    """Metrics that are read from the host's state whenever they are asked for."""

    def counted(values: Iterable[str]) -> Mapping[str, float]:
        return {value: float(number) for value, number in Counter(values).items()}

    metrics = Metrics()
    metrics.collect(
        "fedark_process_up",
        "Whether a process of this host is alive.",
        "process",
        lambda: {kept.name: float(kept.alive) for kept in processes()},
    )
    metrics.collect(
        "fedark_process_restarts",
        "How often a process was started again.",
        "process",
        lambda: {kept.name: float(kept.restarts) for kept in processes()},
    )
    metrics.collect(
        "fedark_nodes",
        "Nodes by standing.",
        "status",
        lambda: counted(row.status for row in store.nodes()),
    )
    metrics.collect(
        "fedark_jobs",
        "Jobs by status.",
        "status",
        lambda: counted(job.status for job in store.jobs()),
    )
    return metrics


class StageWatch:
    """Counts the stages that the aggregator's host notes, as they end.

    Args:
        runs: the folder of the runs; what stands in it already is of an earlier host process, and
            not counted.
    """

    def __init__(self, metrics: Metrics, runs: Path) -> None:
        self._metrics, self._runs = metrics, runs
        self._read = {path: path.stat().st_size for path in runs.glob(f"*/{STAGES}")}

    def look(self) -> None:
        """Count what is new."""
        for path in self._runs.glob(f"*/{STAGES}"):
            begin, lines = self._read.get(path, 0), b""
            with suppress(OSError), path.open("rb") as file:
                file.seek(begin)
                lines = file.read().rpartition(b"\n")[0]
            if lines:
                self._read[path] = begin + len(lines) + 1
                for line in lines.split(b"\n"):
                    with suppress(ValueError):  # the host process was killed in the midst of it
                        self._count(json.loads(line))

    def _count(self, entry: Mapping[str, Any]) -> None:
        stage, metrics = _known(str(entry["stage"])), self._metrics
        metrics.observe(
            "fedark_job_stage_seconds",
            "Seconds until a stage's last reply.",
            entry["seconds"],
            stage=stage,
        )
        for direction, key in (("out", "sent"), ("in", "received")):
            help_text = "Bytes to and from all parties."
            metrics.count(
                "fedark_job_stage_bytes_total",
                help_text,
                entry[key],
                stage=stage,
                direction=direction,
            )
        if stage == "round":
            metrics.count("fedark_job_rounds_total", "Rounds that ended.")


def observe_passed_over(metrics: Metrics, report: Mapping[str, Any]) -> None:
    """Count the parties that a job went on without."""
    for why in report["passed_over"].values():
        stage = _known(str(why).partition(":")[0])
        metrics.count(
            "fedark_job_passed_over_total", "Parties that a job went on without.", stage=stage
        )


def _known(stage: str) -> str:
    """A stage's name from the closed list, "other" for anything else: reports hold other parties'
    words.
    """
    name = stage.split(" ")[0]
    return name if name in DEFAULT_TIMEOUTS or name == "sum" else "other"
