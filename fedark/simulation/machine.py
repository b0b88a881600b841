"""Run a prepared federation with real processes on this machine: SuperLink, aggregator, one node a
party, sandboxed enclaves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedark.foundation.errors import FederationError, restore
from fedark.operate import daemons
from fedark.operate.deployment import Deployment, Member, Plan
from fedark.simulation.local import Federation

__all__ = ["plan_of", "run_on_this_machine"]


def run_on_this_machine(
    federation: Federation,
    root: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    timeout: float = 900.0,
    node: str = daemons.NODE,
    aggregator: str = daemons.AGGREGATOR,
    port: int = 0,
) -> dict[str, Any]:
    """Start every process, run the job, end every process; returns the aggregator's report.

    Args:
        federation: as `prepare` made it.
        root: folder for TLS keys, SuperLink state and logs.
        say: told of what goes on at every party.
        timeout: seconds for all of it.
        node, aggregator: "module:function" that makes a node, and the aggregator's host.
        port: of the SuperLink; 0 takes a free one.

    Raises:
        FedarkError: why the job ended without a report; nothing is left running.
    """
    deadline = time.monotonic() + timeout
    contract = federation.contract
    plan = plan_of(federation, root, node=node, aggregator=aggregator, port=port)
    tails = {
        party.name: _Tail(federation.folder(party.name) / daemons.PROGRESS)
        for party in contract.parties
    }
    outcomes = federation.folder(contract.aggregator.name) / "runs"
    former = set(outcomes.glob("*"))

    def look() -> None:
        for name, tail in tails.items():
            for line in tail.lines():
                say(f"{name}: {line}")

    with Deployment(plan, progress=say) as deployment:
        run = deployment.submit()
        try:
            deployment.wait(run, timeout=deadline - time.monotonic(), on_look=look)
        except FederationError:
            # The coordinator's own words say more than the end of a log.
            for path in _new(outcomes, former, "failed.json"):
                failed = json.loads(path.read_bytes())
                raise restore(
                    failed["code"], failed["what"], safe=failed["safe"], fix=failed["fix"]
                ) from None
            raise
        finally:
            look()
    found = _new(outcomes, former, "report.json")
    if not found:
        raise FederationError("The job left no report.", fix=f"See the logs in {root / 'logs'}.")
    report: dict[str, Any] = json.loads(found[0].read_bytes())
    return report


def _new(outcomes: Path, former: set[Path], name: str) -> list[Path]:
    """That file of every run that is not a former one."""
    return [path for path in outcomes.glob(f"*/{name}") if path.parent not in former]


def plan_of(
    federation: Federation,
    root: Path,
    *,
    node: str = daemons.NODE,
    aggregator: str = daemons.AGGREGATOR,
    port: int = 0,
) -> Plan:
    """What `run_on_this_machine` runs; arguments as there."""
    contract = federation.contract
    names = (contract.provider.name, *(party.name for party in contract.customers))
    return Plan(
        root=root.resolve(),
        nodes=tuple(
            Member(name, node, {"folder": str(federation.folder(name).resolve())}) for name in names
        ),
        aggregator=Member(
            contract.aggregator.name,
            aggregator,
            {
                "folder": str(federation.folder(contract.aggregator.name).resolve()),
                "contract": str((federation.work / "contract.cbor").resolve()),
            },
        ),
        coordinator=daemons.COORDINATOR,
        port=port,
    )


class _Tail:
    """New lines of a growing file, without their time stamps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """Whole lines since the last call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._at += len(data)
        return [line.partition(" ")[2] for line in data.decode("utf-8", "replace").splitlines()]
