"""SQLite files: what holds one of them is not let go by a look at it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.foundation.database import open_private
from fedark.foundation.errors import InputError, StorageError

OTHER = (
    "import sqlite3, sys\n"
    "database = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
    "try:\n    database.execute('BEGIN IMMEDIATE')\n"
    "except sqlite3.OperationalError as error:\n    print(error)\n"
    "else:\n    print('begun')\n"
)


def opened(path: Path, *, create: bool = False, own: bool = True) -> sqlite3.Connection:
    return open_private(path, what="log", safe="Nothing was logged.", create=create, own=own)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_opening_a_file_takes_no_lock_from_a_transaction_in_this_process(
    tmp_path: Path, create: bool, own: bool
) -> None:
    path = tmp_path / "file.sqlite"
    holder = opened(path, create=True)
    holder.execute("CREATE TABLE t (x)")
    holder.execute("BEGIN IMMEDIATE")

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", OTHER, str(path)], capture_output=True, text=True, check=True
        ).stdout

    assert "locked" in other()
    opened(path, create=create, own=own).close()
    assert "locked" in other()
    holder.execute("COMMIT")
    assert "begun" in other()
    holder.close()


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    opened(tmp_path / "file.sqlite", create=True).close()
    assert (tmp_path / "file.sqlite").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_of_ones_own_is_refused(tmp_path: Path) -> None:
    real, link, folder = tmp_path / "real", tmp_path / "link", tmp_path / "folder"
    opened(real, create=True).close()
    link.symlink_to(real)
    folder.mkdir()
    for create in (False, True):
        with pytest.raises(StorageError, match="it is a link"):
            opened(link, create=create)
        with pytest.raises(StorageError, match="it is no file"):
            opened(folder, create=create)
        with pytest.raises(InputError if not create else StorageError):
            opened(tmp_path / "missing" / "file", create=create)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(StorageError, match="it is a link"):
        opened(tmp_path / "dangling", create=True)
    assert not (tmp_path / "nothing").exists()
    real.chmod(0o640)
    with pytest.raises(InputError, match="open to other users"):
        opened(real)
