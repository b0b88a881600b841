"""The process that owns a node: it serves `fedark.v1.Node` on a unix socket and runs the node's
connection as a child.

    python -m fedark.operate.node_daemon CONFIG.json

Keys and data are in this process (and in the enclave that the node starts); the child that talks to
the network has none of them. The aggregator's daemon is the same without a connection: the
ServerApp calls its socket.

It ends on SIGTERM. A connection that dies is started again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fedark.foundation import logs
from fedark.foundation.errors import FedarkError
from fedark.foundation.metrics import Metrics, MetricsServer
from fedark.foundation.proxies import through
from fedark.links.flower import configuration
from fedark.links.flower.bundle import SOCKET_KEY
from fedark.links.flower.service import NodeServer
from fedark.operate import pinned
from fedark.operate.keeper import Keeper
from fedark.operate.node.desk import Desk
from fedark.operate.node.observed import ObservedNode
from fedark.operate.processes import Child, console_script, flower_environment, module

__all__ = ["Settings", "main"]

_LOOK = 0.5
_CALM, _LONGEST_PAUSE = 10.0, 5.0
_log = logging.getLogger("fedark.operate.node_daemon")  # also where it runs as __main__


@dataclass(frozen=True)
class Settings:
    """A daemon's configuration.

    Attributes:
        socket: where it serves.
        factory: "module:function" that makes the node from `settings`.
        settings: the factory's own.
        superlink: host:port, or "" for a daemon without a connection (the aggregator's).
        ca, key: the authority's certificate and the node's transport key.
        stock: use Flower's own SuperNode for the connection instead of ours: 8 to 10 s a stage, and
            a port on loopback.
        stock_port: that port.
        folder: of a node with an operator: its desk is served too.
        metrics: port on loopback for Prometheus; 0 for none.
        proxy: on the way to the SuperLink; "" for none.
    """

    socket: str
    factory: str
    settings: dict[str, Any] = field(default_factory=dict)
    superlink: str = ""
    ca: str = ""
    key: str = ""
    stock: bool = False
    stock_port: int = 0
    folder: str = ""
    metrics: int = 0
    proxy: str = ""


def _connection(settings: Settings, directory: Path) -> Callable[[], Child]:
    environment = flower_environment(directory / "flower") | through(settings.proxy)
    if settings.stock:
        commands = pinned.write_commands(directory / "bin", directory / "clientapp.log")
        path = os.pathsep.join(
            (str(commands), str(Path(sys.executable).parent), environment.get("PATH", ""))
        )
        command = console_script(
            "flower-supernode",
            *("--superlink", settings.superlink, "--root-certificates", settings.ca),
            *(
                "--auth-supernode-private-key",
                settings.key,
                "--node-config",
                f'{SOCKET_KEY}="{settings.socket}"',
            ),
            *("--host", "127.0.0.1", "--port", str(settings.stock_port)),
        )
        environment["PATH"] = path
    else:
        connection = configuration.Connection(
            settings.superlink, settings.ca, settings.key, settings.socket
        )
        file = configuration.write(directory / "supernode.json", connection)
        command = module("fedark.links.flower.supernode", str(file))
    return lambda: Child(
        "the connection", command, environment=environment, log=directory / "supernode.log"
    )


def main(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    logs.setup("node daemon")
    settings = configuration.read(path, Settings)
    asked = threading.Event()

    def stop_asked(number: int, _: FrameType | None) -> None:
        asked.set()

    signal.signal(signal.SIGTERM, stop_asked)
    signal.signal(signal.SIGINT, stop_asked)
    node = configuration.resolve(settings.factory)(settings.settings)
    logs.setup("node daemon", party=node.party)
    desk = Desk(Path(settings.folder)) if settings.folder else None
    metrics, exporter = Metrics(), None
    if desk is not None:
        node = ObservedNode(node, metrics)
        metrics.collect(
            "fedark_contracts", "Contracts by the operator's decision.", "decision", desk.decisions
        )
        if node.role == "customer":
            metrics.collect(
                "fedark_privacy_epsilon", "Of the privacy budget, at its delta.", "of", desk.budget
            )
    connection: Keeper | None = None
    try:
        server = NodeServer(
            node, Path(settings.socket), desk=desk, on_stop=asked.set if desk is not None else None
        )
        try:
            if settings.metrics:
                exporter = MetricsServer(metrics, settings.metrics)
            _log.info("%s (%s) serves %s", node.party, node.role, settings.socket)
            if settings.superlink:
                start = _connection(settings, path.parent)
                connection = Keeper(
                    "the connection", start, say=_log.warning, calm=_CALM, longest=_LONGEST_PAUSE
                )
                connection.look()
            while not asked.wait(_LOOK):
                if connection is not None:
                    connection.look()
        finally:
            server.close()
            if exporter is not None:
                exporter.close()
    finally:
        if connection is not None:
            connection.end(grace=2.0)
        node.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FedarkError as error:
        sys.exit(str(error))
    # A stage may still be at work in a thread; what it had to keep is on disk, and the node has
    # been closed.
    logging.shutdown()
    os._exit(0)
