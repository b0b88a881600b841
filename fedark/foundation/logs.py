"""Structured logs: one JSON object a line on standard error, for whatever collects a service's
output.

    {"time": "...Z", "level": "INFO", "from": "node", "party": "north", "job": "3f..", "session":
    "a1..", "text": "..."}

`job` is the beginning of the contract's digest, `session` that of the run's id, the same at host,
aggregator and nodes; they are there wherever a line is about a job. ERROR is what a person should
look at: a failed job, a full disk, a process that died; an orderly stop is not.

Every text is redacted. Of a foreign exception only its class and the places that it passed are
written: its words may hold a record, and so may a line of source. On a terminal a person sees the
text alone.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedark.foundation.errors import FedarkError, printable
from fedark.foundation.files import os_problem
from fedark.foundation.redact import redact

__all__ = [
    "Bounded",
    "JsonFormatter",
    "Teller",
    "always",
    "explain",
    "of_run",
    "setup",
    "tell_error",
    "teller",
    "working_on",
]

_LONGEST = 4000
logging.getLogger("fedark").addHandler(logging.NullHandler())  # a library says nothing unasked
_always: dict[str, str] = {}
_working_on: ContextVar[Mapping[str, str]] = ContextVar("working_on", default=MappingProxyType({}))


def always(**names: str) -> None:
    """Have every line of this process carry these names: it works for one job alone."""
    _always.update(names)


def of_run(contract: bytes, run_id: str) -> dict[str, str]:
    """The names of a job and its run, as lines carry them.

    Args:
        contract: its digest.
        run_id: another party's word perhaps, "" for none yet.
    """
    return {"job": contract.hex()[:16], "session": printable(run_id[:16])}


@contextmanager
def working_on(**names: str) -> Iterator[None]:
    """Have every line that is logged in this block carry these names, such as job and session."""
    token = _working_on.set(
        {**_working_on.get(), **{name: value for name, value in names.items() if value}}
    )
    try:
        yield
    finally:
        _working_on.reset(token)


class JsonFormatter(logging.Formatter):
    """See the module's docstring.

    Args:
        source: the kind of process, such as "node".
        fixed: what every line carries, such as the party.
    """

    def __init__(self, source: str, **fixed: str) -> None:
        super().__init__()
        self._fixed = {"from": source, **fixed}

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = (
            datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .removesuffix("+00:00")
            + "Z"
        )
        line: dict[str, Any] = {
            "time": when,
            "level": record.levelname,
            **self._fixed,
            **_always,
            **_working_on.get(),
        }
        line["text"] = printable(redact(record.getMessage()), _LONGEST)
        if record.exc_info is not None and record.exc_info[1] is not None:
            line |= _explained(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


class Bounded:
    """Logs what others can provoke, at most `most` lines in `seconds`, and then how many more there
    were.
    """

    def __init__(
        self,
        log: logging.Logger,
        *,
        most: int = 30,
        seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._most, self._seconds, self._clock = log, most, seconds, clock
        self._since, self._count = -seconds, 0

    def warning(self, text: str, *values: object) -> None:
        """See `logging.Logger.warning`."""
        now = self._clock()
        if now - self._since >= self._seconds:
            if self._count > self._most:
                self._log.warning("%d lines like these were left out", self._count - self._most)
            self._since, self._count = now, 0
        self._count += 1
        if self._count <= self._most:
            self._log.warning(text, *values)


def setup(source: str, **fixed: str) -> None:
    """Send this process's log to standard error as JSON lines; libraries from WARNING on, fedark
    from INFO on.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(source, **fixed))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedark").setLevel(logging.INFO)


class Teller:
    """Tells what a supervisor says: the text alone to a terminal, JSON lines to anything else."""

    def __init__(self, *, plain: bool) -> None:
        self._plain, self._log = plain, logging.getLogger("fedark")

    def __call__(self, text: str) -> None:
        self._tell(logging.INFO, text)

    def error(self, text: str) -> None:
        """Something has failed that a person should look at."""
        self._tell(logging.ERROR, text)

    def _tell(self, level: int, text: str) -> None:
        if self._plain:
            when = f"{datetime.now():%H:%M:%S}"  # noqa: DTZ005
            print(f"{when}  {printable(redact(text), _LONGEST)}", file=sys.stderr, flush=True)
        else:
            self._log.log(level, "%s", text)


def teller(source: str, *, plain: bool | None = None, **fixed: str) -> Teller:
    """See `Teller`; `plain`, if standard error does not decide."""
    plain = sys.stderr.isatty() if plain is None else plain
    if not plain:
        setup(source, **fixed)
    return Teller(plain=plain)


def tell_error(say: Callable[[str], None], text: str) -> None:
    """Say it as an error, where `say` knows of such."""
    getattr(say, "error", say)(text)


def explain(error: BaseException) -> str:
    """A foreign error without its words: its class, the file that was refused, and places."""
    found = _explained(error)
    what = f": {found['what']}" if "what" in found else ""
    return f"{found['error']}{what} ({', '.join(found['where'][-4:])})"


def _explained(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    found: dict[str, Any] = {
        "error": type(error).__name__,
        "where": [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, OSError):  # its own words name a file of this machine, and nothing in it
        found["what"] = printable(redact(os_problem(error)), _LONGEST)
    if isinstance(error, FedarkError):
        found["what"] = printable(redact(error.what), _LONGEST)
    return found
