"""The folder of a finished adapter (`fedark.tuning.export`), which an attacker may have made.

What it is, fedark.json says; from that follow the tensors that it holds, their shapes and their
size in bytes, and it must hold these and no others. Numbers that are not finite, links, special
files and matrices that the shared seed does not give are refused. Nothing of it is run. That it is
the adapter that a job made, and not another one of the same shape, nothing in the folder can prove.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from fedark.contract.contract import ModelTerms, TensorSpec
from fedark.foundation.errors import ModelError, printable
from fedark.foundation.jsontext import read_json
from fedark.foundation.terms import explain, to_tuples
from fedark.tuning.export import ADAPTER, FORM, HEAD, LABELS, TERMS, parts
from fedark.tuning.layout import Flat, flatten, seeded_tensor
from fedark.tuning.weights import read_header

__all__ = ["Adapter", "adapter_digest", "read_adapter", "read_terms"]

_MAX_TERMS = 4 << 20
_MAX_VALUES = 1 << 28  # a gigabyte of float32
_HEADER = 16 << 20  # of a file of tensors, at most
_PROBLEMS = 5


@dataclass(frozen=True)
class Adapter:
    """A finished adapter.

    Attributes:
        terms: the contract's of its model.
        flat: float32 [terms.travelling].
    """

    terms: ModelTerms
    flat: Flat


def read_adapter(folder: Path) -> Adapter:
    """Read the folder of an adapter; needs neither torch nor the base.

    Raises:
        ModelError: it is no such folder, or holds anything that its terms do not fix; says what.
    """
    if not folder.is_dir():
        raise _refused(folder, "there is no such folder")
    terms = read_terms(folder)
    if sum(spec.size for spec in terms.layout) > _MAX_VALUES:
        raise _refused(folder, f"its terms name more than {_MAX_VALUES:,} values")
    where = {parts(terms, spec.name): spec for spec in terms.layout}
    if len(where) != len(terms.layout):
        raise _refused(folder, f"{TERMS} names a tensor twice")
    if terms.task == "classification":
        _check_labels(folder, terms)
    named: dict[str, npt.NDArray[np.float32]] = {}
    for file in (ADAPTER, HEAD):
        wanted = {key: spec for (of, key), spec in where.items() if of == file}
        if wanted:
            named |= _tensors(folder, file, wanted)
    for spec in terms.layout:
        if not spec.travels and not np.array_equal(
            named[spec.name], seeded_tensor(terms.adapter.seed, spec)
        ):
            raise _refused(folder, f"its {spec.name} is not the one that the contract's seed gives")
    return Adapter(terms, flatten(terms.layout, named))


def adapter_digest(folder: Path) -> tuple[str, bytes]:
    """The model's name, and the digest by which the aggregator enclave names the adapter
    (`fedark.enclave.statements.Delivered`).

    Raises:
        ModelError: as `read_adapter`.
    """
    read = read_adapter(folder)
    return read.terms.name, hashlib.sha384(read.flat.astype("<f4").tobytes()).digest()


def read_terms(folder: Path) -> ModelTerms:
    """What an adapter's folder says that it is; of its tensors nothing is read.

    Raises:
        ModelError: it says nothing that is understood.
    """
    data = _read(folder, TERMS, _MAX_TERMS)
    try:
        value = read_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.keys() != {"form", "terms"}:
        raise _refused(folder, f"{TERMS} is malformed")
    if value["form"] != FORM:
        raise _refused(folder, f"{TERMS} is of another version of fedark: it should be {FORM!r}")
    try:
        return ModelTerms.model_validate(to_tuples(value["terms"]))
    except ValidationError as error:
        problems = "; ".join(explain(error)[:_PROBLEMS])
        raise _refused(folder, f"{TERMS} is malformed: {printable(problems)}") from None


def _check_labels(folder: Path, terms: ModelTerms) -> None:
    try:
        labels = read_json(_read(folder, LABELS, _MAX_TERMS))
    except ValueError:
        labels = None
    if labels != list(terms.labels):
        raise _refused(folder, f"{LABELS} and {TERMS} name different labels")


def _tensors(
    folder: Path, file: str, wanted: dict[str, TensorSpec]
) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of one file by their names in the layout: exactly those wanted."""
    size = 4 * sum(spec.size for spec in wanted.values())
    data = _read(folder, file, size + _HEADER)
    entries = read_header(file, data)
    if strange := sorted(entries.keys() ^ wanted.keys()):
        which = "lacks" if strange[0] in wanted else "holds, besides what its terms name,"
        raise _refused(folder, f"{file} {which} {printable(strange[0])}")
    found = {}
    for key, spec in wanted.items():
        entry = entries[key]
        if (entry.dtype, entry.shape) != ("F32", spec.shape):
            raise _refused(
                folder,
                f"{printable(key)} in {file} is {entry.dtype} {list(entry.shape)}, and not F32"
                f" {list(spec.shape)}",
            )
        value = np.frombuffer(data[entry.start : entry.end], dtype="<f4").reshape(spec.shape)
        if not np.isfinite(value).all():
            raise _refused(folder, f"{printable(key)} in {file} holds a number that is not finite")
        found[spec.name] = value
    return found


def _read(folder: Path, name: str, limit: int) -> bytes:
    """The content of one file, which is a plain one in this very folder."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        what = f"there is no {name}"
        if name == TERMS:
            what += "; an adapter of fedark has one, and says by it what it belongs to"
        raise _refused(folder, what) from None
    except OSError as error:
        linked = os.path.islink(path)
        why = "is a link" if linked else f"cannot be read ({error.strerror})"
        raise _refused(folder, f"{name} {why}") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refused(folder, f"{name} is no plain file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _refused(folder, f"{name} is larger than what its terms name")
    return data


def _refused(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder} is not a usable adapter: {why}.",
        safe="Nothing of it was loaded.",
        fix="Give the folder adapter-NAME as the job's run left it, or export it again.",
    )
