"""Files that one process writes for another."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from fedark.foundation.errors import InputError, StorageError
from fedark.links.flower import configuration
from fedark.links.flower.configuration import Connection

SETTINGS = Connection("127.0.0.1:1", "ca", "key", "socket")


def test_settings_come_back_and_only_the_owner_can_read_them(tmp_path: Path) -> None:
    path = configuration.write(tmp_path / "c.json", SETTINGS)
    assert configuration.read(path, Connection) == SETTINGS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_settings_that_others_can_change_or_read_are_refused(tmp_path: Path) -> None:
    path = configuration.write(tmp_path / "c.json", SETTINGS)
    path.chmod(0o604)
    with pytest.raises(InputError, match="open to other users"):
        configuration.read(path, Connection)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"superlink": "x", "unknown": 1}', "\x00"])
def test_malformed_settings_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    configuration.write_private(path, text.encode())
    with pytest.raises(InputError, match="not a valid Connection file"):
        configuration.read(path, Connection)


def test_settings_that_are_missing_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        configuration.read(tmp_path / "none.json", Connection)


def test_a_failed_write_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configuration.write(tmp_path / "c.json", SETTINGS)

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        configuration.write(path, Connection("other", "", "", ""))
    assert json.loads(path.read_text())["superlink"] == "127.0.0.1:1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_function_is_found_by_name() -> None:
    assert configuration.resolve("echo_parties:EchoNode")("north").party == "north"


@pytest.mark.parametrize(
    "reference",
    ["", "nowhere", "nowhere:x", "echo_parties:", "echo_parties:none", "echo_parties:__name__"],
)
def test_a_name_without_a_function_is_refused(reference: str) -> None:
    with pytest.raises(InputError):
        configuration.resolve(reference)
