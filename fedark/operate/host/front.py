"""The one port of a host that the world can reach: TLS, and behind it the authenticated node API
and nothing else.

    python -m fedark.operate.host.front CONFIG.json

Flower serves all of its APIs in one place and authenticates only the node API: whoever reaches the
rest can register nodes and submit runs. So that place is a unix socket of the host's account, and
this front passes a closed list of routes to it, for keys of approved nodes alone; Flower then
checks the signature under that key. The host's own routes (`service`) are answered here.

Rules: HTTP/1.1 (RFC 9112) parsed by h11 on both sides, and every request and response written anew
from what was parsed, so no two parsers can disagree about where one ends; the target must equal a
route byte for byte; bodies have a length, no transfer coding; headers outside a short list are
dropped. It holds no secret but the TLS key.

Who has not shown a node's key gets little: 64 KiB of body, seconds of time, and a place that is
taken away when others need it (`visitors`). Every head and body has a deadline in all, not only
for silence. What is refused is logged with the client's address, at a bounded rate.
Why no web framework stands here: docs/adr/0001-front.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ctypes
import errno
import gc
import ipaddress
import itertools
import logging
import resource
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h11

from fedark.foundation import logs
from fedark.foundation.errors import FedarkError, FederationError, printable
from fedark.links.flower import configuration
from fedark.operate.host.folder import LOOPBACK, HostFolder, host_of, port_of
from fedark.operate.host.service import PREFIX, HostAnswer, HostRequest, HostService
from fedark.operate.host.visitors import Limits, Visitors

__all__ = ["FLEET_ROUTES", "Front", "Service", "FrontSettings", "main", "server_context"]

FLEET = "/v1/fleet/"
FLEET_ROUTES = frozenset(
    f"{FLEET}{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What a node needs of Flower's Fleet API. Registration is the host's own act."""
_KEY_HEADER = b"flwr-public-key"
_PASSED = (b"content-type", b"accept")
_PIECE = 64 << 10
_LINGER_SECONDS = 2.0
_COLLECT_EVERY = 64  # connections
_log = logging.getLogger("fedark.operate.host.front")  # also where it runs as __main__


@dataclass(frozen=True)
class FrontSettings:
    """The front's configuration: the host's folder, and the SuperLink's socket."""

    folder: str
    superlink: str


class Service(Protocol):
    """The host's own routes, see `HostService`."""

    def begin(self, method: str, path: str, headers: dict[str, str]) -> HostRequest | HostAnswer:
        """Judge a request by its head."""
        ...

    def finish(self, call: HostRequest, body: bytes) -> HostAnswer:
        """Answer it."""
        ...


class _RefusedError(Exception):
    """Answer so and close. `why`: for the log."""

    def __init__(self, status: int, why: str, answer: HostAnswer | None = None) -> None:
        self.answer, self.why = answer or HostAnswer(status, "text/plain", b""), why
        super().__init__(why)


class Front:
    """See the module's docstring.

    Args:
        tls: the server's context.
        upstream: the SuperLink's socket.
        admits: whether a transport key (PEM) is an approved node's. Such a key is known to its node
            and the host alone, and the SuperLink checks the signature under it.
        service: the host's own routes.
        limits: see there.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext,
        upstream: Path,
        admits: Callable[[str], bool],
        service: Service,
        limits: Limits | None = None,
    ) -> None:
        self._tls, self._upstream = tls, upstream
        self._admits, self._service = admits, service
        self._limits = limits or Limits()
        self._visitors = Visitors()
        self._at_work: Counter[str] = Counter()
        self._refusals = logs.Bounded(_log)
        self._listening: list[tuple[socket.socket, asyncio.Task[None]]] = []

    async def start(self, listen: str) -> None:
        """Listen on host:port.

        Raises:
            FederationError: it cannot.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host_of(listen), port_of(listen), type=socket.SOCK_STREAM)
        for family, where in dict.fromkeys((entry[0], entry[4]) for entry in found):
            try:
                bound = socket.create_server(where[:2], family=family, backlog=1024)
            except OSError as error:
                raise FederationError(f"Cannot listen on {listen}: {error.strerror}.") from None
            bound.setblocking(False)
            self._listening.append((bound, loop.create_task(self._accept(bound))))

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        ending = [accepting for _, accepting in self._listening] + self._visitors.tasks()
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for bound, _ in self._listening:
            bound.close()

    async def _accept(self, bound: socket.socket) -> None:
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        ended = itertools.count(1)

        def forget(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if next(ended) % _COLLECT_EVERY == 0:
                loop.call_soon(_return_memory)

        while True:
            try:
                plain, where = await loop.sock_accept(bound)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._refusals.warning("no connection can be taken: %s", error.strerror)
                    await asyncio.sleep(0.2)
                continue
            task = loop.create_task(self._receive(plain, _network(str(where[0]))))
            tasks.add(task)
            task.add_done_callback(forget)

    async def _receive(self, plain: socket.socket, address: str) -> None:
        """One connection, from its first byte; places are counted before the TLS handshake."""
        task = asyncio.current_task()
        assert task is not None
        closed = self._visitors.enter(task, address, self._limits)
        if closed is None:
            plain.close()
            self._refusals.warning("refused a connection from %s: too many", address)
            return
        if closed:
            self._refusals.warning("closed a connection from %s: too many", closed)
        loop, limits = asyncio.get_running_loop(), self._limits
        reader = asyncio.StreamReader(limit=_PIECE, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport: asyncio.BaseTransport | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                plain,
                ssl=self._tls,
                ssl_handshake_timeout=limits.head,
                ssl_shutdown_timeout=_LINGER_SECONDS,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            await self.serve(reader, writer, address)
        except (OSError, ssl.SSLError):
            pass
        finally:
            self._visitors.leave(task)
            if isinstance(transport, asyncio.Transport):
                transport.abort()
            else:
                plain.close()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str
    ) -> None:
        """Answer the requests of one connection, until it ends."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10)
        peer = _Peer(http, reader, writer, self._limits)
        onward: _Peer | None = None
        try:
            while True:
                request: object = None
                try:
                    request = await peer.event(self._limits.head)
                    if not isinstance(request, h11.Request):
                        break
                    with logs.working_on(client=address):
                        onward = await self._answer(request, peer, onward)
                except _RefusedError as error:
                    self._refused(address, request, error.answer.status, error.why)
                    await peer.respond(error.answer, close=True)
                    await peer.linger()
                    break
                except h11.RemoteProtocolError as error:
                    self._refused(address, request, 400, str(error))
                    await peer.respond(HostAnswer(400, "text/plain", b""), close=True)
                    break
                if peer.http.our_state is not h11.DONE or peer.http.their_state is not h11.DONE:
                    break
                peer.http.start_next_cycle()
        except TimeoutError:
            if isinstance(request, h11.Request) or peer.http.trailing_data[0]:
                self._refused(address, request, 408, "it took too long")
        except (OSError, asyncio.IncompleteReadError, h11.ProtocolError, ssl.SSLError) as error:
            _log.debug("a connection ended: %s", type(error).__name__)
        finally:
            if onward is not None:
                await onward.close()
            await peer.close()

    def _refused(self, address: str, request: object, status: int, why: str) -> None:
        asked = "a request"
        if isinstance(request, h11.Request):
            asked = f"{request.method.decode('ascii')} {request.target.decode('ascii', 'replace')}"
        self._refusals.warning(
            "refused %s from %s with %d: %s", printable(asked, 160), address, status, why
        )

    async def _answer(
        self, request: h11.Request, peer: _Peer, onward: _Peer | None
    ) -> _Peer | None:
        method, target = request.method.decode("ascii"), request.target.decode("ascii", "replace")
        names = [name for name, _ in request.headers]
        length = _length(request, names)
        if target.startswith(PREFIX):
            await self._own(request, method, target, length, peer)
            return onward
        if method != "POST" or target not in FLEET_ROUTES:
            raise _RefusedError(404, "no such route")
        keys = [value for name, value in request.headers if name == _KEY_HEADER]
        if len(keys) != 1 or not await asyncio.to_thread(self._admitted, keys[0]):
            raise _RefusedError(401, "not the key of an approved node")
        self._known()
        if length > self._limits.body:
            raise _RefusedError(413, f"a body of {length} bytes")
        return await self._forward(request, length, peer, onward)

    async def _own(
        self, request: h11.Request, method: str, target: str, length: int, peer: _Peer
    ) -> None:
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
        call = await asyncio.to_thread(self._service.begin, method, target, headers)
        if isinstance(call, HostAnswer):
            raise _RefusedError(call.status, call.why, call)
        if length > call.most:
            raise _RefusedError(413, f"a body of {length} bytes")
        if call.node:
            self._known()
        with self._turn(call.node):
            async with asyncio.timeout(self._limits.deadline(length)):
                body = b"".join([data async for data in peer.body()])
            answer = await asyncio.to_thread(self._service.finish, call, body)
            del body
            if answer.why:
                raise _RefusedError(answer.status, answer.why, answer)
            await peer.respond(answer)

    def _known(self) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._visitors.known(task)

    @contextmanager
    def _turn(self, node: str) -> Iterator[None]:
        """One of a node's requests at work: a body is in memory meanwhile."""
        if node and self._at_work[node] >= self._limits.per_node:
            raise _RefusedError(429, f"{node} asks too much at a time")
        self._at_work[node] += 1
        try:
            yield
        finally:
            self._at_work[node] -= 1
            if not self._at_work[node]:
                del self._at_work[node]

    def _admitted(self, header: bytes) -> bool:
        try:
            return self._admits(base64.b64decode(header, validate=True).decode("ascii").strip())
        except (binascii.Error, UnicodeDecodeError):
            return False

    async def _forward(
        self, request: h11.Request, length: int, peer: _Peer, onward: _Peer | None
    ) -> _Peer | None:
        if onward is not None and onward.reader.at_eof():
            await onward.close()
            onward = None
        if onward is None:
            try:
                streams = await asyncio.open_unix_connection(self._upstream)
            except OSError:
                raise _RefusedError(503, "the SuperLink does not answer") from None
            onward = _Peer(h11.Connection(h11.CLIENT), *streams, self._limits)
        headers = [(b"host", b"superlink"), (b"content-length", str(length).encode())]
        headers += [
            (name, value)
            for name, value in request.headers
            if name in _PASSED or name.startswith(b"flwr-")
        ]
        try:
            await onward.send(h11.Request(method="POST", target=request.target, headers=headers))
            async with asyncio.timeout(self._limits.deadline(length)):
                async for data in peer.body():
                    await onward.send(h11.Data(data=data))
            await onward.send(h11.EndOfMessage())
            response = await onward.event(self._limits.silence)
            while isinstance(response, h11.InformationalResponse):
                response = await onward.event(self._limits.silence)
            if not isinstance(response, h11.Response):
                raise _RefusedError(502, "the SuperLink broke off")
        except (OSError, h11.RemoteProtocolError, TimeoutError):
            await onward.close()
            raise _RefusedError(502, "the SuperLink broke off, or the node") from None
        kept = (b"content-type", b"content-length")
        back = [
            (name, value)
            for name, value in response.headers
            if name in kept or name.startswith(b"flwr-")
        ]
        await peer.send(h11.Response(status_code=response.status_code, headers=back))
        async for data in onward.body():
            await peer.send(h11.Data(data=data))
        await peer.send(h11.EndOfMessage())
        if onward.http.our_state is h11.DONE and onward.http.their_state is h11.DONE:
            onward.http.start_next_cycle()
            return onward
        await onward.close()
        return None


def _length(request: h11.Request, names: list[bytes]) -> int:
    """The length of the request's body; a transfer coding, and whatever asks for another protocol,
    is refused.
    """
    if {b"transfer-encoding", b"upgrade", b"expect", b"trailer"} & set(names) or names.count(
        b"content-length"
    ) > 1:
        raise _RefusedError(400, "a transfer coding, or another protocol")
    values = [value for name, value in request.headers if name == b"content-length"]
    return int(values[0]) if values else 0


class _Peer:
    """An h11 connection with its streams."""

    def __init__(
        self,
        http: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: Limits,
    ) -> None:
        self.http, self.reader, self._writer, self._limits = http, reader, writer, limits

    async def event(self, seconds: float) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event, within `seconds` in all."""
        async with asyncio.timeout(seconds):
            while True:
                event = self.http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self.http.receive_data(await self.reader.read(_PIECE))

    async def body(self) -> AsyncIterator[bytes]:
        """The pieces of the message's body."""
        while True:
            event = await self.event(self._limits.silence)
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise h11.RemoteProtocolError("the connection ended in a body")

    async def send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            self._writer.write(data)
            async with asyncio.timeout(self._limits.silence):
                await self._writer.drain()

    async def respond(self, answer: HostAnswer, *, close: bool = False) -> None:
        """A whole response; none if one has begun already."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("content-type", answer.kind),
            ("content-length", str(len(answer.body))),
            ("cache-control", "no-store"),
        ]
        if close:
            headers.append(("connection", "close"))
        async with asyncio.timeout(self._limits.deadline(len(answer.body))):
            await self.send(h11.Response(status_code=answer.status, headers=headers))
            await self.send(h11.Data(data=answer.body))
            await self.send(h11.EndOfMessage())

    async def linger(self) -> None:
        """Read on for a moment the body of a refused request: closing on it would reset the
        connection, answer and all.
        """
        with suppress(OSError, TimeoutError, ssl.SSLError, h11.ProtocolError):
            async with asyncio.timeout(_LINGER_SECONDS):
                async for _ in self.body():
                    pass

    async def close(self) -> None:
        self._writer.close()
        with suppress(OSError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(2):
                await self._writer.wait_closed()


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 and nothing older (RFC 8446).

    Raises:
        FedarkError: the files do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise FedarkError(
            f"The certificate {certificate} and its key cannot be used ({type(error).__name__}).",
            safe="Nothing listens.",
        ) from None
    return context


def _network(address: str) -> str:
    """What limits count as one: an IPv4 address, a /64 of IPv6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 4:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))


def _limits(host: HostFolder) -> Limits:
    """Behind a reverse proxy all connections come from one address: there the proxy counts."""
    here, there = host_of(host.config.listen), host_of(host.config.address)
    most = Limits().connections
    return Limits(per_address=most) if here in LOOPBACK and there not in LOOPBACK else Limits()


async def _run(settings: FrontSettings) -> None:
    host = HostFolder.open(Path(settings.folder))
    front = Front(
        tls=server_context(host.path / host.config.certificate, host.path / host.config.key),
        upstream=Path(settings.superlink),
        admits=host.store.admits,
        service=HostService(host),
        limits=_limits(host),
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await front.start(host.config.listen)
    _log.info("listening on %s", host.config.listen)
    await stop.wait()
    await front.close()


def _return_memory() -> None:
    """Free what connections have left in reference cycles (256 KiB of buffer each, in asyncio's
    TLS), and have glibc give it back to the kernel. Neither happens soon by itself.
    """
    gc.collect()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def main(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    logs.setup("front")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two for each connection
    gc.freeze()  # what is here stays: nothing to look through again and again
    asyncio.run(_run(configuration.read(path, FrontSettings)))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (FedarkError, OSError) as error:
        sys.exit(str(error))
