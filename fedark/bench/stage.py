"""The fixed cost of a stage: a host and nodes as their operators run them, parties that answer at
once; three of the nodes are asked.

Ours: our connection (`fedark.links.flower.supernode`) and pauses. Peer: Flower's own SuperNode and
ClientApp processes before the same host. The first stage after the nodes came online is not
counted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedark.bench import Row
from fedark.bench._echo import NODE_UP, STOCK_UP, host_up
from fedark.bench._small import small_job
from fedark.contract.job import Job
from fedark.sandbox import survey
from fedark.simulation.machine import Machine

__all__ = ["rows"]

_GOAL = 2.0
_SMALL, _ADAPTER, _LARGE = 1_000, 1_000_000, 100_000_000


def rows() -> Iterator[Row]:
    """Median seconds of a stage."""
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as folder:
        ours = _run(
            Path(folder) / "ours",
            [_SMALL] + [_SMALL] * 15 + [_ADAPTER] * 7 + [_LARGE] * 2,
            stock=False,
        )
        stock = _run(Path(folder) / "stock", [_SMALL] * 4, stock=True)
    small, adapter, large = ours[1:16], ours[16:23], ours[23:]
    peer = statistics.median(stock[1:])
    median = statistics.median(small)
    yield Row(
        "stage of 1 kB, 3 nodes, median",
        median,
        peer,
        "s",
        peer / median,
        f"<= {_GOAL:g} s",
        median <= _GOAL,
    )
    yield Row("stage of 1 kB, 3 nodes, slowest of 15", max(small), max(stock[1:]), "s")
    yield Row("stage of 1 MB each way, median", statistics.median(adapter), None, "s")
    yield Row("stage of 100 MB each way", statistics.median(large), None, "s")


def _run(root: Path, sizes: list[int], *, stock: bool) -> list[float]:
    job = Job.load(small_job(root / "job", rounds=1, mode="sealed"))
    out = root / "seconds.json"
    parties = list(job.customer_names)
    settings = {"parties": parties, "expect": 4, "sizes": sizes, "out": str(out)}
    with Machine(
        root / "machine", host_up=host_up(settings), node_up=STOCK_UP if stock else NODE_UP
    ) as machine:
        machine.finish(machine.begin(job, sandbox=survey().mode()), timeout=900)
    seconds: list[float] = json.loads(out.read_text())
    return seconds
