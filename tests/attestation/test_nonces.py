"""Challenges are single-use, bound to a purpose, and remembered over a crash."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedark.attestation.nonces import NonceBook
from fedark.foundation.errors import EvidenceRefused, InputError, StorageError

NOW = datetime(2027, 3, 1, tzinfo=UTC)


def test_a_nonce_counts_once() -> None:
    book = NonceBook()
    nonce = book.issue("p", now=NOW)
    book.spend(nonce, "p", now=NOW)
    with pytest.raises(EvidenceRefused, match="replay"):
        book.spend(nonce, "p", now=NOW)


@pytest.mark.attack("verifier crash and restart")
def test_a_spent_nonce_stays_spent_after_the_verifier_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    script = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from fedark.attestation.nonces import NonceBook
book, now = NonceBook(Path(sys.argv[1])), datetime(2027, 3, 1, tzinfo=UTC)
spent, fresh = book.issue("p", now=now), book.issue("p", now=now)
book.spend(spent, "p", now=now)
print(spent.hex(), fresh.hex(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    spent, fresh = (bytes.fromhex(part) for part in done.stdout.split())
    book = NonceBook(path)
    with pytest.raises(EvidenceRefused, match="replay"):
        book.spend(spent, "p", now=NOW)
    book.spend(fresh, "p", now=NOW)


def test_of_concurrent_uses_through_several_books_one_wins(tmp_path: Path) -> None:
    books = [NonceBook(tmp_path / "nonces") for _ in range(3)]
    nonce = books[0].issue("p", now=NOW)

    def use(index: int) -> bool:
        try:
            books[index % 3].spend(nonce, "p", now=NOW)
        except EvidenceRefused:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(use, range(12))) == 1


def test_a_nonce_of_another_purpose_is_refused_and_stays_good_for_its_own() -> None:
    book = NonceBook()
    nonce = book.issue("p", now=NOW)
    with pytest.raises(EvidenceRefused):
        book.spend(nonce, "q", now=NOW)
    book.spend(nonce, "p", now=NOW)


def test_an_expired_nonce_is_refused_before_and_after_it_is_pruned() -> None:
    book = NonceBook()
    first, second = (book.issue("p", now=NOW, ttl=timedelta(seconds=5)) for _ in range(2))
    later = NOW + timedelta(seconds=6)
    with pytest.raises(EvidenceRefused, match="expired"):
        book.spend(first, "p", now=later)
    book.issue("p", now=later)
    for nonce in (first, second):
        with pytest.raises(EvidenceRefused):
            book.spend(nonce, "p", now=NOW)


def test_a_stranger_is_refused() -> None:
    with pytest.raises(EvidenceRefused, match="not issued here"):
        NonceBook().spend(os.urandom(32), "p", now=NOW)


def test_a_repeated_step_spends_its_nonce_again_on_the_same_thing_and_before_it_expires() -> None:
    book = NonceBook()
    nonce = book.issue("p", now=NOW)
    book.spend(nonce, "p", now=NOW, by=b"evidence")
    book.spend(nonce, "p", now=NOW + timedelta(minutes=9), by=b"evidence", again=True)
    for change in ({"by": b"other"}, {"by": b""}, {"again": False}):
        with pytest.raises(EvidenceRefused, match="replay"):
            book.spend(nonce, "p", now=NOW, **{"by": b"evidence", "again": True} | change)
    with pytest.raises(EvidenceRefused, match="has expired"):
        book.spend(nonce, "p", now=NOW + timedelta(minutes=11), by=b"evidence", again=True)


def test_the_book_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    NonceBook(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(InputError, match="other users"):
        NonceBook(path)


def test_a_link_in_place_of_the_book_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        NonceBook(tmp_path / "link")


def test_a_file_that_is_no_book_is_a_storage_error_and_admits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "nonces"
    path.write_bytes(b"not a database, but long enough to look like a file" * 100)
    path.chmod(0o600)
    with pytest.raises(StorageError):
        NonceBook(path)


def test_a_nonce_that_was_derived_from_ours_counts_once_for_each_who_may_answer_it() -> None:
    book = NonceBook()
    for purpose in ("north", "south"):
        book.adopt(bytes(32), purpose, now=NOW)
    book.spend(bytes(32), "north", now=NOW)
    with pytest.raises(EvidenceRefused, match="replay"):
        book.spend(bytes(32), "north", now=NOW)
    with pytest.raises(EvidenceRefused, match="not issued here"):
        book.spend(bytes(32), "west", now=NOW)
    book.spend(bytes(32), "south", now=NOW)


@pytest.mark.parametrize("spent", [False, True])
def test_a_nonce_is_adopted_once_for_a_purpose(spent: bool) -> None:
    book = NonceBook()
    book.adopt(bytes(32), "p", now=NOW)
    if spent:
        book.spend(bytes(32), "p", now=NOW)
    with pytest.raises(EvidenceRefused, match="adopted before"):
        book.adopt(bytes(32), "p", now=NOW)


def test_an_adopted_nonce_expires() -> None:
    book = NonceBook()
    book.adopt(bytes(32), "p", now=NOW)
    with pytest.raises(EvidenceRefused, match="expired"):
        book.spend(bytes(32), "p", now=NOW + timedelta(minutes=11))
