"""The commands of a tutorial do, as they are written, what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.foundation.errors import ModelError
from fedark.simulation.propose import ENCODER
from fedark.tuning.sources import resolve

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PARTS = {
    "leak": ("the pump leaks water", "the valve is wet", "the tank leaks", "wet pipe in the hall"),
    "spark": (
        "the cable sparks",
        "the relay sparks",
        "electric fuse sparks",
        "sparks at the motor",
    ),
    "noise": ("the motor hums loud", "the pump rattles", "loud noise in the hall", "it hums"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ones_own_csv_files_lead_to_a_table_by_the_commands_as_written(tmp_path: Path) -> None:
    try:
        resolve(ENCODER)
    except ModelError:
        pytest.skip("the pretrained encoder is not installed")
    for customer in ("north", "south", "east"):
        lines = [
            f"{text} {customer} {number},{label}"
            for number in range(5)
            for label, texts in PARTS.items()
            for text in texts
        ]
        (tmp_path / f"{customer}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    page = (TUTORIALS / "own-csv.md").read_text()
    commands = re.findall(r"^\$ (.+)$", page, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["init", "check", "simulate"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    said = ""
    for command in commands:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert "north" in said
    assert "together" in said
    assert list((tmp_path / "fedark-work" / "parties").glob("*/runs/*/adapter-base/README.md"))
