"""`fedark report DOSSIER`: a run as one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    dossier: Annotated[
        Path, typer.Argument(help="The file dossier.fedark in the folder of a run.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html beside the dossier.")
    ] = None,
) -> None:
    """Verify a dossier, and write its run as one HTML page: figures with intervals, curves,
    privacy, who sent what to whom, what is proven and what rests on trust. It needs no network and
    no script.
    """
    from fedark.report.writing import write_page

    typer.echo(f"Written: {write_page(dossier, out or dossier.with_name('report.html'))}")
