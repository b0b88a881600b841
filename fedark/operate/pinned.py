"""The task processes that Flower's executor starts: `python -m fedark.operate.pinned
serverapp|clientapp ...`.

The executor finds them as `flwr-serverapp` and `flwr-clientapp`, in a directory that stands first
in its PATH (`write_commands`). They are Flower's own, except that a bundle which is not the pinned
one is refused before it is unpacked.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from fedark.operate import _spawn

__all__ = ["write_commands"]


def write_commands(directory: Path, log: Path) -> Path:
    """Write the two commands into `directory`, their output appended to `log` (the executor would
    drop it); returns it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for kind in ("serverapp", "clientapp"):
        path = directory / f"flwr-{kind}"
        command = shlex.join([sys.executable, "-P", "-m", __name__, kind])
        path.write_text(f'#!/bin/sh\nexec {command} "$@" >>{shlex.quote(str(log))} 2>&1\n')
        path.chmod(0o700)
    return directory


if __name__ == "__main__":
    _spawn.die_with(os.getppid())
    from fedark.links.flower import adapter

    role = sys.argv.pop(1)
    sys.argv[0] = f"flwr-{role}"
    if role == "serverapp":
        adapter.run_server_task()
    else:
        from fedark.links.flower.client_app import app

        adapter.run_client_task(app)
