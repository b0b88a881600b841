"""The report page of every run that ended at a party: made beside the run's other files, by a child
process, as soon as there is a dossier. The supervisors of hosts and nodes look for them.

    runs/ID/report.html

A customer's page has its own figures too, and stays where it is: nothing of it is sent anywhere.
Whatever becomes of a page, the run is over and its files are there.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from fedark.foundation.closing import Closing
from fedark.foundation.errors import FederationError
from fedark.foundation.logs import tell_error
from fedark.operate.processes import Child, child_environment, module, stop
from fedark.stages.dossier import DOSSIER, OWN

__all__ = ["PAGE", "Pages"]

PAGE = "report.html"
Say = Callable[[str], None]


class Pages(Closing):
    """The pages of one party.

    Args:
        runs: the folder of its runs.
        logs: where the child's log goes.
        say: told where a page is, or why there is none.
        own: the party is a customer, whose pages are made of its own dossiers.
    """

    def __init__(self, runs: Path, logs: Path, say: Say, *, own: bool = False) -> None:
        self._runs, self._log, self._say = runs, logs / "page.log", say
        self._source = OWN if own else DOSSIER
        self._tried: set[Path] = set()
        self._child: tuple[Child, Path] | None = None

    def look(self) -> None:
        """Tell of a page that is done, and begin the next; each is tried once."""
        if self._child is not None:
            self._reap(*self._child)
            return
        for source in sorted(self._runs.glob(f"*/{self._source}")):
            page = source.with_name(PAGE)
            if page in self._tried or page.exists():
                continue
            if not source.with_name("report.json").exists():  # it is written after the dossier
                continue
            self._tried.add(page)
            command = module("fedark.report.writing", str(source), str(page))
            self._child = (
                Child("page", command, environment=child_environment({}), log=self._log),
                page,
            )
            return

    def _reap(self, child: Child, page: Path) -> None:
        if child.exit_code is None:
            return
        self._child = None
        if child.exit_code == 0:
            self._say(f"the report, as a page: {page}")
            self._say(
                f"to check the run: fedark verify {shlex.quote(str(page.with_name(DOSSIER)))}"
            )
            return
        try:
            child.require_alive()
        except FederationError as error:
            tell_error(self._say, f"no report page was written: {error.what}")

    def close(self) -> None:
        """End a page that is being made."""
        if self._child is not None:
            stop([self._child[0]], grace=1.0)
            self._child = None
