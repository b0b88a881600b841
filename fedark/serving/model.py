"""What answers: a base model in clear with a finished adapter.

`Answering` is all that the rest of this room needs of a model. The figures of `evaluate` are those
that a job's own evaluation gives, because the same code computes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedark.contract.contract import ModelTerms
from fedark.contract.protection import Figure
from fedark.foundation.errors import ModelError
from fedark.records.reading import Record
from fedark.tuning.adapter import Adapter
from fedark.tuning.judged import details
from fedark.tuning.sources import model_files, resolve
from fedark.tuning.task import Evaluation, TaskModel
from fedark.vault.manifest import weights_digest

__all__ = ["Answering", "ClearModel", "load"]


class Answering(Protocol):
    """A model with one adapter."""

    @property
    def terms(self) -> ModelTerms:
        """Of the adapter."""
        ...

    def probabilities(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As `TaskModel.probabilities`."""
        ...

    def answers(
        self, prompts: Sequence[str], *, longest: int | None = None, stop: Sequence[str] = ()
    ) -> list[str]:
        """As `TaskModel.answers`."""
        ...

    def evaluate(self, records: Sequence[Record]) -> tuple[Evaluation, Mapping[str, Figure]]:
        """What a job measures of these records: the metrics, and the figures of
        `fedark.tuning.judged.details`.
        """
        ...


class ClearModel:
    """A base in clear, in this process's memory."""

    def __init__(self, task: TaskModel) -> None:
        self.task, self.terms = task, task.terms
        self.probabilities, self.answers = task.probabilities, task.answers

    def evaluate(self, records: Sequence[Record]) -> tuple[Evaluation, Mapping[str, Figure]]:
        """See `Answering.evaluate`."""
        measured = self.task.evaluate(records)
        return measured, details(self.task, records, measured.said)


def load(adapter: Adapter, base: str) -> ClearModel:
    """The base that the adapter was made on, with the adapter.

    Args:
        base: a folder, or a source as `fedark.tuning.sources.resolve` takes it.

    Raises:
        ModelError: it is no usable model, or holds other weights than those that the adapter was
            trained on.
    """
    task = TaskModel.load(read_base(adapter.terms, base)[1], adapter.terms)
    task.set_flat(adapter.flat)
    return ClearModel(task)


def read_base(terms: ModelTerms, base: str) -> tuple[Path, dict[str, bytearray]]:
    """The folder of a base, and its files; only if its weights are those of `terms`.

    Raises: as `load`.
    """
    folder = resolve(base if ":" in base and not Path(base).exists() else f"dir:{base}")
    files: dict[str, bytearray] = {}
    try:
        for name, path in model_files(folder).items():
            files[name] = bytearray(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be read: {error.strerror}.", safe="Nothing was loaded."
        ) from None
    found = weights_digest({name: hashlib.sha384(data).digest() for name, data in files.items()})
    if found.hex() != terms.weights:
        where = f" ({terms.base} on the hub)" if terms.base else ""
        raise ModelError(
            f"{folder} holds other weights than the base that this adapter was trained on,"
            f" {terms.name}{where}.",
            safe="Nothing was loaded; on another base the adapter would give wrong answers.",
            fix="Give the folder of that very base: same weights, same revision, same precision.",
        )
    return folder, files
