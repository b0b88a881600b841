"""A front with a recorder in the SuperLink's place, and every route that Flower's server has."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h11
from world import free_port

from fedark.links.flower.provision import provision, provision_node_key
from fedark.operate.host.front import Front, server_context
from fedark.operate.host.service import MAX_BODY, HostAnswer, HostRequest
from fedark.operate.host.visitors import Limits

SMALL = Limits(head=6.0, silence=20.0, body=1 << 20, connections=50)
"""Idle connections end soon, and a busy machine still has the time that a request takes."""


@dataclass
class Running:
    """A front with a recorder behind it. `seen`: (method, target, body) of what came through."""

    address: tuple[str, int]
    ca: Path
    key: bytes
    admitted: set[str]
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    own: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    front: Front | None = None

    def connect(self, source: str = "127.0.0.1") -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.ca))
        return context.wrap_socket(self.plain(source), server_hostname="127.0.0.1")

    def plain(self, source: str = "127.0.0.1") -> socket.socket:
        """A connection without TLS, from one of loopback's addresses."""
        return socket.create_connection(self.address, timeout=60, source_address=(source, 0))

    def raw(self, data: bytes, *, wait: float = 60.0) -> bytes:
        """Send bytes as they are; everything that comes back until the other end closes or falls
        silent.
        """
        answer = b""
        with self.connect() as connection:
            connection.settimeout(wait)
            try:
                connection.sendall(data)
                while piece := connection.recv(65536):
                    answer += piece
            except (TimeoutError, OSError):
                pass
        return answer

    def request(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        key: bytes | None = None,
        extra: str = "",
    ) -> int:
        """The status of one well-formed request; 0 for a connection closed without a word."""
        key = self.key if key is None else key
        auth = f"flwr-public-key: {base64.b64encode(key).decode()}\r\n" if key else ""
        head = (
            f"{method} {target} HTTP/1.1\r\nHost: x\r\n{auth}{extra}Connection:"
            f" close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        answer = self.raw(head.encode("latin-1") + body)
        return int(answer.split()[1]) if answer else 0


@contextmanager
def front_before_a_recorder(folder: Path, limits: Limits = SMALL) -> Iterator[Running]:
    """A front that serves for as long as the block lasts."""
    keys, public = provision(folder), provision_node_key(folder, "north")[1]
    port = free_port()
    found = Running(("127.0.0.1", port), keys.ca, public, {public.decode().strip()})
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            request, body = None, b""
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    break
            if request is None:
                break
            found.headers.append(dict(request.headers))
            found.seen.append((request.method.decode(), request.target.decode("latin-1"), body))
            headers = [
                ("content-length", str(len(body))),
                ("server", "recorder"),
                ("set-cookie", "a=b"),
                ("flwr-x", "y"),
            ]
            for event in (
                h11.Response(status_code=200, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            connection.start_next_cycle()
        writer.close()

    class Own:
        """The host's own routes: who says that it is a node is one."""

        def begin(
            self, method: str, path: str, headers: dict[str, str]
        ) -> HostRequest | HostAnswer:
            def act(body: bytes) -> HostAnswer:
                found.own.append((method, path, body))
                return HostAnswer(200, "text/plain", b"own")

            node = headers.get("fedark-node", "")
            return HostRequest(node, MAX_BODY if node else 64 << 10, act)

        def finish(self, call: HostRequest, body: bytes) -> HostAnswer:
            return call.act(body)

    async def serve() -> None:
        upstream = folder / "superlink.sock"
        await asyncio.start_unix_server(record, upstream)
        found.front = Front(
            tls=server_context(keys.certificate, keys.key),
            upstream=upstream,
            admits=found.admitted.__contains__,
            service=Own(),
            limits=limits,
        )
        await found.front.start(f"127.0.0.1:{port}")
        ready.set()

    thread = threading.Thread(
        target=lambda: (loop.run_until_complete(serve()), loop.run_forever()), daemon=True
    )
    thread.start()
    assert ready.wait(60)
    try:
        yield found
    finally:
        assert found.front is not None
        asyncio.run_coroutine_threadsafe(found.front.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
