"""What a host runs for a job: the aggregator's daemon with its enclave, and the coordinator in the
ServerApp.

The processes find both by name in configuration files of their own host
(`fedark.links.flower.configuration`); nothing of this comes from another party.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedark.contract.contract import Contract
from fedark.foundation.logs import always, of_run
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.operate.daemon import Served, enclaves, teller
from fedark.operate.party import load_aggregator
from fedark.stages.coordinator import coordinate

__all__ = ["Work", "make_aggregator", "run_job"]

_LONGEST_CALL = 3600.0
_PATIENCE = 60.0


@dataclass(frozen=True)
class Work:
    """The functions of both; benchmarks and tests of the transport bring their own.

    Attributes:
        aggregator: "module:function", called with {"folder": the aggregator's party folder,
            "contract": the contract's file}; returns a `Served`.
        coordinator: "module:function", called as `function(link, aggregator, settings)`.
        settings: the coordinator's own.
    """

    aggregator: str = "fedark.operate.host.work:make_aggregator"
    coordinator: str = "fedark.operate.host.work:run_job"
    settings: dict[str, Any] = field(default_factory=dict)


def make_aggregator(settings: dict[str, Any]) -> Served:
    """The aggregator's host for one contract."""
    folder = Path(settings["folder"])
    contract = Contract.decode(Path(settings["contract"]).read_bytes())
    host = load_aggregator(folder, contract, enclaves(folder), teller(folder))
    always(**of_run(contract.digest(), host.run_id))
    # Requests wait for it; the daemon serves meanwhile.
    threading.Thread(target=host.wake, name="wake", daemon=True).start()
    return Served(host)


def run_job(link: Link, aggregator: NodeClient, settings: dict[str, Any]) -> None:
    """Run the job that waits at the aggregator's daemon."""
    coordinate(
        link, lambda request: aggregator.handle(request, timeout=_LONGEST_CALL, patience=_PATIENCE)
    )
