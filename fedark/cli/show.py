"""What the commands share on the terminal: progress lines and the report of a job."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedark.contract.contract import Contract
from fedark.foundation.files import disk_errors, write_atomic
from fedark.report.outcome import local_reports, render
from fedark.stages.dossier import DOSSIER

__all__ = ["console", "how_to_use", "show_outcome", "teller", "write_page"]

console = Console(highlight=False)


def teller(*, quiet: bool = False) -> Callable[[str], None]:
    """Prints lines with the seconds since now; lines of a running measurement or epoch replace each
    other on a terminal.
    """
    began = time.monotonic()

    def tell(text: str) -> None:
        if not quiet:
            # Never as markup: the text may be another party's.
            console.print(
                Text.assemble((f"{time.monotonic() - began:6.1f} s", "dim"), f"  {text}"),
                soft_wrap=True,
            )

    return tell


def show_outcome(report: Mapping[str, Any], contract: Contract, work: Path) -> None:
    """The tables, and the paths of what a job made."""
    run_id = report["run_id"]
    console.print(render(report, local_reports(contract, work, run_id)))
    console.print("\nThe adapters, in the form that peft loads:")
    for party in contract.parties:
        run = work / "parties" / party.name / "runs" / run_id
        for folder in (*sorted(run.glob("adapter-*")), *sorted(run.glob("personal-*"))):
            console.print(f"  {folder}", soft_wrap=True)
    last = max((work / "parties").glob(f"*/runs/{run_id}/adapter-*"), default=None)
    if last is not None:
        console.print(f"To use one: {how_to_use(last)}", soft_wrap=True, markup=False)
    dossier = work / "parties" / contract.provider.name / "runs" / run_id / DOSSIER
    page = write_page(dossier, work / "pages" / f"{run_id}.html", work)
    console.print(f"The report, as a page: {page}", soft_wrap=True, markup=False)
    console.print(
        f"To check the run: fedark verify {shlex.quote(str(dossier))}", soft_wrap=True, markup=False
    )


def write_page(dossier: Path, out: Path, work: Path | None = None) -> Path:
    """Write the page of a dossier that holds.

    Args:
        work: the folder of a simulation, whose customers' own figures one person may see.

    Raises:
        DossierRefused: it does not hold; nothing was written.
        InputError, StorageError: a file cannot be read or written.
    """
    from fedark.report.page import page
    from fedark.report.verify import read_dossier, verify_dossier

    verified = verify_dossier(read_dossier(dossier))
    local = (
        local_reports(verified.contract, work, verified.report["run_id"])
        if work is not None
        else None
    )
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(verified, local).encode())
    return out


def how_to_use(folder: Path) -> str:
    """The command that answers prompts with the adapter in `folder`, which a run of this party
    left.
    """
    base = "FOLDER_OF_THE_BASE"
    with suppress(OSError, ValueError, KeyError, TypeError):
        public = json.loads((folder / "fedark.json").read_text("utf-8"))["terms"]["base"]
        base = f"hub:{public}" if public else base
    return f"fedark predict {shlex.quote(str(folder))} --base {shlex.quote(base)} IN.csv OUT.csv"
