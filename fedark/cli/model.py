"""`fedark model`: seal a base model, look at a bundle, verify one, and (for the provider who has
its key) open one.

A weight key is never printed and never an argument: it lies in a folder of mode 0700, one file of
mode 0600 for each bundle.
"""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from fedark.contract.contract import now
from fedark.foundation.errors import InputError, printable
from fedark.foundation.keys import HYBRID, PartyKeys
from fedark.foundation.modelfolder import shortened
from fedark.foundation.terms import explain
from fedark.vault.bundle import SealedBundle, open_directory, read_manifest, seal, select
from fedark.vault.manifest import Manifest, ModelCard, ReleasePolicy, VerifiedManifest
from fedark.vault.weightkey import KeyStore

__all__ = ["app"]

app = typer.Typer(
    help="Seal base models, and look at, verify or open sealed bundles.", no_args_is_help=True
)

Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A sealed bundle: a folder NAME.fedark.")
]
Provider = Annotated[
    str,
    typer.Option("--provider", help="The provider's signing key (64 hex digits), as you know it."),
]
PartyKey = Annotated[Path, typer.Option("--key", help="The provider's party key file.")]
WeightKeys = Annotated[
    Path | None,
    typer.Option(
        "--weight-keys",
        help="Folder of weight keys; `weight-keys` beside the party key by default.",
    ),
]


@app.command("seal")
def seal_model(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A model directory: config.json, safetensors, tokenizer."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The bundle to make, such as NAME.fedark.")],
    key: Annotated[
        Path,
        typer.Option(
            "--key", help="The provider's party key file; one is made where there is none."
        ),
    ],
    licence: Annotated[
        str, typer.Option("--licence", help="SPDX expression of the model's licence.")
    ],
    platform: Annotated[
        list[str],
        typer.Option("--platform", help="An attestation platform to trust; repeat for more."),
    ],
    task: Annotated[
        str, typer.Option("--task", help="classification or instruction.")
    ] = "classification",
    weight_keys: WeightKeys = None,
    name: Annotated[str, typer.Option("--name", help="Short name; that of --out by default.")] = "",
    title: Annotated[str, typer.Option("--title", help="Name for readers.")] = "",
    description: Annotated[str, typer.Option("--description", help="For readers.")] = "",
    base: Annotated[str, typer.Option("--base", help="Where the weights come from.")] = "",
    sandbox: Annotated[
        str, typer.Option("--sandbox", help="Weakest admissible sandbox: namespaces or landlock.")
    ] = "landlock",
    days: Annotated[
        int, typer.Option("--days", min=1, max=3650, help="Days until the release policy expires.")
    ] = 365,
    minimum_cohort: Annotated[
        int, typer.Option("--minimum-cohort", min=2, help="Fewest customers in a sum.")
    ] = 3,
    kem: Annotated[
        list[str] | None,
        typer.Option("--kem", help=f"A KEM to release keys under; {HYBRID} alone by default."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            "--role", help="Enclaves that may get its key: trainer (alone by default), inference."
        ),
    ] = None,
    extra: Annotated[
        list[Path] | None,
        typer.Option("--extra", help="A data set to seal along; repeat for more."),
    ] = None,
) -> None:
    """Seal DIR: encrypted, signed, and useless without a key that only an attested enclave gets."""
    short = name or out.name.removesuffix(".fedark")
    try:
        card = ModelCard.model_validate(
            {
                "name": short,
                "title": title or short,
                "description": description,
                "licence": licence,
                "task": task,
                "base": base,
            }
        )
        policy = ReleasePolicy.model_validate(
            {
                "expires": (now() + timedelta(days=days)).isoformat(timespec="seconds"),
                "platforms": tuple(platform),
                "sandbox": sandbox,
                "minimum_cohort": minimum_cohort,
                "kem": tuple(kem or (HYBRID,)),
                "roles": tuple(role or ("trainer",)),
            }
        )
    except ValidationError as error:
        problems = "\n".join(f"  - {problem}" for problem in explain(error))
        raise InputError(
            f"The options do not fit:\n{problems}", safe="Nothing was written."
        ) from None
    files = {path.name: path for path in extra or ()}
    if len(files) != len(extra or ()):
        raise InputError("Two extra data sets have one name.", safe="Nothing was written.")
    # First of all, so that not even a key is made for a directory that cannot be sealed.
    left_out = select(directory, files).left_out
    provider = _party_keys(key)
    typer.echo(f"sealing {directory}")
    if left_out:
        typer.echo(f"not part of the model, so not sealed: {shortened(left_out)}")
    manifest, weight_key = seal(
        directory, out, provider=provider.signing, card=card, policy=policy, extra=files
    )
    try:
        kept = _store(weight_keys, key).put(manifest, weight_key)
    except BaseException:
        shutil.rmtree(out)  # nobody could ever open it
        raise
    _show(manifest)
    typer.echo(f"weight key   {kept} (keep it: without it the bundle cannot be opened)")


@app.command("show")
def show(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show model card, release policy and files of BUNDLE. The signature is checked, the payload is
    not read.
    """
    manifest = _manifest(bundle, "")
    if as_json:
        typer.echo(json.dumps(_as_map(manifest), indent=2))
    else:
        _show(manifest)


@app.command("verify")
def verify(bundle: Bundle, provider: Provider = "") -> None:
    """Check signature, length and digest of all of BUNDLE. Needs no key."""
    manifest = _manifest(bundle, provider)
    loaded = SealedBundle.load(bundle, manifest.provider)
    loaded.check_payload()
    typer.echo(
        f"{bundle}: {manifest.payload_size} sealed bytes are exactly what the provider sealed."
    )
    typer.echo(f"bundle       {manifest.digest().hex()}")
    known = (
        "as given" if provider else "as the bundle says: compare it with what the provider told you"
    )
    typer.echo(f"provider     {manifest.provider.hex()} ({known})")


@app.command("open")
def open_model(
    bundle: Bundle,
    out: Annotated[Path, typer.Option("--out", help="The directory to make.")],
    key: PartyKey,
    weight_keys: WeightKeys = None,
) -> None:
    """Decrypt BUNDLE into a new directory, for the provider who sealed it."""
    loaded = SealedBundle.load(bundle, PartyKeys.load(key).signing.public)
    open_directory(loaded, _store(weight_keys, key).get(loaded.manifest), out)
    typer.echo(f"{len(loaded.manifest.files)} files are in {out}")


def _store(weight_keys: Path | None, key: Path) -> KeyStore:
    return KeyStore(weight_keys or key.parent / "weight-keys")


def _party_keys(path: Path) -> PartyKeys:
    if path.exists():
        return PartyKeys.load(path)
    keys = PartyKeys()
    keys.save(path)
    typer.echo(f"made a new party key in {path}")
    return keys


def _manifest(bundle: Path, provider: str) -> VerifiedManifest:
    data = read_manifest(bundle)
    try:
        public = bytes.fromhex(provider) if provider else Manifest.claimed_provider(data)
    except ValueError:
        raise InputError("--provider is not 64 hex digits.") from None
    return Manifest.verify(data, public)


def _as_map(manifest: VerifiedManifest) -> dict[str, object]:
    return {
        "bundle": manifest.digest().hex(),
        "provider": manifest.provider.hex(),
        "card": manifest.card.model_dump(),
        "policy": manifest.policy.model_dump(),
        "files": [
            {"name": entry.name, "size": entry.size, "sha384": entry.sha384.hex()}
            for entry in manifest.files
        ],
        "chunk_size": manifest.chunk_size,
        "payload_size": manifest.payload_size,
        "payload_sha384": manifest.payload_sha384.hex(),
    }


def _show(manifest: VerifiedManifest) -> None:
    card, policy = manifest.card, manifest.policy
    lines = {
        "model": f"{card.title} ({card.name})",
        "about": card.description,
        "licence": card.licence,
        "task": card.task,
        "base": card.base,
        "provider": manifest.provider.hex(),
        "bundle": manifest.digest().hex(),
        "expires": policy.expires,
        "released to": (
            f"{', '.join(policy.platforms)}; sandbox {policy.sandbox} or stronger; svn"
            f" {policy.minimum_svn} or newer"
        ),
        "kem": ", ".join(policy.kem),
        "enclaves": ", ".join(policy.roles),
        "updates": (
            f"{', '.join(policy.protection)}; sums of {policy.minimum_cohort} or more customers"
        ),
        "privacy": ", ".join(policy.mechanisms),
        "files": f"{len(manifest.files)}, {manifest.total} bytes",
    }
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:<12} {printable(value, 2000)}")
    for entry in manifest.files:
        typer.echo(f"  {entry.size:>14}  {entry.name}")
