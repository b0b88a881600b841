"""`fedark lease`: the provider makes and revokes a lease of a sealed base; its customer signs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedark.operate.state import require_own

if TYPE_CHECKING:
    from fedark.contract.lease import Lease

__all__ = ["app"]

app = typer.Typer(
    help="Let a customer use an adapter with a base that stays sealed.", no_args_is_help=True
)

Party = Annotated[Path, typer.Option("--party", help="The party's folder.")]
File = Annotated[Path, typer.Argument(metavar="LEASE", help="The lease's file.")]


@app.command("make")
def make(
    out: Annotated[Path, typer.Argument(metavar="LEASE", help="The file to make.")],
    party: Party,
    customer: Annotated[str, typer.Option("--customer", help="Its name in your roster.")],
    adapter: Annotated[
        Path, typer.Option("--adapter", help="An adapter's folder: its fedark.json is read.")
    ],
    bundle: Annotated[
        Path, typer.Option("--bundle", help="Its base, sealed with --role inference.")
    ],
    total: Annotated[int, typer.Option("--tokens", min=1, help="Read and written in all.")],
    tokens: Annotated[
        int, typer.Option("--portion", min=1, help="Tokens of one portion.")
    ] = 1_000_000,
    hours: Annotated[int, typer.Option("--hours", min=1, help="How long one lasts.")] = 24,
    days: Annotated[int, typer.Option("--days", min=1, help="How long the lease lasts.")] = 30,
) -> None:
    """Make and sign a lease, as the provider. It is good once the customer has signed it too."""
    from fedark.operate.leases import make_lease
    from fedark.tuning.adapter import read_terms

    require_own(party)
    terms = read_terms(adapter)
    lease = make_lease(
        party,
        out,
        bundle=bundle,
        terms=terms,
        customer=customer,
        job=terms.name,
        days=days,
        seconds=hours * 3600,
        tokens=min(tokens, total),
        total=total,
    )
    _show(lease)


@app.command("sign")
def sign(path: File, party: Party) -> None:
    """Sign a lease, as its customer."""
    from fedark.operate.leases import sign_lease

    require_own(party)
    _show(sign_lease(party, path))


@app.command("revoke")
def revoke(path: File, party: Party) -> None:
    """Give out no further portion of a lease, as its provider; at once, without a restart."""
    from fedark.operate.leases import revoke_lease

    require_own(party)
    typer.echo(f"revoked      {revoke_lease(party, path)}")


def _show(lease: Lease) -> None:
    from fedark.foundation.errors import printable

    typer.echo(f"lease        {lease.digest().hex()}")
    typer.echo(f"of           {printable(lease.terms.name)}, {printable(lease.provider.name)}")
    typer.echo(f"to           {printable(lease.customer.name)}, until {lease.expires}")
    typer.echo(
        f"tokens       {lease.total:,}, in portions of {lease.tokens:,}, each for"
        f" {lease.seconds:,} s"
    )
