"""A running node: `fedark node up`. One process that watches two things and holds no secret but the
transport key.

    daemon    the party's keys, its records, its enclave; serves a unix socket; its child talks to
              the host
    sync      asks the host for contracts and bundles every two seconds
              (`fedark.operate.node.hostsync`)

It makes outbound connections only. A daemon that dies is started again; a host that cannot be
reached is asked again later; a refusal (revoked, another version) is shown and tried again more
slowly. It ends on SIGTERM and SIGINT, and leaves nothing running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedark.foundation.errors import FedarkError, FederationError
from fedark.foundation.files import os_problem, private_directory
from fedark.foundation.logs import tell_error
from fedark.foundation.proxies import proxy_for
from fedark.links.flower import configuration
from fedark.operate import daemon
from fedark.operate.host.folder import host_of
from fedark.operate.node.folder import REQUEST, NodeFolder
from fedark.operate.node.hostclient import HostClient
from fedark.operate.node.hostsync import HostSync
from fedark.operate.pages import Pages
from fedark.operate.processes import child_environment, module
from fedark.operate.state import locked, socket_of
from fedark.operate.supervisor import LOOK, Supervised, Supervisor, told_to_stop

__all__ = ["NODE", "await_approval", "run_node"]

NODE = "fedark.operate.node.serve:make_node"
_ASK, _ASK_LATER = 2.0, 30.0
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
                    say(f"{node.config.name} has joined {node.admission.aggregator.name}")
                    return
                if not told:
                    say("the request is with the host and waits for a person there")
                    told = True
        except FederationError as error:
            say(error.what)
        stop.wait(_ASK)


def run_node(path: Path, say: Say, *, metrics: int = 0, factory: str = NODE) -> None:
    """Run a node until SIGTERM or SIGINT.

    Args:
        metrics: port on loopback for Prometheus; 0 for none.
        factory: what makes the daemon's `Served` from {"folder": the node's folder}; benchmarks
            and tests of the transport bring their own.

    Raises:
        InputError, ContractError: the folder is not in order.
        FederationError: another process runs this node.
    """
    node = NodeFolder(path)
    stop = told_to_stop()
    with locked(node.path):
        await_approval(node, say, stop)
        if not stop.is_set():
            logs = private_directory(node.path / "logs")
            customer = node.config.role == "customer"
            with (
                Pages(node.path / "runs", logs, say, own=customer) as pages,
                Supervisor(logs, say) as children,
            ):
                own = _start(node, children, metrics, factory)
                _watch(node, own, children, pages, say, stop)


def _watch(
    node: NodeFolder,
    own: Supervised,
    children: Supervisor,
    pages: Pages,
    say: Say,
    stop: threading.Event,
) -> None:
    sync = HostSync(node, socket_of(node.path), say)
    due, last = 0.0, ""
    while not stop.wait(LOOK):
        children.look()
        pages.look()
        if own.done:
            say("the node was asked to stop")
            return
        if time.monotonic() < due:
            continue
        pause, trouble = _ASK, ""
        try:
            sync.step()
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


def _start(node: NodeFolder, children: Supervisor, metrics: int, factory: str) -> Supervised:
    socket = socket_of(node.path)
    for directory in (socket.parent, node.path / "run"):
        private_directory(directory)
    settings = daemon.DaemonSettings(
        socket=str(socket),
        factory=factory,
        settings={"folder": str(node.path)},
        superlink=node.admission.address,
        ca=str(node.ca),
        key=str(node.path / "transport.key"),
        metrics=metrics,
        proxy=proxy_for(host_of(node.admission.address), node.config.proxy),
    )
    file = configuration.write(node.path / "run" / "daemon.json", settings)
    command = module(daemon.__name__, str(file))
    return children.keep("daemon", command, child_environment({}), may_end=True)
