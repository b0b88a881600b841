"""What a trainer enclave takes in: the customer's records, and the provider's opened models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedark.contract.contract import Contract, ModelTerms
from fedark.foundation import canonical
from fedark.foundation.errors import DataError, ModelError, Refused
from fedark.foundation.jsontext import read_json
from fedark.privacy.ledger import record_bytes
from fedark.records.reading import Record
from fedark.tuning.start import START, open_start
from fedark.tuning.task import TaskModel
from fedark.tuning.weights import Files
from fedark.v1 import enclave_pb2 as pb

__all__ = ["OpenModel", "RecordIntake"]

_MAX_RECORDS = 5_000_000
_MAX_RECORD_CHARS = 1 << 20


class RecordIntake:
    """The customer's records as its node brings them: in batches of either split, and after a
    restart once more.

    Attributes:
        train, test: what was taken.
        digest: of all that was brought when they were first complete. Later only the same are
            taken.
    """

    def __init__(self, contract: Contract, party: str, *, private: bool, by_record: bool) -> None:
        """Args:
        private: the contract has a privacy mechanism: a record that cannot be used is then left
            out in silence, because a refusal would tell of it.
        by_record: the mechanism protects single records.
        """
        self._party, self._private, self._by_record = party, private, by_record
        self._answers = set().union(*(terms.labels for terms in contract.models))
        self.digest: bytes | None = None
        self.drop()

    def drop(self) -> None:
        """Forget the records, though not their digest."""
        self.train: list[Record] = []
        self.test: list[Record] = []
        self._hashed = hashlib.sha384()

    def take(
        self, call: pb.Records, failing: Callable[[list[Record]], list[int]]
    ) -> pb.Unusable | None:
        """Take a batch; the last one completes the records.

        Args:
            failing: indices of the records that a model fails on.

        Returns:
            Which records were unusable, if any: then all were dropped.

        Raises:
            DataError: a batch that is not to the contract, or no training record at all.
            Refused: other records than this run began with; they were dropped.
        """
        split = self.train if call.split == pb.Records.TRAIN else self.test
        batch = [Record(record.prompt, record.answer) for record in call.records]
        room = _MAX_RECORDS - len(split)
        problems = [self._problem(record, at < room) for at, record in enumerate(batch)]
        empty = call.last and not self.train and not (split is self.train and batch)
        found = next(filter(None, [*problems, "no training record" if empty else ""]), "")
        if found and not self._private:
            raise DataError(self._party, None, found)
        for record in batch:
            self._hashed.update(canonical.encode([call.split, record.prompt, record.answer]))
        split += [record for record, bad in zip(batch, problems, strict=True) if not bad]
        return self._complete(failing) if call.last else None

    def _problem(self, record: Record, room: bool) -> str:
        if not room:
            return f"more than {_MAX_RECORDS} records"
        if max(len(record.prompt), len(record.answer)) > _MAX_RECORD_CHARS:
            return f"a record has more than {_MAX_RECORD_CHARS} characters"
        if self._answers and record.answer not in self._answers:
            return "a record's answer is none of the contract's labels"
        return ""

    def _complete(self, failing: Callable[[list[Record]], list[int]]) -> pb.Unusable | None:
        bad = pb.Unusable(train=failing(self.train), test=failing(self.test))
        if bad.train or bad.test:
            self.drop()
            return bad
        digest = self._hashed.digest()
        if self.digest not in (None, digest):
            self.drop()
            raise Refused(
                f"The records that {self._party} brought again are not those that this run"
                " began with.",
                safe="They were dropped, and nothing was trained on them.",
                fix="Put the data file back as it was, or begin a new run.",
            )
        self.digest = digest
        if self._by_record:
            # A record that is in the file twice is one to the ledger: it must not move a sum twice.
            once = {record_bytes(record.prompt, record.answer): record for record in self.train}
            self.train = list(once.values())
        return None


@dataclass(frozen=True)
class OpenModel:
    """One base model of the job, with the provider's own records beside it.

    Attributes:
        initial: the adapter before any training, or that the job starts from, float32 [travelling].
        replay: records that are mixed into a customer's.
        acceptance: group and record of the acceptance set.
    """

    terms: ModelTerms
    task: TaskModel
    initial: np.ndarray[Any, np.dtype[np.float32]]
    replay: list[Record]
    acceptance: list[tuple[str, Record]]

    @classmethod
    def load(cls, files: Files, terms: ModelTerms, groups: Sequence[str]) -> OpenModel:
        """Build it from the files of an opened bundle.

        Args:
            groups: of the acceptance set, that the contract names.

        Raises:
            ModelError: they are not the model of `terms`, or its records are malformed.
        """
        acceptance = _records(files, "extra/acceptance.jsonl")
        if not {group for group, _ in acceptance} <= set(groups):
            raise ModelError(
                f"The acceptance set of model {terms.name} has a group that the contract does not"
                " name.",
                safe="Nothing was measured.",
            )
        task = TaskModel.load(files, terms)
        start = open_start(_bytes(files, f"extra/{START}"), terms)
        if start is not None:
            task.set_flat(start)
        replay = [record for _, record in _records(files, "extra/replay.jsonl")]
        return cls(terms, task, task.get_flat(), replay, acceptance)


def _bytes(files: Files, name: str) -> bytes | None:
    return bytes(files[name]) if name in files else None


def _records(files: Files, name: str) -> list[tuple[str, Record]]:
    """The provider's own records in a bundle: JSON lines of prompt, answer and group."""
    rows: list[tuple[str, Record]] = []
    for number, line in enumerate(bytes(files.get(name, b"")).splitlines(), start=1):
        try:
            row = read_json(line)
            rows.append((str(row["group"]), Record(str(row["prompt"]), str(row["answer"]))))
        except (ValueError, KeyError, TypeError):
            raise ModelError(
                f"{name} of the sealed bundle, line {number}: not a record.",
                safe="Nothing was trained.",
            ) from None
    return rows
