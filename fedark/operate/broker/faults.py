"""Errors as they cross gRPC: a status, the error's texts, and the whole of it as a trailer; back
into an error on the other side.

What is the caller's to know is told: why evidence, contract or request was refused. What went wrong
inside the provider's node is
not: paths and the state of its disk are told to its own people. No fedark error holds a secret.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedark.foundation.errors import (
    FedarkError,
    FederationError,
    InputError,
    LogRefused,
    ProtocolError,
    Refused,
    StorageError,
    printable,
    restore,
)
from fedark.v1 import stage_pb2

__all__ = ["FAULT", "error_of", "fault_of", "status_of"]

FAULT = "fedark-fault-bin"
_REASONS, _REASON, _TEXT = 10, 160, 600  # a trailer has 8 KiB, in base64
_INSIDE = FederationError(
    "The provider's node cannot answer now.",
    safe="No key was released.",
    fix="Ask the provider; its node knows why.",
)


def status_of(error: Exception) -> grpc.StatusCode:
    """The gRPC status that says what kind of refusal it is."""
    match error:
        case LogRefused() | StorageError():
            return grpc.StatusCode.UNAVAILABLE
        case Refused():
            return grpc.StatusCode.PERMISSION_DENIED
        case ProtocolError() | InputError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case FederationError():
            return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INTERNAL


def fault_of(error: Exception) -> stage_pb2.StageFault:
    """What the caller is told."""
    if not isinstance(error, FedarkError) or isinstance(error, LogRefused | StorageError):
        error = _INSIDE
    reasons = getattr(error, "reasons", getattr(error, "problems", ()))
    return stage_pb2.StageFault(
        code=type(error).__name__,
        what=printable(error.what, _TEXT),
        safe=printable(error.safe),
        fix=printable(error.fix),
        reasons=[printable(reason, _REASON) for reason in reasons[:_REASONS]],
        log=getattr(error, "proof", b""),
    )


def error_of(error: Any, timeout: float) -> FedarkError:
    """The error behind a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == FAULT and isinstance(value, bytes):
            try:
                fault = stage_pb2.StageFault.FromString(value)
            except DecodeError:
                break
            told = restore(
                fault.code, fault.what, safe=fault.safe, fix=fault.fix, reasons=fault.reasons
            )
            if isinstance(told, Refused):
                told.proof = fault.log
            return told
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return FederationError(
                f"The key broker did not answer within {timeout:.3g} s.", fix="Ask again."
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return FederationError(
                "The key broker is busy, or the request was too large.", fix="Ask again later."
            )
        case grpc.StatusCode.UNAVAILABLE:
            return FederationError(
                "The key broker cannot be reached, or is not who its certificate should say.",
                fix="Check address, certificate and network.",
            )
    return FederationError(f"The key broker failed ({error.code().name}).", fix="Ask the provider.")
