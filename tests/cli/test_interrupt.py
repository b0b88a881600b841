"""Ctrl-C in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small import write_job


@pytest.mark.slow
@pytest.mark.parametrize("line", ["measuring the enclaves", "round 3"])
def test_an_interrupted_simulation_ends_in_order_and_leaves_nothing(
    tmp_path: Path, line: str
) -> None:
    job = write_job(tmp_path / "job", minimum=3, rounds=400)
    command = [
        *(sys.executable, "-c", "from fedark.cli import main; main()"),
        *("simulate", str(job), "--work", str(tmp_path / "work")),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    said = ""
    for text in process.stdout:
        said += text
        if line in text:
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.stdout.read()
    assert process.wait(60) == 130, said
    assert "Traceback" not in said
    assert said.rstrip().endswith("fedark: stopped; nothing was left running.")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
