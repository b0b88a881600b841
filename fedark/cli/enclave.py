"""`fedark enclave`: what an enclave is, as a contract's reference values, and which file makes two
of them differ.

A publisher signs what it measured (`sign-reference`); who gets an enclave from it checks that, and
compares (`verify-reference`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from fedark.attestation.reference import ReferenceValues, VerifiedReference, sign_reference
from fedark.contract.contract import now
from fedark.foundation.errors import InputError, printable
from fedark.foundation.files import write_new
from fedark.foundation.keys import PartyKeys
from fedark.foundation.terms import explain, to_tuples
from fedark.measurement import differences, measure_enclave, reference_policies

__all__ = ["app"]

app = typer.Typer(help="Measure enclaves and compare measurements.", no_args_is_help=True)

_MAX_FILE = 256 << 20


@app.command()
def measure(
    role: Annotated[str, typer.Argument(help="trainer or aggregator")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every measured file too, for `diff`.")
    ] = False,
) -> None:
    """Print the registers of an enclave, and what went into them."""
    begun = time.perf_counter()
    measurement = measure_enclave(role)
    seconds = time.perf_counter() - begun
    if as_json:
        typer.echo(json.dumps(measurement.to_json(), indent=1, sort_keys=True))
        return
    typer.echo(f"{role} enclave, entry point {measurement.entry_point}")
    for name, value in measurement.registers.items():
        entries = measurement.entries[name]
        typer.echo(f"\n{name:<12} {value.hex()}")
        parts = Counter(_part(entry.label) for entry in entries)
        typer.echo(
            f"{'':<12} {len(entries)} files: "
            + ", ".join(f"{part} {count}" for part, count in sorted(parts.items()))
        )
    typer.echo(f"\nmeasured in {seconds:.2f} s; files that did not change are not read again")
    for mode, policies in reference_policies().items():
        typer.echo(f"\nsandbox mode {mode}: reference values of its policies")
        for kind, digests in (("seccomp", policies.seccomp), ("landlock", policies.landlock)):
            for digest in digests:
                typer.echo(f"{kind:<12} {digest or '(none: a kernel without landlock)'}")


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="a file made by `measure --json`")],
    other: Annotated[
        str, typer.Argument(help="another such file, or a role, which is measured now")
    ],
) -> None:
    """Say which files differ from one measurement to another; the exit status is 1 if any does."""
    lines = differences(_read(one), _read(other))
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)
    typer.echo("Nothing differs.")


@app.command("sign-reference")
def sign(
    measurement: Annotated[
        str,
        typer.Argument(help="a file made by `measure --json`, or a role, which is measured now"),
    ],
    key: Annotated[Path, typer.Option("--key", help="The publisher's party key file.")],
    release: Annotated[
        str, typer.Option("--release", help='What was measured, such as "fedark 0.1.0".')
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to make.")],
    days: Annotated[
        int, typer.Option("--days", min=1, max=3650, help="Days until the values expire.")
    ] = 180,
) -> None:
    """Sign the registers of a measurement as reference values; the list of files stays out."""
    value = _load(measurement)
    begun = now()
    try:
        values = ReferenceValues.model_validate(
            {
                "role": value.get("role"),
                "release": release,
                "issued": begun.isoformat(timespec="seconds"),
                "expires": (begun + timedelta(days=days)).isoformat(timespec="seconds"),
                "registers": value.get("registers"),
                "policies": to_tuples(value.get("policies", {})),
            }
        )
    except ValidationError as error:
        problems = "\n".join(f"  - {printable(problem)}" for problem in explain(error))
        raise InputError(
            f"{measurement} makes no reference values:\n{problems}", safe="Nothing was signed."
        ) from None
    publisher = PartyKeys.load(key).signing
    signed = sign_reference(values, publisher)
    write_new(out, lambda file: file.write(signed))
    out.chmod(0o644)  # public: it goes with what it speaks of
    typer.echo(f"{out}: {values.role} enclave of {values.release}, until {values.expires}")
    typer.echo(f"publisher    {publisher.public.hex()}")


@app.command("verify-reference")
def verify(
    file: Annotated[Path, typer.Argument(help="a file made by `sign-reference`")],
    publisher: Annotated[
        str,
        typer.Option(
            "--publisher", help="The publisher's signing key (64 hex digits), as you know it."
        ),
    ],
    installed: Annotated[
        bool, typer.Option("--installed", help="Compare with the enclave that is installed here.")
    ] = False,
) -> None:
    """Check signature and dates of reference values and print them; with --installed the exit
    status is 1 if one differs.
    """
    try:
        known = bytes.fromhex(publisher)
        data = file.read_bytes() if file.stat().st_size <= _MAX_FILE else b""
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError("--publisher is not 64 hex digits.") from None
    values = VerifiedReference.verify(data, [known], now=now(), source=str(file)).values
    typer.echo(
        f"{values.role} enclave of {values.release}, from {values.issued} until {values.expires}"
    )
    mine = measure_enclave(values.role).registers if installed else {}
    differing = []
    for name, value in sorted(values.registers.items()):
        same = mine[name].hex() == value if name in mine else None
        differing += [name] if same is False else []
        verdict = {None: "", True: "  as installed", False: "  DIFFERS from what is installed"}[
            same
        ]
        typer.echo(f"{name:<16} {value}{verdict}")
    reference = reference_policies()
    for mode, policies in values.policies.items():
        for kind in ("seccomp", "landlock"):
            for digest in getattr(policies, kind):
                here = mode in reference and digest in getattr(reference[mode], kind)
                differing += [] if here or not installed else [digest]
                said = "" if not installed else "  known here" if here else "  UNKNOWN here"
                typer.echo(f"{mode + '.' + kind:<19} {digest or '(none)'}{said}")
    if installed and (missing := sorted(mine.keys() - values.registers.keys())):
        raise InputError(
            f"It has no value for {', '.join(missing)}, which this installation measures."
        )
    if differing:
        raise typer.Exit(1)


def _part(label: str) -> str:
    """What a measured file belongs to: a distribution or part of fedark by name, else the standard
    or system library.
    """
    top, _, rest = label.partition("/")
    if top not in ("site", "fedark"):
        return top
    name = rest.partition("/")[0]
    return "dist-info" if name.endswith(".dist-info") else f"{top}/{name}"


def _read(source: str) -> dict[str, Any]:
    value = _load(source)
    if not _is_measurement(value):
        raise InputError(
            f"{source} is not a measurement.", fix="Make one: fedark enclave measure ROLE --json"
        )
    return {"files": value["files"]}


def _load(source: str) -> dict[str, Any]:
    path = Path(source)
    if not path.exists():
        return measure_enclave(source).to_json()
    try:
        if path.stat().st_size > _MAX_FILE:
            raise InputError(f"{path} is too large for a measurement.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(
            f"{path} is not a measurement.", fix="Make one: fedark enclave measure ROLE --json"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{path} is not a measurement.", fix="Make one: fedark enclave measure ROLE --json"
        )
    return value


def _is_measurement(value: object) -> bool:
    files = value.get("files") if isinstance(value, dict) else None
    return isinstance(files, dict) and all(
        isinstance(part, dict)
        and all(
            isinstance(row, list) and [type(item) for item in row] == [str, bool, str]
            for row in part.values()
        )
        for part in files.values()
    )
