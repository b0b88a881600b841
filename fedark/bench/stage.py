"""The fixed cost of a stage: SuperLink, ServerApp and three nodes as real processes, parties that
answer at once.

Ours: our connection (`fedark.links.flower.supernode`) and pauses. Peer: Flower's own SuperNode and
ClientApp processes behind the same ServerApp, which every node can fall back to. The first stage
after the nodes came online is not counted.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedark.bench import Row
from fedark.operate.deployment import Deployment, Member, Plan

__all__ = ["rows"]

_NODES = ("north", "east", "south")
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
    out = root / "seconds.json"
    plan = Plan(
        root=root,
        nodes=tuple(
            Member(party, "fedark.bench._echo:make", {"party": party}, stock=stock)
            for party in _NODES
        ),
        aggregator=Member("pool", "fedark.bench._echo:make", {"party": "pool"}),
        coordinator="fedark.bench._echo:coordinate",
        settings={"expect": len(_NODES), "sizes": sizes, "out": str(out)},
    )
    with Deployment(plan) as deployment:
        deployment.wait(deployment.submit(), timeout=600)
    seconds: list[float] = json.loads(out.read_text())
    return seconds
