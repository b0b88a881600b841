"""`fedark contract`: read a contract, and agree to it for a party."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedark.contract.contract import Contract
from fedark.foundation.errors import InputError
from fedark.operate.state import require_own
from fedark.stages.consent import Consent, summary

__all__ = ["app"]

app = typer.Typer(help="Read contracts, and agree to them.", no_args_is_help=True)


def _read(path: Path) -> Contract:
    try:
        return Contract.decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


@app.command("show")
def show(
    contract: Annotated[Path, typer.Argument(help="The contract's file, contract.cbor.")],
) -> None:
    """Print a contract in words."""
    typer.echo(summary(_read(contract)), nl=False)


@app.command("approve")
def approve(
    folder: Annotated[Path, typer.Argument(help="The folder of the party that agrees.")],
    contract: Annotated[Path, typer.Argument(help="The contract's file, contract.cbor.")],
) -> None:
    """Agree to a contract: the party's node will sign it and take part in one run of it."""
    if not (folder / "party.toml").is_file():
        raise InputError(f"{folder} is not a party's folder.", safe="Nothing was approved.")
    require_own(folder)
    agreed = _read(contract)
    typer.echo(summary(agreed), nl=False)
    Consent(folder).approve(agreed)
    typer.echo(f"Approved: contract {agreed.digest().hex()[:16]}... of job {agreed.job}.")
