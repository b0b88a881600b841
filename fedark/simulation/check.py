"""A job looked at before it is run: every problem with what to do, and what it will take here.

The time is foretold from a few steps of the job's own models on this machine, memory from what they
take of it, and bytes from what travels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedark.contract.contract import ModelTerms
from fedark.contract.job import Job, ModelSpec
from fedark.contract.privacy import (
    Outline,
    futile_problems,
    learning_lines,
    learning_warnings,
    solved,
)
from fedark.contract.protection import protection_warnings
from fedark.enclave.usage import peak_mib
from fedark.foundation.errors import ContractError, FedarkError, InputError
from fedark.operate.offer import model_sources, start_of
from fedark.records.reading import Record, one_answer
from fedark.simulation.local import checked_records
from fedark.tuning.layout import base_shapes
from fedark.tuning.task import TaskModel
from fedark.tuning.unsealed import unsealed_model

__all__ = ["Outlook", "check", "planned"]

_TRIED = 32
_FIXED_SECONDS, _STAGE_SECONDS = 8.0, 0.3  # measuring the enclaves; a customer's part of a stage
_MESSAGE = 8 << 10

Parts = Mapping[str, tuple[list[Record], list[Record]]]


@dataclass(frozen=True)
class Outlook:
    """What a job is and takes.

    Attributes:
        lines, warnings: for people.
        seconds: that `fedark simulate` takes on this machine, about.
        mebibytes: of its memory, about.
        traffic: bytes between all nodes and the aggregator, about.
    """

    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    mebibytes: float
    traffic: int


def check(job: Job, say: Callable[[str], None] = lambda text: None) -> Outlook:
    """Look at a job whose file was read. `say` is told what is left out.

    Raises:
        ContractError: with every problem of its records, models and privacy terms.
    """
    problems: list[str] = []
    parts: Parts = {}
    sources: list[tuple[ModelSpec, Path]] = []
    try:
        parts = checked_records(job, say).parts
    except ContractError as error:
        problems += error.problems
    try:
        sources, left_out = model_sources(job)
        for name, why in left_out.items():
            say(f"model {name} is left out: {why}")
    except ContractError as error:
        problems += error.problems
    privacy = job.privacy
    try:
        privacy = solved(job.privacy, job.rounds)
    except InputError as error:
        problems.append(f"privacy.epsilon: {error.what} {error.fix}")
    if problems:
        raise ContractError(str(job.path), problems)
    lines = [
        f"Job {job.name}: {job.provider} owns the base model, {len(parts)} customers tune it"
        f" together in {job.rounds} rounds, {job.aggregator} relays."
    ]
    lines += [
        f"  {name}: {len(train):,} records to train on, {len(test):,} held out"
        for name, (train, test) in parts.items()
    ]
    masked = job.protection.mode == "masked"
    lines.append(
        "Updates are masked and encrypted: even the aggregator's enclave sees only sums."
        if masked
        else "Updates are encrypted to the aggregator's enclave, which alone sums them."
    )
    lines.append(
        "No differential privacy: the adapter may remember records."
        if privacy.mechanism == "none"
        else f"Differential privacy: {privacy.mechanism}, epsilon {privacy.epsilon:g} at delta"
        f" {privacy.delta:g}, noise {privacy.noise_multiplier:.3g} times the sensitivity."
    )
    warnings = protection_warnings(
        job.protection, [(spec.name, spec.adapter) for spec, _ in sources]
    )
    alike = [name for name, (train, _) in parts.items() if job.labels and one_answer(train)]
    warnings = [
        *warnings,
        *(
            f"all of {name}'s records have the same answer: alone they teach nothing"
            for name in alike
        ),
    ]
    seconds = _FIXED_SECONDS + _STAGE_SECONDS * len(parts) * (job.rounds + 4)
    traffic = _MESSAGE * len(parts) * (job.rounds + 5)
    models: list[ModelTerms] = []
    for spec, folder in sources:
        try:
            task = unsealed_model(job, spec, folder)
            start_of(job, spec, task.terms, folder)
            training, measuring = _seconds(task, parts)
        except FedarkError as error:
            problems.append(f"model {spec.name}: {error.what} {error.fix}")
            continue
        trained = sum(len(train) for train, _ in parts.values())
        tested = sum(len(test) for _, test in parts.values())
        own = spec.training
        passes = job.rounds * own.epochs + own.baseline_share * own.baseline_epochs
        seconds += training * trained * passes + measuring * (trained + 3 * tested)
        traffic += 2 * 4 * task.terms.travelling * len(parts) * (job.rounds + 2)
        lines.append(_line_of(task.terms, spec.source))
        models.append(task.terms)
    outline = Outline(privacy, job.protection, job.rounds, tuple(parts), models)
    lines += learning_lines(outline)
    warnings += learning_warnings(outline)
    problems += futile_problems(outline)
    if problems:
        raise ContractError(str(job.path), problems)
    memory = peak_mib()
    took = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    lines.append(
        f"Foretold for `fedark simulate` on this machine: about {took}, {memory / 1024:.1f} GiB of"
        f" memory or more, {traffic / 1e6:.1f} MB between all parties."
    )
    return Outlook(tuple(lines), tuple(warnings), seconds, memory, traffic)


def planned(job: Job) -> dict[str, Any]:
    """What a job says of the arguments of `fedark.contract.plan.plan`; of its privacy, where it has
    a mechanism.
    """
    parts = checked_records(job).parts
    sources, _ = model_sources(job)
    layouts = [
        base_shapes(folder, spec.task, job.labels, spec.pooling).layout(spec.adapter)
        for spec, folder in sources
    ]
    travelling = [tensor for layout in layouts for tensor in layout if tensor.travels]
    found: dict[str, Any] = {
        "records": sum(len(train) for train, _ in parts.values()),
        "customers": len(parts),
        "values": sum(tensor.size for tensor in travelling),
        "lora": any(".lora_" in tensor.name for tensor in travelling),
        "epsilon": 3.0,
    }
    if job.privacy.mechanism != "none":
        terms = job.privacy
        found |= {"mechanism": terms.mechanism, "epsilon": terms.epsilon, "delta": terms.delta}
        found["protection"] = job.protection
    return found


def _line_of(terms: ModelTerms, source: str) -> str:
    return (
        f"Model {terms.name} ({source}): {terms.task}, {terms.adapter.method};"
        f" {terms.travelling:,} values travel each way in a round."
    )


def _seconds(task: TaskModel, parts: Parts) -> tuple[float, float]:
    """Seconds to train on one record once, and to measure one: tried on a few, after a first time
    that does not count.
    """
    share = max(1, _TRIED // len(parts))
    sample = [record for train, _ in parts.values() for record in train[:share]][: 2 * _TRIED]
    task.train(sample, epochs=1, seed=0)
    began = time.perf_counter()
    task.train(sample, epochs=1, seed=1)
    middle = time.perf_counter()
    with task.uncached():
        task.evaluate(sample)
    end = time.perf_counter()
    return (middle - began) / len(sample), (end - middle) / len(sample)
