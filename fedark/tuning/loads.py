"""The loads of base models in this process: one at a time, and countable.

Loading a model patches functions of torch and transformers for its duration and may leave classes
of theirs changed, so this state belongs to the process as they do. An enclave loads its models
before it trains. In a simulation the trainers are threads, and one may load while another takes
gradients: `mark` lets that one tell a model that changes itself from a library that was changed
beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["loading", "mark"]


class _Loads:
    lock = threading.Lock()
    begun = 0
    ended = 0


@contextmanager
def loading() -> Iterator[None]:
    """Wait until no other thread loads a model; while open, this one does."""
    with _Loads.lock:
        _Loads.begun += 1
        try:
            yield
        finally:
            _Loads.ended += 1


def mark() -> int | None:
    """A number that stays the same as long as no load begins; None while one is under way."""
    begun = _Loads.begun
    return begun if _Loads.ended == begun else None
