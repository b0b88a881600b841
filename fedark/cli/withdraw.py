"""`fedark withdraw`: take a customer's part out of a model by a re-run, and state what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedark.foundation.errors import InputError, printable

__all__ = ["app"]

app = typer.Typer(
    help="Take a customer out: what to run again, and a signed statement of what was done.",
    no_args_is_help=True,
)

_Customer = Annotated[str, typer.Argument(help="Who leaves, by its name in the jobs.")]
_Replaced = Annotated[
    Path, typer.Argument(help="Dossier of the job whose adapters shall not be used any more.")
]
_Jobs = Annotated[
    list[Path], typer.Argument(help="Dossiers of the jobs that stand in for it, in their order.")
]
_Root = Annotated[
    str, typer.Option(metavar="SHA256", help="The simulated platform's root, as you know it.")
]


@app.command("plan")
def plan(
    customer: _Customer,
    dossiers: Annotated[
        list[Path], typer.Argument(help="Dossiers of all jobs so far, in their order.")
    ],
    root: _Root = "",
) -> None:
    """Say which jobs have to be run again without a customer, and from which state."""
    from fedark.report.verify import read_dossier
    from fedark.report.withdrawal import last_untouched

    kept, again = last_untouched(customer, [read_dossier(path) for path in dossiers], root=root)
    for job in kept:
        typer.echo(f"keep       job {job.contract.job}, contract {job.contract.digest().hex()}")
    for job in again:
        typer.echo(f"run again  job {job.contract.job}, contract {job.contract.digest().hex()}")
    typer.echo(
        f"Run {len(again)} jobs again in this order, without {printable(customer)}, each from what"
        " it started from: its base, a kept job's adapter, or the adapter of the job before that"
        " was run again (models.start). Then `fedark withdraw sign`."
    )


@app.command("sign")
def sign(
    folder: Annotated[Path, typer.Argument(help="The folder of the party that signs.")],
    customer: _Customer,
    replaced: _Replaced,
    jobs: _Jobs,
    root: _Root = "",
    out: Annotated[Path, typer.Option(help="The statement.")] = Path("withdrawal.fedark"),
) -> None:
    """State that a customer is out, if the dossiers show it."""
    from fedark.foundation.files import write_atomic
    from fedark.foundation.keys import PartyKeys
    from fedark.operate.party import KEYS, PartyConfig
    from fedark.operate.state import require_own
    from fedark.report.verify import read_dossier
    from fedark.report.withdrawal import withdrawal_of

    require_own(folder)
    by = PartyConfig.read(folder).name
    said = withdrawal_of(
        customer, read_dossier(replaced), [read_dossier(job) for job in jobs], by=by, root=root
    )
    write_atomic(out, said.sign(PartyKeys.load(folder / KEYS).signing))
    typer.echo(f"{out}: {customer} is out, by a {said.kind}; signed by {by}.")


@app.command("check")
def check(
    statement: Annotated[Path, typer.Argument(help="The statement, withdrawal.fedark.")],
    replaced: _Replaced,
    jobs: _Jobs,
    root: _Root = "",
) -> None:
    """Make the statement anew from the dossiers and compare. The exit status is 1 if it is not
    shown that the customer is out.
    """
    from fedark.report.verify import read_dossier
    from fedark.report.withdrawal import Withdrawal

    try:
        data = statement.read_bytes()
    except OSError as error:
        raise InputError(f"{statement} cannot be read: {error.strerror}.") from None
    said = Withdrawal.verify(
        data, read_dossier(replaced), [read_dossier(job) for job in jobs], root=root
    )
    typer.echo(
        f"{printable(said.customer)} is out of job {said.replaced.contract.hex()[:16]}... by a"
        f" {said.kind}: {len(said.jobs)} jobs without it stand in; signed by {printable(said.by)}."
    )
    for name, digest in said.jobs[-1].adapters.items():
        typer.echo(f"  to use, model {printable(name)}: SHA-384 {digest.hex()}")
    for name, digest in said.replaced.adapters.items():
        typer.echo(f"  no longer, model {printable(name)}: SHA-384 {digest.hex()}")
