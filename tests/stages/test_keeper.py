"""A child that ends is started again, less and less eagerly, and is done only when it was asked to
end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from fedark.operate.processes import Child, child_environment
from fedark.operate.supervisor import Supervised


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def made(tmp_path: Path) -> list[Child]:
    return []


def keeper(
    tmp_path: Path,
    made: list[Child],
    clock: Clock,
    said: list[str],
    code: str,
    *,
    may_end: bool = False,
) -> Supervised:
    def start() -> Child:
        child = Child(
            "it",
            [sys.executable, "-c", code],
            environment=child_environment({}),
            log=tmp_path / "log",
        )
        made.append(child)
        return child

    return Supervised("it", start, say=said.append, may_end=may_end, clock=clock)


def test_the_pause_doubles_up_to_half_a_minute_and_falls_back_after_ten_calm_seconds(
    tmp_path: Path, made: list[Child]
) -> None:
    clock, said = Clock(), list[str]()
    kept = keeper(tmp_path, made, clock, said, "raise SystemExit(3)")
    pauses = []
    for _ in range(9):
        kept.look()
        assert made[-1].wait(60)
        kept.look()
        assert not kept.alive
        count = len(made)
        pauses.append(kept._due - clock.now)
        clock.now = kept._due - 0.01
        kept.look()
        assert len(made) == count
        clock.now = kept._due
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert kept.restarts == 8
    assert "ended with code 3" in said[0]
    assert "started again in 1 s" in said[0]
    kept.look()
    assert made[-1].wait(60)
    clock.now += 11
    kept.look()
    assert kept._due - clock.now == 0.5


def test_a_killed_child_is_started_again_and_what_it_started_is_ended(
    tmp_path: Path, made: list[Child]
) -> None:
    clock, said = Clock(), list[str]()
    code = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True);"
        " time.sleep(100)"
    )
    kept = keeper(tmp_path, made, clock, said, code)
    kept.look()
    while not (tmp_path / "log").read_text().strip():
        pass
    grandchild = int((tmp_path / "log").read_text())
    os.kill(made[0].pid, signal.SIGKILL)
    assert made[0].wait(60)
    kept.look()
    stat = Path(f"/proc/{grandchild}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    clock.now += 60
    kept.look()
    assert kept.alive
    kept.end()
    assert made[1].exit_code is not None


@pytest.mark.parametrize("may_end", [True, False])
def test_code_zero_is_an_end_only_for_a_child_that_may_end(
    tmp_path: Path, made: list[Child], may_end: bool
) -> None:
    clock = Clock()
    kept = keeper(tmp_path, made, clock, [], "pass", may_end=may_end)
    kept.look()
    assert made[0].wait(60)
    kept.look()
    clock.now += 100
    kept.look()
    assert kept.done is may_end
    assert len(made) == (1 if may_end else 2)
    kept.end()
