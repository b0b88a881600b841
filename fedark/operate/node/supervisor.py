"""A running node: `fedark node up`. One process that watches two things and holds no secret but the
transport key.

    node daemon   the party's keys, its records, its enclave; serves a unix socket; its child talks to the host
    liaison       asks the host for contracts and bundles every two seconds (`fedark.operate.node.liaison`)

It makes outbound connections only. A daemon that dies is started again; a host that cannot be
reached is asked again later; a refusal (revoked, another version) is shown and tried again more
slowly. It ends on SIGTERM and SIGINT, and leaves nothing running.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from fedark.foundation.errors import FedarkError, FederationError, InputError
from fedark.foundation.files import os_problem, private_directory
from fedark.foundation.logs import tell_error
from fedark.foundation.proxies import proxy_for
from fedark.links.flower import configuration
from fedark.operate import daemons, node_daemon
from fedark.operate.host.folder import host_of
from fedark.operate.keeper import Keeper
from fedark.operate.node.folder import REQUEST, NodeFolder, socket_of
from fedark.operate.node.hostclient import HostClient
from fedark.operate.node.liaison import Liaison
from fedark.operate.processes import Child, child_environment, module
from fedark.operate.state import locked

__all__ = ["await_approval", "run_node", "socket_of"]

_LOOK, _ASK, _ASK_LATER = 0.5, 2.0, 30.0
Say = Callable[[str], None]


def await_approval(node: NodeFolder, say: Say, stop: threading.Event) -> None:
    """File the join request, if the host has it not yet, and wait until a person there has approved
    it; then install the bundle.

    Raises:
        Refused, InputError: the host does not take the request, or has revoked the node.
    """
    filed = told = False
    while not node.joined and not stop.is_set():
        try:
            with HostClient(node) as host:
                if not filed:
                    host.join((node.path / REQUEST).read_bytes())
                    filed = True
                data = host.bundle()
                if data is not None:
                    node.install(data)
                    say(f"{node.config.name} has joined {node.bundle.aggregator.name}")
                    return
                if not told:
                    say("the request is with the host and waits for a person there")
                    told = True
        except FederationError as error:
            say(error.what)
        stop.wait(_ASK)


def run_node(path: Path, say: Say, *, metrics: int = 0) -> None:
    """Run a node until SIGTERM or SIGINT.

    Args:
        metrics: port on loopback for Prometheus; 0 for none.

    Raises:
        InputError, ContractError: the folder is not in order.
        FederationError: another process runs this node.
    """
    node = NodeFolder(path)
    stop = threading.Event()

    def asked(number: int, _: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    with locked(node.path):
        await_approval(node, say, stop)
        if stop.is_set():
            return
        keeper = Keeper("the node daemon", lambda: _start(node, metrics), say=say, may_end=True)
        try:
            _watch(node, keeper, say, stop)
        finally:
            keeper.end()


def _watch(node: NodeFolder, keeper: Keeper, say: Say, stop: threading.Event) -> None:
    liaison = Liaison(node, socket_of(node.path), say)
    due, last = 0.0, ""
    keeper.look()
    while not stop.wait(_LOOK):
        keeper.look()
        if keeper.done:
            say("the node was asked to stop")
            return
        if time.monotonic() < due:
            continue
        pause, trouble = _ASK, ""
        try:
            liaison.step()
        except FederationError as error:
            trouble = error.what
        except FedarkError as error:
            pause, trouble = _ASK_LATER, error.what
        except OSError as error:
            pause, trouble = _ASK_LATER, os_problem(error)
        if trouble != last:
            if trouble and pause == _ASK_LATER:
                tell_error(say, trouble)
            else:
                say(trouble or f"this is over: {last}")
            last = trouble
        due = time.monotonic() + pause


def _start(node: NodeFolder, metrics: int) -> Child:
    node = NodeFolder(node.path)
    if not node.joined:
        raise InputError(f"{node.config.name} has not joined yet.")
    socket = socket_of(node.path)
    for directory in (socket.parent, node.path / "run", node.path / "logs"):
        private_directory(directory)
    settings = node_daemon.Settings(
        socket=str(socket),
        factory=daemons.NODE,
        settings={"folder": str(node.path)},
        superlink=node.bundle.address,
        ca=str(node.ca),
        key=str(node.path / "transport.key"),
        folder=str(node.path),
        metrics=metrics,
        proxy=proxy_for(host_of(node.bundle.address), node.config.proxy),
    )
    file = configuration.write(node.path / "run" / "daemon.json", settings)
    command = module(node_daemon.__name__, str(file))
    return Child(
        "the node daemon",
        command,
        environment=child_environment({}),
        log=node.path / "logs" / "daemon.log",
    )
