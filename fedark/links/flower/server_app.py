"""The ServerApp: gives the coordinator a link to the parties and a client of the aggregator's
daemon, and nothing else.

Which coordinator, which daemon and which nodes comes from a file that the host's supervisor wrote
(its path is in the environment), never from the run. The file names the one run that counts by the
id that the SuperLink gave to it: nothing secret is in a run's configuration, and a run that
somebody else has submitted does nothing.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedark.foundation.errors import Refused
from fedark.foundation.logs import JsonFormatter
from fedark.links.flower import configuration
from fedark.links.flower.link import FlowerLink
from fedark.links.flower.service import NodeClient

__all__ = ["CONFIG_VARIABLE", "AppSettings", "app", "forget", "running"]

CONFIG_VARIABLE = "FEDARK_SERVER_CONFIG"
_UNNAMED_SECONDS, _PAUSE = 20.0, 0.05
_log = logging.getLogger("fedark")


@dataclass(frozen=True)
class AppSettings:
    """What the supervisor tells the ServerApp.

    Attributes:
        coordinator: "module:function", called as `function(link, aggregator, settings)`.
        aggregator: socket of the aggregator's daemon.
        roster: party -> public key (PEM) of its node.
        settings: the coordinator's own.
        run: the id of the run that this is for; 0 until the SuperLink has told it.
    """

    coordinator: str
    aggregator: str
    roster: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    run: int = 0


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
    settings = _settings_for(context.run_id, config)
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


def _settings_for(run_id: int, config: Path) -> AppSettings:
    """The supervisor's settings, once they name this run; the supervisor writes its id a moment
    after it has submitted it.

    Raises:
        Refused: they name another run, or none.
    """
    given_up = time.monotonic() + _UNNAMED_SECONDS
    while True:
        settings = configuration.read(config, AppSettings)
        if settings.run == run_id:
            return settings
        if settings.run or time.monotonic() > given_up:
            raise Refused(
                "The run was not submitted by this host's supervisor.",
                safe="No message was sent to any node.",
            )
        time.sleep(_PAUSE)
