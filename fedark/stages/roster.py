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

from fedark.contract.contract import Party, fingerprint, now
from fedark.foundation.errors import InputError
from fedark.foundation.files import write_atomic

__all__ = ["FORMER", "ROSTER", "FileBacked", "read_roster", "replace_keys", "write_roster"]

ROSTER = "roster.json"
FORMER = "former-keys.jsonl"
"""Keys that parties had before, and when they were replaced, oldest first."""
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


def replace_keys(folder: Path, name: str, told: str, offered: Iterable[Party]) -> Party:
    """Take a party's new keys into the roster: those of `offered` with the fingerprint that the
    party itself told.

    Args:
        told: the fingerprint; spaces and case do not matter.
        offered: as others say that the party is now.

    Raises:
        InputError: it is not known, is this party itself or the aggregator, or nothing offered has
            this fingerprint; the roster stands as it was.
        StorageError: it cannot be written.
    """
    safe = "The roster was left as it is."
    known = read_roster(folder)
    old = known.get(name)
    if old is None:
        raise InputError(
            f"The roster knows no {name}.", safe=safe, fix="Approving a contract adds new parties."
        )
    if old.role == "aggregator":
        raise InputError(
            f"{name} is the aggregator that invited this node.",
            safe=safe,
            fix="Join its new keys as a new node: fedark node join.",
        )
    new = next(
        (
            party
            for party in offered
            if (party.name, party.role) == (name, old.role)
            and _digits(fingerprint(party)) == _digits(told)
        ),
        None,
    )
    if new is None:
        raise InputError(
            f"No contract that was proposed here has keys of {name} with this fingerprint.",
            safe=safe,
            fix=f"Compare it with {name}'s own people again; the host proposes a contract first.",
        )
    if new != old:
        former = {"replaced": now().isoformat(timespec="seconds"), "party": old.model_dump()}
        path = folder / FORMER
        before = path.read_bytes() if path.exists() else b""
        write_atomic(path, before + json.dumps(former).encode() + b"\n", mode=0o600)
        write_roster(folder, {**known, name: new}.values())
    return new


def _digits(text: str) -> str:
    return "".join(text.split()).lower()


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
