"""What the lines of a run's progress say: which stage and round it is at, and how fast it goes.

The parties tell what they do in lines for people (`fedark.operate.daemon.PROGRESS`). Here these are
read again, for whoever shows all parties at once or hands the facts to a program. A line that is
not understood stays a line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Progress", "Tail"]

_PARTY = re.compile(r"([a-z0-9][a-z0-9-]{0,47}): (.*)", re.S)
_STAGES = "enrol|attest|release|load|round|measure|evaluate|endorse|unmask|deliver|abort"
_STAGE = re.compile(rf"({_STAGES})(?: (\d+)(?:/(\d+))?)?: (?:waiting for )?(\d+) (?:part|node)")
_ROUND = re.compile(r"round (\d+) of (\d+)$")
_LOSS = re.compile(r"\bloss (\d+\.\d+)")
_NEWS = re.compile(
    r"refused|passed over|is back|warning|abort|left out|could not|no personal|too few|poisoned"
    r"|is again|is started again|are in /|is over|the report, as a page|to check the run|has joined"
    r"|^after round|listens on|^job |Differential|epsilon"
)


@dataclass
class Progress:
    """Where a run is, as its lines have told so far.

    Attributes:
        stage: the coordinator's last one.
        round, rounds: the round at work, and how many there may be; 0 before the first.
        parties: how many were asked.
        losses: party -> the last loss that it told.
        doing: party -> its last line.
    """

    clock: Callable[[], float] = time.monotonic
    stage: str = ""
    round: int = 0
    rounds: int = 0
    parties: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    doing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self._rounds_began = 0.0

    def read(self, text: str) -> bool:
        """Take a line in, with or without its party before it; returns whether people should see
        the line itself.
        """
        party, said = "", text
        if not _STAGE.match(text) and (found := _PARTY.fullmatch(text)):
            party, said = found.groups()
        if party:
            self.doing.pop("", None)  # what was done before there were parties
        self.doing[party] = said
        if stage := _STAGE.match(said):
            self.stage, self.parties = stage[1], int(stage[4])
            if stage[1] == "round":
                self._at(int(stage[2]), int(stage[3]))
        elif of := _ROUND.match(said):
            self.stage = "round"
            self._at(int(of[1]), int(of[2]))
        if loss := _LOSS.search(said):
            self.losses[party] = float(loss[1])
        return bool(_NEWS.search(said))

    def _at(self, number: int, rounds: int) -> None:
        if not self.round:
            self._rounds_began = self.clock()
        self.round, self.rounds = max(number, self.round), rounds

    @property
    def left(self) -> float | None:
        """Seconds that the rounds still take at the pace of those before; None before the first is
        through.
        """
        done = self.through
        if done < 1:
            return None
        return (self.clock() - self._rounds_began) / done * (self.rounds - done)

    @property
    def through(self) -> int:
        """Rounds that are summed."""
        return max(0, self.round - (self.stage in ("round", "endorse", "unmask")))

    def facts(self, text: str) -> dict[str, Any]:
        """The line and where the run is, for a program."""
        own = {name: getattr(self, name) for name in ("stage", "round", "rounds", "parties")}
        left = self.left
        seconds = {"seconds": round(self.clock() - self.began, 1)}
        return {**seconds, **own, "left": None if left is None else round(left, 1), "text": text}


class Tail:
    """New lines of a party's growing file, without their time stamps."""

    def __init__(self, party: str, path: Path) -> None:
        self.party, self._path = party, path
        self._at = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """Whole lines since the last call."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._at += len(data)
        return [line.partition(" ")[2] for line in data.decode("utf-8", "replace").splitlines()]
