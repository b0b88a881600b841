"""Vendors of our own (`vendors`) and the sampling of single-bit flips, for the platforms' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from vendors import Authority, NitroMaker, SnpMaker, TdxMaker


def flips(data: bytes, count: int) -> Iterable[bytes]:
    """`data` with one bit flipped, at `count` places spread over all of it and over all bit
    positions.
    """
    bits = len(data) * 8
    for index in range(count):
        at = (index * bits // count + index % 8) % bits
        yield data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


@pytest.fixture(scope="session")
def authority() -> Authority:
    """`issue`, `revoke` and the time at which their defaults are valid."""
    return Authority()


@pytest.fixture(scope="session")
def bit_flips() -> Callable[[bytes, int], Iterable[bytes]]:
    return flips


@pytest.fixture(scope="session")
def maker(authority: Any) -> TdxMaker:
    return TdxMaker(authority)


@pytest.fixture(scope="session")
def amd(authority: Any) -> SnpMaker:
    return SnpMaker(authority)


@pytest.fixture(scope="session")
def aws(authority: Any) -> NitroMaker:
    return NitroMaker(authority)
