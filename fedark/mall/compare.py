"""`fedark compare`: every candidate is tasted, and only the best of them are tuned.

A tuned candidate costs as much as a whole job, a tasted one about one pass over the records. So all
are tasted, each in a job of its own: only one base is in memory, and what keeps a candidate from
being tasted (no such model, not enough memory, a task that it does not have, its provider's
refusal) is its own matter. The best `finalists` by the figures of the taster are tuned by the job's
own terms. What selection may look at are figures that the jobs release anyway; under a privacy
mechanism there is no taster, and nothing is compared.

What a candidate gave is kept in WORK/compare/ as soon as it is there, under a digest of all that it
depends on: a comparison that was killed goes on with the candidate that it was at. A failed one is
tried again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from fedark.contract.job import Job, ModelSpec
from fedark.contract.taste import taste_problems
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, FedarkError, InputError, ModelError
from fedark.foundation.files import write_atomic
from fedark.mall.choice import Candidate, Stage, candidates_of, ranked, reason
from fedark.operate.offer import model_sources
from fedark.simulation import simulate

__all__ = ["Comparison", "compare"]

_FOLDER = "compare"
_MOST_KEPT = 1 << 20

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        candidates: in order, the best first; a tuned one stands for its tasted self.
        reason: why the first one is it, in a sentence.
        seconds: that all of it took, in earlier attempts too.
    """

    candidates: tuple[Candidate, ...]
    reason: str
    seconds: float


class _Kept(BaseModel):
    """A candidate's outcome in the folder."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str
    stage: Stage
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]
    why: str
    seconds: float
    run_id: str


def compare(
    job: Job,
    work: Path,
    *,
    models: Sequence[str] = (),
    finalists: int = 0,
    say: Say = lambda text: None,
) -> Comparison:
    """Taste candidates and tune the best.

    Args:
        models: names of the candidates; all of the job's where none are named.
        finalists: how many are tuned; the job's own `compare.finalists` where it is 0.
        work: folder of all jobs of the comparison.

    Raises:
        InputError, ContractError: what cannot be compared, with every problem; nothing was started.
    """
    names = list(dict.fromkeys(models)) or [spec.name for spec in job.models]
    count = finalists or job.compare.finalists
    _require(job, names)
    tasted = [
        _outcome(job.only([name]), "tasted", work, say, at=f"{number} of {len(names)}")
        for number, name in enumerate(names, 1)
    ]
    chosen = [one.name for one in ranked(tasted) if one.stage == "tasted" and one.judged][:count]
    if chosen:
        say(f"to be tuned: {', '.join(chosen)}")
    tuned = [
        _outcome(job.only([name]), "tuned", work, say, at=f"{number} of {len(chosen)}")
        for number, name in enumerate(chosen, 1)
    ]
    done = {one.name for one in tuned if one.stage == "tuned"}
    # A finalist whose tuning failed stays in as it was tasted, beside why it failed.
    every = ranked([*tuned, *(one for one in tasted if one.name not in done)])
    return Comparison(tuple(every), reason(every), sum(one.seconds for one in [*tasted, *tuned]))


def _require(job: Job, names: Iterable[str]) -> None:
    strangers = sorted(set(names) - {spec.name for spec in job.models})
    if strangers:
        raise InputError(
            f"The job has no model of these names: {', '.join(strangers)}.",
            safe="Nothing was started.",
            fix=f"Its models are {', '.join(spec.name for spec in job.models)}.",
        )
    first = job.taste.model_copy(update={"first": True})
    if problems := taste_problems(first, job.privacy, ()):
        raise ContractError(str(job.path), problems, safe="Nothing was started.")


def _outcome(job: Job, stage: Stage, work: Path, say: Say, *, at: str) -> Candidate:
    """What a job of one candidate gives, now or in an earlier attempt."""
    (spec,) = job.models
    say(f"{spec.name}, {at}: to be {stage}")
    began = time.monotonic()
    try:
        asked = job.tasting() if stage == "tasted" else job
        path = work / _FOLDER / f"{spec.name}-{stage}-{_digest(asked)}.json"
        kept = _read(path)
        if kept is not None:
            say(f"{spec.name} was {stage} already")
            return kept
        with simulate(asked, work, say=say) as running:
            (found,) = candidates_of(running.run(), stage)
    except (FedarkError, MemoryError) as error:
        why = error.told if isinstance(error, FedarkError) else "This machine has not the memory."
        say(f"{spec.name} failed: {why}")
        return Candidate(spec.name, "failed", {}, {}, why, time.monotonic() - began)
    found = found.timed(time.monotonic() - began)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, _Kept(**asdict(found)).model_dump_json().encode())
    return found


def _read(path: Path) -> Candidate | None:
    """A kept outcome; one that cannot be read is made again."""
    try:
        data = path.read_bytes()
        if len(data) > _MOST_KEPT:
            return None
        return Candidate(**_Kept.model_validate_json(data).model_dump())
    except (OSError, ValidationError):
        return None


def _digest(job: Job) -> str:
    """Of everything that an outcome depends on: terms, records, and the model's files by name, size
    and time of change.
    """
    (spec,) = job.models
    files = [job.replay, job.acceptance, job.resolve(job.split.file) if job.split else None]
    files += [job.resolve(customer.data) for customer in job.customers]
    files += [job.resolve(customer.test) for customer in job.customers]
    terms = (spec, job.data, job.protection, job.privacy, job.curve, job.taste)
    value: dict[str, Any] = {
        "terms": [each.model_dump_json() for each in terms],
        "job": [job.seed, job.rounds, list(job.labels), list(job.deliver_to)],
        "customers": [each.model_dump_json() for each in job.customers],
        "split": job.split.model_dump_json() if job.split else "",
        "records": [hashlib.sha256(path.read_bytes()).digest() for path in files if path],
        "model": [list(each) for each in _files(job, spec)],
    }
    return canonical.digest(value).hex()[:32]


def _files(job: Job, spec: ModelSpec) -> list[tuple[str, int, int]]:
    sources, left_out = model_sources(job)
    if not sources:
        raise ModelError(f"The model {spec.name} is not here: {left_out.get(spec.name, '')}")
    folders = [sources[0][1]] + ([job.resolve(spec.start)] if spec.start else [])
    found = []
    for folder in cast("list[Path]", folders):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                stat = path.stat()
                found.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return found
