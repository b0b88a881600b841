"""`fedark serve`: adapters behind the OpenAI API. `fedark key`: who may ask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.use import Base, Lease
from fedark.foundation.errors import InputError

__all__ = ["app", "serve"]

app = typer.Typer(help="API keys of a server: made, listed, revoked.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="KEYS", help="The file of keys.")]


def serve(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ADAPTER...", help="Folders of adapters, with a name or OWNER/NAME."
        ),
    ] = None,
    base: Base = "",
    lease: Lease = None,
    models: Annotated[
        Path | None, typer.Option("--models", help="TOML with [models]; read again at SIGHUP.")
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT; port 0 chooses a free one.")
    ] = "127.0.0.1:8000",
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="File of API keys; without it, one is made for this run."),
    ] = None,
    cert: Annotated[Path | None, typer.Option("--cert", help="PEM: for TLS.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="PEM: its private key.")] = None,
    metrics: Annotated[
        int | None, typer.Option("--metrics", help="Port on loopback for Prometheus.")
    ] = None,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Prompts that wait for each base, at most.")
    ] = 256,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="In which a request is answered.")
    ] = 600.0,
) -> None:
    """Serve adapters behind the OpenAI API, until SIGINT or SIGTERM.

    Without --keys one API key is made, printed once, and good for this run.
    """
    if bool(base) == (lease is not None):
        raise InputError(
            "Say which base: --base for one in clear, or --lease for a sealed one.",
            safe="Nothing was loaded.",
        )
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait sleep
    from fedark.foundation.logs import teller
    from fedark.serving.http import Limits
    from fedark.serving.keys import KeyFile, once
    from fedark.serving.models import Clear, Sealed, named, read_list
    from fedark.serving.running import Place, run

    place = Place.parse(listen, cert, key)
    say = teller("serve")
    given = named(folders or [])

    def wanted() -> dict[str, Path]:
        return given | (read_list(models) if models is not None else {})

    if not wanted():
        raise InputError("No adapter is named.", fix="Name folders, or a file by --models.")
    if keys is None:
        known, made = once()
        typer.echo(f"API key of this run: {made}")
    else:
        known = KeyFile(keys)
        if not known.list():
            raise InputError(
                f"{keys} has no key.", fix=f"fedark key create {keys} NAME", safe="Nothing started."
            )
    if lease is None:
        bases: Clear | Sealed = Clear(base)
    else:
        from fedark.serving.opening import open_lease

        bases = Sealed(open_lease(lease, say))
    limits = Limits(answering=seconds)
    run(bases, wanted, known, place, limits=limits, waiting=waiting, metrics=metrics, say=say)


@app.command()
def create(
    file: File,
    name: Annotated[str, typer.Argument(help="By which it is listed and revoked.")],
    owner: Annotated[
        str, typer.Option("--owner", help="May ask models named OWNER/..., besides the common.")
    ] = "",
) -> None:
    """Make a key and print it: it is stored as a hash alone."""
    from fedark.serving.keys import KeyFile

    typer.echo(KeyFile(file).create(name, owner))


@app.command("list")
def list_keys(file: File) -> None:
    """Print name, owner and age of every key."""
    from fedark.serving.keys import KeyFile

    for one in KeyFile(file).list():
        typer.echo(f"{one.name}  {one.owner or '-'}  {one.created}")


@app.command()
def revoke(file: File, name: Annotated[str, typer.Argument(help="Of the key.")]) -> None:
    """Forget a key: a running server refuses it from its next request on."""
    from fedark.serving.keys import KeyFile

    KeyFile(file).revoke(name)
    typer.echo(f"{name} is revoked")
