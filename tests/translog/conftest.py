"""A provider's log, and entries to put in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fedark.foundation.keys import SigningKey
from fedark.translog.entry import Entry
from fedark.translog.log import TransparencyLog
from fedark.translog.memory import HeadMemory

OWNER = "maker"


def digest(text: str, size: int = 48) -> bytes:
    return hashlib.sha512(text.encode()).digest()[:size]


def entry(number: int = 0, party: str = "north", *, run_id: str = "run-1") -> Entry:
    """An attestation; every number gives another one."""
    facts = {
        "party": party,
        "run_id": run_id,
        "contract": digest("contract"),
        "role": "trainer",
        "platform": "simulated",
        "evidence": digest(f"evidence {number}"),
        "measurements": digest("measurements"),
        "signing": digest("signing", 32),
    }
    return Entry("attestation", 1_800_000_000 + number, facts)


@pytest.fixture
def make_entry() -> Callable[..., Entry]:
    return entry


@pytest.fixture
def key() -> SigningKey:
    return SigningKey()


@pytest.fixture
def make_log(tmp_path: Path, key: SigningKey) -> Callable[..., TransparencyLog]:
    """A log with `count` entries; logs of one owner with the same entries are the same log."""

    def make(name: str = "log", count: int = 0, party: str = "north") -> TransparencyLog:
        log = TransparencyLog(tmp_path / f"{name}.sqlite", key)
        for number in range(count):
            log.append(entry(number, party))
        return log

    return make


@pytest.fixture
def memory(tmp_path: Path) -> HeadMemory:
    return HeadMemory(tmp_path / "seen.sqlite")
