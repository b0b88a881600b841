"""Mask streams: AES-256 in counter mode, by `cryptography`, over zeros, read as little-endian 64-bit words.

Block i of a key is the keystream of the 96-bit nonce i, counted from 2: the counter mode inside AES-GCM (NIST SP 800-38D, section
6.5). So `AESGCM` over zeros makes it, and so does plain CTR from that counter. Which of the two is faster depends on the processor,
by a fifth or by nearly twice (both measured), so a process times them once; the bits are the same. GCM's tag is thrown away.

Any block is reached directly, so ranges of one vector run in parallel threads (the cipher and the additions release the
interpreter lock) and give the same masks. Buffers belong to the caller.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

__all__ = ["BLOCK", "LONGEST", "SPARE", "Keystream", "aligned", "block_of", "nonce_of"]

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
Writer = Callable[[bytes], object]


class _Counter(Protocol):
    """A way to the stream of one key."""

    def __init__(self, key: bytes) -> None: ...

    def writer(self, buffer: memoryview) -> Writer:
        """Writes a nonce's stream to all of `buffer` but its last 16 bytes, which may be overwritten."""


class _Gcm:
    """By AES-GCM, which keeps no state between calls."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def writer(self, buffer: memoryview) -> Writer:
        encrypt, zeros = self._cipher.encrypt_into, _ZEROS[: len(buffer) - _TAG]
        return lambda nonce: encrypt(nonce, zeros, None, buffer)


class _Ctr:
    """By plain CTR, whose counter is state: one call at a time."""

    def __init__(self, key: bytes) -> None:
        self._cipher, self._lock = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor(), threading.Lock()

    def writer(self, buffer: memoryview) -> Writer:
        lock, start, encrypt = self._lock, self._cipher.reset_nonce, self._cipher.update_into
        zeros, target = _ZEROS[: len(buffer) - _TAG], buffer[:-_TAG]

        def write(nonce: bytes) -> None:
            with lock:
                start(nonce + _FIRST)
                encrypt(zeros, target)

        return write


class Keystream:
    """The stream of one 32-byte key, which is used for nothing else. Any thread may ask for any block."""

    def __init__(self, key: bytes) -> None:
        self._counter = _fastest()(key)

    def writer(self, buffer: NDArray[np.uint64]) -> Writer:
        """A function that writes the stream of a nonce (`nonce_of`) to all of `buffer` but its last SPARE words, which it may
        overwrite: for many blocks in one place, as what Python does between two of them finds the caches full of keystream.

        `buffer` is contiguous and has SPARE to LONGEST + SPARE words.
        """
        return self._counter.writer(buffer.view(np.uint8).data)

    def block(self, index: int, buffer: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
        """The first `count` words (at most LONGEST) of block `index`, written to the front of `buffer`; a view of them.

        `buffer` is contiguous and has at least count + SPARE words; its rest may be overwritten.
        """
        self.writer(buffer[: count + SPARE])(nonce_of(index))
        return buffer[:count]

    def words(self, count: int, first: int = 0) -> NDArray[np.uint64]:
        """The first `count` words from block `first` on, in a new array."""
        result = np.empty(count + SPARE, np.uint64)
        for at in range(0, count, BLOCK):
            self.block(first + at // BLOCK, result[at:], min(BLOCK, count - at))
        return result[:count]


def aligned(size: int, at: int = 0) -> NDArray[np.uint8]:
    """`size` new bytes, not set, of which number `at` begins a cache line of 64: additions across lines take a seventh longer.

    By numpy, which asks for huge pages where a vector has many megabytes: page faults took a fifth of the time of masking it.
    """
    room = np.empty(size + 63, np.uint8)
    first = -(room.ctypes.data + at) % 64
    return room[first : first + size]


def nonce_of(index: int) -> bytes:
    """The nonce of block `index`."""
    return index.to_bytes(12, "big")


def block_of(words: int) -> int:
    """Words of a block of the masks of a vector of `words` words. Part of the protocol: both sides of a mask cut it alike.

    Threads take turns with the interpreter lock at every call: longer blocks mean fewer turns, as long as all threads get several
    and their buffers weigh little beside the vector.
    """
    return min(LONGEST, max(BLOCK, 1 << (words // 16).bit_length() >> 1))


@cache
def _fastest() -> type[_Counter]:
    """Whichever filled a block faster, at its best of a few alternate tries: a millisecond, once."""
    buffer, took = memoryview(bytearray(8 * (BLOCK + SPARE))), dict[type[_Counter], float]()
    for _ in range(_TRIALS):
        for way in (_Gcm, _Ctr):
            write, start = way(bytes(32)).writer(buffer), time.perf_counter()
            write(bytes(12))
            took[way] = min(took.get(way, float("inf")), time.perf_counter() - start)
    return min(took, key=lambda way: took[way])
