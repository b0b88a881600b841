"""Mask streams: AES-256 in counter mode, by `cryptography`, over zeros, read as little-endian
64-bit words.

Block i of a key is the keystream of the 96-bit nonce i, counted from 2: the counter mode inside
AES-GCM (NIST SP 800-38D, section 6.5). So `AESGCM` over zeros makes it, and so does plain CTR from
that counter. Which of the two is faster depends on the processor, by a fifth or by nearly twice
(both measured), so a process times them once; the bits are the same. GCM's tag is thrown away.

Any block is reached directly, so ranges of one vector run in parallel threads (the cipher and the
additions release the interpreter lock) and give the same masks. Buffers belong to the caller.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

__all__ = ["BLOCK", "LONGEST", "SPARE", "Keystream", "Masks", "aligned", "block_of"]

BLOCK = 1 << 15
"""Words of a block: 256 KiB of keystream."""
LONGEST = 1 << 17
"""Words of the longest block."""
SPARE = 2
"""Words that a buffer needs beyond the keystream, for the discarded tag."""

_ZEROS = memoryview(bytes(8 * LONGEST))
_FIRST = (2).to_bytes(4, "big")
_TAG = 8 * SPARE
_TRIALS = 5


class Cursor(Protocol):
    """One thread's way along the stream of a key: a block is begun, and then read front to back in
    pieces.
    """

    PIECE: ClassVar[int]
    """Words that are read at a time, at most; a shorter piece ends its block."""

    def __init__(self, key: bytes) -> None: ...

    def begin(self, counter: bytes, /) -> object:
        """Go to the start of the block with this first counter (`_counter_of`), 16 bytes."""

    def fill(self, zeros: memoryview, target: memoryview, /) -> object:
        """Write the next words of the block, as `views` says."""

    @staticmethod
    def views(buffer: NDArray[np.uint64]) -> tuple[memoryview, memoryview]:
        """What `fill` reads and writes, for the words of `buffer` but its last SPARE, which may be
        overwritten.
        """


class _Gcm:
    """By AES-GCM: a block in one piece. A second one would be the first again, so it is an error: a
    nonce serves once.
    """

    PIECE: ClassVar[int] = LONGEST

    def __init__(self, key: bytes) -> None:
        self._encrypt, self._nonce = AESGCM(key).encrypt_into, b""

    def begin(self, counter: bytes) -> None:
        self._nonce = counter[: -len(_FIRST)]

    def fill(self, zeros: memoryview, target: memoryview) -> None:
        nonce, self._nonce = self._nonce, b""
        self._encrypt(nonce, zeros, None, target)

    @staticmethod
    def views(buffer: NDArray[np.uint64]) -> tuple[memoryview, memoryview]:
        target = buffer.view(np.uint8).data
        return _ZEROS[: len(target) - _TAG], target


class _Ctr:
    """By plain CTR, in pieces that stay in a processor's cache together with what is masked."""

    PIECE: ClassVar[int] = BLOCK

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        self.begin, self.fill = cipher.reset_nonce, cipher.update_into

    @staticmethod
    def views(buffer: NDArray[np.uint64]) -> tuple[memoryview, memoryview]:
        target = buffer.view(np.uint8).data[:-_TAG]
        return _ZEROS[: len(target)], target


class Keystream:
    """The stream of one 32-byte key, which is used for nothing else. Any thread may ask for any
    block.
    """

    def __init__(self, key: bytes) -> None:
        self._cursor, self._lock = _fastest()(key), threading.Lock()

    def block(self, index: int, buffer: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
        """The first `count` words (at most LONGEST) of block `index`, written to the front of
        `buffer`; a view of them.

        `buffer` is contiguous and has at least count + SPARE words; its rest may be overwritten.
        """
        views = self._cursor.views(buffer[: count + SPARE])
        with self._lock:
            self._cursor.begin(_counter_of(index))
            self._cursor.fill(*views)
        return buffer[:count]

    def words(self, count: int, first: int = 0) -> NDArray[np.uint64]:
        """The first `count` words from block `first` on, in a new array."""
        result = np.empty(count + SPARE, np.uint64)
        for at in range(0, count, BLOCK):
            self.block(first + at // BLOCK, result[at:], min(BLOCK, count - at))
        return result[:count]


class Masks:
    """Several keys' streams, each to be added or subtracted, block by block, for one thread.

    What Python does between two calls finds the caches full of keystream, so there is next to
    nothing of it.

    Args:
        streams: (key of 32 bytes, whether it is added).
        block: words of a block, at most LONGEST.
        alone: no other thread masks meanwhile. Pieces may be short then: threads take turns with
            the interpreter lock at every call.
    """

    def __init__(self, streams: Sequence[tuple[bytes, bool]], block: int, *, alone: bool) -> None:
        way = _fastest()
        cursors = [(way(key), np.add if added else np.subtract) for key, added in streams]
        self._begin = [cursor.begin for cursor, _ in cursors]
        self._steps = [(cursor.fill, operation) for cursor, operation in cursors]
        self._views, self._piece = way.views, min(block, way.PIECE if alone else LONGEST)
        self._buffer = aligned(8 * (self._piece + SPARE)).view(np.uint64)
        self._whole = self._cut(self._piece)

    def _cut(self, size: int) -> tuple[NDArray[np.uint64], memoryview, memoryview]:
        """The front of the buffer: the keystream's words, and how to fill them."""
        return self._buffer[:size], *self._views(self._buffer[: size + SPARE])

    def apply(self, target: NDArray[np.uint64], index: int) -> None:
        """Apply the first target.size words of block `index` of every stream to `target`."""
        counter = _counter_of(index)
        for begin in self._begin:
            begin(counter)
        for first in range(0, target.size, self._piece):
            piece = target[first : first + self._piece]
            words, zeros, written = (
                self._whole if piece.size == self._piece else self._cut(piece.size)
            )
            for fill, operation in self._steps:
                fill(zeros, written)
                operation(piece, words, piece)


def aligned(size: int, at: int = 0) -> NDArray[np.uint8]:
    """`size` new bytes, not set, of which number `at` begins a cache line of 64: additions across
    lines take a seventh longer.

    By numpy, which asks for huge pages where a vector has many megabytes: page faults took a fifth
    of the time of masking it.
    """
    room = np.empty(size + 63, np.uint8)
    first = -(room.ctypes.data + at) % 64
    return room[first : first + size]


def _counter_of(index: int) -> bytes:
    """The first counter of block `index`: its nonce, and 2."""
    return index.to_bytes(12, "big") + _FIRST


def block_of(words: int) -> int:
    """Words of a block of the masks of a vector of `words` words. Part of the protocol: both sides
    of a mask cut it alike.

    Threads take turns with the interpreter lock at every call: longer blocks mean fewer turns, as
    long as all threads get several and their buffers weigh little beside the vector.
    """
    return min(LONGEST, max(BLOCK, 1 << (words // 16).bit_length() >> 1))


@cache
def _fastest() -> type[Cursor]:
    """Whichever filled a block faster, at its best of a few alternate tries; takes 1 ms, once."""
    buffer, took = np.empty(BLOCK + SPARE, np.uint64), dict[type[Cursor], float]()
    for _ in range(_TRIALS):
        for way in (_Gcm, _Ctr):
            cursor, views, start = way(bytes(32)), way.views(buffer), time.perf_counter()
            cursor.begin(_counter_of(0))
            cursor.fill(*views)
            took[way] = min(took.get(way, float("inf")), time.perf_counter() - start)
    return min(took, key=lambda way: took[way])
