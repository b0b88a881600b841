"""A malicious app bundle and host: for tests that no node runs what such a host sends."""

from __future__ import annotations

import hashlib
import io
import shlex
import sys
import zipfile
from pathlib import Path

_PROJECT = """\
[project]
name = "evil"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "evil"
[tool.flwr.app.components]
serverapp = "evil_code:server"
clientapp = "evil_code:client"
"""

_CODE = """\
import json
from pathlib import Path

Path({marker!r}).mkdir(exist_ok=True)
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()


@client.query("stage")
def stage(message, context):
    (Path({marker!r}) / "client-ran").write_text("")
    return Message(message.content, reply_to=message)


@server.main()
def main(grid, context):
    (Path({marker!r}) / "server-ran").write_text("")
    content = RecordDict({{"fedark": ConfigRecord({{"data": b"x"}})}})
    nodes = list(grid.get_node_ids())
    messages = [Message(content, node, "query.stage", ttl=40.0) for node in nodes]
    replies = grid.send_and_receive(messages, timeout=100)
    told = [(reply.has_error(), reply.error.code if reply.has_error() else 0) for reply in replies]
    (Path({marker!r}) / "replies.json").write_text(json.dumps([len(nodes), told]))
"""


def bundle(marker: Path) -> bytes:
    """A valid bundle with code; whatever of it runs leaves a file in `marker`."""
    files = {
        "pyproject.toml": _PROJECT.encode(),
        "evil_code.py": _CODE.format(marker=str(marker)).encode(),
    }
    lines = [
        f"{name},{hashlib.sha256(data).hexdigest()},{len(data) * 8}" for name, data in files.items()
    ]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**files, ".info/CONTENT": "\n".join(lines).encode()}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def stock_server_commands(directory: Path, superlink: Path, log: Path) -> Path:
    """What a malicious host has instead of `pinned.write_commands`: Flower's own ServerApp process,
    which runs any bundle.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "flwr-serverapp"
    code = (
        "import sys; from pathlib import Path; from fedark.links.flower import adapter;"
        " adapter.over_socket(Path(sys.argv.pop(1))); sys.argv[0] = 'flwr-serverapp';"
        " from flwr.superlink.cli import flwr_serverapp; flwr_serverapp()"
    )
    command = shlex.join([sys.executable, "-P", "-c", code, str(superlink)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@" >>{shlex.quote(str(log))} 2>&1\n')
    path.chmod(0o700)
    return directory
