"""The ClientApp: passes a stage's bytes to the node daemon's socket and its answer back. It holds
no secret and no logic.

Where the daemon's socket is comes from the node's own configuration ("fedark-socket"), never from a
message.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedark.foundation.errors import FedarkError, FederationError
from fedark.links.flower.adapter import error_reply
from fedark.links.flower.bundle import SOCKET_KEY
from fedark.links.flower.payload import pack, unpack
from fedark.links.flower.service import NodeClient

__all__ = ["app"]

app = ClientApp()


@functools.cache
def _node(socket: str) -> NodeClient:
    return NodeClient(Path(socket))


@app.query("stage")  # type: ignore[untyped-decorator]
def stage(message: Message, context: Context) -> Message:
    """One stage: what the node answers, or an error reply that says why it did not."""
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    try:
        socket = context.node_config.get(SOCKET_KEY)
        if not isinstance(socket, str):
            raise FederationError(f"The node's configuration has no {SOCKET_KEY}.")
        if left <= 0:
            raise FederationError("The message came after its deadline.")
        return Message(
            pack(_node(socket).handle(unpack(message.content), timeout=left)), reply_to=message
        )
    except FedarkError as error:
        return error_reply(f"{type(error).__name__}: {error.what}", message)
