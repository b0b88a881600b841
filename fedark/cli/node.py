"""`fedark node`: run a party's node on its own premises: join a host, agree to jobs, see what it
does.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedark.foundation.errors import FederationError, InputError
from fedark.foundation.jsontext import read_json
from fedark.operate.state import require_own

if TYPE_CHECKING:
    from fedark.operate.node.folder import NodeFolder

__all__ = ["app"]

app = typer.Typer(help="Run a provider's or a customer's node on-prem.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The node's folder.")]
JobName = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Name of a job, or the beginning of its contract's digest."),
]
Sandbox = Literal["namespaces", "landlock"]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.command("join")
def join(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="The host's invitation; later, where need be, its admission."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The node's folder; made with the invitation.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="A customer's records: CSV or JSON lines.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", help="Held-out records; a part of --data by default.")
    ] = None,
    prompt: Annotated[
        str,
        typer.Option("--prompt", help="Template over columns, such as '{desk} desk: {message}'."),
    ] = "",
    answer: Annotated[str, typer.Option("--answer", help="The column of the answer.")] = "",
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", help="Of --data, held out of training.")
    ] = 0.2,
    sandbox: Annotated[
        Sandbox,
        typer.Option("--sandbox", help="Weakest sandbox to accept: namespaces or landlock."),
    ] = "landlock",
    minimum_cohort: Annotated[
        int, typer.Option("--minimum-cohort", min=2, help="Fewest customers to sum with.")
    ] = 3,
    offline: Annotated[
        bool, typer.Option("--offline", help="File nothing; carry the request's file to the host.")
    ] = False,
) -> None:
    """Make keys and ask a host to be admitted; or take the admission that it answered with."""
    from fedark.contract.contract import fingerprint
    from fedark.contract.job import DataSpec
    from fedark.operate.joining import Admission, Invitation, parse
    from fedark.operate.node.folder import NodeFolder, begin_join
    from fedark.operate.node.hostclient import HostClient
    from fedark.operate.party import DataConfig

    require_own(folder)
    try:
        content = file.read_bytes()
        kind = read_json(content).get("kind")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError):
        raise InputError(f"{file} is neither an invitation nor an admission.") from None
    if kind == Admission.model_fields["kind"].default:
        node = NodeFolder(folder)
        node.install(content)
        typer.echo(f"{node.config.name} has joined {node.admission.aggregator.name}.")
        return
    invitation = parse(content, Invitation, str(file))
    records = None
    if data is not None:
        if not data.is_file():
            raise InputError(f"{data} does not exist.", safe="Nothing was made.")
        spec = DataSpec(prompt=prompt, answer=answer, test_fraction=test_fraction)
        records = DataConfig(
            file=str(data.resolve()), test=str(test.resolve()) if test else "", spec=spec
        )
    node = begin_join(
        folder, invitation, data=records, sandbox=sandbox, minimum_cohort=minimum_cohort
    )
    request = node.path / "request.json"
    if offline:
        typer.echo(f"Carry {request} to the host. It holds public keys only.")
    else:
        try:
            with HostClient(node) as host:
                host.join(request.read_bytes())
            typer.echo(f"The request is with {invitation.aggregator.name}.")
        except FederationError as error:
            typer.echo(
                f"{error.what} The folder is made; fedark node up files the request once the host"
                " answers."
            )
    typer.echo("Compare two fingerprints with the host's people, by telephone or face to face:")
    typer.echo(
        f"  {invitation.aggregator.name} (they tell you): {fingerprint(invitation.aggregator)}"
    )
    typer.echo(f"  {node.config.name} (you tell them): {fingerprint(node.request.party)}")


@app.command("up")
def up(
    folder: Folder,
    metrics: Annotated[
        int, typer.Option("--metrics", help="Port on loopback for Prometheus; 0 for none.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, in a terminal too.")] = False,
) -> None:
    """Run the node until it is told to stop. It makes outbound connections only. A terminal shows
    one live view of the job at work.
    """
    from fedark.cli.live import watching
    from fedark.operate.node.folder import NodeFolder
    from fedark.operate.node.supervisor import run_node

    require_own(folder)
    node = NodeFolder(folder)
    with watching("node", node.config.name, node.path, as_json=as_json) as say:
        run_node(folder, say, metrics=metrics)


@app.command("offer")
def offer(
    folder: Folder,
    job: Annotated[
        Path, typer.Argument(metavar="JOB.toml", help="The job file that names the models.")
    ],
) -> None:
    """Provider: seal a job's models and offer them; the running node brings both to the host."""
    from fedark.contract.job import Job
    from fedark.foundation.files import private_directory, write_atomic
    from fedark.operate.node.folder import NodeFolder
    from fedark.operate.node.hostsync import OFFERS
    from fedark.operate.offer import make_offer

    require_own(folder)
    node = NodeFolder(folder)
    parsed = Job.load(job, role="provider")
    data, left_out = make_offer(node.path, parsed, typer.echo)
    write_atomic(private_directory(node.path / OFFERS) / f"{parsed.name}.offer", data, mode=0o600)
    for name, why in left_out.items():
        typer.echo(f"model {name} is left out: {why}")
    typer.echo(f"The offer for job {parsed.name} is signed.")


@app.command("jobs")
def jobs(
    folder: Folder,
    job: Annotated[
        str, typer.Argument(metavar="[JOB]", help="Show this one's contract in words.")
    ] = "",
) -> None:
    """List the contracts that the operator was asked about, or show one."""
    from fedark.operate.node.folder import NodeFolder
    from fedark.stages.consent import Consent, summary
    from fedark.stages.roster import read_roster

    node = NodeFolder(folder)
    if job:
        consent = Consent(node.path)
        contract = consent.find(job)
        typer.echo(
            summary(contract, frozenset(read_roster(node.path)), consent.before(contract)), nl=False
        )
        decision = consent.decision(contract)
        typer.echo(f"{decision.status}: {decision.reason}")
        if decision.status == "used":
            _show_outcome(node, decision.reason)
        if decision.status in ("waiting", "refused"):
            typer.echo(
                f"to agree: fedark node approve {shlex.quote(str(folder))}"
                f" {contract.digest().hex()}"
            )
        return
    for item in _told(node, "jobs").jobs:
        digest = item.contract.hex()[:16]
        typer.echo(f"{item.name} ({digest}...): {item.decision}, {item.reason}")
        if item.decision == "used":
            _show_outcome(node, item.reason)
        if item.decision == "waiting":
            typer.echo(f"  to read it: fedark node jobs {shlex.quote(str(folder))} {digest}")


def _show_outcome(node: NodeFolder, reason: str) -> None:
    """Where the run has left its report and adapters, how one is used, and what the personal one
    gains.
    """
    from fedark.cli.show import how_to_serve, how_to_use
    from fedark.stages.personal import gain_lines

    folder = node.path / "runs" / reason.removeprefix("run ")
    adapters = [
        path for kind in ("adapter", "personal") for path in sorted(folder.glob(f"{kind}-*"))
    ]
    for path in (*adapters, folder / "report.json"):
        if path.exists():
            typer.echo(f"  {path}")
    if adapters:
        typer.echo(f"  to use it: {how_to_use(adapters[-1])}")
        typer.echo(f"  to serve it: {how_to_serve(adapters[-1])}")
    figures = folder / "local.json"
    for line in gain_lines(json.loads(figures.read_bytes())) if figures.is_file() else ():
        typer.echo(f"  {line}")


@app.command("personal-key")
def personal_key(
    out: Annotated[Path, typer.Argument(help="The new key file; keep it off the node's machine.")],
) -> None:
    """Make a key that a customer's enclave seals personal adapters to."""
    from fedark.foundation.keys import PartyKeys

    keys = PartyKeys()
    keys.save(out)
    typer.echo("The line for the party.toml of the customer's node:")
    typer.echo(f'personal_key = "{keys.hpke.public.hex()}"')


@app.command("unseal")
def unseal(
    folder: Folder,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its name or the contract's digest.")],
    key: Annotated[Path, typer.Argument(help="The key file of `personal-key`.")],
    out: Annotated[Path, typer.Option(help="Where the folders go.")] = Path(),
) -> None:
    """Open the sealed personal adapters of a job, as PEFT folders."""
    from fedark.foundation.keys import PartyKeys
    from fedark.stages.consent import Consent
    from fedark.stages.personal import SEALED, write_personal

    consent = Consent(folder)
    contract = consent.find(job)
    run_id = consent.decision(contract).reason.removeprefix("run ")
    path = folder / "runs" / run_id / SEALED
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: this job left no sealed personal adapter here.",
            safe="Nothing was written.",
        )
    for made in write_personal(contract, run_id, path.read_bytes(), out, PartyKeys.load(key).hpke):
        typer.echo(f"  {made}")


@app.command("ledger")
def ledger(folder: Folder) -> None:
    """Show what was attested, released, refused and spent here. The log is verified first."""
    from fedark.foundation.errors import printable
    from fedark.operate.node.folder import NodeFolder

    reply = _told(NodeFolder(folder), "ledger")
    for entry in reply.entries:
        when = datetime.fromtimestamp(entry.time, UTC).isoformat().removesuffix("+00:00")
        typer.echo(
            f"{entry.index:6d}  {when}Z  {entry.kind:12s} {entry.party} run {entry.run_id[:16]}"
        )
        for line in printable(entry.note, 2000).splitlines():
            typer.echo(f"{'':30s}{line}")
    for charge in reply.charges:
        typer.echo(
            f"charged: contract {charge.contract.hex()[:16]}..., epsilon {charge.epsilon:.3f} at"
            f" delta {charge.delta:.3g} for each {charge.unit}, {charge.records} records,"
            f" {charge.released} of {charge.releases} releases have left"
        )
    for item in reply.spent:
        typer.echo(
            f"used up: contract {item.contract.hex()[:16]}... of job {item.name}, {item.reason}"
        )


@app.command("doctor")
def doctor(folder: Folder, as_json: AsJson = False) -> None:
    """Check this machine and folder, and say how to mend what is wrong. Exit status 1 if something
    is.
    """
    from fedark.operate.node.doctor import examine
    from fedark.operate.node.folder import NodeFolder

    found = examine(NodeFolder(folder))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        for finding in found:
            typer.echo(f"{finding.level:8s} {finding.check}: {finding.what}")
            if finding.level != "good" and finding.fix:
                typer.echo(f"{'':9s}mend: {finding.fix}")
    if any(finding.level == "bad" for finding in found):
        raise typer.Exit(1)


@app.command("stop")
def stop(folder: Folder) -> None:
    """End the running node. A stage at work is cut off; its job goes on without this party or
    fails.
    """
    from fedark.links.flower.service import NodeClient
    from fedark.operate.node.folder import NodeFolder
    from fedark.operate.state import socket_of

    node = NodeFolder(folder)
    with NodeClient(socket_of(node.path)) as client:
        client.stop()
    typer.echo(f"{node.config.name} stops.")


@app.command("approve")
def approve(
    folder: Folder,
    digest: Annotated[
        str,
        typer.Argument(
            metavar="DIGEST", help="Of the contract that you read: 16 hex digits of it or more."
        ),
    ],
) -> None:
    """Agree to a contract, for one run. `fedark node jobs FOLDER JOB` shows it, and this command
    with its digest.
    """
    from fedark.operate.node.folder import NodeFolder
    from fedark.stages.consent import Consent, summary
    from fedark.stages.roster import read_roster

    require_own(folder)
    node = NodeFolder(folder)
    consent = Consent(node.path)
    contract = consent.by_digest(digest)
    typer.echo(
        summary(contract, frozenset(read_roster(node.path)), consent.before(contract)), nl=False
    )
    consent.approve(contract)
    typer.echo(f"Approved: contract {contract.digest().hex()[:16]}... of job {contract.job}.")


@app.command("replace")
def replace(
    folder: Folder,
    party: Annotated[str, typer.Argument(metavar="PARTY", help="Whose keys are new.")],
    told: Annotated[
        str,
        typer.Option(
            "--fingerprint", help="As the party's own people tell you; without it, nothing changes."
        ),
    ] = "",
) -> None:
    """Take the new keys of a party that lost its machine, or changed its keys, into the roster."""
    from fedark.contract.contract import fingerprint
    from fedark.operate.node.folder import NodeFolder
    from fedark.stages.consent import Consent
    from fedark.stages.roster import read_roster, replace_keys

    node = NodeFolder(folder)
    if party == node.config.name:
        raise InputError(f"{party} is this node itself.", safe="The roster was left as it is.")
    proposed = [one for contract in Consent(node.path).proposed() for one in contract.parties]
    if told:
        old = read_roster(node.path).get(party)
        new = replace_keys(node.path, party, told, proposed)
        typer.echo(f"{party} was {fingerprint(old) if old else 'unknown'}.")
        typer.echo(f"{party} is  {fingerprint(new)} from now on.")
        typer.echo("Standing rules that name it still name its former fingerprint.")
        return
    known = read_roster(node.path)
    offered = {
        fingerprint(one) for one in proposed if one.name == party and one != known.get(party)
    }
    if party in known:
        typer.echo(f"{party} is known here as {fingerprint(known[party])}")
    for one in sorted(offered):
        typer.echo(f"  proposed by the host: {one}")
    if not offered:
        raise InputError(f"No contract that was proposed here has other keys of {party}.")
    typer.echo(
        f"Ask {party}'s own people, not the host, for their fingerprint (fedark node status shows"
        " it there), then:"
    )
    typer.echo(
        f'  fedark node replace {shlex.quote(str(folder))} {shlex.quote(party)} --fingerprint "..."'
    )


@app.command("refuse")
def refuse(
    folder: Folder,
    job: JobName,
    reason: Annotated[str, typer.Option("--reason", help="For this node's own records.")] = "",
) -> None:
    """Say no to a job, or take an approval back: a run of it ends here at its next stage."""
    from fedark.operate.node.folder import NodeFolder
    from fedark.stages.consent import Consent

    require_own(folder)
    consent = Consent(NodeFolder(folder).path)
    contract = consent.find(job)
    consent.refuse(contract, reason)
    typer.echo(f"Refused: contract {contract.digest().hex()[:16]}... of job {contract.job}.")


@app.command("status")
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Ask the running node what it is and does. Exit status 1 if it does not answer."""
    from fedark.contract.contract import fingerprint
    from fedark.links.flower.service import NodeClient
    from fedark.operate.node.folder import NodeFolder
    from fedark.operate.state import socket_of

    node = NodeFolder(folder)
    with NodeClient(socket_of(node.path)) as client:
        found = client.status()
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "party": found.party,
                    "role": found.role,
                    "run": found.run_id,
                    "stage": found.stage,
                }
            )
        )
        return
    typer.echo(f"its keys: {fingerprint(NodeFolder(folder).request.party)}")
    doing = f"works on stage {found.stage} of run {found.run_id}" if found.run_id else "waits"
    typer.echo(f"{found.party} ({found.role}) {doing}")


def _told(node: NodeFolder, what: Literal["jobs", "ledger"]) -> Any:
    """The running node's answer; where it does not run, the same read from its folder."""
    from fedark.links.flower.service import NodeClient
    from fedark.operate.node.queries import NodeQueries
    from fedark.operate.state import socket_of

    try:
        with NodeClient(socket_of(node.path)) as client:
            return getattr(client, what)()
    except FederationError:
        typer.echo("(the node does not run)", err=True)
        return getattr(NodeQueries(node.path), what)()
