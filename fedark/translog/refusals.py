"""The two errors of this package: a log, head or proof that does not hold, and a log that provably was forked or rewound."""

from __future__ import annotations

from fedark.errors import Refused

__all__ = ["LogForked", "LogRefused"]


class LogRefused(Refused):
    """A log, a tree head or a proof is not what it must be. Nothing was concluded from it."""


class LogForked(LogRefused):
    """The owner of a log signed two histories of it, or unsaid a part of one.

    Args:
        what: which log, and what does not fit.
        kept: the two statements that do not fit, as they were received; whoever has the owner's public key can check them.
    """

    def __init__(self, what: str, *, kept: tuple[bytes, ...] = (), safe: str = "", fix: str = "") -> None:
        self.kept = kept
        super().__init__(
            what,
            safe=safe or "Nothing was released, opened or stored on the strength of it.",
            fix=fix
            or "Take part in nothing under this key until its owner has explained it; keep both heads: they are the proof.",
        )
