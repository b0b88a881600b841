"""How much memory a process has had at most, by what the kernel counts (proc(5), VmHWM): resident,
in MiB.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

__all__ = ["peak_below_mib", "peak_mib", "processes_below"]


def peak_mib(pid: int | str = "self") -> float:
    """The peak of one process; 0 if it is gone."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return 0.0


def processes_below(pid: int) -> list[int]:
    """The processes that one has started, and those that they have, parents before children."""
    found, at = [pid], 0
    while at < len(found):
        with suppress(OSError):
            for task in Path(f"/proc/{found[at]}/task").iterdir():
                with suppress(OSError):
                    found += [int(child) for child in (task / "children").read_text().split()]
        at += 1
    return found[1:]


def peak_below_mib(pid: int) -> float:
    """The largest peak among a process and those below it: for an enclave, the enclave's own, below
    its monitor.
    """
    return max(peak_mib(one) for one in (pid, *processes_below(pid)))
