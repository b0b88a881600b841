"""The roster of a party's folder, `roster.json`: the public keys of every party that it deals with,
got by a trusted way.

It grows while a node runs, when its operator approves a contract with parties that were unknown. So
a node holds a `FileBacked` mapping, which is read from the disk each time it is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fedark.contract.contract import Party
from fedark.foundation.errors import InputError
from fedark.foundation.files import write_atomic

__all__ = ["ROSTER", "FileBacked", "read_roster", "write_roster"]

ROSTER = "roster.json"
T = TypeVar("T")


def write_roster(folder: Path, roster: Iterable[Party]) -> None:
    """Write the parties that this one knows.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomic(
        folder / ROSTER, json.dumps([party.model_dump() for party in roster], indent=1).encode()
    )


def read_roster(folder: Path) -> dict[str, Party]:
    """The parties that this one knows, by name.

    Raises:
        InputError: the roster is missing or malformed.
    """
    try:
        items = json.loads((folder / ROSTER).read_bytes())
        parties = [Party.model_validate(item) for item in items]
    except (OSError, ValueError):
        raise InputError(f"{folder / ROSTER} is missing or malformed.") from None
    return {party.name: party for party in parties}


class FileBacked(Mapping[str, T]):
    """A mapping that `read` gives anew for every question; `items` asks once."""

    def __init__(self, read: Callable[[], dict[str, T]]) -> None:
        self._read = read

    def __getitem__(self, key: str) -> T:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def items(self) -> ItemsView[str, T]:
        return self._read().items()
