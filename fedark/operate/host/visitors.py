"""Who is connected to the front, and what each may use up."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

__all__ = ["Limits", "Visitors"]


@dataclass(frozen=True)
class Limits:
    """What a client may use up.

    Attributes:
        head: seconds for the TLS handshake, and again for each request's head.
        silence: seconds without a byte.
        slack, rate: a body, either way, has `slack` seconds and one more for each `rate` bytes.
        body: bytes of a Fleet request.
        connections: at a time; and those `per_address` (of IPv6: per /64).
        per_node: requests of one node to the host's own routes at a time.
    """

    head: float = 15.0
    silence: float = 60.0
    slack: float = 15.0
    rate: int = 16 << 10
    body: int = 64 << 20
    connections: int = 512
    per_address: int = 32
    per_node: int = 2

    def deadline(self, length: int) -> float:
        """Seconds for a body of this many bytes."""
        return self.slack + length / self.rate


class Visitors:
    """Who is connected, by address. A connection that has shown a node's key keeps its place; where
    there is no room, the oldest of the others is closed: of the same address if that has too many,
    else of the address that has the most. So nobody who comes with few addresses keeps others out.
    """

    def __init__(self) -> None:
        self._strangers: dict[str, dict[asyncio.Task[None], None]] = {}
        self._open: dict[asyncio.Task[None], str] = {}
        self._count: Counter[str] = Counter()

    def enter(self, task: asyncio.Task[None], address: str, limits: Limits) -> str | None:
        """Take a place. Returns "", the address of whoever was cancelled for it, or None if there
        is no place.
        """
        crowded = ""
        if self._count[address] >= limits.per_address:
            crowded = address
        elif len(self._open) >= limits.connections:
            waiting = self._strangers
            crowded = max(waiting, key=lambda where: len(waiting[where]), default=address)
        if crowded:
            oldest = next(iter(self._strangers.get(crowded, ())), None)
            if oldest is None:
                return None
            self.leave(oldest)
            oldest.cancel()
        self._open[task] = address
        self._count[address] += 1
        self._strangers.setdefault(address, {})[task] = None
        return crowded

    def known(self, task: asyncio.Task[None]) -> None:
        """It has shown a node's key."""
        self._forget(task, self._open.get(task, ""))

    def leave(self, task: asyncio.Task[None]) -> None:
        """It is over; may be said twice."""
        address = self._open.pop(task, None)
        if address is not None:
            self._forget(task, address)
            self._count[address] -= 1
            if not self._count[address]:
                del self._count[address]

    def _forget(self, task: asyncio.Task[None], address: str) -> None:
        strangers = self._strangers.get(address, {})
        strangers.pop(task, None)
        if not strangers:
            self._strangers.pop(address, None)

    def tasks(self) -> list[asyncio.Task[None]]:
        """Everyone."""
        return list(self._open)
