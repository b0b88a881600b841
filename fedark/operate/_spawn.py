"""Becomes the given command, but dies with its parent: python -I -S _spawn.py PARENT_PID COMMAND...

Run by path, with nothing but the standard library, between fork and exec: a function run there by a
process with threads could hang (POSIX fork, async-signal-safety). PR_SET_PDEATHSIG (prctl(2))
outlives exec; the parent may have died before it was set, so its pid is compared afterwards. The
file mode mask makes whatever the command writes private.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent` that started it ends; exit if
    it has already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent is gone")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.umask(0o077)
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
