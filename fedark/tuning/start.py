"""The adapter that a job starts from, where it goes on from an earlier result, head included.

The provider seals its travelling values with the base weights, as `START`; the contract names their
digest, and a trainer enclave takes no others. Whoever holds the adapter's folder computes the same
digest from it (`fedark contract start`), and so knows what the job goes on from.

A folder is read as an attacker could have made it (`fedark.tuning.adapter`), and must be of the
same base weights, task, labels and shape: the digest covers these too. On which base it was made a
folder says itself. Values that were made on another one start a bad job, and do no other harm.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedark.contract.contract import ModelTerms
from fedark.foundation import canonical
from fedark.foundation.errors import ModelError, printable
from fedark.tuning.adapter import read_adapter
from fedark.tuning.layout import Flat

__all__ = ["START", "Start", "open_start", "read_start", "start_digest"]

START = "start.f32"
"""Under `extra/` in a bundle: float32, little-endian, in the order of an update's vector."""
_SAME = ("task", "weights", "labels", "pooling", "layout")
_SAME_ADAPTER = ("method", "rank", "alpha", "targets", "layers", "head", "head_bias", "seed")
_LARGEST = 1e4
"""Magnitude of a value. Those of trained adapters and heads are below 100; from 1e19 on their
squares overflow, and every measurement and every step with them.
"""


@dataclass(frozen=True)
class Start:
    """What a job starts from.

    Attributes:
        values: float32, little-endian [terms.travelling].
        digest: SHA-384 (hex) of them, and of what gives them their meaning.
    """

    values: bytes
    digest: str


def read_start(folder: Path, terms: ModelTerms) -> Start:
    """What a job of `terms` starts from.

    Args:
        folder: of an adapter, or of a finished run, which has one for each model.

    Raises:
        ModelError: it is none, or it does not fit, with every reason.
    """
    inside = folder / f"adapter-{terms.name}"
    adapter = read_adapter(inside if inside.is_dir() else folder)
    problems = [
        f"it is of another base: its weights are {adapter.terms.weights[:16]}..., those of"
        f" {terms.name} are {terms.weights[:16]}..."
        if name == "weights"
        else f"its {name} and the job's are not the same"
        for name in _SAME
        if getattr(adapter.terms, name) != getattr(terms, name)
    ]
    for name in _SAME_ADAPTER:
        theirs, ours = getattr(adapter.terms.adapter, name), getattr(terms.adapter, name)
        if theirs != ours:
            problems.append(
                f"its adapter.{name} is {printable(str(theirs), 100)}, the job's {ours}"
            )
    if _too_large(adapter.flat):
        problems.append(f"it holds a value larger than {_LARGEST:g}, which no training gives")
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ModelError(
            f"Model {terms.name} cannot start from {folder}:\n{lines}",
            safe="Nothing was sealed.",
            fix="Start from an adapter of the same base, labels and shape, or change the job file.",
        )
    values = adapter.flat.astype("<f4").tobytes()
    return Start(values, start_digest(terms, hashlib.sha384(values).digest()))


def open_start(data: bytes | None, terms: ModelTerms) -> Flat | None:
    """The vector in an opened bundle; None where the job starts from the base itself.

    Args:
        data: the bundle's `START`, or None where it has none.

    Raises:
        ModelError: it is not the one that the contract names, or not usable.
    """
    if data is None and not terms.start:
        return None
    if data is None or start_digest(terms, hashlib.sha384(data).digest()) != terms.start:
        raise ModelError(
            f"The adapter that model {terms.name} starts from is not the one in the contract.",
            safe="Nothing was trained.",
            fix="The provider seals the model again, and the contract is made from that.",
        )
    usable = len(data) == 4 * terms.travelling
    flat = np.frombuffer(data, "<f4").astype(np.float32) if usable else np.zeros(0, np.float32)
    if not usable or _too_large(flat):
        raise ModelError(
            f"The adapter that model {terms.name} starts from has another length than the contract"
            f" says, or holds what is no number or larger than {_LARGEST:g}.",
            safe="Nothing was trained.",
            fix="Ask the provider to start from an adapter that fedark made.",
        )
    return flat


def _too_large(flat: Flat) -> bool:
    return not bool((np.abs(flat) <= _LARGEST).all())


def start_digest(terms: ModelTerms, values: bytes) -> str:
    """SHA-384 (hex) of what a job of `terms` starts from.

    Args:
        values: SHA-384 of the values, as the aggregator enclave's statement of a delivery names
            them.
    """
    what = {name: terms.model_dump()[name] for name in _SAME}
    return canonical.digest(["fedark/start/1", what, values]).hex()
