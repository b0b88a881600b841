"""`fedark example grid`: write an example's job file, records and small base models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedark.cli.examples import write_example
from fedark.cli.show import console, teller

__all__ = ["example"]


def example(
    name: Annotated[str, typer.Argument(help="The example: grid.")] = "grid",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("fedark-grid"),
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 7,
) -> None:
    """Write an example to a folder; run it with `fedark simulate FOLDER/job.toml`."""
    path = write_example(name, out, seed=seed, progress=teller())
    console.print(f"Written. Next: fedark simulate {path}", soft_wrap=True)
