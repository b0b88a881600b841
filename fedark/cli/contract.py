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


@app.command("start")
def start(
    contract: Annotated[Path, typer.Argument(help="The contract's file, contract.cbor.")],
    folder: Annotated[Path, typer.Argument(help="Of an adapter, or of a finished run.")],
    model: Annotated[
        str, typer.Option(help="Which of the contract's models; the first else.")
    ] = "",
) -> None:
    """Compare the adapter that a contract starts from with one that you hold."""
    from fedark.tuning.start import read_start

    agreed = _read(contract)
    terms = agreed.model(model) if model else agreed.models[0]
    if terms is None:
        raise InputError(f"The contract has no model {model!r}.")
    if not terms.start:
        raise InputError(f"Model {terms.name} starts from its base, and from no adapter.")
    if read_start(folder, terms).digest != terms.start:
        raise InputError(
            f"Model {terms.name} starts from another adapter than the one in {folder}.",
            fix="Ask the provider which one it is before you approve the contract.",
        )
    typer.echo(f"Model {terms.name} starts from the adapter in {folder}.")


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
