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
from rich.table import Table
from rich.text import Text

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation.errors import printable
from fedark.report.outcome import local_reports, render
from fedark.stages.dossier import DOSSIER

__all__ = [
    "adapters_of",
    "bases_of",
    "console",
    "how_to_serve",
    "how_to_use",
    "outcome_facts",
    "show_outcome",
    "show_questions",
    "teller",
]

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


def show_outcome(
    report: Mapping[str, Any], contract: Contract, work: Path, bases: Mapping[str, str]
) -> None:
    """The tables, and the paths of what a job made.

    Args:
        bases: where the base of each model is.
    """
    run_id = report["run_id"]
    console.print(render(report, local_reports(contract, work, run_id)))
    console.print("\nThe adapters, in the form that peft loads:")
    for party in contract.parties:
        run = work / "parties" / party.name / "runs" / run_id
        for folder in (*sorted(run.glob("adapter-*")), *sorted(run.glob("personal-*"))):
            console.print(f"  {folder}", soft_wrap=True)
    for last in adapters_of(contract, work, run_id)[-1:]:
        base = bases.get(last.name.removeprefix("adapter-"), "")
        console.print(f"To use one: {how_to_use(last, base)}", soft_wrap=True, markup=False)
        console.print(f"To serve it: {how_to_serve(last, base)}", soft_wrap=True, markup=False)
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


def how_to_use(folder: Path, base: str = "") -> str:
    """The command that answers prompts with the adapter in `folder`, which a run of this party
    left.

    Args:
        base: where the base is, if it is known here.
    """
    return f"fedark predict {_with_base(folder, base)} IN.csv OUT.csv"


def how_to_serve(folder: Path, base: str = "") -> str:
    """The command that puts that adapter behind the OpenAI API."""
    return f"fedark serve {_with_base(folder, base)}"


def bases_of(job: Job) -> dict[str, str]:
    """Where the base of each model is, for whoever has the job file."""
    return {
        spec.name: str(job.resolve(spec.source.removeprefix("dir:")))
        if spec.source.startswith("dir:")
        else spec.source
        for spec in job.models
    }


def show_questions(folder: Path, job: Job) -> None:
    """Serve an adapter that a run left, ask it three questions of the job's acceptance set, and
    show its answers before and after.
    """
    from fedark.records.reading import read_records
    from fedark.serving.trying import ask
    from fedark.tuning.adapter import read_adapter

    adapter = read_adapter(folder)
    terms = adapter.terms
    if job.acceptance is None:
        return
    records = read_records(job.acceptance, terms.prompt, job.data.answer, terms.labels)
    chosen = [records[len(records) * place // 6] for place in (1, 3, 5)]
    answers = ask(adapter, bases_of(job)[terms.name], [record.prompt for record in chosen])
    table = Table(title=f"{terms.name}, served and asked", title_justify="left")
    for head in ("question", "before", "after", "right"):
        table.add_column(head)
    for record, (before, after) in zip(chosen, answers, strict=True):
        texts = (record.prompt, before, after, record.answer)
        table.add_row(*(Text(printable(text, 200)) for text in texts))
    console.print(table)


def adapters_of(contract: Contract, work: Path, run_id: str) -> list[Path]:
    """The shared adapters that a run left in the parties' folders."""
    parties = (work / "parties" / party.name for party in contract.parties)
    return [one for party in parties for one in sorted(party.glob(f"runs/{run_id}/adapter-*"))]


def _with_base(folder: Path, base: str) -> str:
    found = base or "FOLDER_OF_THE_BASE"
    with suppress(OSError, ValueError, KeyError, TypeError):
        public = json.loads((folder / "fedark.json").read_text("utf-8"))["terms"]["base"]
        found = base or (f"hub:{public}" if public else found)
    return f"{shlex.quote(str(folder))} --base {shlex.quote(found)}"
