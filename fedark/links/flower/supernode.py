"""A node's connection to the SuperLink: pulls its messages, has them answered by the ClientApp,
sends the replies.

The same Fleet API and node authentication as Flower's own SuperNode, outbound only, with three
differences: no bundle is ever unpacked (the pinned one is recognised by its hash, any other refused
in the reply), the ClientApp stays loaded between messages, and the pause between looks, 3 s there,
is 0.1 s for some seconds after a message, for the next stage is near, and then grows to 0.5 s. A
stage costs tenths of a second so, not eight. It listens on no port. It holds the node's transport
key and nothing else of value.

    python -m fedark.links.flower.supernode CONFIG.json
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flwr.app import Context, Message, RecordDict

from fedark.foundation import logs
from fedark.foundation.errors import FederationError, InputError, Refused
from fedark.links.flower import configuration
from fedark.links.flower.adapter import Fleet, Incoming, connect, error_reply
from fedark.links.flower.bundle import SOCKET_KEY
from fedark.links.flower.client_app import app
from fedark.links.flower.provision import load_node_key

__all__ = ["main", "serve"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 0.5
_EAGER_LOOKS = 40
_log = logging.getLogger("fedark.links.flower.supernode")  # also where it runs as __main__


def serve(fleet: Fleet, socket: str, sleep: Callable[[float], None] = time.sleep) -> NoReturn:
    """Answer messages until the process is told to stop."""
    pinned: set[int] = set()
    pause, looks = _FIRST_PAUSE, 0
    while True:
        try:
            incoming = fleet.pull()
        except Exception as error:  # whatever the SuperLink sends, the node stays
            _log.warning("messages cannot be fetched (%s)", type(error).__name__)
            incoming, pause = None, _LONGEST_PAUSE
        if incoming is None:
            sleep(pause)
            looks += 1
            if looks > _EAGER_LOOKS:
                pause = min(pause * 1.5, _LONGEST_PAUSE)
            continue
        pause, looks = _FIRST_PAUSE, 0
        try:
            started = time.monotonic()
            reply = _answer(fleet, incoming, socket, pinned)
            fleet.push(reply, time.monotonic() - started)
        except FederationError as error:
            _log.warning("%s", error.what)


def _answer(fleet: Fleet, incoming: Incoming, socket: str, pinned: set[int]) -> Message:
    run_id = incoming.run_id
    if run_id not in pinned:
        try:
            fleet.require_pinned_bundle(run_id)
        except Refused as error:
            _log.error("%s", error.what)
            return error_reply(f"{error.what} {error.safe}", incoming.message, refused=True)
        pinned.add(run_id)
    try:
        message = fleet.content(incoming)
    except FederationError as error:
        _log.warning("%s", error.what)
        return error_reply(error.what, incoming.message, lost=True)
    context = Context(run_id, fleet.node_id, {SOCKET_KEY: socket}, RecordDict(), {})
    try:
        return app(message, context)
    except Exception as error:
        _log.exception("the ClientApp failed")
        return error_reply(type(error).__name__, incoming.message)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(0)


def main(path: Path) -> None:
    """Run until SIGTERM or SIGINT."""
    logs.setup("connection")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    settings = configuration.read(path, configuration.Connection)
    former = path.with_suffix(".node")
    with connect(
        settings.superlink, Path(settings.ca), load_node_key(Path(settings.key)), former
    ) as fleet:
        _log.info("connected as node %d", fleet.node_id)
        serve(fleet, settings.socket)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (FederationError, InputError) as error:
        sys.exit(str(error))
