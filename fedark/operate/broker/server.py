"""gRPC around the broker: TLS only, unary calls with a deadline, bounded messages, bounded
concurrency, health, no reflection.

A call that names no deadline, or one further away than a minute, is refused. A connection lives for
two minutes at most, so a caller who never finishes a request holds a thread no longer. Of the
health service only Check is offered: Watch holds a call open for as long as the caller likes, and a
few of those would use up all that may run at once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedark.foundation.closing import Closing
from fedark.foundation.errors import (
    FedarkError,
    FederationError,
    InputError,
    LogRefused,
    ProtocolError,
    Refused,
    StorageError,
)
from fedark.links import faults
from fedark.operate.broker.keys import KeyBroker
from fedark.v1 import broker_pb2 as pb
from fedark.v1 import broker_pb2_grpc, stage_pb2

__all__ = [
    "FAULT",
    "LONGEST_DEADLINE",
    "MAX_MESSAGE",
    "SERVICE",
    "BrokerServer",
    "fault_of",
    "status_of",
]

SERVICE = pb.DESCRIPTOR.services_by_name["Broker"].full_name
MAX_MESSAGE = 5 << 20  # a contract has 4 MiB at most
LONGEST_DEADLINE = 60.0
_CONNECTION_SECONDS, _GRACE_SECONDS = 120, 5
_CONCURRENT = 8
_MAX_PEM = 1 << 20
_Answer = TypeVar("_Answer", bound=object)
FAULT = "fedark-fault-bin"
"""The trailer that carries a refusal as a StageFault."""
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
    """What the caller is told: why evidence, contract or request was refused. What went wrong
    inside the provider's node, such as its disk, is told to the provider's own people alone.
    """
    if not isinstance(error, FedarkError) or isinstance(error, LogRefused | StorageError):
        error = _INSIDE
    # a trailer has 8 KiB, in base64
    return faults.fault_of(error, text=600, reasons=10, reason=160)


class _BrokerServicer(broker_pb2_grpc.BrokerServicer):
    def __init__(self, broker: KeyBroker) -> None:
        self._broker = broker

    def Challenge(  # noqa: N802
        self, request: pb.BrokerChallengeRequest, context: Any
    ) -> pb.BrokerChallengeReply:
        return self._answer(context, request.about.party, lambda: self._broker.challenge(request))

    def Release(self, request: pb.BrokerReleaseRequest, context: Any) -> stage_pb2.Grants:  # noqa: N802
        waiting: Callable[[], bool] = lambda: context.is_active() and context.time_remaining() > 0  # noqa: E731
        return self._answer(
            context, request.about.party, lambda: self._broker.release(request, waiting=waiting)
        )

    def _answer(self, context: Any, party: str, answer: Callable[[], _Answer]) -> _Answer:
        try:
            remaining = context.time_remaining()
            if (
                remaining is None or remaining > LONGEST_DEADLINE + 1
            ):  # clocks of two hosts count the way there differently
                raise ProtocolError(
                    f"A call must name a deadline, within {LONGEST_DEADLINE:.0f} s.",
                    safe="Nothing was done.",
                    fix="Set one.",
                )
            return answer()
        except Exception as error:
            failed = error
        self._broker.tell(
            party,
            failed if isinstance(failed, FedarkError) else FederationError(type(failed).__name__),
        )
        fault = fault_of(failed)
        context.set_trailing_metadata(((FAULT, fault.SerializeToString()),))
        return context.abort(status_of(failed), fault.what)  # type: ignore[no-any-return]  # it raises


class _Health(health.HealthServicer):  # type: ignore[misc]
    """Check alone; see the module's docstring."""

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Ask by Check.")


class BrokerServer(Closing):
    """Serves `broker` until `close`.

    Args:
        listen: HOST:PORT; port 0 chooses one.
        certificate, key: PEM files of the server's chain and its private key (mode 0600).
        concurrent: calls that may run at once; more are refused, not queued.

    Attributes:
        port: that it listens on.

    Raises:
        InputError: a file is missing or malformed, or the key is open to other users.
        FederationError: the address cannot be listened on.
    """

    def __init__(
        self,
        broker: KeyBroker,
        *,
        listen: str,
        certificate: Path,
        key: Path,
        concurrent: int = _CONCURRENT,
    ) -> None:
        pair = (_private(key), _content(certificate))
        try:
            credentials = grpc.ssl_server_credentials([pair])
        except ValueError:
            raise InputError(f"{certificate} and {key} are no certificate and key.") from None
        self._pool = ThreadPoolExecutor(max_workers=concurrent, thread_name_prefix="broker")
        self._server = grpc.server(
            self._pool,
            maximum_concurrent_rpcs=concurrent,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.max_connection_age_ms", _CONNECTION_SECONDS * 1000),
                ("grpc.max_connection_age_grace_ms", _GRACE_SECONDS * 1000),
                ("grpc.so_reuseport", 0),
            ],
        )
        broker_pb2_grpc.add_BrokerServicer_to_server(_BrokerServicer(broker), self._server)  # type: ignore[no-untyped-call]
        self._health = _Health()
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        try:
            self.port: int = self._server.add_secure_port(listen, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            self._pool.shutdown(wait=False)
            raise FederationError(
                f"The key broker cannot listen on {listen} with {certificate} and {key}.",
                safe="Nothing was served.",
                fix=(
                    "Choose a free address; see that key and certificate are PEM and belong"
                    " together."
                ),
            )
        self._server.start()

    def wait(self) -> None:
        """Return when the server has been closed."""
        self._server.wait_for_termination()

    def close(self) -> None:
        """Say so to health checks, let running calls end within five seconds, then stop."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace=_GRACE_SECONDS).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_PEM)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise InputError(
                f"{path} is open to other users (mode {mode & 0o777:o}).",
                fix=f"Run: chmod 600 {path}",
            )
        return file.read(_MAX_PEM)
