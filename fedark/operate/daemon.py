"""The process that owns a party: it serves `fedark.v1.Node` on a unix socket, and runs a node's
connection as its child.

    python -m fedark.operate.daemon CONFIG.json

Keys and data are in this process (and in the enclave that it starts); the child that talks to the
network has none of them. The aggregator's daemon is the same without a connection: the ServerApp
calls its socket.

It ends on SIGTERM. A connection that dies is started again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from fedark.contract.lease import INFERENCE
from fedark.enclave.host import EnclaveHandle, EnclaveProcess
from fedark.enclave.session import LeaseConfig, RunConfig
from fedark.foundation import logs
from fedark.foundation.errors import FedarkError
from fedark.foundation.files import private_directory
from fedark.foundation.metrics import MetricsServer
from fedark.foundation.proxies import through
from fedark.links.flower import configuration
from fedark.links.flower.service import NodeServer, OperatorQueries, StageHandler
from fedark.operate.party import PartyConfig, load_machine
from fedark.operate.processes import flower_environment, module
from fedark.operate.supervisor import LOOK, Supervisor, told_to_stop
from fedark.stages.settings import EnclaveFactory

__all__ = ["PROGRESS", "Served", "DaemonSettings", "enclaves", "main", "teller"]

PROGRESS = "progress.log"
"""In every party's folder: one line for people for whatever happens there; holds no secret."""
_LONGEST_PAUSE = 5.0
_log = logging.getLogger("fedark.operate.daemon")  # also where it runs as __main__


@dataclass(frozen=True)
class DaemonSettings:
    """A daemon's configuration.

    Attributes:
        socket: where it serves.
        factory: "module:function" that makes what it serves, a `Served`, from `settings`.
        settings: the factory's own.
        superlink: host:port, or "" for a daemon without a connection (the aggregator's).
        ca, key: the authority's certificate and the node's transport key.
        metrics: port on loopback for Prometheus; 0 for none.
        proxy: on the way to the SuperLink; "" for none.
    """

    socket: str
    factory: str
    settings: dict[str, Any] = field(default_factory=dict)
    superlink: str = ""
    ca: str = ""
    key: str = ""
    metrics: int = 0
    proxy: str = ""


@dataclass(frozen=True)
class Served:
    """What a daemon serves: a party's node; and of an operator's node what answers its commands."""

    node: StageHandler
    queries: OperatorQueries | None = None
    metrics: CollectorRegistry = field(default_factory=CollectorRegistry)


def enclaves(folder: Path) -> EnclaveFactory:
    """Starts enclaves of the party whose folder this is, in sandboxed processes."""
    sandbox, device = PartyConfig.read(folder).sandbox, load_machine(folder)

    def start(role: str, run_config: bytes, checkpoint: bytes = b"") -> EnclaveHandle:
        return EnclaveProcess.start(
            role,
            run_config,
            device=device,
            log=folder / "enclave.log",
            minimum_sandbox=sandbox,
            message_bytes=(LeaseConfig if role == INFERENCE else RunConfig)
            .decode(run_config)
            .message_bytes,
            checkpoint=checkpoint,
        )

    return start


def teller(folder: Path) -> Callable[[str], None]:
    """Writes what happens at a party to its log, and to `PROGRESS` for people."""

    def tell(text: str) -> None:
        _log.info("%s", text)
        with open(folder / PROGRESS, "a", encoding="utf-8") as file:
            line = text.replace("\n", " | ")  # what another party says stays on one line
            file.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}\n")

    return tell


def main(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    logs.setup("node daemon")
    settings = configuration.read(path, DaemonSettings)
    asked = told_to_stop()
    served: Served = configuration.resolve(settings.factory)(settings.settings)
    node, queries = served.node, served.queries
    logs.setup("node daemon", party=node.party)
    exporter = None
    try:
        with Supervisor(path.parent, _log.warning, longest=_LONGEST_PAUSE) as children:
            server = NodeServer(
                node, Path(settings.socket), queries=queries, on_stop=asked.set if queries else None
            )
            try:
                if settings.metrics:
                    exporter = MetricsServer(served.metrics, settings.metrics)
                _log.info("%s (%s) serves %s", node.party, node.role, settings.socket)
                if settings.superlink:
                    _connect(children, settings, path.parent)
                while not asked.wait(LOOK):
                    children.look()
            finally:
                server.close()
                if exporter is not None:
                    exporter.close()
    finally:
        node.close()


def _connect(children: Supervisor, settings: DaemonSettings, directory: Path) -> None:
    connection = configuration.Connection(
        settings.superlink, settings.ca, settings.key, settings.socket
    )
    file = configuration.write(directory / "supernode.json", connection)
    environment = flower_environment(private_directory(directory / "flower"))
    environment |= through(settings.proxy)
    children.keep("supernode", module("fedark.links.flower.supernode", str(file)), environment)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FedarkError as error:
        sys.exit(str(error))
    # A stage may still be at work in a thread; what it had to keep is on disk, and the node has
    # been closed.
    logging.shutdown()
    os._exit(0)
