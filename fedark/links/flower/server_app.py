"""The ServerApp: gives the coordinator a link to the parties and a client of the aggregator's
daemon, and nothing else.

Which coordinator, which daemon and which nodes comes from a file that the host's supervisor wrote
(its path is in the environment), never from the run: anybody who reaches the SuperLink's control
API can submit a run, so a run counts only if it carries the session that the file names.
"""

from __future__ import annotations

import hmac
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedark.foundation.errors import Refused
from fedark.foundation.logs import JsonFormatter
from fedark.links.flower import configuration
from fedark.links.flower.bundle import SESSION_KEY
from fedark.links.flower.link import FlowerLink
from fedark.links.flower.service import NodeClient

__all__ = ["CONFIG_VARIABLE", "Settings", "app", "forget", "running"]

CONFIG_VARIABLE = "FEDARK_SERVER_CONFIG"
_log = logging.getLogger("fedark")


@dataclass(frozen=True)
class Settings:
    """What the supervisor tells the ServerApp.

    Attributes:
        session: the run must carry it.
        coordinator: "module:function", called as `function(link, aggregator, settings)`.
        aggregator: socket of the aggregator's daemon.
        roster: party -> public key (PEM) of its node.
        settings: the coordinator's own.
    """

    session: str
    coordinator: str
    aggregator: str
    roster: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)


app = ServerApp()


def running(config: Path) -> int:
    """The process id of the ServerApp that read this configuration last; 0 if none has."""
    try:
        return int(config.with_suffix(".pid").read_text())
    except (OSError, ValueError):
        return 0


def forget(config: Path) -> None:
    """Before the first run: whatever ran in this directory before is no concern of ours."""
    config.with_suffix(".pid").unlink(missing_ok=True)


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the coordinator."""
    config = Path(os.environ[CONFIG_VARIABLE])
    settings = configuration.read(config, Settings)
    session = str(context.run_config.get(SESSION_KEY, ""))
    if not hmac.compare_digest(session.encode(), settings.session.encode()):
        raise Refused(
            "The run was not submitted by this host's supervisor.",
            safe="No message was sent to any node.",
        )
    # The SuperLink notices a killed ServerApp late; whoever started it looks at the process.
    configuration.write_private(config.with_suffix(".pid"), str(os.getpid()).encode())
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("serverapp"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    roster = {party: key.encode() for party, key in settings.roster.items()}
    with NodeClient(Path(settings.aggregator)) as aggregator:
        link = FlowerLink(grid, roster, progress=_log.info)
        configuration.resolve(settings.coordinator)(link, aggregator, settings.settings)
