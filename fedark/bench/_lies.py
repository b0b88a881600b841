"""Every single change of a dossier's parts: what a lying aggregator, who holds the key over the
whole, could sign.

A leaf is whatever stands in the canonical CBOR of the body and holds nothing further of it: most
are bytes that somebody else signed. Each is altered in its middle, at its first and last byte, left
out, given under another name, given twice, and put in the place of each of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.keys import SigningKey
from fedark.stages.dossier import _LABEL

__all__ = ["CHANGES", "Lie", "leaves", "lies", "signed"]

_MAX = 1 << 28
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Lie:
    """A changed body.

    Attributes:
        path: of the leaf.
        change: what became of it.
    """

    path: Path
    change: str
    body: bytes


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """The places in a tree of maps and lists that hold something else."""
    if not isinstance(value, (dict, list)):
        yield path
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


def lies(body: bytes) -> Iterator[Lie]:
    """Every change of every leaf of a canonical body."""
    tree = canonical.decode(body, max_bytes=_MAX)
    for path in leaves(tree):
        for name, change in CHANGES.items():
            lie = canonical.decode(body, max_bytes=_MAX)
            if change(_at(lie, path[:-1]), path[-1]) is not False:
                changed = canonical.encode(lie)
                if changed != body:
                    yield Lie(path, name, changed)


def signed(key: SigningKey, body: bytes, label: str = _LABEL) -> bytes:
    """The file, whatever is in it, signed by whoever holds the key."""
    return canonical.encode({"body": body, "signature": key.sign(label, body)})


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _altered(place: Callable[[int], int]) -> Callable[[Any, Any], bool]:
    def change(at: Any, key: Any) -> bool:
        value = at[key]
        if isinstance(value, bool):
            at[key] = not value
        elif isinstance(value, int | float):
            at[key] = value + 1
        elif value is None:
            at[key] = 1
        elif not value:
            at[key] = b"\1" if isinstance(value, bytes) else "a"
        else:
            index = place(len(value))
            one = value[index : index + 1]
            other = bytes([one[0] ^ 1]) if isinstance(value, bytes) else chr(ord(one) ^ 1)
            at[key] = value[:index] + other + value[index + 1 :]
        return True

    return change


def _dropped(at: Any, key: Any) -> bool:
    del at[key]
    return True


def _emptied(at: Any, key: Any) -> bool:
    at[key] = type(at[key])()
    return True


def _renamed(at: Any, key: Any) -> bool:
    if isinstance(at, dict):
        at[f"{key}x"] = at.pop(key)
    else:
        at.insert(0, at.pop(key))
    return True


def _repeated(at: Any, key: Any) -> bool:
    """Given twice: under a stranger's name, or once more in a list."""
    if isinstance(at, dict):
        at[f"{key}x"] = at[key]
    else:
        at.append(at[key])
    return True


def _in_the_next_place(at: Any, key: Any) -> bool:
    """It stands for its neighbour too, who is of the same kind."""
    keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
    following = keys[(keys.index(key) + 1) % len(keys)]
    at[following] = at[key]
    return True


def _exchanged(at: Any, key: Any) -> bool:
    keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
    following = keys[(keys.index(key) + 1) % len(keys)]
    at[key], at[following] = at[following], at[key]
    return True


CHANGES: dict[str, Callable[[Any, Any], bool]] = {
    "altered": _altered(lambda length: length // 2),
    "altered at its beginning": _altered(lambda length: 0),
    "altered at its end": _altered(lambda length: length - 1),
    "emptied": _emptied,
    "left out": _dropped,
    "given another name": _renamed,
    "given twice": _repeated,
    "put in another's place": _in_the_next_place,
    "exchanged with another": _exchanged,
}
