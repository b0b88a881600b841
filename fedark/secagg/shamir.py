"""Shamir's secret sharing (1979) of 32-byte secrets over the prime field of 65537, for many secrets
at once.

A secret is 16 digits of 16 bits; each digit is the constant term of its own random polynomial of
degree t - 1. Splitting and combining are matrix products modulo p, and exact in double precision: t
* p**2 < 2**53 for every t up to 2**20. The time does not depend on the secrets. Sharing costs the
  same for a vector of any length, because only seeds are shared.

Coefficients are uniform: a 32-bit draw is reduced modulo p, and 2**32 - 1 = 65535 * p leaves one
draw to reject.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import ProtocolError
from fedark.secagg.stream import Keystream

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "agreeing", "combine", "split"]

PRIME = 65537
SECRET_BYTES = 32
SHARE_BYTES = 34
_DIGITS = 16
_TILE = 250_000
_ROWS = 32


def split(secrets: NDArray[np.uint8], threshold: int, count: int) -> NDArray[np.uint8]:
    """Shares of every secret for members 1..count, any `threshold` of which recover it and fewer
    tell nothing.

    Args:
        secrets: [s, 32].

    Returns:
        [count, s, 34].
    """
    digits = np.ascontiguousarray(secrets).view("<u2").reshape(-1)
    rows = np.empty((threshold, digits.size))
    rows[0] = digits
    rows[1:] = _uniform((threshold - 1) * digits.size).reshape(threshold - 1, digits.size)
    return _pack(_product(_powers(count, threshold), rows).reshape(count, -1, _DIGITS))


def combine(members: Sequence[int], shares: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The secrets behind the shares of `members` (distinct, at least 1): exactly the threshold of
    them.

    Any bytes are some shares, and wrong shares give wrong secrets: the caller compares the secrets
    with their commitments.

    Args:
        shares: [len(members), s, 34].

    Returns:
        [s, 32].

    Raises:
        ProtocolError: a member stands twice.
    """
    digits: NDArray[np.int64] = _interpolate(members, shares, [0])[0]
    return digits.astype("<u2").reshape(-1, _DIGITS).view(np.uint8).reshape(-1, SECRET_BYTES)


def agreeing(
    members: Sequence[int],
    shares: NDArray[np.uint8],
    others: Sequence[int],
    theirs: NDArray[np.uint8],
) -> NDArray[np.bool_]:
    """Which of `theirs`, [len(others), s, 34], lie on the polynomials that `shares` of `members`,
    none of the others, define.
    """
    expected = _interpolate(members, shares, others)
    same: NDArray[np.bool_] = (expected == _unpack(theirs).reshape(expected.shape)).all(axis=1)
    return same


def _interpolate(
    members: Sequence[int], shares: NDArray[np.uint8], points: Sequence[int]
) -> NDArray[np.int64]:
    """The values at `points`, none of them a member's: [len(points), digits]."""
    if len(set(members)) != len(members) or min(members) < 1:
        raise ProtocolError(
            "Shares of one member stand twice.", safe="Nothing was unmasked with them."
        )
    return _product(
        _lagrange(members, points), _unpack(shares).reshape(len(members), -1).astype(np.float64)
    )


def _lagrange(members: Sequence[int], points: Sequence[int]) -> NDArray[np.float64]:
    """What the value of each member counts at each point: [len(points), len(members)]."""
    known, wanted = np.array(members, np.int64), np.array(points, np.int64)
    between = known[:, None] - known
    np.fill_diagonal(between, 1)
    away = wanted[:, None] - known
    weights = _multiplied(away)[:, None] * _inverse(away * _multiplied(between) % PRIME) % PRIME
    return weights.astype(np.float64)


def _multiplied(factors: NDArray[np.int64]) -> NDArray[np.int64]:
    """The product of each row."""
    product = np.ones(len(factors), np.int64)
    for column in factors.T:
        product = product * column % PRIME
    return product


def _inverse(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """By Fermat: to the power of p - 2, which is sixteen ones in binary."""
    power = np.ones_like(values)
    for _ in range(16):
        power = power * power % PRIME * values % PRIME
    return power


def _product(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.int64]:
    """left @ right modulo p, in tiles: a library of linear algebra leaves a small product to one
    thread, and a client on a busy machine must not wait for spinning ones."""
    product = np.empty((left.shape[0], right.shape[1]))
    columns = max(16, _TILE // (_ROWS * left.shape[1]))
    for row in range(0, left.shape[0], _ROWS):
        for column in range(0, right.shape[1], columns):
            tile = np.s_[row : row + _ROWS, column : column + columns]
            product[tile] = left[row : row + _ROWS] @ right[:, column : column + columns]
    result: NDArray[np.int64] = product.astype(np.int64)
    result %= PRIME
    return result


@lru_cache(maxsize=8)
def _powers(count: int, threshold: int) -> NDArray[np.float64]:
    table = np.ones((count, threshold), np.int64)
    points = np.arange(1, count + 1)
    for power in range(1, threshold):
        table[:, power] = table[:, power - 1] * points % PRIME
    return table.astype(np.float64)


def _uniform(count: int) -> NDArray[np.uint32]:
    words = np.empty(0, np.uint32)
    while words.size < count:
        draws = Keystream(os.urandom(32)).words((count - words.size) // 2 + 8).view(np.uint32)
        words = np.concatenate([words, draws[draws != 0xFFFFFFFF]])
    return words[:count] % np.uint32(PRIME)


def _pack(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    """[..., 16] field elements as [..., 34] bytes: 16 low halves, then the 17th bits."""
    low = (values & 0xFFFF).astype("<u2").view(np.uint8)
    return np.concatenate([low, np.packbits(values == PRIME - 1, axis=-1)], axis=-1)


def _unpack(shares: NDArray[np.uint8]) -> NDArray[np.int64]:
    low = np.ascontiguousarray(shares[..., :SECRET_BYTES]).view("<u2").astype(np.int64)
    high = np.unpackbits(np.ascontiguousarray(shares[..., SECRET_BYTES:]), axis=-1)
    digits: NDArray[np.int64] = (low + (high.astype(np.int64) << 16)) % PRIME
    return digits
