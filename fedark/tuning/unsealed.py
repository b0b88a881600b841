"""A job's model straight from its files, for those who own them: trials, predictions and audits."""

from __future__ import annotations

from pathlib import Path

from fedark.contract.job import Job, ModelSpec, model_terms
from fedark.tuning.layout import base_shapes
from fedark.tuning.sources import model_files
from fedark.tuning.task import TaskModel

__all__ = ["unsealed_model"]


def unsealed_model(job: Job, spec: ModelSpec, folder: Path) -> TaskModel:
    """The model in `folder` with its adapter, under the terms that it would have in a contract.

    Raises:
        ModelError: it is unusable, or not what the job says.
    """
    base = base_shapes(folder, spec.task, job.labels, spec.pooling)
    terms = model_terms(
        spec,
        bundle="0" * 96,
        weights="0" * 96,
        prompt=job.data.prompt,
        labels=job.labels,
        base=base,
        layout=base.layout(spec.adapter),
    )
    files = {name: bytearray(path.read_bytes()) for name, path in model_files(folder).items()}
    return TaskModel.load(files, terms)
