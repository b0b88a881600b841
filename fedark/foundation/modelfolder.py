"""Which files of a folder make a base model.

A folder as cloned from a hub holds much besides: pickled weights, other frameworks' weights, code,
pictures. What is named here is read and sealed; all else is named and left alone, and nothing that
can run code when it is read is ever opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import ModelError, printable
from fedark.foundation.jsontext import read_json

__all__ = [
    "INDEX",
    "MAX_SMALL_BYTES",
    "SMALL_FILES",
    "WEIGHTS",
    "ModelFolder",
    "index_names",
    "read_folder",
    "shortened",
]

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SMALL_FILES = (
    *("config.json", "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "modules.json", "1_Pooling/config.json"),
)
MAX_SMALL_BYTES = 256 << 20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,180}\.safetensors")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")


@dataclass(frozen=True)
class ModelFolder:
    """The model in a folder.

    Attributes:
        path: the folder; of a hub's cache, the snapshot in it.
        files: name inside the folder -> file, sorted by name. Not every one need be readable.
        left_out: everything else that is there.
        problems: why it is no model that fedark can use.
    """

    path: Path
    files: dict[str, Path]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]


def read_folder(folder: Path) -> ModelFolder:
    """Look through a folder; links to files are followed, as hub caches have them.

    Raises:
        ModelError: it is not a folder.
    """
    path = _snapshot(folder)
    if not path.is_dir():
        raise ModelError(
            f"{folder} is not a directory.",
            safe="Nothing was loaded.",
            fix="Give the directory that holds config.json and model.safetensors.",
        )
    problems = []
    names = [name for name in SMALL_FILES if os.path.lexists(path / name)]
    if os.path.lexists(path / WEIGHTS):
        names = [name for name in names if name != INDEX] + [WEIGHTS]
    elif INDEX in names:
        try:
            names += index_names(_small(path / INDEX))
        except OSError as error:
            problems.append(f"{INDEX}: cannot be read: {error.strerror}")
        except ValueError:
            problems.append(f"{INDEX} is malformed")
    missing = [name for name in names if not os.path.lexists(path / name)]
    problems += [f"{INDEX} names {name}, which is missing" for name in missing]
    left_out = _others(path, set(names))
    if not any(name.endswith(".safetensors") for name in names) and INDEX not in names:
        problems.append(_without_weights(left_out))
    if "config.json" not in names:
        problems.append("there is no config.json")
    files = {name: path / name for name in sorted(names) if name not in missing}
    return ModelFolder(path, files, left_out, tuple(problems))


def shortened(names: tuple[str, ...]) -> str:
    """Names for a sentence; of many, the first."""
    few = ", ".join(printable(name) for name in names[:12])
    return few if len(names) <= 12 else f"{few} and {len(names) - 12} more"


def index_names(data: bytes | bytearray | memoryview) -> list[str]:
    """The files that an index of safetensors names, sorted.

    Raises:
        ValueError: it is malformed, or names no file or what is no plain name of one.
    """
    try:
        names = sorted(set(read_json(data)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError from None
    if not names or not all(isinstance(name, str) and _PART.fullmatch(name) for name in names):
        raise ValueError
    return names


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_SMALL_BYTES)


def _snapshot(folder: Path) -> Path:
    """The snapshot inside a hub cache's folder of one model; any other folder as it is."""
    snapshots = folder / "snapshots"
    if (folder / "config.json").exists() or not snapshots.is_dir():
        return folder
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs/main"
    if main.is_file():
        revision = main.read_text("utf-8", "replace").strip()
        found = [path for path in found if path.name == revision] or found
    return found[0] if len(found) == 1 else folder


def _others(path: Path, taken: set[str]) -> tuple[str, ...]:
    """What else is in the folder; hidden folders and links to folders by their name alone."""
    found = []
    for at, folders, names in os.walk(path):
        relative = Path(at).relative_to(path)
        closed = {name for name in folders if name.startswith(".") or Path(at, name).is_symlink()}
        folders[:] = sorted(set(folders) - closed)
        inner = [(relative / name).as_posix() for name in names]
        found += [name for name in inner if name not in taken]
        found += [
            f"{(relative / name).as_posix()}/"
            for name in closed
            if not any(one.startswith(f"{(relative / name).as_posix()}/") for one in taken)
        ]
    return tuple(sorted(found))


def _without_weights(left_out: tuple[str, ...]) -> str:
    what = f"there are no weights: no {WEIGHTS}"
    unsafe = [name for name in left_out if name.lower().endswith(_UNSAFE) and "/" not in name]
    if any(name.endswith(".safetensors") for name in left_out):
        return f"{what} and no {INDEX}; save the model again with save_pretrained(folder)"
    if unsafe:
        return (
            f"{what}. Weights in {', '.join(unsafe[:2])} are never opened: reading such a file can"
            " run code. Where you trust where it came from, load it with transformers and save it"
            " again with save_pretrained(folder), which writes safetensors"
        )
    return what
