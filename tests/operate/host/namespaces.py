"""Machines of one's own: a network namespace each, joined by a bridge in one more. Nothing of this
machine's network is touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

__all__ = ["Machine", "network", "obstacle"]

SUBNET = "10.77.0"
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """A network namespace with its address; `holder`: the process that keeps it; `port`: the
    bridge's holder, and its port there.
    """

    address: str
    holder: int
    port: tuple[int, str] = (0, "")

    @property
    def enter(self) -> tuple[str, ...]:
        """The command that starts another inside."""
        return ("nsenter", "-t", str(self.holder), "-n")

    def cut(self) -> None:
        """From now on every packet to and from it is lost, and nobody is told."""
        self._run(self.port[0], "ip", "link", "set", self.port[1], "nomaster")

    def mend(self) -> None:
        """Undo `cut`."""
        self._run(self.port[0], "ip", "link", "set", self.port[1], "master", "br0")

    def slow(self, rate: str) -> None:
        """What it sends leaves at `rate`, such as "1mbit", and no faster."""
        self._run(
            self.holder,
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            rate,
            "latency",
            "400ms",
            "burst",
            "16kb",
        )

    @staticmethod
    def _run(holder: int, *command: str) -> None:
        subprocess.run(["nsenter", "-t", str(holder), "-n", *command], check=True)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function inside: the namespace is a thread's own."""

        def inside() -> T:
            with open(f"/proc/{self.holder}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return function()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(inside).result()


def obstacle() -> str:
    """Why there can be no namespaces here, or "": for a test to skip with."""
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root, who may make network namespaces"
    probe = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no bridge in a network namespace: {probe.stderr.strip()}" if probe.returncode else ""


@contextmanager
def network(names: tuple[str, ...]) -> Iterator[Mapping[str, Machine]]:
    """A machine for each name."""
    holders: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in ("switch", *names):
            holders[name] = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        own = os.stat("/proc/self/ns/net").st_ino
        for holder in holders.values():
            deadline = time.monotonic() + 60
            while Path(f"/proc/{holder.pid}/ns/net").stat().st_ino == own:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        machines = {
            name: Machine(
                f"{SUBNET}.{number + 9}", holder.pid, (holders["switch"].pid, f"port{number}")
            )
            for number, (name, holder) in enumerate(holders.items())
        }

        def ip(where: str, *arguments: str) -> None:
            subprocess.run([*machines[where].enter, "ip", *arguments], check=True)

        ip("switch", "link", "add", "br0", "type", "bridge")
        ip("switch", "link", "set", "br0", "up")
        for name in names:
            port, peer = machines[name].port[1], str(machines[name].holder)
            ip("switch", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", peer)
            ip("switch", "link", "set", port, "master", "br0", "up")
            ip(name, "addr", "add", f"{machines[name].address}/24", "dev", "eth0")
            ip(name, "link", "set", "eth0", "up")
            ip(name, "link", "set", "lo", "up")
        yield {name: machines[name] for name in names}
    finally:
        for holder in holders.values():
            holder.kill()
            holder.wait()
