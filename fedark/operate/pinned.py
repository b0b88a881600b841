"""Flower's processes at a host, as fedark runs them: `python -m fedark.operate.pinned SOCKET
superlink|superexec|serverapp ...`.

They are Flower's own, except that they meet on a unix socket of the host's account instead of a
TCP port of the whole machine, and that a bundle which is not the pinned one is refused before it is
unpacked. The executor finds the ServerApp's task process as `flwr-serverapp`, in a directory that
stands first in its PATH (`write_commands`).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from fedark.operate import _spawn
from fedark.operate.processes import module

__all__ = ["command", "write_commands"]


def command(socket: Path, role: str, *arguments: str) -> list[str]:
    """The command of one of them."""
    return module("fedark.operate.pinned", str(socket), role, *arguments)


def write_commands(directory: Path, socket: Path, log: Path) -> Path:
    """Write `flwr-serverapp` into `directory`, its output appended to `log` (the executor would
    drop it); returns the directory.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory / "flwr-serverapp"
    line = shlex.join(command(socket, "serverapp"))
    path.write_text(f'#!/bin/sh\nexec {line} "$@" >>{shlex.quote(str(log))} 2>&1\n')
    path.chmod(0o700)
    return directory


def _main(where: str, role: str, *arguments: str) -> None:
    from fedark.links.flower import adapter

    path = Path(where)
    if role == "superlink":
        adapter.run_superlink(path, *arguments)
    elif role == "superexec":
        adapter.run_executor(path, *arguments)
    else:
        _spawn.die_with(os.getppid())
        sys.argv = ["flwr-serverapp", *arguments]
        adapter.run_server_task(path)


if __name__ == "__main__":
    _main(*sys.argv[1:])
