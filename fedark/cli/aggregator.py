"""`fedark aggregator`: host the aggregator: make its folder, run it, admit nodes, submit jobs."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedark.foundation.errors import FedarkError, FederationError, InputError
from fedark.operate.state import require_own, running

if TYPE_CHECKING:
    from fedark.operate.host.folder import HostFolder

__all__ = ["app"]

_STALE = 60.0  # seconds: it writes twice a second, but for a call to the SuperLink that takes long
app = typer.Typer(help="Host the aggregator: it relays what it cannot read.", no_args_is_help=True)
jobs = typer.Typer(help="Submit, list, follow, show and stop jobs.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

Host = Annotated[Path, typer.Argument(metavar="FOLDER", help="The host's folder.")]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="The node's name.")]
Sandbox = Literal["namespaces", "landlock"]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    name: Annotated[str, typer.Option("--name", help="The aggregator's name in contracts.")],
    address: Annotated[str, typer.Option("--address", help="host:port that nodes connect to.")],
    listen: Annotated[
        str, typer.Option("--listen", help="host:port to listen on; that of --address by default.")
    ] = "",
    sandbox: Annotated[
        Sandbox, typer.Option("--sandbox", help="Weakest sandbox for the aggregator's enclave.")
    ] = "namespaces",
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="PEM chain of an own certificate for --address."),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", help="PEM key of that certificate.")] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", help="PEM of the authority that nodes shall trust for --address."),
    ] = None,
    metrics: Annotated[
        int, typer.Option("--metrics", help="Port on loopback for Prometheus; 0 for none.")
    ] = 0,
) -> None:
    """Make keys, an authority (or take an own certificate) and a simulated platform."""
    from fedark.contract.contract import fingerprint
    from fedark.operate.host.folder import init_host

    host = init_host(
        folder,
        name=name,
        listen=listen or address,
        address=address,
        sandbox=sandbox,
        certificate=certificate,
        key=key,
        ca=ca,
        metrics=metrics,
    )
    typer.echo(f"{name} is in {folder}. Its fingerprint, which every node's operator compares:")
    typer.echo(f"  {fingerprint(host.aggregator)}")
    typer.echo(
        "This host is the simulated platform's manufacturer: it could pass off a program as an"
        " enclave."
    )


@app.command("up")
def up(
    folder: Host,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, in a terminal too.")] = False,
) -> None:
    """Run the host until it is told to stop. A terminal shows one live view of the job at work."""
    from fedark.cli.live import watching
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.host.supervisor import run_host

    require_own(folder)
    party = HostFolder.open(folder)
    with watching("host", party.config.name, party.party_folder, as_json=as_json) as say:
        run_host(folder, say)


@app.command("invite")
def invite(
    folder: Host,
    name: Annotated[str, typer.Argument(metavar="NODE", help="The name that the party will have.")],
    role: Annotated[
        Literal["provider", "customer"], typer.Option("--role", help="What the party is.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="The file to write, for the party's operator.")
    ],
) -> None:
    """Write an invitation for one party; it holds no secret that opens anything."""
    from fedark.links.flower.configuration import write_private
    from fedark.operate.host.admission import invite as make
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.joining import dump

    require_own(folder)
    invitation = make(HostFolder.open(folder), name, role)
    write_private(out, dump(invitation), replace=False)
    typer.echo(f"{out} is for the operator of {name}, until {invitation.expires}.")


@app.command("approve")
def approve(
    folder: Host,
    node: Annotated[
        str,
        typer.Argument(
            metavar="NODE|REQUEST.json", help="Who asked over the network, or a request's file."
        ),
    ],
    fingerprint: Annotated[
        str,
        typer.Option(
            "--fingerprint", help="As the node's operator told you, not as the host shows."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the admission to a file as well.")
    ] = None,
) -> None:
    """Admit a node, once its fingerprint was compared with its operator."""
    from fedark.links.flower.configuration import write_private
    from fedark.operate.host.admission import approve as admit
    from fedark.operate.host.admission import file_request
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.joining import dump

    require_own(folder)
    host = HostFolder.open(folder)
    name = node
    if node.endswith(".json"):
        try:
            name = file_request(host, Path(node).read_bytes()).party.name
        except OSError as error:
            raise InputError(f"{node} cannot be read: {error.strerror}.") from None
    bundle = admit(host, name, fingerprint)
    if out is not None:
        write_private(out, dump(bundle), replace=False)
    typer.echo(f"{name} is approved{f'; its admission is {out}' if out else ''}.")


@app.command("revoke")
def revoke(
    folder: Host,
    node: NodeName,
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop it, so that the name may join anew.")
    ] = False,
) -> None:
    """Close a node out: at once at the front, within a second at the SuperLink, and on the
    platform's revocation list.
    """
    from fedark.operate.host.admission import revoke as close_out
    from fedark.operate.host.folder import HostFolder

    require_own(folder)
    host = HostFolder.open(folder)
    close_out(host, node)
    if forget:
        host.store.forget(node)
    typer.echo(f"{node} is revoked{' and forgotten' if forget else ''}.")


@app.command("status")
def status(folder: Host, as_json: AsJson = False) -> None:
    """Show processes, nodes and jobs. Exit status 1 if the host is not running well."""
    from fedark.contract.contract import fingerprint
    from fedark.operate.host.admission import request_of
    from fedark.operate.host.folder import HostFolder

    host = HostFolder.open(folder)
    found = _supervised(host) if running(folder) else {}
    nodes = [
        {
            "name": row.name,
            "role": row.role,
            "status": row.status,
            # of one that waits, its operator tells: nobody shall copy it from here
            "fingerprint": fingerprint(request_of(row).party) if row.status != "pending" else "",
        }
        for row in host.store.nodes()
    ]
    work = [
        {"name": job.name, "status": job.status, "contract": job.digest[:16]}
        for job in host.store.jobs()
    ]
    well = (
        bool(found)
        and all(process["alive"] for process in found["processes"].values())
        and not found["trouble"]
    )
    if as_json:
        typer.echo(json.dumps({"well": well, "running": found, "nodes": nodes, "jobs": work}))
    else:
        typer.echo(
            f"{host.config.name} {'runs' if found else 'does not run'}; nodes use"
            f" {host.config.address}"
        )
        for name, process in found.get("processes", {}).items():
            note = f", {process['restarts']} restarts" if process["restarts"] else ""
            typer.echo(
                f"  {name:12s}"
                f" {'alive' if process['alive'] else 'ended, will be started again'}{note}"
            )
        if found.get("trouble"):
            typer.echo(f"  trouble: {found['trouble']}")
        for node in nodes:
            typer.echo(
                f"  {node['role']:10s} {node['name']:24s} {node['status']:9s} {node['fingerprint']}"
            )
        for job in work:
            typer.echo(f"  job {job['name']} ({job['contract']}...): {job['status']}")
    if not well:
        raise typer.Exit(1)


def _supervised(host: HostFolder) -> dict[str, Any]:
    """What the living supervisor has written of its processes; trouble if that is old."""
    try:
        found: dict[str, Any] = json.loads((host.supervisor / "state/status.json").read_bytes())
        age = datetime.now(UTC) - datetime.fromisoformat(found["time"])
    except (OSError, ValueError):
        return {"processes": {}, "trouble": "it is starting"}
    if age.total_seconds() > _STALE:
        found["trouble"] = f"it has not looked at its processes for {age.total_seconds():.0f} s"
    return found


def _say_if_idle(folder: Path) -> None:
    if not running(folder):
        typer.echo("(the host does not run: nothing begins or goes on until it does)", err=True)


@jobs.command("submit")
def submit(
    folder: Host, job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")]
) -> None:
    """Make the contract of a job and put it before all parties; it begins once every one of them is
    ready.
    """
    from fedark.contract.job import Job
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.host.jobs import propose

    require_own(folder)
    contract = propose(HostFolder.open(folder), Job.load(job, role="host"))
    typer.echo(f"job {contract.job} is proposed, contract {contract.digest().hex()}")
    _say_if_idle(folder)


@jobs.command("list")
def list_jobs(folder: Host, as_json: AsJson = False) -> None:
    """List all jobs, with what the parties said."""
    from fedark.operate.host.folder import HostFolder

    store = HostFolder.open(folder).store
    _say_if_idle(folder)
    found = []
    for job in store.jobs():
        answers = {party: answer for party, (answer, _) in store.answers(job.digest).items()}
        found.append(
            {
                "name": job.name,
                "contract": job.digest,
                "status": job.status,
                "reason": job.reason,
                "answers": answers,
            }
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    for item in found:
        said = ", ".join(f"{party} {answer}" for party, answer in item["answers"].items())  # type: ignore[attr-defined]
        typer.echo(
            f"{item['name']} ({str(item['contract'])[:16]}...):"
            f" {item['status']}{f'; {said}' if said else ''}"
        )
        if item["reason"]:
            typer.echo(f"  {item['reason']}")


@jobs.command("show")
def show(
    folder: Host,
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="Name, or the beginning of the contract's digest.")
    ],
) -> None:
    """Show a job's contract in words, and its report."""
    from fedark.cli.show import console
    from fedark.contract.contract import Contract
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.host.jobs import find_job
    from fedark.report.outcome import render
    from fedark.stages.consent import summary

    host = HostFolder.open(folder)
    found = find_job(host.store, job)
    _say_if_idle(folder)
    typer.echo(summary(Contract.decode(found.contract)), nl=False)
    typer.echo(f"{found.status}{f': {found.reason}' if found.reason else ''}")
    for party, (answer, reason) in host.store.answers(found.digest).items():
        typer.echo(f"  {party}: {answer}{f' ({reason})' if reason else ''}")
    path = host.party_folder / "runs" / found.run / "report.json"
    if found.run and path.is_file():
        console.print(render(json.loads(path.read_bytes()), {}))


@jobs.command("follow")
def follow(
    folder: Host,
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="Name, or the beginning of the contract's digest.")
    ],
) -> None:
    """Tell what a job is at, until it ends. Exit status 1 if it does not end well."""
    from fedark.operate.daemon import PROGRESS
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.host.jobs import find_job
    from fedark.operate.host.store import JOB_ENDS

    host = HostFolder.open(folder)
    digest = find_job(host.store, job, to_stop=True).digest
    log, said = host.party_folder / PROGRESS, ""
    read = log.stat().st_size if log.is_file() else 0
    while True:
        found = find_job(host.store, digest)
        answers = host.store.answers(digest)
        waits = [f"{party} {answer}" for party, (answer, _) in answers.items()]
        state = f"{found.status}{f': {found.reason}' if found.reason else ''}"
        if found.status == "proposed":
            state = f"proposed; {', '.join(waits) or 'nobody has answered yet'}"
        if state != said:
            typer.echo(said := state)
        if log.is_file() and log.stat().st_size > read:
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(read)
                typer.echo(file.read().rstrip("\n"))
                read = file.tell()
        if found.status in JOB_ENDS:
            raise typer.Exit(found.status != "done")
        if not running(folder):
            raise FederationError("The host does not run.", fix=f"fedark aggregator up {folder}")
        time.sleep(0.5)


@jobs.command("stop")
def stop(
    folder: Host,
    job: Annotated[
        str, typer.Argument(metavar="JOB", help="Name, or the beginning of the contract's digest.")
    ],
) -> None:
    """Stop a job that waits or runs; its contract is used up if a run of it had begun."""
    from fedark.operate.host.folder import HostFolder
    from fedark.operate.host.jobs import find_job

    require_own(folder)
    host = HostFolder.open(folder)
    found = find_job(host.store, job, to_stop=True)
    try:
        host.store.set_job(found.digest, "stopped", "stopped at the host")
    except FedarkError as error:
        raise FederationError(error.what, safe=error.safe) from None
    typer.echo(f"job {found.name} ({found.digest[:16]}..., {found.status}) is stopped.")
