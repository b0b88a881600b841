"""`fedark verify DOSSIER`: what a run's dossier proves, offline and without any key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from fedark.cli.show import console
from fedark.foundation.errors import printable

__all__ = ["verify"]


def verify(
    dossier: Annotated[
        Path, typer.Argument(help="The file dossier.fedark in the folder of a run.")
    ],
    installed: Annotated[
        bool,
        typer.Option(
            "--installed", help="Compare the enclaves' measurements with this installation's."
        ),
    ] = False,
    root: Annotated[
        str,
        typer.Option(
            metavar="SHA256", help="The simulated platform's root, as you know it (64 hex digits)."
        ),
    ] = "",
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="An adapter that shall be this job's; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check everything that a dossier claims, and say what is proven, by whom, and what rests on
    trust. The exit status is 1 if anything in it does not hold.
    """
    from fedark.report.verify import read_dossier, verify_dossier
    from fedark.tuning.adapter import adapter_digest

    verified = verify_dossier(
        read_dossier(dossier),
        root=root.lower(),
        installed=_installed() if installed else None,
        adapters=dict(adapter_digest(folder) for folder in adapter or ()),
    )
    if as_json:
        facts = {
            "job": verified.contract.job,
            "run_id": verified.report["run_id"],
            "contract": verified.contract.digest().hex(),
            "proven": [vars(proven) for proven in verified.proven],
            "trusted": list(verified.trusted),
            "adapters": {name: digest.hex() for name, digest in verified.adapters.items()},
            "report": verified.report,
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(title=f"job {verified.contract.job}: proven", title_justify="left")
    table.add_column("what")
    table.add_column("by the signature of")
    for proven in verified.proven:
        table.add_row(Text(printable(proven.what, 500)), Text(printable(proven.by, 200)))
    console.print(table)
    console.print("\nWhat rests on trust:")
    for line in verified.trusted:
        console.print(Text(f"  - {printable(line, 500)}"), soft_wrap=True)
    if not root and verified.contract.attestation.simulated_root:
        console.print(
            f"\nThe parties pin the simulated root {verified.contract.attestation.simulated_root}."
            " Compare it with the one you know, or name that with --root.",
            soft_wrap=True,
        )


def _installed() -> dict[str, dict[str, str]]:
    from fedark.operate.party import reference_values

    console.print("measuring the enclaves of this installation ...", style="dim")
    return {
        role: {name: value.hex() for name, value in registers.items()}
        for role, registers in reference_values().items()
    }
