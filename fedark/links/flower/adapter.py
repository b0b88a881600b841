"""The only module that touches private APIs of Flower; pinned to flwr 1.42.0 and held by contract
tests that also run on 1.41.0 (docs/adr/0006-flower-behind-one-module.md).

What it wraps, and why the public API is not enough:

- the Control API's client: `flwr` the command reads and writes the user's own ~/.flwr and prompts;
- the SuperLink's server: it would listen on TCP, where every account of the machine reaches APIs
  that authenticate nobody. `run_superlink` serves the same application on a unix socket, whose
  directory only the host's account may enter, and `over_socket` makes its clients speak there;
- the Fleet API's client: the stock SuperNode polls every 3 s, starts a fresh process for each
  message, and unpacks and runs whatever bundle it is sent. `Fleet` is the same protocol,
  authenticated the same way, for our own loop;
- the task process's entry point: so that the pinned bundle is checked before it is unpacked.

Everything that comes from the SuperLink is untrusted here: only metadata is parsed before the
bundle has been checked.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import RetryInvoker, RetryState, make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from fedark.foundation.closing import Closing
from fedark.foundation.errors import FederationError, Refused, printable
from fedark.foundation.proxies import direct
from fedark.links.flower.bundle import PINNED_SHA256, build, require_pinned
from fedark.links.flower.configuration import write_private

__all__ = [
    "Control",
    "LOST_ON_THE_WAY",
    "NOT_REACHED",
    "RUN_OVER",
    "Fleet",
    "Incoming",
    "NodeRecord",
    "RunState",
    "connect",
    "error_reply",
    "over_socket",
    "retry_soon",
    "run_executor",
    "run_server_task",
    "run_superlink",
    "sending",
]

# A message is announced before its objects are uploaded; Flower waits 1 s before it looks again.
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 0.5
_LOOK_SECONDS, _PULL_SECONDS = 3.0, 30.0
LOST_ON_THE_WAY = frozenset(
    {
        int(ErrorCode.MESSAGE_UNAVAILABLE),
        int(ErrorCode.REPLY_MESSAGE_UNAVAILABLE),
        int(ErrorCode.NODE_UNAVAILABLE),
    }
)
"""Error codes of a message that never reached its node, or of a reply that was lost: it may be sent
again.
"""
NOT_REACHED = (httpx.TransportError, httpx.HTTPStatusError)
"""What a SuperLink that is not there, or just starting, makes of a request."""
RUN_OVER = RunNotRunningException
"""What it makes of one for a run that was stopped."""
_RETRY_SECONDS = 1.0
_NAME = "superlink"  # in the Host header; the socket's path is what leads there
_BACKLOG = 2048
_FLEET_ERRORS = (httpx.HTTPError, DecodeError, RunNotRunningException, RuntimeError, ValueError)


@dataclass(frozen=True)
class NodeRecord:
    """What the SuperLink knows of a registered node: `status` is "registered", "online", "offline"
    or "unregistered".
    """

    node_id: int
    name: str
    status: str
    public_key: bytes


@dataclass(frozen=True)
class RunState:
    """A run's status ("pending", "starting", "running", "finished"), its sub-status and details
    once finished.
    """

    status: str
    sub_status: str
    details: str

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def completed(self) -> bool:
        return self.finished and self.sub_status == "completed"


class Control(Closing):
    """The host's own client to its SuperLink: registers nodes, starts, watches and stops runs.

    Args:
        path: the SuperLink's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with direct():
            self._client = ControlHttpClient(
                f"http://{_NAME}",
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        _speak_over(self._client, path)

    def register_node(self, name: str, public_key: bytes) -> int:
        """Admit the node with this public key (PEM, a NIST curve). Returns its node id."""
        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._call("register a node", self._client.RegisterNode, request).node_id)

    def unregister_node(self, node_id: int) -> None:
        """Close a node out: its key authenticates nothing any more."""
        self._call(
            "unregister a node", self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id)
        )

    def nodes(self) -> tuple[NodeRecord, ...]:
        """All registered nodes."""
        reply = self._call("list the nodes", self._client.ListNodes, ListNodesRequest())
        return tuple(
            NodeRecord(n.node_id, n.name, n.status, bytes(n.public_key)) for n in reply.nodes_info
        )

    def start_run(self, bundle: bytes | None = None) -> int:
        """Submit the pinned bundle. `bundle`: another one, for tests of its refusal. Returns the
        run id.
        """
        content = build() if bundle is None else bundle
        request = StartRunRequest(fab=fab_to_proto(Fab(PINNED_SHA256, content, {})))
        run_id = int(self._call("start a run", self._client.StartRun, request).run_id)
        if not run_id:
            raise FederationError(
                "The SuperLink did not accept the run.", safe="Nothing was started."
            )
        return run_id

    def run_state(self, run_id: int) -> RunState:
        """The state of a run."""
        reply = self._call("look at a run", self._client.ListRuns, ListRunsRequest(run_id=run_id))
        run = reply.run_dict.get(run_id)
        if run is None:
            raise FederationError(f"The SuperLink does not know run {run_id}.")
        return RunState(run.status.status, run.status.sub_status, printable(run.status.details))

    def stop_run(self, run_id: int) -> None:
        """Stop a run; its messages are answered no more."""
        self._call("stop a run", self._client.StopRun, StopRunRequest(run_id=run_id))

    def close(self) -> None:
        self._client.close()

    def _call(self, purpose: str, method: Callable[[Any], Any], request: Any) -> Any:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            reason = known.message if known else f"HTTP status {error.response.status_code}"
            raise FederationError(
                f"The SuperLink refused to {purpose}: {printable(reason)}"
            ) from None
        except httpx.HTTPError as error:
            raise FederationError(
                f"The SuperLink cannot be reached to {purpose} ({type(error).__name__}).",
                fix=f"Look at its log; its socket is {self._path}.",
            ) from None


@dataclass(frozen=True)
class Incoming:
    """A message that waits for this node; `message` has metadata only."""

    message: Message
    tree: Any

    @property
    def run_id(self) -> int:
        return int(self.message.metadata.run_id)


class Fleet:
    """One authenticated node's connection to the SuperLink (made by `connect`)."""

    def __init__(
        self,
        callbacks: tuple[Any, ...],
        trouble: threading.Event | None = None,
        renew: Callable[[int], bool] | None = None,
    ) -> None:
        self.node_id: int = callbacks[0]
        self._trouble, self._renew = trouble or threading.Event(), renew or (lambda node_id: True)
        (
            self._receive,
            self._send,
            self._get_run,
            self._get_fab,
            self._pull,
            self._push,
            self._confirm,
        ) = callbacks[1:]

    def pull(self) -> Incoming | None:
        """The next message for this node, without its content.

        A SuperLink that dies as it answers has marked a message as delivered that never came.
        Whoever had to ask again therefore connects anew, which tells the sender to send again what
        has no answer yet. Trouble counts until that is done: an asking or a connecting that failed
        leaves it to the next one, which then connects before it asks.
        """
        self._end_trouble()
        received = self._receive()
        self._end_trouble()
        return Incoming(*received) if received is not None else None

    def _end_trouble(self) -> None:
        if self._trouble.is_set():
            self._trouble.clear()  # first: another thread's new trouble must count
            if not self._renew(self.node_id):
                self._trouble.set()

    def require_pinned_bundle(self, run_id: int) -> None:
        """Fetch the bundle of a run and compare it with the pinned one.

        Raises:
            Refused: it is another one.
        """
        try:
            run = self._get_run(run_id)
            content = self._get_fab(run.fab_hash, run_id).content
        except RunNotRunningException:
            raise FederationError(f"Run {run_id} is over.") from None
        except _FLEET_ERRORS as error:
            raise Refused(
                f"The bundle of run {run_id} cannot be fetched ({type(error).__name__})."
            ) from None
        require_pinned(content)

    def content(self, incoming: Incoming) -> Message:
        """Fetch the content of a message; the SuperLink then forgets it."""
        try:
            message = pull_and_inflate_object_from_tree(
                incoming.tree,
                functools.partial(self._pull, incoming.run_id),
                functools.partial(self._confirm, incoming.run_id),
                return_type=Message,
                initial_backoff=_FIRST_WAIT,
                backoff_cap=_LONGEST_WAIT,
                max_time=_PULL_SECONDS,
            )
        except Exception as error:
            raise FederationError(
                f"A message cannot be fetched ({type(error).__name__}).", safe="It was dropped."
            ) from None
        message.metadata.__dict__["_message_id"] = incoming.message.metadata.message_id
        return message

    def push(self, reply: Message, seconds: float) -> None:
        """Send a reply; `seconds` is how long the node worked on it."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            run_id = reply.metadata.run_id
            try:
                wanted, session = self._send(reply, get_object_tree(reply), seconds)
                push = functools.partial(self._push, run_id, session)
                push_objects(get_all_nested_objects(reply), push, object_ids_to_push=wanted)
            except Exception as error:
                raise FederationError(
                    f"A reply cannot be sent ({type(error).__name__}).", safe="It was dropped."
                ) from None


def retry_soon() -> None:
    """Look for a SuperLink that is gone about once a second: Flower's pauses grow to 20 s, longer
    than it takes to start one.
    """
    retry: Any = importlib.import_module("flwr.supercore.retry.http_retry")
    retry.MAX_RETRY_DELAY = _RETRY_SECONDS


@contextmanager
def connect(
    address: str, ca: Path, key: ec.EllipticCurvePrivateKey, former: Path | None = None
) -> Iterator[Fleet]:
    """Connect a node. Heartbeats are sent until the context ends; a lost connection is tried again
    without end.

    Ends the process if the SuperLink does not know `key`, or if another process is connected with
    it.

    Args:
        former: a file of this node's own, for the connection after this one. A process that was
            killed leaves its node online at the SuperLink for a minute, which refuses a second
            connection meanwhile: the next process first takes that one back, if this file says that
            it was ours and its process is gone.
    """
    connection: Any = importlib.import_module("flwr.supernode.fleet_http_connection")

    retry_soon()
    trouble = threading.Event()
    connection.make_simple_http_retry_invoker = functools.partial(
        _noted, make_simple_http_retry_invoker, trouble
    )
    if former is not None:
        _take_back(address, ca, key, former)
    with connection.http_request_response(
        address, False, str(ca), (key, key.public_key())
    ) as callbacks:
        fleet = Fleet(callbacks, trouble, functools.partial(_connect_anew, address, ca, key))
        if former is not None:
            write_private(former, f"{fleet.node_id} {os.getpid()}".encode())
        yield fleet
    if former is not None:
        former.unlink(missing_ok=True)


def _noted(make: Callable[[], RetryInvoker], trouble: threading.Event) -> RetryInvoker:
    """What `make` makes, which also sets `trouble` whenever a request has to be made again."""
    invoker = make()
    before = invoker.on_backoff

    def on_backoff(state: RetryState) -> None:
        trouble.set()
        if before is not None:
            before(state)

    invoker.on_backoff = on_backoff
    return invoker


def _fleet_client(address: str, ca: Path, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    return FleetHttpClient.from_server_address(address, False, str(ca), interceptors=interceptors)


def _connect_anew(address: str, ca: Path, key: ec.EllipticCurvePrivateKey, node_id: int) -> bool:
    """Leave and come back: the time at which the node connected, which the SuperLink tells, is then
    a new one.

    Returns:
        Whether the SuperLink was reached for both. It may not be, while the trouble lasts.
    """
    public = public_key_to_bytes(key.public_key())
    with _fleet_client(address, ca, key) as client:
        try:
            with suppress(httpx.HTTPStatusError):  # it was not online any more
                client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
            with suppress(httpx.HTTPStatusError):  # it is online
                client.ActivateNode(
                    ActivateNodeRequest(
                        public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
                    )
                )
        except (httpx.HTTPError, DecodeError):
            return False
    return True


def _take_back(address: str, ca: Path, key: ec.EllipticCurvePrivateKey, former: Path) -> None:
    try:
        node_id, pid = (int(word) for word in former.read_text().split())
    except (OSError, ValueError):
        return
    if Path(f"/proc/{pid}").exists() and pid != os.getpid():
        return
    with (
        _fleet_client(address, ca, key) as client,
        suppress(
            httpx.HTTPError, DecodeError
        ),  # it was not online any more; or it says so again in a moment
    ):
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


def error_reply(reason: str, to: Message, *, refused: bool = False, lost: bool = False) -> Message:
    """A reply that says what went wrong. `refused`: it was the bundle. `lost`: the message did not
    come whole; send it again.
    """
    code = ErrorCode.INVALID_FAB if refused else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    code = ErrorCode.MESSAGE_UNAVAILABLE if lost else code
    return Message(Error(code=int(code), reason=printable(reason, 600)), reply_to=to)


class _Sending:
    """What the link and the grid below it tell each other.

    Attributes:
        goes_on: whether what the SuperLink has announced is still on its way; the link knows which
            nodes are connected.
        trouble: set when a request of the grid had to be made again: a reply may have been lost
            with the first one.
    """

    goes_on: Callable[[], bool] = staticmethod(lambda: True)
    trouble = threading.Event()


sending = _Sending()


def _while_it_comes(pull_objects: Callable[..., Any]) -> Callable[..., Any]:
    """Flower waits three minutes for the rest of a reply whose sender was killed in the midst of
    it. This one asks `sending`.
    """

    def pull(*args: Any, **kwargs: Any) -> Any:
        while True:
            began = time.monotonic()
            try:
                limits = {
                    "initial_backoff": _FIRST_WAIT,
                    "backoff_cap": _LONGEST_WAIT,
                    "max_time": _LOOK_SECONDS,
                }
                return pull_objects(*args, **{**kwargs, **limits})
            except ObjectPullError:
                ran_out = time.monotonic() - began >= _LOOK_SECONDS
                if not (ran_out and sending.goes_on()):
                    raise

    return pull


def _speak_over(client: ProtobufClient, path: Path) -> None:
    client._client.close()
    client._client = httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), timeout=client._client.timeout
    )


def over_socket(path: Path) -> None:
    """From now on every client of Flower's APIs in this process speaks over the SuperLink's socket,
    whatever address it is given.
    """
    begin = ProtobufClient.__init__

    def init(client: ProtobufClient, *args: Any, **kwargs: Any) -> None:
        begin(client, *args, **kwargs)
        _speak_over(client, path)

    ProtobufClient.__init__ = init


def run_superlink(path: Path, *arguments: str) -> None:
    """Flower's SuperLink, serving on the unix socket `path` instead of TCP.

    It authenticates nodes and nobody else: who may open the socket decides who may submit runs,
    register nodes or take tasks. So the socket's directory must be closed to other users; a file
    mode mask makes the socket itself private too.

    Args:
        arguments: of `flower-superlink`. It demands certificates where nodes are to authenticate
            themselves; they are not used, TLS is the front's.
    """
    command: Any = importlib.import_module("flwr.superlink.cli.flower_superlink")
    serve = command.uvicorn.run

    def serve_on_socket(**options: Any) -> None:
        for name in ("host", "port", "ssl_keyfile", "ssl_certfile"):
            del options[name]
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            os.umask(mask)
            listener.listen(_BACKLOG)
            serve(**options, fd=listener.fileno())

    command.uvicorn = SimpleNamespace(run=serve_on_socket)
    sys.argv = ["flower-superlink", *arguments]
    command.flower_superlink()


def run_executor(path: Path, *arguments: str) -> None:
    """Flower's executor, which asks the SuperLink on its socket for tasks and starts their
    processes. `arguments`: of `flower-superexec`.
    """
    from flwr.supercore.cli import flower_superexec

    over_socket(path)
    sys.argv = ["flower-superexec", "--runtime-api-address", f"{_NAME}:80", *arguments]
    sys.argv.append("--insecure")  # no TLS inside of a socket of its own account
    flower_superexec()


def run_server_task(path: Path) -> None:
    """The `flwr-serverapp` task process, for the pinned bundle alone."""
    from flwr.superlink.cli import flwr_serverapp

    over_socket(path)
    runtime: Any = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    install = runtime.install_from_fab

    def install_pinned(content: bytes, *args: Any, **kwargs: Any) -> Any:
        return install(require_pinned(content), *args, **kwargs)

    runtime.install_from_fab = install_pinned
    retry_soon()
    grid: Any = importlib.import_module("flwr.superlink.grid.http_grid")
    grid.make_simple_http_retry_invoker = functools.partial(
        _noted, make_simple_http_retry_invoker, sending.trouble
    )
    grid.pull_objects = _while_it_comes(grid.pull_objects)
    flwr_serverapp()
