"""The functions that the processes of a deployment are made of: a node's, the aggregator's, and the
ServerApp's.

The processes find them by name in configuration files of their own host
(`fedark.links.flower.configuration`); nothing of this comes from another party.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedark.contract.contract import Contract
from fedark.enclave.host import EnclaveHandle, EnclaveProcess
from fedark.enclave.session import RunConfig
from fedark.foundation.logs import always, of_run
from fedark.links.flower.service import NodeClient
from fedark.links.link import Link
from fedark.operate.party import PartyConfig, load_aggregator, load_machine, load_node
from fedark.stages.aggregator import AggregatorHost
from fedark.stages.coordinator import coordinate
from fedark.stages.node import Node
from fedark.stages.settings import EnclaveFactory

__all__ = [
    "AGGREGATOR",
    "COORDINATOR",
    "NODE",
    "PROGRESS",
    "make_aggregator",
    "make_node",
    "run_job",
]

NODE = "fedark.operate.daemons:make_node"
AGGREGATOR = "fedark.operate.daemons:make_aggregator"
COORDINATOR = "fedark.operate.daemons:run_job"
PROGRESS = "progress.log"
"""In every party's folder: one line for people for whatever happens there; holds no secret."""

_LONGEST_CALL = 3600.0
_log = logging.getLogger(__name__)
_PATIENCE = 60.0


def make_node(settings: dict[str, Any]) -> Node:
    """The node of the party folder `settings["folder"]`, with enclaves in sandboxed processes."""
    folder = Path(settings["folder"])
    config = PartyConfig.read(folder)
    start = None if config.role == "provider" else _enclaves(folder, config.sandbox)
    node = load_node(folder, start, _teller(folder))
    # Its requests wait for it; the daemon serves meanwhile.
    threading.Thread(target=node.wake, name="wake", daemon=True).start()
    return node


def make_aggregator(settings: dict[str, Any]) -> AggregatorHost:
    """The aggregator's host for the folder `settings["folder"]` and the contract in
    `settings["contract"]`.
    """
    folder = Path(settings["folder"])
    contract = Contract.decode(Path(settings["contract"]).read_bytes())
    host = load_aggregator(
        folder, contract, _enclaves(folder, PartyConfig.read(folder).sandbox), _teller(folder)
    )
    always(**of_run(contract.digest(), host.run_id))
    threading.Thread(target=host.wake, name="wake", daemon=True).start()
    return host


def run_job(link: Link, aggregator: NodeClient, settings: dict[str, Any]) -> None:
    """Run the job that waits at the aggregator's daemon."""
    coordinate(
        link, lambda request: aggregator.handle(request, timeout=_LONGEST_CALL, patience=_PATIENCE)
    )


def _enclaves(folder: Path, sandbox: str) -> EnclaveFactory:
    device = load_machine(folder)

    def start(role: str, run_config: bytes, checkpoint: bytes = b"") -> EnclaveHandle:
        return EnclaveProcess.start(
            role,
            run_config,
            device=device,
            log=folder / "enclave.log",
            minimum_sandbox=sandbox,
            message_bytes=RunConfig.decode(run_config).message_bytes,
            checkpoint=checkpoint,
        )

    return start


def _teller(folder: Path) -> Callable[[str], None]:
    def tell(text: str) -> None:
        _log.info("%s", text)
        with open(folder / PROGRESS, "a", encoding="utf-8") as file:
            line = text.replace("\n", " | ")  # what another party says stays on one line
            file.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}\n")

    return tell
