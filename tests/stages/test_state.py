"""State carries a version: another one is refused with an explanation, or migrated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.foundation.errors import FederationError, InputError
from fedark.operate.processes import child_environment
from fedark.operate.state import STATE, VERSION, locked, open_state, write_state


def test_what_this_release_wrote_it_opens(tmp_path: Path) -> None:
    write_state(tmp_path, "node")
    open_state(tmp_path, "node")


def test_a_newer_state_is_refused_and_says_which_release_wrote_it(tmp_path: Path) -> None:
    (tmp_path / STATE).write_text(
        json.dumps({"kind": "node", "version": VERSION + 1, "written_by": "9.9"})
    )
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(InputError, match=r"written by fedark 9\.9") as caught:
        open_state(tmp_path, "node")
    assert "Install that release" in caught.value.fix
    assert (tmp_path / STATE).read_bytes() == before


def test_an_older_state_without_a_migration_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path, "node", VERSION - 1)
    with pytest.raises(InputError, match="no migration"):
        open_state(tmp_path, "node")


def test_an_older_state_is_migrated_step_by_step_and_a_step_that_fails_is_taken_again(
    tmp_path: Path,
) -> None:
    write_state(tmp_path, "host", 1)
    taken: list[str] = []

    def first(folder: Path) -> None:
        taken.append("1 to 2")

    def second(folder: Path) -> None:
        taken.append("2 to 3")
        if len(taken) == 2:
            raise InputError("the disk is full")

    migrations = {("host", 1): first, ("host", 2): second}
    with pytest.raises(InputError):
        open_state(tmp_path, "host", migrations=migrations, version=3)
    open_state(tmp_path, "host", migrations=migrations, version=3)
    assert taken == ["1 to 2", "2 to 3", "2 to 3"]
    assert json.loads((tmp_path / STATE).read_bytes())["version"] == 3


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"kind": "node"}', '{"kind": "node", "version": "x"}', "\x00"]
)
def test_a_malformed_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(InputError, match="malformed"):
        open_state(tmp_path, "node")


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a node's folder"):
        open_state(tmp_path, "node")
    write_state(tmp_path, "host")
    with pytest.raises(InputError, match="host's folder, not a node's"):
        open_state(tmp_path, "node")


def test_a_folder_is_one_processs_own_until_that_ends_however_it_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from fedark.operate.state import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment({}),
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(FederationError, match="Another process runs"), locked(tmp_path):
        pytest.fail("it was held twice")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    holder.stdin.close()
    with locked(tmp_path):
        pass
