"""The process that stands between host and enclave: it waits for either to end, and takes the other
along.

A process namespace needs a fork, and a parent-death signal goes off when the *thread* that started
a child ends, which in a host with worker threads is any moment. So the host's death is seen through
a process descriptor, and the enclave's parent is this single-threaded process, whose death the
kernel turns into the enclave's. It holds no channel and no secret.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import NoReturn

from fedark.sandbox.syscalls import (
    CAP_KILL,
    PR_SET_NAME,
    give_up_privileges,
    libc,
    set_capabilities,
    syscall,
)

__all__ = ["MONITOR", "TRACED", "pin_host", "traced", "watch"]

MONITOR = "fedark-monitor"
"""Name of the process in /proc."""

TRACED = 76
"""Exit code: another process traced the enclave before it was confined, so it was not let run."""


def pin_host(pid: int) -> int:
    """A descriptor of the host process `pid`, which must be this process's parent; ends this
    process if it is gone.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(0)
    if os.getppid() != pid:
        os._exit(0)
    return descriptor


def traced(proc: int, pid: int) -> bool:
    """Whether another process traces `pid`. `proc` is a descriptor of the host's /proc."""
    with open(
        os.open(f"{pid}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc),
        encoding="ascii",
        errors="replace",
    ) as file:
        return not any(line.split() == ["TracerPid:", "0"] for line in file)


def watch(host: int, enclave: int) -> NoReturn:
    """Wait for the end of the enclave (process id `enclave`) or of the host (descriptor `host`),
    and end with it.

    The exit code is the enclave's, or 128 and the number of the signal that killed it.
    """
    child = os.pidfd_open(enclave)
    libc.prctl(PR_SET_NAME, MONITOR.encode(), 0, 0, 0)
    give_up_privileges()
    # The parent-death signal is sent with this process's rights: without CAP_KILL, a root monitor
    # could not kill another uid.
    set_capabilities(*((CAP_KILL,) if os.geteuid() == 0 else ()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _kill(child))
    waiting = select.poll()
    waiting.register(host, select.POLLIN)
    waiting.register(child, select.POLLIN)
    ended: set[int] = set()
    while child not in ended:
        ended = {descriptor for descriptor, _ in waiting.poll()}
        if host in ended:
            waiting.unregister(host)
            _kill(child)
    _, status = os.waitpid(enclave, 0)
    sys.stdout.flush()
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _kill(child: int) -> None:
    try:
        syscall("pidfd_send_signal", child, int(signal.SIGKILL), None, 0)
    except ProcessLookupError:
        return
