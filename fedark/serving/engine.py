"""What a server answers with: many adapters of one form on one base, in this process or in an
inference enclave.

An `Engine` belongs to one thread (`fedark.serving.worker`). Nothing of a prompt or an answer
outlives the call or the text that it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fedark.contract.contract import ModelTerms
from fedark.foundation import canonical
from fedark.foundation.errors import EnclaveFailed, FedarkError, InputError, ModelError
from fedark.serving.leased import Leased
from fedark.tuning.adapter import Adapter
from fedark.tuning.mixed import Asked, Read
from fedark.tuning.task import TaskModel
from fedark.tuning.writing import ROWS, Piece, Wish, Writer
from fedark.v1 import enclave_pb2 as pb

__all__ = ["LOST", "ClearEngine", "Engine", "LeasedEngine", "alike"]

LOST = "lost"
"""How a text ends whose enclave ended: nothing of it is wrong, but it has no rest."""
_MAX_PIECES = 1 << 26
_STEPS = 2  # tokens of each text that an enclave writes for one call


class Engine(Protocol):
    """See the module's text.

    Attributes:
        terms: of every adapter, as `alike` has it.
        rows: texts that are written at once.
        tells: it gives vectors, and the probabilities of written tokens.
    """

    terms: ModelTerms
    rows: int
    tells: bool

    def put(self, name: str, adapter: Adapter) -> None:
        """Load an adapter, in the place of one of that name.

        Raises:
            ModelError: it is one of another base or form.
        """
        ...

    def drop(self, name: str) -> None:
        """Forget an adapter, with what is being written with it."""
        ...

    def label(self, asked: Sequence[Asked]) -> list[Read]:
        """As `fedark.tuning.mixed.Mixed.label`."""
        ...

    def embed(self, asked: Sequence[Asked]) -> list[Read]:
        """As `fedark.tuning.mixed.Mixed.embed`."""
        ...

    def write(self, begin: Mapping[int, Wish], drop: Sequence[int]) -> list[Piece]:
        """Begin and end texts, and write on all that are begun."""
        ...

    def told(self) -> Mapping[str, float]:
        """Figures for operators, by name."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class ClearEngine:
    """A base in clear, in this process's memory; see `Engine`."""

    tells = True

    def __init__(self, task: TaskModel) -> None:
        self.terms, self._mixed = task.terms, task.mixed()
        writes = task.causal and not task.terms.labels
        self._writer = Writer(self._mixed) if writes else None
        self.rows = self._writer.rows if self._writer is not None else 0

    def put(self, name: str, adapter: Adapter) -> None:
        if alike(adapter.terms, self.terms) != self.terms:
            raise ModelError("The adapter's terms are not those of the others on this base.")
        self.drop(name)
        self._mixed.put(name, adapter.flat)

    def drop(self, name: str) -> None:
        if self._writer is not None:
            self._writer.forget(name)
        self._mixed.drop(name)

    def label(self, asked: Sequence[Asked]) -> list[Read]:
        return self._mixed.label(asked)

    def embed(self, asked: Sequence[Asked]) -> list[Read]:
        return self._mixed.embed(asked)

    def write(self, begin: Mapping[int, Wish], drop: Sequence[int]) -> list[Piece]:
        writer = self._writer
        if writer is None:
            raise InputError("This model writes no text: it has labels.")
        for number in drop:
            writer.drop(number)
        try:
            for number, wish in begin.items():
                writer.add(number, wish)
        except FedarkError:
            for number in begin:
                writer.drop(number)
            raise
        return writer.step()

    def told(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        for name in self._mixed.names:
            self.drop(name)


class LeasedEngine:
    """A sealed base in its inference enclave; see `Engine`.

    A lease is about answers: vectors of texts, and probabilities of tokens, would tell more of the
    base than its provider has signed for.
    """

    tells = False

    def __init__(self, leased: Leased) -> None:
        self.terms, self._leased = leased.signed.contract.terms, leased
        self.rows = 0 if self.terms.labels or self.terms.task == "classification" else ROWS
        self._begun: set[int] = set()

    def put(self, name: str, adapter: Adapter) -> None:
        self._leased.model(name, adapter)

    def drop(self, name: str) -> None:
        self._leased.drop(name)

    def label(self, asked: Sequence[Asked]) -> list[Read]:
        names, prompts = [one.adapter for one in asked], [one.prompt for one in asked]
        match self._leased.ask(pb.Ask(adapters=names, prompts=prompts)):
            case {"probabilities": bytes(likely), "read": list(read), "cut": list(cut)}:
                rows = np.frombuffer(likely, dtype="<f4").reshape(len(asked), -1)
                return [Read(*one) for one in zip(rows, read, cut, strict=True)]
        raise ModelError("The enclave's answer is malformed.")

    def embed(self, asked: Sequence[Asked]) -> list[Read]:
        raise InputError(
            "A leased base gives no vectors of texts: its provider leased its answers alone."
        )

    def write(self, begin: Mapping[int, Wish], drop: Sequence[int]) -> list[Piece]:
        wishes = [
            pb.Wish(
                id=number,
                adapter=one.adapter,
                prompt=one.prompt,
                longest=one.longest,
                stop=one.stop,
                temperature=one.temperature,
                top_p=one.top_p,
                seed=one.seed,
            )
            for number, one in begin.items()
        ]
        lives, lost = self._leased.lives, set(self._begun)
        try:
            call = pb.Call(write=pb.Write(begin=wishes, drop=drop, steps=_STEPS))
            written = self._leased.call(call, again=not lost).written
        except EnclaveFailed:
            self._begun.clear()
            raise
        if self._leased.lives == lives:
            lost.clear()
        self._leased.usage = written.usage or self._leased.usage
        pieces = [
            Piece(number, text, (), end, read, count)
            for number, text, end, read, count in canonical.decode(
                written.pieces, max_bytes=_MAX_PIECES
            )
        ]
        self._begun = ((self._begun - lost) | set(begin)) - set(drop)
        self._begun -= {piece.id for piece in pieces if piece.end}
        return pieces + [Piece(number, end=LOST) for number in lost]

    def told(self) -> Mapping[str, float]:
        return self._leased.figures()

    def close(self) -> None:
        self._leased.close()


def alike(terms: ModelTerms, base: ModelTerms) -> ModelTerms:
    """`terms` with all that `base` has and that says nothing of how an adapter answers: equal to
    it, if one engine can hold adapters of both.
    """
    same = ("name", "bundle", "base", "prompt", "pooling_why", "start", "server", "personal")
    values = {name: getattr(base, name) for name in same}
    if terms.training.max_length == base.training.max_length:
        values["training"] = base.training
    return terms.model_copy(update=values)
