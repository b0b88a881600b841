"""What the kernel shows of a confined process from outside: so that evidence says what is
installed, not what should have been.

All of it is in files of /proc that any user may read, for the enclave is not dumpable and its
namespaces' links are not shown to an ordinary host. What no file shows: the landlock domain, and
the text of the filters. The two are counted, from Linux 5.9 on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["missing"]

_NAMESPACES = ("mnt", "net", "pid", "ipc", "uts", "cgroup")
_FILTERS = 2
"""The filter for loading and the final one."""


def missing(monitor: int, mode: str) -> str:
    """What of its confinement the enclave below the process `monitor` lacks; "" if nothing.

    Args:
        mode: "namespaces" or "landlock".
    """
    try:
        enclave = _only_child(monitor)
        inherited = _filters(_status(Path(f"/proc/{monitor}")))
        found = [
            *_of_threads(enclave, inherited),
            *(_of_namespaces(enclave) if mode == "namespaces" else ()),
        ]
    except (OSError, ValueError, KeyError, IndexError) as error:
        return f"what the kernel says of it ({type(error).__name__})"
    return ", ".join(dict.fromkeys(found))


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return int(child)


def _status(process: Path) -> dict[str, str]:
    text = (process / "status").read_text(encoding="utf-8", errors="replace")
    return {
        name: value.strip()
        for name, _, value in (line.partition(":") for line in text.splitlines())
    }


def _filters(status: dict[str, str]) -> int:
    return int(status.get("Seccomp_filters", "0"))


def _of_threads(pid: int, inherited: int) -> Iterator[str]:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            status = _status(thread)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended just now
        counted = "Seccomp_filters" in status
        if status["Seccomp"] != "2" or (counted and _filters(status) < inherited + _FILTERS):
            yield "its system call filter"
        if status["NoNewPrivs"] != "1":
            yield "the ban on new privileges"
        if any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
            yield "the loss of every capability"


def _of_namespaces(pid: int) -> Iterator[str]:
    enclave, here = Path(f"/proc/{pid}"), Path("/proc/self")
    if _status(enclave)["NSpid"].split()[1:] != ["1"]:
        yield "a process namespace"
    if _mounts(enclave) & _mounts(here):
        yield "a root of its own"
    if _has_carried(enclave / "net" / "dev"):
        yield "a network namespace"
    for name in _NAMESPACES:
        try:
            shared = os.readlink(enclave / "ns" / name) == os.readlink(here / "ns" / name)
        except PermissionError:
            return  # an ordinary host
        if shared:
            yield f"a namespace {name!r}"


def _mounts(process: Path) -> set[str]:
    """Mount ids, which no two mount namespaces share."""
    lines = (process / "mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.split(None, 1)[0] for line in lines}


def _has_carried(devices: Path) -> bool:
    """Whether a byte ever went through an interface; all of a new namespace are down."""
    lines = devices.read_text(encoding="ascii").splitlines()[2:]
    return any(int(count) for line in lines for count in line.partition(":")[2].split())
