"""A server as a process: its socket, its signals, and its orderly end.

SIGTERM and SIGINT: it takes no further request, lets those that it has end, for some seconds, and
gives back what it holds. SIGHUP: it reads again which adapters it serves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from fedark.foundation.errors import FedarkError, FederationError, InputError
from fedark.foundation.metrics import MetricsServer
from fedark.serving.http import Limits, Server
from fedark.serving.keys import Keys
from fedark.serving.models import Bases, Models

__all__ = ["Place", "beside", "run"]

Say = Callable[[str], None]
_CONNECTIONS = 1024
_GRACE = 30  # seconds for requests that are being answered


@dataclass(frozen=True)
class Place:
    """Where a server listens.

    Attributes:
        cert, key: PEM files, for TLS.
    """

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def parse(cls, listen: str, cert: Path | None = None, key: Path | None = None) -> Place:
        """Read HOST:PORT.

        Raises:
            InputError: it is none, or others than this machine's programs could read what passes.
        """
        host, _, port = listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise InputError(f"{listen!r} is not HOST:PORT.")
        if (cert is None) != (key is None):
            raise InputError("TLS needs both, --cert and --key.")
        if cert is None and not _loopback(host):
            raise InputError(
                f"On {host} others could read API keys, prompts and answers.",
                safe="Nothing was started.",
                fix="Give --cert and --key for TLS, or listen on 127.0.0.1.",
            )
        return cls(host, int(port), cert, key)

    def bound(self) -> socket.socket:
        """A socket that listens there.

        Raises:
            FederationError: the port is taken.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
        except OSError as error:
            sock.close()
            raise FederationError(
                f"{self.host}, port {self.port}, cannot be listened on: {error.strerror}.",
                fix="Choose another by --listen.",
            ) from None
        return sock

    def url(self, port: int) -> str:
        """What clients call their base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.cert else ''}://{host}:{port}/v1"


def run(
    bases: Bases,
    wanted: Callable[[], Mapping[str, Path]],
    keys: Keys,
    place: Place,
    *,
    limits: Limits | None = None,
    waiting: int = 256,
    metrics: int | None = None,
    say: Say,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        wanted: names and folders of the adapters, asked for now and at every SIGHUP.
        waiting: prompts that wait for each base, at most.
        metrics: port on loopback for Prometheus; 0 takes a free one.

    Raises:
        FedarkError: it could not begin, or none of the adapters can be served.
    """
    sock = place.bound()
    models = Models(bases, waiting=waiting, say=say)
    try:
        models.follow(wanted())
        if not any(True for _ in models):
            raise InputError("None of the adapters can be served.", safe="The server has ended.")
        server = Server(models, keys, limits)
        observer = MetricsServer(server.observed.registry, metrics) if metrics is not None else None
        if observer is not None:
            say(f"metrics on http://127.0.0.1:{observer.port}/metrics")
        asyncio.run(_serve(server, place, sock, wanted, say))
        if observer is not None:
            observer.close()
    finally:
        sock.close()
        models.stop()


def _loopback(host: str) -> bool:
    """Whether nobody beyond this machine can come to it. A name other than localhost may mean
    anything.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def beside(app: Any) -> Iterator[str]:
    """While open, an application answers on a free port of loopback, in a thread of this process;
    gives its address.
    """
    sock = socket.create_server(("127.0.0.1", 0))
    running = _Uvicorn(_config(app))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[sock])))
    thread.start()
    try:
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        sock.close()


def _config(app: Any, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http="h11",
        ws="none",
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        **more,
    )


class _Uvicorn(uvicorn.Server):
    """Signals are this process's own: uvicorn would send itself its signal again at the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    server: Server,
    place: Place,
    sock: socket.socket,
    wanted: Callable[[], Mapping[str, Path]],
    say: Say,
) -> None:
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = _config(server.app, ssl_certfile=place.cert, ssl_keyfile=place.key)
    try:
        running = _Uvicorn(config)
        config.load()
    except OSError as error:
        raise InputError(f"TLS cannot be set up: {error.strerror or 'a malformed file'}.") from None

    def again() -> None:
        def follow() -> None:
            try:
                server.models.follow(wanted())
            except FedarkError as error:
                say(f"the adapters stay as they are: {error.told}")

        threading.Thread(target=follow, name="fedark-serving-list", daemon=True).start()

    def end() -> None:
        server.stopping = running.should_exit = True

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, again)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    say(f"listening on {place.url(sock.getsockname()[1])}")
    await running.serve(sockets=[sock])
    say("stopped")
