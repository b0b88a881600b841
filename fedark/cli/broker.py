"""`fedark broker`: answer release requests of attested enclaves directly, outside a Flower run."""

from __future__ import annotations

import signal
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Release weight keys directly, over TLS.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group, though it has one command."""


@app.command()
def serve(
    party: Annotated[Path, typer.Option("--party", help="The provider's folder.")],
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT; port 0 chooses a free one.")],
    cert: Annotated[
        Path,
        typer.Option("--cert", help="PEM file: the server's certificate and what it chains to."),
    ],
    key: Annotated[Path, typer.Option("--key", help="PEM file: its private key, mode 0600.")],
) -> None:
    """Serve until SIGINT or SIGTERM. Keys go to nobody but enclaves whose evidence this provider's
    node appraises as good.
    """
    from fedark.operate.broker.keys import load_broker  # gRPC and the node take a second to load
    from fedark.operate.broker.server import BrokerServer
    from fedark.operate.state import require_own

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    require_own(party)
    broker = load_broker(party, _tell)
    with BrokerServer(broker, listen=listen, certificate=cert, key=key) as server:
        typer.echo(
            f"key broker of {broker.party} listens on {listen.rpartition(':')[0]}:{server.port}"
        )
        stop.wait()
        typer.echo("stopping")
    broker.close()


def _tell(text: str) -> None:
    typer.echo(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}")
