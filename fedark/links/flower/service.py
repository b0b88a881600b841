"""The local service of a node daemon (`fedark.v1.Node`): gRPC on a unix socket in a directory that
only its user may enter.

A call carries one stage: bytes in, bytes out, in pieces of at most 1 MiB. The daemon does one stage
at a time. What goes wrong is told in the words of our own errors; of any other error only the class
is told, its traceback goes to the daemon's log.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from fedark.foundation.closing import Closing
from fedark.foundation.errors import FedarkError, FederationError, printable, restore
from fedark.links.link import MAX_MESSAGE_BYTES, stage_of
from fedark.v1 import node_pb2, node_pb2_grpc, stage_pb2

__all__ = [
    "LONGEST_PATH",
    "OperatorQueries",
    "StageHandler",
    "NodeClient",
    "NodeServer",
    "NodeStatus",
]

_PIECE = 1 << 20
_PAUSE = 0.1
_CONNECTED, _OUTAGES = 5.0, 4
_CALLS = 8  # at a time; all but one of them wait for a stage to end, or are answered at once
LONGEST_PATH = 100  # of a unix socket, in bytes; Linux allows 107
_FAULT = "fedark-fault-bin"
_OPTIONS = [
    ("grpc.max_receive_message_length", 2 * _PIECE),
    ("grpc.max_send_message_length", 2 * _PIECE),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),  # a daemon that was restarted is found at once
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_log = logging.getLogger(__name__)
T = TypeVar("T")


class StageHandler(Protocol):
    """What a daemon owns: a party's side of the protocol."""

    party: str
    role: str

    def handle(self, request: bytes) -> bytes:
        """One stage: serialised StageRequest in, serialised StageReply out. May take minutes."""
        ...

    def close(self) -> None:
        """Stop whatever it started."""
        ...


class OperatorQueries(Protocol):
    """What answers the operator's commands."""

    def jobs(self) -> node_pb2.JobsReply:
        """Contracts with the operator's decisions."""
        ...

    def ledger(self) -> node_pb2.LedgerReply:
        """What was attested, released, refused and spent."""
        ...


class NodeStatus:
    """What a daemon says of itself: party, role, and the run and stage that it works on, if any."""

    def __init__(self, reply: node_pb2.StatusReply) -> None:
        self.party: str = reply.party
        self.role: str = reply.role
        self.run_id: str = reply.run_id
        self.stage: str = reply.stage


def _pieces(data: bytes) -> Iterator[node_pb2.Piece]:
    view = memoryview(data)
    for start in range(0, max(1, len(data)), _PIECE):
        yield node_pb2.Piece(data=bytes(view[start : start + _PIECE]))


def _joined(pieces: Iterable[node_pb2.Piece]) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece.data
        if len(data) > MAX_MESSAGE_BYTES:
            raise FederationError(
                f"A message is over the limit of {MAX_MESSAGE_BYTES} bytes.", safe="It was dropped."
            )
    return bytes(data)


class _NodeServicer(node_pb2_grpc.NodeServicer):
    def __init__(
        self,
        node: StageHandler,
        queries: OperatorQueries | None,
        on_stop: Callable[[], None] | None,
    ) -> None:
        self._node = node
        self._queries = queries
        self._on_stop = on_stop
        self._turn = threading.Lock()
        self._now = ("", "")

    def Handle(  # noqa: N802
        self, request_iterator: Iterable[node_pb2.Piece], context: Any
    ) -> Iterator[node_pb2.Piece]:
        try:
            request = _joined(request_iterator)
            now = _run_and_stage(request)
            if not self._take_turn(now[1], context):
                return
            try:
                self._now = now
                reply = self._node.handle(request)
            finally:
                self._now = ("", "")
                self._turn.release()
        except FedarkError as error:
            _log.warning("stage refused: %s", error)
            context.set_trailing_metadata(((_FAULT, _fault(error)),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, type(error).__name__)
        except Exception as error:
            _log.exception("stage failed")
            context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)
        else:
            yield from _pieces(reply)

    def _take_turn(self, stage: str, context: Any) -> bool:
        """Wait until no other stage is at work; False once the caller has given up, who asks again
        or has no use for the answer.

        A run that was aborted must end all the same.
        """
        while not self._turn.acquire(timeout=_PAUSE):
            if stage != "abort" and not context.is_active():
                return False
        if stage == "abort" or context.is_active():
            return True
        self._turn.release()
        return False

    def Status(self, request: node_pb2.StatusRequest, context: Any) -> node_pb2.StatusReply:  # noqa: N802
        run_id, stage = self._now
        return node_pb2.StatusReply(
            party=self._node.party, role=self._node.role, run_id=run_id, stage=stage
        )

    def Jobs(self, request: node_pb2.JobsRequest, context: Any) -> node_pb2.JobsReply:  # noqa: N802
        return self._asked(context, lambda queries: queries.jobs())

    def Ledger(self, request: node_pb2.LedgerRequest, context: Any) -> node_pb2.LedgerReply:  # noqa: N802
        return self._asked(context, lambda queries: queries.ledger())

    def Stop(self, request: node_pb2.StopRequest, context: Any) -> node_pb2.StopReply:  # noqa: N802
        if self._on_stop is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        else:
            self._on_stop()
        return node_pb2.StopReply()

    def _asked(self, context: Any, ask: Callable[[OperatorQueries], T]) -> T:
        if self._queries is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        try:
            return ask(self._queries)  # type: ignore[arg-type]  # abort raises
        except FedarkError as error:
            context.set_trailing_metadata(((_FAULT, _fault(error)),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, type(error).__name__)
            raise


def _fault(error: FedarkError) -> bytes:
    """The error's texts, within what fits into a call's trailer (8 KiB)."""
    reasons = [printable(reason, 200) for reason in getattr(error, "reasons", ())][:8]
    fault = stage_pb2.StageFault(
        code=type(error).__name__,
        what=printable(error.what, 600),
        safe=printable(error.safe),
        fix=printable(error.fix),
        reasons=reasons,
    )
    return bytes(fault.SerializeToString())


def _run_and_stage(request: bytes) -> tuple[str, str]:
    message = stage_pb2.StageRequest()
    try:
        message.ParseFromString(request)
    except DecodeError:
        return "", "unknown"
    return printable(message.run_id, 80), stage_of(message)


class NodeServer:
    """Serves a node on a unix socket until `close`.

    Args:
        node: whose `handle` is called, one call at a time.
        path: of the socket; its directory must exist and be closed to other users.
        queries: answers the operator's commands, at a node that has an operator's folder.
        on_stop: called when the operator asks the daemon to end.

    Raises:
        FederationError: the path is too long, in use, or its directory is open to others.
    """

    def __init__(
        self,
        node: StageHandler,
        path: Path,
        *,
        queries: OperatorQueries | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        _check_directory(path)
        self._socket = path
        if _is_open(path):
            raise FederationError(f"Another daemon serves {path}.", fix="Stop it first.")
        path.unlink(missing_ok=True)
        self._pool = ThreadPoolExecutor(max_workers=_CALLS, thread_name_prefix="service")
        self._server = grpc.server(self._pool, options=[*_OPTIONS, ("grpc.so_reuseport", 0)])
        node_pb2_grpc.add_NodeServicer_to_server(
            _NodeServicer(node, queries, on_stop), self._server
        )  # type: ignore[no-untyped-call]
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise FederationError(
                f"The socket {path} cannot be opened.", fix="Check its directory."
            ) from None
        finally:
            os.umask(mask)
        self._server.start()

    def close(self) -> None:
        """Stop serving at once and remove the socket."""
        self._server.stop(grace=0.2).wait(timeout=2)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._socket.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    """Whether some process has this socket open, though it may be too busy to answer."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


def _check_directory(path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise FederationError(
            f"The socket path {path} is longer than {LONGEST_PATH} bytes.",
            fix="Use a shorter directory.",
        )
    try:
        directory = path.parent.stat()
    except OSError as error:
        raise FederationError(
            f"{path.parent} cannot be used for a socket: {error.strerror}."
        ) from None
    if directory.st_uid != os.geteuid() or stat.S_IMODE(directory.st_mode) & 0o077:
        raise FederationError(
            f"{path.parent} is open to other users.",
            fix=f"Run: chmod 700 {shlex.quote(str(path.parent))}",
        )


class NodeClient(Closing):
    """Calls a node daemon's service."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._stub = node_pb2_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]

    def handle(self, request: bytes, *, timeout: float, patience: float = 0.0) -> bytes:
        """Pass one stage to the daemon.

        Args:
            patience: seconds that a daemon which is not there, or dies of it, has to be started
                again, each of a few times: the request is then made anew, so it must be one that
                may come twice.

        Raises:
            FedarkError: the node's own error.
            FederationError: the daemon is not there, failed without a word, or took longer than
                `timeout` seconds.
        """
        outages, given_up = 0, 0.0
        while True:
            begun = time.monotonic()
            try:
                return _joined(self._stub.Handle(_pieces(request), timeout=timeout))
            except grpc.RpcError as error:
                ended = time.monotonic()
                if not outages or ended - begun > _CONNECTED:  # it was at work, and died
                    outages, given_up = outages + 1, ended + patience
                gone = error.code() is grpc.StatusCode.UNAVAILABLE
                if not gone or outages > _OUTAGES or ended >= given_up:
                    raise self._explained(error, timeout) from None
            time.sleep(_PAUSE)

    def status(self, *, timeout: float = 5.0) -> NodeStatus:
        """What the daemon is and does."""
        try:
            return NodeStatus(self._stub.Status(node_pb2.StatusRequest(), timeout=timeout))
        except grpc.RpcError as error:
            raise self._explained(error, timeout) from None

    def jobs(self, *, timeout: float = 10.0) -> node_pb2.JobsReply:
        """Contracts with the operator's decisions; raises what `status` raises, or the daemon's own
        error.
        """
        try:
            return self._stub.Jobs(node_pb2.JobsRequest(), timeout=timeout)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise self._explained(error, timeout) from None

    def ledger(self, *, timeout: float = 30.0) -> node_pb2.LedgerReply:
        """What was attested, released, refused and spent; raises as `jobs`."""
        try:
            return self._stub.Ledger(node_pb2.LedgerRequest(), timeout=timeout)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            raise self._explained(error, timeout) from None

    def stop(self, *, timeout: float = 5.0) -> None:
        """End the daemon."""
        try:
            self._stub.Stop(node_pb2.StopRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise self._explained(error, timeout) from None

    def close(self) -> None:
        self._channel.close()

    def _explained(self, error: Any, timeout: float) -> FedarkError:
        code = error.code()
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            for key, value in error.trailing_metadata() or ():
                if key == _FAULT:
                    fault = stage_pb2.StageFault.FromString(value)
                    return restore(
                        fault.code,
                        fault.what,
                        safe=fault.safe,
                        fix=fault.fix,
                        reasons=fault.reasons,
                    )
        if code is grpc.StatusCode.INTERNAL:
            return FederationError(
                f"The node failed ({printable(error.details() or '', 100)}).", fix="See its log."
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return FederationError(f"The node did not answer within {timeout:.0f} s.")
        # The first sentence goes to the aggregator, from a node's ClientApp: where the socket is
        # does not concern it.
        return FederationError(
            f"The node daemon cannot be reached ({code.name}).",
            fix=f"Start it; its socket is {self._socket}.",
        )
