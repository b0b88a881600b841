"""The model and the records that a job file names, for an audit on the machine of whoever owns
them.
"""

from __future__ import annotations

from pathlib import Path

from fedark.contract.job import Job, ModelSpec
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning.sources import resolve
from fedark.tuning.task import TaskModel
from fedark.tuning.unsealed import unsealed_model

__all__ = ["job_records", "job_task"]


def job_task(job: Job, name: str = "") -> TaskModel:
    """The job's model of that name, or its first, with its adapter.

    Raises:
        InputError: there is none, or it is no classifier.
        ModelError: it is not on this machine.
    """
    spec = next((model for model in job.models if name in ("", model.name)), None)
    if spec is None:
        raise InputError(
            "The job has no model of that name.",
            fix=f"It has: {', '.join(model.name for model in job.models)}",
        )
    if spec.task != "classification":
        raise InputError(
            f"Model {spec.name} is no classifier.",
            safe="Nothing was trained.",
            fix="Name one with --model.",
        )
    return unsealed_model(job, spec, _folder(job, spec))


def job_records(job: Job) -> list[Record]:
    """All customers' records, each prompt once, in the order of the files.

    Raises:
        DataError: a file is unusable.
    """
    names = (
        [job.split.file] if job.split is not None else [customer.data for customer in job.customers]
    )
    found: dict[str, Record] = {}
    for path in map(job.resolve, names):
        if path is not None:
            for record in job.data.read(path, job.labels):
                found.setdefault(record.prompt, record)
    return list(found.values())


def _folder(job: Job, spec: ModelSpec) -> Path:
    source = spec.source
    if source.startswith("dir:"):
        source = f"dir:{job.resolve(source.removeprefix('dir:'))}"
    return resolve(source)
