"""Machines of one's own: a network namespace each, joined by a bridge in one more. Nothing of this machine's network is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SUBNET", "network", "obstacle"]

SUBNET = "10.77.0"


def obstacle() -> str:
    """Why there can be no namespaces here, or "": for a test to skip with."""
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root, who may make network namespaces"
    probe = subprocess.run(
        ["unshare", "-n", "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True, check=False
    )
    return f"no bridge in a network namespace: {probe.stderr.strip()}" if probe.returncode else ""


@contextmanager
def network(names: tuple[str, ...]) -> Iterator[Mapping[str, tuple[tuple[str, ...], str]]]:
    """name -> (command that enters its namespace, its address)."""
    holders: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in ("switch", *names):
            holders[name] = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        own = os.stat("/proc/self/ns/net").st_ino
        for holder in holders.values():
            deadline = time.monotonic() + 10
            while Path(f"/proc/{holder.pid}/ns/net").stat().st_ino == own:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        enter = {name: ("nsenter", "-t", str(holder.pid), "-n") for name, holder in holders.items()}

        def ip(where: str, *arguments: str) -> None:
            subprocess.run([*enter[where], "ip", *arguments], check=True)

        ip("switch", "link", "add", "br0", "type", "bridge")
        ip("switch", "link", "set", "br0", "up")
        found = {}
        for number, name in enumerate(names, start=10):
            port = f"port{number}"
            ip("switch", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holders[name].pid))
            ip("switch", "link", "set", port, "master", "br0", "up")
            ip(name, "addr", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
            ip(name, "link", "set", "eth0", "up")
            ip(name, "link", "set", "lo", "up")
            found[name] = (enter[name], f"{SUBNET}.{number}")
        yield found
    finally:
        for holder in holders.values():
            holder.kill()
            holder.wait()
