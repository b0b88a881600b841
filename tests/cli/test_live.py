"""One live view in a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fedark.cli.live import View
from fedark.operate.daemon import PROGRESS
from fedark.operate.progress import Progress, Tail

LINES = (
    "sealing tiny",
    "pool: enrol: waiting for 4 nodes",
    "north: signed the contract of job small; 30 records stay here",
    "pool: round 1/3: 3 parties",
    "north: round 1 of 3",
    "north: tiny: round 1: 4/10, loss 0.731",
    "pool: after round 1: tiny: 75.0 % of 12 records of the acceptance set right, loss 0.612",
    "pool: round 2/3: 3 parties",
    "east: tiny: round 2: 10/10, loss 0.500",
)


def test_lines_say_stage_round_parties_losses_and_what_is_left() -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for line in LINES:
        now[0] += 10.0
        progress.read(line)
    facts = progress.facts("x")
    assert (facts["stage"], facts["round"], facts["rounds"], facts["parties"]) == ("round", 2, 3, 3)
    assert progress.losses["north"] == 0.731
    assert progress.losses["east"] == 0.5
    assert facts["left"] == pytest.approx(100.0)  # fifty seconds a round, and two are left


def test_the_last_round_leaves_nothing_once_it_is_through() -> None:
    progress = Progress()
    for line in ("round 1/2: 3 parties", "round 2/2: 3 parties", "evaluate: 3 parties"):
        progress.read(line)
    assert progress.stage == "evaluate"
    assert progress.left == 0.0


def test_elsewhere_every_line_is_printed_as_it_is() -> None:
    out = io.StringIO()
    with View(Console(file=out, width=200)) as view:
        for line in LINES:
            view(line)
        view("north: [red]no markup[/red] \x1b[2J")
    printed = out.getvalue().splitlines()
    assert [line.split(" s  ", 1)[1] for line in printed[:-1]] == list(LINES)
    assert "[red]no markup[/red]" in printed[-1]
    assert "\x1b" not in out.getvalue()


def test_for_programs_every_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    with View(Console(), as_json=True) as view:
        for line in LINES:
            view(line)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in told] == list(LINES)
    assert told[-1]["round"] == 2


def _in_a_terminal(code: str) -> str:
    """What a terminal gets of a process."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait() == 0, shown
    os.close(ours)
    assert b"\x1b[2J" not in shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_a_terminal_shows_one_view_and_only_the_lines_that_people_should_read() -> None:
    code = f"""
from rich.console import Console
from fedark.cli.live import View
with View(Console()) as view:
    for line in {LINES!r}:
        view(line)
    view("pool: south is passed over in stage round: gone \\x1b[2J")
    view._live.refresh()
"""
    shown = _in_a_terminal(code)
    assert "round 2 of 3" in shown
    assert "3 parties" in shown
    assert "loss 0.731" in shown
    above = [line for line in shown.splitlines() if " s  " in line]
    assert any("passed over" in line for line in above)
    assert any("75.0 % of 12 records" in line for line in above)
    assert not any("signed the contract" in line for line in above)


def test_a_party_that_runs_shows_what_its_processes_write(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from fedark.cli.live import watching
folder = Path({str(tmp_path)!r})
with watching("node", "north", folder, as_json=False) as view:
    view("the node runs")
    with open(folder / {PROGRESS!r}, "a") as file:
        file.write("2026-01-01T00:00:00 round 2 of 3\\n2026-01-01T00:00:01 warning: x\\n")
    view._live.refresh()
"""
    shown = _in_a_terminal(code)
    assert "round 2 of 3" in shown
    assert any("warning: x" in line and " s  " in line for line in shown.splitlines())


def test_a_party_without_a_terminal_writes_json_lines(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from fedark.cli.live import watching
with watching("node", "north", Path({str(tmp_path)!r}), as_json=False) as view:
    view("the node runs")
    view.error("it does not")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["text"] for line in lines] == ["the node runs", "it does not"]
    assert lines[1]["level"].lower() == "error"


def test_a_tail_gives_whole_new_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("t old\n")
    tail = Tail("north", path)
    with path.open("a") as file:
        file.write("t new\nt par")
    assert tail.lines() == ["new"]
    assert tail.lines() == []
    with path.open("a") as file:
        file.write("t\n")
    assert tail.lines() == ["part"]
