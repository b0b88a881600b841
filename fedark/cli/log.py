"""`fedark log`: read, verify and compare transparency logs. Nothing here writes to a log, and none
of it needs a secret key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedark.foundation.errors import InputError, printable
from fedark.operate.party import PartyConfig
from fedark.stages.node import LOG, SEEN_LOGS
from fedark.stages.roster import read_roster
from fedark.translog.entry import KINDS, Fact
from fedark.translog.head import TreeHead
from fedark.translog.log import LogContents, read_log
from fedark.translog.memory import HeadMemory

__all__ = ["app"]

app = typer.Typer(
    help="Look at, verify and compare the logs of attestations, releases and refusals.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", help="A party's folder, or a copy of it or of its log.sqlite."
    ),
]
Key = Annotated[
    str,
    typer.Option(
        "--key",
        help=(
            "The owner's signing key (64 hex digits), as you know it; that of FOLDER's roster by"
            " default."
        ),
    ),
]


@app.command("verify")
def verify(
    folder: Folder,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", metavar="HEAD.json", help="A head that was kept; repeat for more."
        ),
    ] = None,
    key: Key = "",
) -> None:
    """Check every entry, proof and signature of a log, and that every head that somebody kept is of
    its past.
    """
    contents, public = _read(folder, key)
    for path in against or ():
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        head = TreeHead.from_json(text, public, by="the log's owner")
        contents.check(head)
        typer.echo(
            f"{path}: of this log's past, at {head.size} of {len(contents.entries)} entries."
        )
    counted = [logged.entry.kind for logged in contents.entries]
    kinds = ", ".join(f"{counted.count(kind)} {kind}" for kind in sorted(set(counted))) or "none"
    typer.echo(f"The log is whole: {len(counted)} entries ({kinds}).")
    if contents.head is not None:
        typer.echo(f"Root {contents.head.root.hex()} at {_time(contents.head.time)}.")
    unproven = "" if key else ", in the words of this folder: compare it with what you know"
    typer.echo(f"Signed by {public.hex()}{unproven}.")
    if not against:
        typer.echo(
            "Whether its end was cut off, or another log was shown to others, only a kept head"
            " tells: use --against."
        )


@app.command("show")
def show(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    key: Key = "",
) -> None:
    """Print the entries of a log, once it is verified."""
    contents, _ = _read(folder, key)
    for logged in contents.entries:
        entry = logged.entry
        facts = _readable({name: entry.facts[name] for name in KINDS[entry.kind]})
        if as_json:
            value = {
                "index": logged.index,
                "time": _time(entry.time),
                "kind": entry.kind,
                "facts": facts,
                "note": logged.note,
            }
            typer.echo(json.dumps(value))
            continue
        named = [
            f"{name} {_short(fact)}"
            for name, fact in facts.items()
            if name not in ("party", "reasons")
        ]
        typer.echo(
            f"{logged.index:6d}  {_time(entry.time)}  {entry.kind:11s}  {facts['party']}:"
            f" {', '.join(named)}"
        )
        for line in logged.note.splitlines():
            typer.echo(f"{'':29s}{line}")


@app.command("head")
def head(
    folder: Folder,
    of: Annotated[
        str,
        typer.Option(
            "--of", metavar="PARTY", help="The last head that FOLDER's party saw of PARTY's log."
        ),
    ] = "",
    key: Key = "",
) -> None:
    """Print a tree head as JSON, to keep or to send: of FOLDER's own log, or the last that it saw
    of another's.
    """
    if of:
        public = _hex(key) or _roster_key(folder, of)
        seen = folder / SEEN_LOGS
        found = HeadMemory(seen).last(public, by=of) if seen.exists() else None
        if found is None:
            raise InputError(f"{folder} has seen no log of {printable(of)}.")
    else:
        contents, public = _read(folder, key)
        found = contents.head
        if found is None:
            raise InputError(f"The log of {folder} is empty.")
    typer.echo(found.to_json(public), nl=False)


def _read(folder: Path, key: str) -> tuple[LogContents, bytes]:
    path = folder / LOG if folder.is_dir() else folder
    public = _hex(key) or _roster_key(path.parent, PartyConfig.read(path.parent).name)
    return read_log(path, public), public


def _roster_key(folder: Path, name: str) -> bytes:
    party = read_roster(folder).get(name)
    if party is None:
        raise InputError(f"The roster of {folder} has no {printable(name)}.")
    return bytes.fromhex(party.signing_key)


def _hex(key: str) -> bytes:
    try:
        public = bytes.fromhex(key)
    except ValueError:
        public = b"?"
    if len(public) not in (0, 32):
        raise InputError("A signing key is 64 hex digits.")
    return public


def _readable(facts: Mapping[str, Fact]) -> dict[str, str | int]:
    return {name: fact.hex() if isinstance(fact, bytes) else fact for name, fact in facts.items()}


def _short(fact: str | int) -> str:
    text = str(fact)
    return f"{text[:12]}..." if len(text) > 40 else text


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00") + "Z"
