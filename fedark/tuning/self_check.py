"""Before a private job trains: are the clipped gradients right, and does the adapter that is saved
learn anything?

Training with differential privacy can break in silence: the loss is computed, the budget is spent,
and the adapter that is delivered is the one that it started from, or follows gradients of something
else (opacus issue 820 reports such a case with PEFT). And a clipped sum protects a record only if
nothing of it enters what other records add, now or later. Every run of a job therefore checks, on
its own model, with ordinary and hostile records, before anything is trained:

1. that the architecture is admitted (`fedark.tuning.separable`);
2. each record's clipped gradient against plain automatic differentiation of a batch of one, without
   padding and with nothing taken from memory;
3. the same gradient against finite differences of the loss through the flat vector, which know
   nothing of modules or copies: this ties what is clipped and noised to what travels;
4. that a record's part is within the bound, and is the same whatever else is in its batch or was in
   earlier ones: random batches of the given records and of texts that are empty, of one token, or
   longer than the model reads;
5. that every tensor that travels gets a gradient, that a step moves each of them and the model's
   answers, and that PEFT, asked what it would save, gives exactly the vector that the federation
   delivers.

Nothing leaves: a failure is one sentence that names a tensor or a property, never a figure that
depends on a record.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model_state_dict

from fedark.foundation.errors import ModelError
from fedark.records.reading import Record
from fedark.tuning.base import PREFIX
from fedark.tuning.layout import Flat
from fedark.tuning.separable import require_separable
from fedark.tuning.task import TaskModel

__all__ = ["self_check"]

_RECORDS = 4
_OFFSET = 0.02  # off the start, where B = 0 and thus the gradient of A too
_TOLERANCE = 1e-4
_DIFFERENCE_TOLERANCE = 0.05
_STEPS = (
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
)  # of finite differences: float32 makes small ones noisy, curvature large ones wrong

Rows = npt.NDArray[np.float64]


def self_check(task: TaskModel, records: Sequence[Record]) -> None:
    """Run every check of the module's text on `task`, which is left as it was.

    Args:
        task: the job's model.
        records: some of the job's; the first few different ones are used, at least one.

    Raises:
        ModelError: a check failed, in words; the adapter is as before.
    """
    sample = list(dict.fromkeys(records))[:_RECORDS]
    if not sample:
        raise ModelError(
            "The self-check of private training was given no record.", safe="Nothing was trained."
        )
    require_separable(task.config)
    task.gradient_sum([], clip_norm=1.0)  # from now on the model may not change itself
    before = task.get_flat()
    generator = np.random.default_rng(0)
    start = (before + _OFFSET * generator.normal(size=before.size)).astype(np.float32)
    try:
        task.set_flat(start)
        rows = np.stack([_alone(task, record) for record in sample])
        norms = np.linalg.norm(rows, axis=1)
        if not np.isfinite(norms).all() or not norms.all():
            raise _failed("a record of the sample has no gradient, or one that is not finite")
        bound = float(np.median(norms)) * 0.7  # some are clipped, and not all by the same factor
        clipped = rows * np.minimum(1, bound / norms)[:, None]
        _check_gradients(task, sample, clipped, bound)
        _check_batches(task, sample, bound, generator)
        _check_differences(task, sample, rows, start, generator)
        _check_steps(task, sample, clipped.sum(0), start, bound)
    finally:
        task.set_flat(before)


def _check_gradients(
    task: TaskModel, sample: Sequence[Record], clipped: Rows, bound: float
) -> None:
    parts = [
        task.gradient_sum([record], clip_norm=bound)[0].astype(np.float64) for record in sample
    ]
    if max(np.linalg.norm(part) for part in parts) > bound * (1 + 1e-5):
        raise _failed("a record's part is larger than the clipping bound")
    if (
        max(np.linalg.norm(part - row) for part, row in zip(parts, clipped, strict=True))
        > _TOLERANCE * bound
    ):
        raise _failed("the clipped gradient of a record is not that of a batch of one")
    together = task.gradient_sum(sample, clip_norm=bound)[0]
    if np.linalg.norm(together - np.sum(parts, axis=0)) > _TOLERANCE * bound * len(sample):
        raise _failed("a record's part depends on the batch that it is in")


def _check_batches(
    task: TaskModel, sample: Sequence[Record], bound: float, generator: np.random.Generator
) -> None:
    """That what a record adds to a sum is a function of the record: of nothing in its batch, of no
    earlier batch, of no chance.
    """

    def summed(records: Sequence[Record]) -> Rows:
        return task.gradient_sum(records, clip_norm=bound)[0].astype(np.float64)

    def differ(one: Rows, other: Rows, records: int) -> bool:
        # Where the loss is not a finite number the record adds zeros, alone and among others.
        return not float(np.linalg.norm(one - other)) <= _TOLERANCE * bound * records

    records = [*sample, *_hostile(task, generator)]
    parts = [summed([record]) for record in records]
    for record, part in zip(records, parts, strict=True):
        alone = _alone(task, record)
        norm = float(np.linalg.norm(alone))
        clipped = alone * min(1.0, bound / max(norm, 1e-30)) if np.isfinite(norm) else 0 * part
        if differ(part, clipped, 1):
            raise _failed("the clipped gradient of a record depends on how it is padded")
    for size in (2, 5, len(records), 2 * len(records)):
        drawn = generator.integers(len(records), size=size)
        together = summed([records[index] for index in drawn])
        if differ(together, np.sum([parts[index] for index in drawn], axis=0), size):
            raise _failed("a record's part depends on the batch that it is in")
    for record, part in zip(records, parts, strict=True):
        if differ(summed([record]), part, 1):
            raise _failed("a record's part depends on earlier batches, or on chance")


def _hostile(task: TaskModel, generator: np.random.Generator) -> list[Record]:
    """Texts that are nobody's, of many lengths and kinds, each with some answer."""
    longest = task.terms.training.max_length
    letters = [chr(code) for code in (*range(33, 127), 0xE9, 0x4E2D, 0x1F600, 0x200B, 0x0301)]
    words = ["".join(generator.choice(letters, size=3)) for _ in range(2 * longest)]
    texts = ["", "a", "\ufffd\u0000", "a " * (2 * longest), " ".join(words)]
    texts += [" ".join(words[: max(1, longest // part)]) for part in (2, 5, 11)]
    answers = task.terms.labels or ("a", "a b c d e f g", "")
    return [Record(text, str(generator.choice(answers))) for text in texts]


def _check_differences(
    task: TaskModel,
    sample: Sequence[Record],
    rows: Rows,
    start: Flat,
    generator: np.random.Generator,
) -> None:
    """Per tensor, the slope of the summed loss along the claimed gradient: its norm, if it is the
    gradient of what travels.
    """
    gradient = rows.sum(0)
    for name, part in _parts(task):
        size = float(np.linalg.norm(gradient[part]))
        if not np.linalg.norm(rows[:, part], axis=1).any():
            raise _failed(f"no record has a gradient with respect to {name}")
        direction = np.zeros_like(gradient)
        # A little of a random direction: a gradient that is wrong in other coordinates is seen too.
        direction[part] = gradient[part] / max(size, 1e-30) + 0.3 * _unit(
            generator.normal(size=gradient[part].size)
        )
        direction = _unit(direction)
        expected = float(gradient @ direction)
        errors = [abs(_slope(task, sample, start, direction, step) - expected) for step in _STEPS]
        if min(errors) > _DIFFERENCE_TOLERANCE * max(size, 1e-3):
            raise _failed(
                f"the gradient with respect to {name} is not the slope of the loss in the vector"
                " that travels"
            )
    task.set_flat(start)


def _check_steps(
    task: TaskModel, sample: Sequence[Record], summed: Rows, start: Flat, bound: float
) -> None:
    answers = _losses(task, sample)
    for how in ("a step of the cohort", "a step of the customer's own"):
        task.set_flat(start)
        if how == "a step of the cohort":
            task.set_flat((start - 1e-2 * _unit(summed)).astype(np.float32))
        else:
            task.stepper()(task.gradient_sum(sample, clip_norm=bound)[0] / np.float32(len(sample)))
        after = task.get_flat()
        if np.array_equal(_losses(task, sample), answers):
            raise _failed(f"{how} does not change the model's answers")
        for name, part in _parts(task):
            if np.array_equal(after[part], start[part]):
                raise _failed(f"{how} does not change {name}")
        saved = _saved(task)
        for name, part in _parts(task):
            if name not in saved or not np.array_equal(saved[name].reshape(-1), after[part]):
                raise _failed(f"{name} as it would be saved is not what was trained")


def _alone(task: TaskModel, record: Record) -> npt.NDArray[np.float64]:
    """The gradient [travelling] of one record by plain automatic differentiation over a batch of
    one.
    """
    with task.uncached():
        losses = task.losses([record])
        if not losses.requires_grad:
            raise _failed("the loss does not depend on the adapter")
        gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
            losses.sum(), task.trained, allow_unused=True
        )
    flat = [
        torch.zeros(p.numel()) if g is None else g.flatten()
        for p, g in zip(task.trained, gradients, strict=True)
    ]
    row: npt.NDArray[np.float64] = torch.cat(flat).double().numpy()
    return row


def _slope(
    task: TaskModel, sample: Sequence[Record], start: Flat, direction: Rows, step: float
) -> float:
    ends = []
    for sign in (1, -1):
        task.set_flat((start + sign * step * direction).astype(np.float32))
        ends.append(float(_losses(task, sample).sum()))
    return (ends[0] - ends[1]) / (2 * step)


def _losses(task: TaskModel, sample: Sequence[Record]) -> Rows:
    with task.uncached(), torch.no_grad():
        losses: Rows = task.losses(sample).double().numpy()
        return losses


def _saved(task: TaskModel) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that PEFT and torch themselves would write, by the names of the layout."""
    body, head = task.scorer.body, task.scorer.head
    if isinstance(body, PeftModel):
        state = dict(get_peft_model_state_dict(body, save_embedding_layers=False))
    else:
        state = {PREFIX + name: tensor for name, tensor in body.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def _parts(task: TaskModel) -> list[tuple[str, slice]]:
    parts, offset = [], 0
    for spec in task.terms.layout:
        if spec.travels:
            parts.append((spec.name, slice(offset, offset + spec.size)))
            offset += spec.size
    return parts


def _unit(vector: Rows) -> Rows:
    return vector / max(float(np.linalg.norm(vector)), 1e-30)


def _failed(what: str) -> ModelError:
    return ModelError(
        f"The self-check of private training failed: {what}.",
        safe="Nothing was trained, and the adapter is as before.",
        fix=(
            "Do not train on private data with this combination of model and libraries; compare"
            " their versions with requirements/run.txt."
        ),
    )
