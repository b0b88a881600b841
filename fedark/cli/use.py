"""`fedark predict`, `fedark eval`, `fedark merge`: a finished adapter in use."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedark.foundation.errors import InputError

if TYPE_CHECKING:
    from fedark.serving.asking import Form
    from fedark.serving.model import Answering

__all__ = ["evaluate", "merge", "predict"]

Folder = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder, as a run left it.")
]
Base = Annotated[
    str,
    typer.Option(
        "--base", help="The base: a folder, or package:NAME, dir:PATH or hub:ORG/NAME[@REVISION]."
    ),
]
Lease = Annotated[
    Path | None,
    typer.Option("--lease", help="Where the base is a secret: the TOML file of a lease in use."),
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt",
        help="Template of the prompt over the file's columns; the job's own if it is not given.",
    ),
]
Encoding = Annotated[str, typer.Option("--encoding", help="Of a file that is not UTF-8.")]
LeaveOut = Annotated[
    bool, typer.Option("--leave-out", help="Leave out records that cannot be used.")
]


def predict(
    folder: Folder,
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="CSV, JSON lines, Parquet or Arrow: the prompts.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write, .csv or .jsonl; replaced.")
    ],
    base: Base = "",
    lease: Lease = None,
    prompt: Prompt = "",
    encoding: Encoding = "",
    leave_out: LeaveOut = False,
    every: Annotated[
        bool, typer.Option("--all", help="Write the probability of every label.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Most tokens of a written answer.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="A text at which an answer ends; may be repeated."),
    ] = None,
) -> None:
    """Answer every record of IN: a label with its probability, or a written text."""
    from fedark.serving.asking import answer_file

    with _model(folder, base, lease) as model:
        count = answer_file(
            model,
            source,
            out,
            form=_form(prompt, encoding, leave_out),
            every=every,
            longest=max_tokens,
            stop=tuple(stop or ()),
            say=_say,
        )
    typer.echo(f"{count:,} answers are in {out}")


def evaluate(
    folder: Folder,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Records with their answers.")],
    base: Base = "",
    lease: Lease = None,
    answer: Annotated[str, typer.Option("--answer", help="Column of the right answer.")] = "label",
    prompt: Prompt = "",
    encoding: Encoding = "",
    leave_out: LeaveOut = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the adapter on records whose answers are known, as its job did."""
    from fedark.serving.asking import measure

    with _model(folder, base, lease) as model:
        found = measure(model, source, answer, form=_form(prompt, encoding, leave_out), say=_say)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            for label, counts in value.items():
                typer.echo(
                    f"  {label}: {counts['correct']} of {counts['records']} found,"
                    f" {counts['answered']} answered so"
                )
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            typer.echo(f"{name:<9} {shown}")


def merge(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    base: Base,
) -> None:
    """Write base and adapter as one folder that transformers loads. It holds the base in clear."""
    _quiet()
    from fedark.serving.merging import merge as merged
    from fedark.tuning.adapter import read_adapter

    what = merged(read_adapter(folder), base, out)
    typer.echo(f"{out}: {what}")


@contextmanager
def _model(folder: Path, base: str, lease: Path | None) -> Iterator[Answering]:
    """The adapter on a base in clear, or on a leased one in its enclave, which ends with the
    block.
    """
    if bool(base) == (lease is not None):
        raise InputError(
            "Say which base: --base for one in clear, or --lease for a sealed one.",
            safe="Nothing was loaded.",
        )
    _quiet()
    from fedark.tuning.adapter import read_adapter

    adapter = read_adapter(folder)
    if lease is None:
        from fedark.serving.model import load

        yield load(adapter, base)
        return
    from fedark.serving.opening import open_lease

    leased = open_lease(lease, _say)
    try:
        yield leased.model("adapter", adapter)
        _say(f"used so far: {leased.told()}")
    finally:
        leased.close()


def _form(prompt: str, encoding: str, leave_out: bool) -> Form:
    from fedark.serving.asking import Form

    return Form(prompt, encoding, leave_out)


def _quiet() -> None:
    # Before torch is loaded: threads that wait on a busy machine sleep instead of spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _say(text: str) -> None:
    typer.echo(text, err=True)
