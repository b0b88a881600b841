"""Errors as they cross a link between parties: class and texts, and back into errors."""

from __future__ import annotations

from fedark.foundation.errors import FedarkError, Refused, printable, restore
from fedark.v1 import stage_pb2

__all__ = ["error_of", "fault_of"]


def fault_of(
    error: FedarkError, *, text: int = 2000, reasons: int | None = None, reason: int = 600
) -> stage_pb2.StageFault:
    """An error as it crosses the wire: its class and its texts, which hold no secret.

    Args:
        text, reason: longest text of what happened, and of one reason, in characters.
        reasons: most reasons; None for all.
    """
    listed = getattr(error, "reasons", getattr(error, "problems", ()))
    return stage_pb2.StageFault(
        code=type(error).__name__,
        what=printable(error.what, text),
        safe=printable(error.safe),
        fix=printable(error.fix),
        reasons=[printable(one, reason) for one in listed[:reasons]],
        log=getattr(error, "proof", b""),
    )


def error_of(fault: stage_pb2.StageFault) -> FedarkError:
    """The error that a fault stands for."""
    error = restore(fault.code, fault.what, safe=fault.safe, fix=fault.fix, reasons=fault.reasons)
    if isinstance(error, Refused):
        error.proof = fault.log
    return error
