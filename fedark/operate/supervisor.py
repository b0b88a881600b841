"""Named child processes that are kept running: the one supervisor of a host, of a node, and of both
together on one machine (`fedark.simulation.machine`).

    first pause 0.5 s, doubled each time up to 30 s; a child that ran for ten seconds starts again
    at the first

There is no last attempt: an operator sees the state and the end of the log, and a supervisor above
(systemd) sees a live parent. Whoever wants to give up looks at `failures`.
Only a child that may end by itself (`may_end`) is done when it ends with code 0: it was asked to.
Nothing here waits, except for the end of a child that was told to end: `look` is called in the
owner's own loop, in the thread that shall own the children. `close` asks them to end in the reverse
order of their starts.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from fedark.foundation.closing import Closing
from fedark.foundation.errors import FederationError
from fedark.foundation.logs import tell_error
from fedark.operate.processes import Child, bound_log, stop

__all__ = ["Supervised", "Supervisor", "told_to_stop"]

LOOK = 0.5
"""Seconds between two looks of a host or node."""
_FIRST, _LONGEST, _CALM = 0.5, 30.0, 10.0
Say = Callable[[str], None]


def told_to_stop(*more: signal.Signals) -> threading.Event:
    """Set when this process is sent SIGTERM or SIGINT, or one of `more`."""
    stop_asked = threading.Event()

    def asked(number: int, _: FrameType | None) -> None:
        stop_asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, *more):
        if signal.getsignal(number) is not signal.SIG_IGN or number is not signal.SIGHUP:
            signal.signal(number, asked)  # but `nohup` shall hold
    return stop_asked


class Supervised:
    """One child.

    Args:
        name: what messages call it.
        start: starts it.
        say: told when it ended, with the end of its log, and when it is started again.
        may_end: whether code 0 is the child's own good end.
        longest: seconds of the longest pause.
        clock: monotonic seconds.

    Attributes:
        failures: ends in a row without a calm time between them.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Child],
        *,
        say: Say,
        may_end: bool = False,
        longest: float = _LONGEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.failures = 0
        self.done = False
        self.last_end = ""
        self._start, self._say, self._may_end, self._clock = start, say, may_end, clock
        self._longest = longest
        self._pause, self._due, self._since = _FIRST, 0.0, 0.0
        self.child: Child | None = None

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.exit_code is None

    @property
    def pid(self) -> int:
        """Of the living child; 0 if there is none."""
        return self.child.pid if self.child is not None and self.child.exit_code is None else 0

    def look(self) -> None:
        """Start it if it is not running and its pause is over."""
        now = self._clock()
        if self.child is not None:
            bound_log(self.child.log)
            try:
                self.child.require_alive()
                return
            except FederationError as error:
                self.done = self._may_end and self.child.exit_code == 0
                self.end(grace=0.5)  # what it started itself
                if self.done:
                    return
                self.last_end = error.what
                was_calm = now - self._since >= _CALM
                self.failures = 1 if was_calm else self.failures + 1
                self._pause = _FIRST if was_calm else min(self._longest, self._pause * 2)
                self._due = now + self._pause
                tell_error(
                    self._say, f"{error.what}\n{self.name} is started again in {self._pause:g} s"
                )
        if now >= self._due and not self.done:
            self.restarts += self._since > 0
            self._since = now
            self.child = self._start()

    def end(self, *, grace: float = 5.0) -> None:
        """End it, and all that it started."""
        child, self.child = self.child, None
        if child is not None:
            stop([child], grace=grace)


class Supervisor(Closing):
    """Children by name. Leaving its `with` block ends them all.

    Args:
        logs: folder for NAME.log of each.
        say, longest: see `Supervised`.
    """

    def __init__(self, logs: Path, say: Say, *, longest: float = _LONGEST) -> None:
        self._logs, self._say, self._longest = logs, say, longest
        self._kept: dict[str, Supervised] = {}

    def keep(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        may_end: bool = False,
    ) -> Supervised:
        """Start a child, and have it run from now on."""

        def start() -> Child:
            return Child(name, command, environment=environment, log=self._logs / f"{name}.log")

        kept = Supervised(name, start, say=self._say, may_end=may_end, longest=self._longest)
        self._kept[name] = kept
        kept.look()
        return kept

    def __getitem__(self, name: str) -> Supervised:
        return self._kept[name]

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @property
    def all(self) -> tuple[Supervised, ...]:
        """In the order of their starts."""
        return tuple(self._kept.values())

    def look(self) -> None:
        """Start again what has ended."""
        for kept in self.all:
            kept.look()

    def end(self, name: str) -> None:
        """End one for good, if there is one of that name."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            kept.end()

    def close(self, *, grace: float = 5.0) -> None:
        """End all: asked, the last first, and killed after `grace` seconds.

        Raises:
            FederationError: something is left even after SIGKILL.
        """
        children = [kept.child for kept in self.all if kept.child is not None]
        self._kept.clear()
        stop(children, grace=grace)
