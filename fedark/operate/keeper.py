"""Keeps a child process running: one that ends is started again, after a pause that grows while it
keeps ending.

    first pause 0.5 s, doubled each time up to 30 s; a child that ran for a minute starts again at
    the first

There is no last attempt: an operator sees the state and the end of the log, and a supervisor above
(systemd) sees a live parent. Whoever wants to give up looks at `failures`.
Only a child that may end by itself (`may_end`) is done when it ends with code 0: it was asked to.
Nothing here waits: `look` is called in the supervisor's own loop, in the thread that shall own the
children.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fedark.foundation.errors import FederationError
from fedark.foundation.logs import tell_error
from fedark.operate.processes import Child, bound_log, stop

__all__ = ["Keeper"]

_FIRST, _LONGEST, _CALM = 0.5, 30.0, 60.0


class Keeper:
    """One child.

    Args:
        name: what messages call it.
        start: starts it.
        say: told when it ended, with the end of its log, and when it is started again.
        may_end: whether code 0 is the child's own good end.
        calm: seconds after which a child counts as well.
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
        say: Callable[[str], None],
        may_end: bool = False,
        calm: float = _CALM,
        longest: float = _LONGEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.failures = 0
        self.done = False
        self.last_end = ""
        self._start, self._say, self._may_end, self._clock = start, say, may_end, clock
        self._calm, self._longest = calm, longest
        self._pause, self._due, self._since = _FIRST, 0.0, 0.0
        self.child: Child | None = None

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.exit_code is None

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
                was_calm = now - self._since >= self._calm
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
