"""The Merkle tree of RFC 9162, section 2.1, over SHA-256: roots, inclusion proofs, consistency
proofs, and their verification.

A leaf's hash is SHA-256(0x00 || entry), a node's SHA-256(0x01 || left || right): no entry can pass
for a node. The tree over n entries splits at the largest power of two below n. Whatever is said
about a tree of n entries stays provable when it grows.

`Tree` keeps every complete subtree (64 bytes an entry in all); the two `verify_` functions follow
2.1.3.2 and 2.1.4.2 step by step and need no tree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedark.foundation.errors import LogRefused

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "MAX_PATH",
    "Tree",
    "leaf_hash",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES = 32
MAX_PATH = 64
"""No proof is longer: a log holds fewer than 2^63 entries."""
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A growing tree in memory. `level[k]` holds the roots of the complete subtrees of 2^k leaves,
    one after the other.
    """

    def __init__(self) -> None:
        self._levels = [bytearray()]

    def __len__(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf: bytes) -> None:
        """Add a leaf by its hash."""
        self._levels[0] += leaf
        size, level = len(self), 0
        while size & 1 == 0:
            below = self._levels[level]
            level, size = level + 1, size >> 1
            if level == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level] += _node(
                bytes(below[-2 * HASH_BYTES : -HASH_BYTES]), bytes(below[-HASH_BYTES:])
            )

    def truncate(self, size: int) -> None:
        """Forget all but the first `size` leaves: an append that did not reach the disk."""
        for level, nodes in enumerate(self._levels):
            del nodes[(size >> level) * HASH_BYTES :]

    def leaf(self, index: int) -> bytes:
        """The hash of a leaf."""
        return self._at(0, index)

    def root(self, size: int | None = None) -> bytes:
        """MTH of the first `size` leaves, 2.1.1; of all, by default."""
        size = len(self) if size is None else size
        self._check(0 <= size <= len(self))
        return self._range(0, size) if size else EMPTY_ROOT

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """PATH(index, D[size]), 2.1.3.1: the proof that leaf `index` is in the tree of the first
        `size` leaves.
        """
        self._check(0 <= index < size <= len(self))
        start, end, path = 0, size, list[bytes]()
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency(self, first: int, second: int) -> tuple[bytes, ...]:
        """PROOF(first, D[second]), 2.1.4.1: that the tree of `first` leaves is the beginning of
        that of `second`.

        Empty for `first` 0, which needs no proof, and for equal sizes.
        """
        self._check(0 <= first <= second <= len(self))
        if first in (0, second):
            return ()
        start, end, whole, path = 0, second, True, list[bytes]()
        while first != end:
            middle = start + _split(end - start)
            if first <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start, whole = middle, False
        if not whole:
            path.append(self._range(start, end))
        return tuple(reversed(path))

    def _range(self, start: int, end: int) -> bytes:
        """The root of a subtree: `start` is a multiple of the power of two that is not below `end -
        start`.
        """
        width = end - start
        level = width.bit_length() - 1
        if width == 1 << level:
            return self._at(level, start >> level)
        middle = start + _split(width)
        return _node(self._range(start, middle), self._range(middle, end))

    def _at(self, level: int, index: int) -> bytes:
        return bytes(self._levels[level][index * HASH_BYTES : (index + 1) * HASH_BYTES])

    @staticmethod
    def _check(holds: bool) -> None:
        if not holds:
            raise LogRefused(
                "A proof was asked for that this log has not the entries for.",
                safe="None was given.",
            )


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes
) -> None:
    """Return if the leaf of that hash is entry `index` of the tree with `size` leaves and that root
    (RFC 9162, 2.1.3.2).

    Raises:
        LogRefused: it is not shown to be.
    """
    refused = LogRefused(
        "A log entry is not under the tree head that it was shown with.",
        safe="Nothing was concluded from it.",
    )
    if (
        not 0 <= index < size
        or len(path) > MAX_PATH
        or any(len(node) != HASH_BYTES for node in path)
    ):
        raise refused
    place, last, found = index, size - 1, leaf
    for node in path:
        if last == 0:
            raise refused
        if place & 1 or place == last:
            found = _node(node, found)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            found = _node(found, node)
        place, last = place >> 1, last >> 1
    if last != 0 or found != root:
        raise refused


def verify_consistency(
    first: int, first_root: bytes, second: int, second_root: bytes, path: Sequence[bytes]
) -> None:
    """Return if the tree of `second` leaves goes on from the tree of `first` leaves (RFC 9162,
    2.1.4.2).

    Every tree goes on from the empty one, and from itself; the proof of that is empty.

    Raises:
        LogRefused: it is not shown to.
    """
    refused = LogRefused(
        "A tree head is not shown to go on from an earlier one.",
        safe="Nothing was concluded from it.",
    )
    if (
        not 0 <= first <= second
        or len(path) > MAX_PATH
        or any(len(node) != HASH_BYTES for node in path)
    ):
        raise refused
    if first in (0, second):
        if path or first_root != (second_root if first else EMPTY_ROOT):
            raise refused
        return
    if not path:
        raise refused
    nodes = list(path) if first & (first - 1) else [first_root, *path]
    place, last = first - 1, second - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise refused
        if place & 1 or place == last:
            old, new = _node(node, old), _node(node, new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            new = _node(new, node)
        place, last = place >> 1, last >> 1
    if last != 0 or old != first_root or new != second_root:
        raise refused
