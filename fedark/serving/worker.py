"""The one thread that an engine is used from, and the queue before it.

What waits is bounded: when the queue is full a request is refused at once (`Full`), and whoever
asked may come again. A request whose client has gone is taken out of the queue, or ended where it
is being written, and its place is free.

Prompts that wait at the same time are computed together, whoever sent them. If that fails, each
request is tried alone, so that one that the model or its tokenizer fails on takes no other along;
what is said of the failure goes to that request's client and to nobody else.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedark.foundation.errors import EnclaveFailed, FedarkError, InputError, Refused
from fedark.foundation.logs import explain
from fedark.serving.engine import Engine
from fedark.tuning.adapter import Adapter
from fedark.tuning.mixed import Asked, Read
from fedark.tuning.writing import Piece, Wish

__all__ = ["Full", "Job", "Worker"]

Outcome = list[Read] | Piece | FedarkError
_BATCH = 256  # prompts that are computed together
_log = logging.getLogger("fedark.serving")


class Full(Exception):
    """The queue is full, or the server is about to end."""


@dataclass(eq=False)
class Job:
    """A request's part: prompts to label or embed, or one text to write.

    Args:
        tell: called in the worker's thread with each outcome: all answers at once, or the pieces of
            a text one after the other, of which the last has an `end`; or why there is no more.
        size: prompts; what the queue's bound counts.
    """

    kind: Literal["label", "embed", "write"]
    tell: Callable[[Outcome], None]
    asked: Sequence[Asked] = ()
    wish: Wish | None = None
    gone: bool = False

    @property
    def size(self) -> int:
        return max(1, len(self.asked))


@dataclass(eq=False)
class _Order:
    """Something to do in the worker's thread between two batches."""

    act: Callable[[], object]
    done: threading.Event = field(default_factory=threading.Event)
    error: FedarkError | None = None


class Worker:
    """See the module's text.

    Args:
        engine: used from this worker's thread alone.
        most: prompts and texts that wait, at most.
    """

    def __init__(self, engine: Engine, *, most: int = 256) -> None:
        self.engine, self._most = engine, most
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._orders: deque[_Order] = deque()
        self._running: dict[int, Job] = {}
        self._numbers = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="fedark-serving", daemon=True)
        self._thread.start()

    # -- from any thread

    @property
    def waiting(self) -> int:
        """Prompts and texts in the queue."""
        return sum(job.size for job in tuple(self._waiting))

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all of them or none.

        Raises:
            Full: there is no room for them.
        """
        with self._changed:
            if self._stopping or self.waiting + sum(job.size for job in jobs) > self._most:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Its client has gone: compute no more of it."""
        with self._changed:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def order(self, act: Callable[[], object]) -> None:
        """Do something to the engine, between two batches, and wait for it.

        Raises:
            FedarkError: what `act` raised.
        """
        order = _Order(act)
        with self._changed:
            self._orders.append(order)
            self._changed.notify()
        order.done.wait()
        if order.error is not None:
            raise order.error

    def put(self, name: str, adapter: Adapter) -> None:
        """Load an adapter; what is being written with one of that name is ended.

        Raises:
            FedarkError: as `Engine.put`.
        """

        def act() -> None:
            self._end(name)
            self.engine.put(name, adapter)

        self.order(act)

    def drop(self, name: str) -> None:
        """Forget an adapter, and end what is being written with it."""

        def act() -> None:
            self._end(name)
            self.engine.drop(name)

        self.order(act)

    def stop(self) -> None:
        """Take nothing more, finish nothing more, and give back what the engine holds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # -- the worker's thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._orders or self._waiting or self._running):
                    self._changed.wait()
                orders, jobs = list(self._orders), self._due()
                self._orders.clear()
                stopping = self._stopping
            for order in orders:
                self._obey(order)
            if stopping:
                break
            for kind in ("label", "embed"):
                self._compute(kind, [job for job in jobs if job.kind == kind and not job.gone])
            self._write([job for job in jobs if job.kind == "write" and not job.gone])
        ended = FedarkError("The server is about to end.")
        for job in (*jobs, *self._waiting, *self._running.values()):
            job.tell(ended)
        self.engine.close()

    def _due(self) -> list[Job]:
        """What is begun now: prompts up to the size of a batch, and texts for which there is room.
        What waits longest goes first.
        """
        due: list[Job] = []
        prompts, texts = 0, self.engine.rows - len(self._running)
        for job in tuple(self._waiting):
            fits = texts > 0 if job.kind == "write" else prompts < _BATCH
            if fits:
                due.append(job)
                self._waiting.remove(job)
                prompts += job.size if job.kind != "write" else 0
                texts -= job.kind == "write"
        return due

    def _obey(self, order: _Order) -> None:
        try:
            order.act()
        except FedarkError as error:
            order.error = error
        except Exception as error:
            _log.error("an order failed: %s", explain(error))
            order.error = FedarkError("The model could not be changed.")
        order.done.set()

    def _end(self, name: str) -> None:
        for job in self._running.values():
            if job.wish is not None and job.wish.adapter == name:
                job.gone = True
                job.tell(FedarkError("The model was unloaded."))

    def _compute(self, kind: str, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        asked = [one for job in jobs for one in job.asked]
        act = self.engine.label if kind == "label" else self.engine.embed
        try:
            found = act(asked)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Refused | EnclaveFailed):
                for job in jobs:
                    self._compute(kind, [job])
                return
            for job in jobs:
                job.tell(_told(error))
            return
        at = 0
        for job in jobs:
            job.tell(found[at : at + job.size])
            at += job.size

    def _write(self, jobs: Sequence[Job]) -> None:
        begin: dict[int, Job] = {}
        for job in jobs:
            self._numbers += 1
            begin[self._numbers] = job
        gone = [number for number, job in self._running.items() if job.gone]
        if not begin and not self._running:
            return
        wishes = {number: job.wish for number, job in begin.items() if job.wish is not None}
        try:
            pieces = self.engine.write(wishes, gone)
        except Exception as error:
            self._failed(begin, error)
            return
        self._running |= begin
        for number in gone:
            del self._running[number]
        for piece in pieces:
            found = self._running.get(piece.id)
            if found is None:
                continue
            if piece.end:
                del self._running[piece.id]
            found.tell(piece)

    def _failed(self, begin: dict[int, Job], error: Exception) -> None:
        """A step failed: because of a text that was to begin, if there was one, and else for all
        that are being written.
        """
        if begin and isinstance(error, Refused | InputError):
            if len(begin) > 1:
                for job in begin.values():
                    self._write([job])
            else:
                for job in begin.values():
                    job.tell(_told(error))
            return
        told, ended = _told(error), list(self._running)
        for job in (*begin.values(), *self._running.values()):
            job.tell(told)
        self._running.clear()
        try:
            if ended:
                self.engine.write({}, [*ended, *begin])
        except Exception as again:
            _log.warning("texts could not be ended: %s", explain(again))


def _told(error: Exception) -> FedarkError:
    """What may be said of an error: our own, whose words hold no text; of others that there was
    one.
    """
    if isinstance(error, FedarkError):
        return error
    _log.error("the model failed: %s", explain(error))
    return FedarkError("The model failed at this request.")
