"""The one port of a host that the world can reach: TLS, and behind it the authenticated node API
and nothing else.

    python -m fedark.operate.host.front CONFIG.json

Flower serves all of its APIs on one port and authenticates only the node API: whoever reaches the
rest can register nodes and submit runs. So that port is on loopback, and this front passes a closed
list of routes to it, for keys of approved nodes alone; Flower then checks the signature under that
key. The host's own routes (`service`) are answered here.

Rules: HTTP/1.1 (RFC 9112) parsed by h11 on both sides, and every request and response written anew
from what was parsed, so no two parsers can disagree about where one ends; the target must equal a
route byte for byte; bodies have a length, no transfer coding; headers outside a short list are
dropped; head, body and silence have limits. It holds no secret but the TLS key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h11

from fedark.foundation import logs
from fedark.foundation.errors import FedarkError
from fedark.links.flower import configuration
from fedark.operate.host.folder import HostFolder, host_of, port_of
from fedark.operate.host.service import MAX_BODY, PREFIX, Answer, HostService

__all__ = ["FLEET_ROUTES", "Front", "Limits", "Settings", "main", "server_context"]

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
_log = logging.getLogger("fedark.operate.host.front")  # also where it runs as __main__


@dataclass(frozen=True)
class Limits:
    """Seconds for a request's head, and without a byte; bytes of a Fleet request; connections at a
    time.
    """

    head: float = 15.0
    silence: float = 60.0
    body: int = 64 << 20
    connections: int = 1000


@dataclass(frozen=True)
class Settings:
    """The front's configuration: the host's folder, and host:port of the SuperLink with its
    authority's certificate.
    """

    folder: str
    superlink: str
    ca: str


class _RefusedError(Exception):
    """Answer with this status and close."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(str(status))


class Front:
    """See the module's docstring.

    Args:
        tls: the server's context.
        upstream: host:port of the SuperLink.
        upstream_tls: verifies the SuperLink.
        admits: whether a transport key (PEM) is an approved node's.
        service: the host's own routes.
        limits: see there.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext,
        upstream: str,
        upstream_tls: ssl.SSLContext,
        admits: Callable[[str], bool],
        service: Callable[[str, str, dict[str, str], bytes], Answer],
        limits: Limits | None = None,
    ) -> None:
        self._tls, self._upstream, self._upstream_tls = tls, upstream, upstream_tls
        self._admits, self._service = admits, service
        self._limits = limits or Limits()
        self._open = 0

    async def start(self, listen: str) -> asyncio.Server:
        """Listen on host:port."""
        return await asyncio.start_server(
            self._serve,
            host_of(listen),
            port_of(listen),
            ssl=self._tls,
            ssl_handshake_timeout=self._limits.head,
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= self._limits.connections:
            writer.close()
            return
        self._open += 1
        peer = _Peer(
            h11.Connection(h11.SERVER, max_incomplete_event_size=16 << 10),
            reader,
            writer,
            self._limits.silence,
        )
        onward: _Peer | None = None
        try:
            while True:
                try:
                    request = await peer.event(self._limits.head)
                    if not isinstance(request, h11.Request):
                        break
                    onward = await self._answer(request, peer, onward)
                except _RefusedError as error:
                    await peer.respond(error.status, close=True)
                    await peer.linger()
                    break
                except h11.RemoteProtocolError:
                    await peer.respond(400, close=True)
                    break
                if peer.http.our_state is not h11.DONE or peer.http.their_state is not h11.DONE:
                    break
                peer.http.start_next_cycle()
        except (
            OSError,
            TimeoutError,
            asyncio.IncompleteReadError,
            h11.ProtocolError,
            ssl.SSLError,
        ) as error:
            _log.debug("a connection ended: %s", type(error).__name__)
        finally:
            self._open -= 1
            await peer.close()
            if onward is not None:
                await onward.close()

    async def _answer(
        self, request: h11.Request, peer: _Peer, onward: _Peer | None
    ) -> _Peer | None:
        method, target = request.method.decode("ascii"), request.target.decode("ascii", "replace")
        names = [name for name, _ in request.headers]
        length = _length(request, names)
        if target.startswith(PREFIX):
            if length > MAX_BODY:
                raise _RefusedError(413)
            body = b"".join([data async for data in peer.body()])
            headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
            answer = await asyncio.to_thread(self._service, method, target, headers, body)
            await peer.respond(answer.status, answer.body, answer.kind)
            return onward
        if method != "POST" or target not in FLEET_ROUTES:
            raise _RefusedError(404)
        keys = [value for name, value in request.headers if name == _KEY_HEADER]
        if len(keys) != 1 or not await asyncio.to_thread(self._admitted, keys[0]):
            raise _RefusedError(401)
        if length > self._limits.body:
            raise _RefusedError(413)
        return await self._forward(request, length, peer, onward)

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
                streams = await asyncio.open_connection(
                    host_of(self._upstream), port_of(self._upstream), ssl=self._upstream_tls
                )
            except (OSError, ssl.SSLError):
                raise _RefusedError(503) from None
            onward = _Peer(h11.Connection(h11.CLIENT), *streams, self._limits.silence)
        headers = [(b"host", self._upstream.encode()), (b"content-length", str(length).encode())]
        headers += [
            (name, value)
            for name, value in request.headers
            if name in _PASSED or name.startswith(b"flwr-")
        ]
        try:
            await onward.send(h11.Request(method="POST", target=request.target, headers=headers))
            async for data in peer.body():
                await onward.send(h11.Data(data=data))
            await onward.send(h11.EndOfMessage())
            response = await onward.event(self._limits.silence)
            while isinstance(response, h11.InformationalResponse):
                response = await onward.event(self._limits.silence)
            if not isinstance(response, h11.Response):
                raise _RefusedError(502)
        except (OSError, h11.RemoteProtocolError, TimeoutError):
            await onward.close()
            raise _RefusedError(502) from None
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
        raise _RefusedError(400)
    values = [value for name, value in request.headers if name == b"content-length"]
    return int(values[0]) if values else 0


class _Peer:
    """An h11 connection with its streams."""

    def __init__(
        self,
        http: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        silence: float,
    ) -> None:
        self.http, self.reader, self._writer, self._silence = http, reader, writer, silence

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
            event = await self.event(self._silence)
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
            async with asyncio.timeout(self._silence):
                await self._writer.drain()

    async def respond(
        self, status: int, body: bytes = b"", kind: str = "text/plain", *, close: bool = False
    ) -> None:
        """A whole response; none if one has begun already."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("content-type", kind),
            ("content-length", str(len(body))),
            ("cache-control", "no-store"),
        ]
        if close:
            headers.append(("connection", "close"))
        await self.send(h11.Response(status_code=status, headers=headers))
        await self.send(h11.Data(data=body))
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


async def _run(settings: Settings) -> None:
    host = HostFolder.open(Path(settings.folder))
    front = Front(
        tls=server_context(host.path / host.config.certificate, host.path / host.config.key),
        upstream=settings.superlink,
        upstream_tls=ssl.create_default_context(cafile=settings.ca),
        admits=host.store.admits,
        service=HostService(host).handle,
    )
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await front.start(host.config.listen)
    _log.info("listening on %s", host.config.listen)
    await stop.wait()
    server.close()


def main(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    logs.setup("front")
    asyncio.run(_run(configuration.read(path, Settings)))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (FedarkError, OSError) as error:
        sys.exit(str(error))
