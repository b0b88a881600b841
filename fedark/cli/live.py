"""One live view of a run in a terminal; plain lines elsewhere; JSON lines for programs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedark.foundation.errors import printable
from fedark.foundation.logs import teller
from fedark.operate.daemon import PROGRESS
from fedark.operate.progress import Progress, Tail

__all__ = ["View", "watching"]

_ROWS, _WIDEST = 12, 300


class View:
    """Is told lines, as a `say`; use it as a context manager.

    On a terminal it shows stage, round, parties, losses and the time that is left, in one place,
    and above it only the lines that people should read. Elsewhere it prints every line.

    Args:
        console: where it prints.
        quiet: print nothing.
        as_json: print JSON lines instead.
        tail: a file of lines of one party that other processes write.
        plain: what takes lines where there is no terminal; by default they are printed with the
            seconds since now.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        as_json: bool = False,
        tail: Tail | None = None,
        plain: Callable[[str], None] | None = None,
    ) -> None:
        self._console, self._quiet, self._json, self._tail = console, quiet, as_json, tail
        self._plain = plain or self._line
        self._lock = threading.RLock()
        self.progress = Progress()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        plain = self._quiet or self._json or self._plain != self._line
        if self._console.is_terminal and not plain:
            self._live = Live(
                console=self._console, get_renderable=self._picture, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the view down; what was drawn last stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, text: str) -> None:
        with self._lock:
            news = self.progress.read(text)
        if self._quiet:
            return
        if self._json:
            typer.echo(json.dumps(self.progress.facts(printable(text, 4000))))
        elif self._live is None:
            self._plain(text)
        elif news:
            self._line(text)

    def error(self, text: str) -> None:
        """Something has failed that a person should look at."""
        if self._live is None and self._plain != self._line:
            getattr(self._plain, "error", self._plain)(text)
        elif self._live is not None:
            self._line(text)
        else:
            self(text)

    def _line(self, text: str) -> None:
        # Never as markup: the text may be another party's.
        seconds = time.monotonic() - self.progress.began
        self._console.print(
            Text.assemble((f"{seconds:6.1f} s", "dim"), f"  {printable(text, 4000)}"),
            soft_wrap=True,
        )

    def _picture(self) -> RenderableType:
        with self._lock:
            for line in self._tail.lines() if self._tail is not None else ():
                if self.progress.read(f"{self._tail.party}: {line}"):  # type: ignore[union-attr]
                    self._line(line)
            return self.drawn()

    def drawn(self) -> RenderableType:
        """The view, as it is now."""
        now = self.progress
        head = [now.stage or "waiting"]
        if now.rounds:
            head.append(f"round {now.round} of {now.rounds}")
        if now.parties:
            head.append(f"{now.parties} parties")
        head.append(f"{time.monotonic() - now.began:.0f} s")
        if (left := now.left) is not None:
            head.append(f"about {_lasting(left)} left")
        table = Table.grid(padding=(0, 2))
        for party, doing in sorted(now.doing.items())[:_ROWS]:
            loss = f"loss {now.losses[party]:.3f}" if party in now.losses else ""
            said = Text(printable(doing, _WIDEST), overflow="ellipsis", no_wrap=True)
            table.add_row(Text(party, style="bold"), said, Text(loss))
        if len(now.doing) > _ROWS:
            table.add_row("", Text(f"and {len(now.doing) - _ROWS} more", style="dim"), "")
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(1, now.rounds), completed=now.through, width=40))
        return Group(Text(" · ".join(head), style="bold"), bar, table)


@contextmanager
def watching(source: str, party: str, folder: Path, *, as_json: bool) -> Iterator[View]:
    """The view of a party that runs until it is told to stop, on standard error; where that is no
    terminal, JSON lines, as with `as_json`.

    Args:
        folder: the party's.
    """
    console = Console(stderr=True, highlight=False)
    plain = None if console.is_terminal and not as_json else teller(source, plain=False)
    tail = Tail(party, folder / PROGRESS)
    with View(console, quiet=False, tail=tail, plain=plain) as view:
        yield view


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
