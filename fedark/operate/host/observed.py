"""A host's metrics: its processes, nodes and jobs, and the stages of the jobs while they run.

fedark_process_up|fedark_process_restarts{process=}   fedark_nodes{status=}   fedark_jobs{status=}
fedark_job_stage_seconds_sum|_count{stage=}   fedark_job_stage_bytes_total{stage=,direction=}
fedark_job_rounds_total   fedark_job_passed_over_total{stage=}
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Summary

from fedark.foundation.metrics import GaugeByLabel
from fedark.operate.host.store import HostStore
from fedark.operate.supervisor import Supervised
from fedark.stages.aggregator import STAGES
from fedark.stages.coordinator import DEFAULT_TIMEOUTS

__all__ = ["StageWatch", "host_metrics"]


def host_metrics(
    store: HostStore, processes: Callable[[], Iterable[Supervised]]
) -> CollectorRegistry:
    """Metrics that are read from the host's state whenever they are asked for."""

    def counted(values: Iterable[str]) -> Mapping[str, float]:
        return {value: float(number) for value, number in collections.Counter(values).items()}

    registry = CollectorRegistry()
    for gauge in (
        GaugeByLabel(
            "fedark_process_up",
            "Whether a process of this host is alive.",
            "process",
            lambda: {kept.name: float(kept.alive) for kept in processes()},
        ),
        GaugeByLabel(
            "fedark_process_restarts",
            "How often a process was started again.",
            "process",
            lambda: {kept.name: float(kept.restarts) for kept in processes()},
        ),
        GaugeByLabel(
            "fedark_nodes",
            "Nodes by standing.",
            "status",
            lambda: counted(row.status for row in store.nodes()),
        ),
        GaugeByLabel(
            "fedark_jobs",
            "Jobs by status.",
            "status",
            lambda: counted(job.status for job in store.jobs()),
        ),
    ):
        registry.register(gauge)
    return registry


class StageWatch:
    """Counts, in `registry`, the stages that the aggregator's host notes, as they end, and the
    parties that a job went on without.

    Args:
        runs: the folder of the runs; what stands in it already is of an earlier host process, and
            not counted.
    """

    def __init__(self, registry: CollectorRegistry, runs: Path) -> None:
        self._seconds = Summary(
            "fedark_job_stage_seconds",
            "Seconds until a stage's last reply.",
            ["stage"],
            registry=registry,
        )
        self._bytes = Counter(
            "fedark_job_stage_bytes_total",
            "Bytes to and from all parties.",
            ["stage", "direction"],
            registry=registry,
        )
        self._rounds = Counter("fedark_job_rounds_total", "Rounds that ended.", registry=registry)
        self._passed_over = Counter(
            "fedark_job_passed_over_total",
            "Parties that a job went on without.",
            ["stage"],
            registry=registry,
        )
        self._runs = runs
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
        stage = _known(str(entry["stage"]))
        self._seconds.labels(stage).observe(entry["seconds"])
        self._bytes.labels(stage, "out").inc(entry["sent"])
        self._bytes.labels(stage, "in").inc(entry["received"])
        if stage == "round":
            self._rounds.inc()

    def passed_over(self, report: Mapping[str, Any]) -> None:
        """Count the parties that a job went on without."""
        for why in report["passed_over"].values():
            self._passed_over.labels(_known(str(why).partition(":")[0])).inc()


def _known(stage: str) -> str:
    """A stage's name from the closed list, "other" for anything else: reports hold other parties'
    words.
    """
    name = stage.split(" ")[0]
    return name if name in DEFAULT_TIMEOUTS or name == "sum" else "other"
