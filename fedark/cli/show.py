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
from fedark.report.outcome import local_reports, render
from fedark.stages.dossier import DOSSIER

__all__ = ["console", "how_to_use", "outcome_facts", "show_outcome", "teller"]

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
    dossier, page = _paged(report, contract, work)
    console.print(f"The report, as a page: {page}", soft_wrap=True, markup=False)
    console.print(
        f"To check the run: fedark verify {shlex.quote(str(dossier))}", soft_wrap=True, markup=False
    )


def outcome_facts(report: Mapping[str, Any], contract: Contract, work: Path) -> str:
    """The same for a program: one JSON object on one line."""
    dossier, page = _paged(report, contract, work)
    return json.dumps({"report": report, "dossier": str(dossier), "page": str(page)})


def _paged(report: Mapping[str, Any], contract: Contract, work: Path) -> tuple[Path, Path]:
    """The run's dossier, and its page, which is written."""
    from fedark.report.writing import write_page  # matplotlib: not for every command

    run_id = report["run_id"]
    dossier = work / "parties" / contract.provider.name / "runs" / run_id / DOSSIER
    return dossier, write_page(dossier, work / "pages" / f"{run_id}.html", work)


def how_to_use(folder: Path) -> str:
    """The command that answers prompts with the adapter in `folder`, which a run of this party
    left.
    """
    base = "FOLDER_OF_THE_BASE"
    with suppress(OSError, ValueError, KeyError, TypeError):
        public = json.loads((folder / "fedark.json").read_text("utf-8"))["terms"]["base"]
        base = f"hub:{public}" if public else base
    return f"fedark predict {shlex.quote(str(folder))} --base {shlex.quote(base)} IN.csv OUT.csv"
