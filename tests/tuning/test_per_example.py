"""Per-example gradients against batches of one, over layers, families and everything that must not
matter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from fedark.foundation.errors import DataError, InputError, ModelError, ProtocolError
from fedark.records.reading import Record
from fedark.tuning.per_example import PerExample, clip_factors, clip_vector
from fedark.tuning.task import TaskModel

ANSWERS = ("open line", "close the breaker", "shed load now", "hold")
Make = Callable[[tuple[str, ...]], list[Record]]
CASES = ["bert", "minilm", "gpt2", "llama", "gpt2-classifier", "llama-classifier", "bert-no-pooler"]


def made(
    zoo: Any, case: str, tmp_path: Path, records: Make, **terms: Any
) -> tuple[TaskModel, list[Record]]:
    """A model somewhere off its start, so that no gradient is zero, and its records."""
    name, _, kind = case.partition("-")
    tiny = zoo[name]
    if kind == "classifier":
        tiny = replace(tiny, task="classification", labels=("a", "b", "c", "d"))
    elif kind:
        folder = Path(shutil.copytree(tiny.folder, tmp_path / "base"))
        state = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in state.items() if "pooler" not in key}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        tiny = replace(tiny, folder=folder)
    task = tiny.load(tiny.terms(**terms))
    noise = np.random.default_rng(0).normal(size=task.terms.travelling)
    task.set_flat((task.initial() + 0.1 * noise).astype(np.float32))
    return task, records(tiny.labels or ANSWERS)


def alone(task: TaskModel, record: Record) -> np.ndarray:
    """The gradient of a batch of one by plain autograd, with nothing from memory."""
    kept = task._features, task._trunk
    task._features = task._trunk = None
    losses, _ = task._score(task._encoded([record]))
    task._features, task._trunk = kept
    gradients = torch.autograd.grad(losses.sum(), task.trained)
    return torch.cat([gradient.flatten() for gradient in gradients]).double().numpy()


def clipped(rows: np.ndarray, bound: float) -> np.ndarray:
    return rows * np.minimum(1, bound / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("method", ["ffa-lora", "lora", "head"])
@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_that_of_clipped_gradients_of_batches_of_one(
    zoo: Any, records: Make, tmp_path: Path, case: str, method: str, layers: tuple[int, ...]
) -> None:
    """With padding, five batches, half the records clipped, and the frozen part in memory where
    there is one.
    """
    if method == "head" and (layers or case in ("gpt2", "llama")):
        pytest.skip("a head has no layers, and a language model no head")
    task, data = made(
        zoo, case, tmp_path, records, method=method, layers=layers, training={"batch_size": 5}
    )
    assert (task._trunk is not None or task._features is not None) == (
        layers == (2,) or method == "head"
    )
    rows = np.stack([alone(task, record) for record in data])
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms))
    summed, ours = task.gradient_sum(data, clip_norm=bound)
    assert summed.dtype == np.float32
    np.testing.assert_allclose(ours, norms, rtol=2e-5)
    expected = clipped(rows, bound).sum(0)
    assert np.abs(summed - expected).max() < 2e-6 * bound * len(data)
    offset = 0
    for spec in task.terms.layout:
        if spec.travels:
            assert np.abs(expected[offset : offset + spec.size]).max() > 0, spec.name
            offset += spec.size


@pytest.mark.parametrize("method", ["ffa-lora", "lora", "head"])
@pytest.mark.parametrize("case", CASES)
def test_a_records_part_depends_on_no_other_record(
    zoo: Any, records: Make, tmp_path: Path, case: str, method: str
) -> None:
    """Added to a batch of longer and shorter ones it adds its own gradient, which is within the
    bound.
    """
    if method == "head" and case in ("gpt2", "llama"):
        pytest.skip("a language model has no head")
    task, data = made(zoo, case, tmp_path, records, method=method, training={"batch_size": 32})
    bound = 0.5 * float(np.median(task.gradient_sum(data, clip_norm=1.0)[1]))
    others, _ = task.gradient_sum(data[1:], clip_norm=bound)
    own, _ = task.gradient_sum(data[:1], clip_norm=bound)
    every, _ = task.gradient_sum(data, clip_norm=bound)
    assert np.linalg.norm(own) <= bound * (1 + 1e-6)
    assert np.linalg.norm(every - others - own) < 1e-6 * bound * len(data)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("method", ["ffa-lora", "lora"])
@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
def test_opacus_hooks_give_the_same_sum(
    zoo: Any, records: Make, tmp_path: Path, name: str, method: str
) -> None:
    from opacus.grad_sample import GradSampleModule

    task, data = made(zoo, name, tmp_path, records, method=method, training={"batch_size": 24})
    summed, norms = task.gradient_sum(data, clip_norm=0.3)
    parameters = [parameter for parameter in task.scorer.parameters() if parameter.requires_grad]
    task.scorer = GradSampleModule(task.scorer, batch_first=True, loss_reduction="sum")  # type: ignore[assignment]
    task._score(task._examples(data))[0].sum().backward()
    assert {id(p) for p in parameters} == {id(p) for p in task.trained}
    rows = (
        torch.cat([parameter.grad_sample.flatten(1) for parameter in task.trained], dim=1)
        .double()
        .numpy()
    )
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=2e-5)
    assert np.abs(summed - clipped(rows, 0.3).sum(0)).max() < 2e-6 * 0.3 * len(data)


@pytest.mark.parametrize("name", ["minilm", "llama"])
def test_an_empty_sample_gives_zeros_and_the_adapter_is_left_alone(
    zoo: Any, records: Make, tmp_path: Path, name: str
) -> None:
    task, data = made(zoo, name, tmp_path, records)
    before = task.get_flat()
    summed, norms = task.gradient_sum([], clip_norm=1.0)
    assert summed.shape == before.shape
    assert not summed.any()
    assert norms.shape == (0,)
    task.losses(data).sum().backward()  # what a plain step leaves behind
    task.gradient_sum(data, clip_norm=1.0)
    assert np.array_equal(task.get_flat(), before)
    assert all(parameter.grad is None for parameter in task.scorer.parameters())
    assert not any("forward" in module.__dict__ for module in task.scorer.modules())


def test_a_gradient_exactly_at_the_bound_is_not_shrunk(
    zoo: Any, records: Make, tmp_path: Path
) -> None:
    task, data = made(zoo, "minilm", tmp_path, records, method="lora")
    free, norms = task.gradient_sum(data[:1], clip_norm=1e9)
    assert np.array_equal(
        task.gradient_sum(data[:1], clip_norm=float(norms[0]) * (1 + 1e-6))[0], free
    )
    exact = torch.tensor([0.0, 3.0, 3.0000002, 12.0, float("inf"), float("nan")])
    factors = clip_factors(exact, 3.0)
    assert factors.tolist()[:2] == [1.0, 1.0]
    assert factors[2] < 1
    assert factors.tolist()[3:] == [0.25, 0.0, 0.0]


def test_memory_is_bounded_by_the_contracts_batch(zoo: Any, records: Make, tmp_path: Path) -> None:
    task, data = made(zoo, "llama", tmp_path, records, training={"batch_size": 5})
    sizes: list[int] = []
    score = task._score
    task._score = lambda batch, length: sizes.append(len(batch)) or score(batch, length)  # type: ignore[method-assign]
    task.gradient_sum(data, clip_norm=1.0)
    assert (max(sizes), sum(sizes)) == (5, 24)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bound_that_bounds_nothing_is_refused(
    zoo: Any, records: Make, tmp_path: Path, bound: float
) -> None:
    task, data = made(zoo, "minilm", tmp_path, records)
    with pytest.raises(ValueError, match="clip_norm"):
        task.gradient_sum(data, clip_norm=bound)


def test_an_unknown_answer_is_refused_before_anything_is_summed(zoo: Any) -> None:
    with pytest.raises(DataError):
        zoo["minilm"].load().gradient_sum([Record("open", "elsewhere")], clip_norm=1.0)


# -- layers by themselves


class Toy(nn.Module):
    """Rows or sequences of four values to one loss each, by way of `body`."""

    def __init__(
        self, body: Callable[[Toy, torch.Tensor], torch.Tensor], bias: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4, bias=bias), nn.Linear(4, 40, bias=bias)
        self.body = body
        self.eval()
        self.one.train()
        self.two.train()

    def losses(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(self, inputs).square().flatten(1).sum(1)


BODIES: dict[str, Callable[[Toy, torch.Tensor], torch.Tensor]] = {
    "in a row": lambda toy, x: toy.two(torch.tanh(toy.one(x))),
    "one of them twice": lambda toy, x: toy.two(torch.tanh(toy.one(torch.tanh(toy.one(x))))),
    "a large one twice": lambda toy, x: toy.two(toy.one(x)) + torch.sin(toy.two(x)),
    "on other lengths": lambda toy, x: (
        toy.two(toy.one(x).flatten(1)[:, -4:]) + toy.two(toy.one(x).flatten(1)[:, :4])
    ),
    "one of them unused": lambda toy, x: toy.one(x),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (30, 4), (2, 3, 4)])
@pytest.mark.parametrize("body", BODIES)
def test_every_shape_and_every_way_of_calling_a_layer_is_exact(
    body: str, shape: tuple[int, ...], bias: bool
) -> None:
    toy = Toy(BODIES[body], bias)
    inputs = torch.randn(6, *shape)
    parameters = list(toy.parameters())
    rows = []
    for row in inputs:
        gradients = torch.autograd.grad(
            toy.losses(row.unsqueeze(0)).sum(), parameters, allow_unused=True
        )
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )
        )
    oracle = torch.stack(rows).double().numpy()
    bound = float(np.median(np.linalg.norm(oracle, axis=1)))
    with PerExample(toy, parameters).batch(6) as pending:
        pending.backward(toy.losses(inputs))
    summed, norms = pending.clipped_sum(bound)
    np.testing.assert_allclose(norms, np.linalg.norm(oracle, axis=1), rtol=1e-5)
    np.testing.assert_allclose(summed, clipped(oracle, bound).sum(0), atol=1e-5 * bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_record_without_a_finite_gradient_adds_nothing_and_spoils_nothing(bad: float) -> None:
    toy = Toy(BODIES["in a row"])
    toy.body = lambda self, x: self.two(self.one(x))  # no tanh that would tame it
    inputs = torch.randn(5, 3, 4)
    parameters = list(toy.parameters())
    sums = []
    for batch in (inputs, torch.cat([inputs, torch.full((1, 3, 4), bad)])):
        with PerExample(toy, parameters).batch(len(batch)) as pending:
            pending.backward(toy.losses(batch))
        sums.append(pending.clipped_sum(0.5)[0])
    torch.testing.assert_close(sums[0], sums[1])
    assert sums[0].abs().max() > 0


def broken(change: Callable[[Toy], Any]) -> str:
    toy = Toy(BODIES["in a row"])
    parameters = list(toy.parameters())
    parameters = change(toy) or parameters
    with (
        pytest.raises(ModelError, match="would not be exact") as caught,
        PerExample(toy, parameters).batch(3) as pending,
    ):
        pending.backward(toy.losses(torch.randn(3, 2, 4)))
    return str(caught.value)


def test_what_cannot_be_exact_is_refused() -> None:
    def conv(toy: Toy) -> list[nn.Parameter]:
        toy.extra = nn.Conv1d(1, 1, 1).eval()
        return list(toy.parameters())

    def norm(toy: Toy) -> list[nn.Parameter]:
        toy.extra = nn.LayerNorm(4).eval()
        return list(toy.parameters())

    def stranger(toy: Toy) -> None:
        toy.extra = nn.Linear(4, 4).eval()

    def frozen(toy: Toy) -> None:
        toy.two.requires_grad_(False)

    assert "extra is trained and not a plain linear" in broken(conv)
    assert "extra is trained and not a plain linear" in broken(norm)
    assert "does not travel" in broken(stranger)
    assert "frozen" in broken(frozen)
    assert "training mode" in broken(lambda toy: setattr(toy, "extra", nn.Dropout(0.1)))
    assert "recomputes" in broken(lambda toy: setattr(toy, "gradient_checkpointing", True))
    assert "was replaced" in broken(lambda toy: setattr(toy.one, "forward", toy.one.forward))
    assert "otherwise than by calling" in broken(
        lambda toy: setattr(
            toy, "body", lambda self, x: self.two(functional.linear(x, self.one.weight))
        )
    )
    assert "for each example" in broken(
        lambda toy: setattr(toy, "body", lambda self, x: self.two(self.one(x.flatten(0, 1)))[:3])
    )
    assert "does not depend" in broken(
        lambda toy: setattr(toy, "body", lambda self, x: self.two(self.one(x)).detach())
    )
    toy = Toy(BODIES["in a row"])
    nn.utils.parametrizations.weight_norm(toy.one)
    with pytest.raises(ModelError):
        PerExample(toy, list(toy.parameters()))


# -- whole updates and local steps


@given(
    arrays.arrays(
        np.float32, st.integers(1, 50), elements=st.floats(-(2.0**60), 2.0**60, width=32)
    ),
    st.floats(1e-6, 1e6),
)
def test_a_clipped_update_is_within_its_bound_and_keeps_its_direction(
    vector: np.ndarray, bound: float
) -> None:
    result = clip_vector(vector, bound)
    norm = np.linalg.norm(vector.astype(np.float64))
    assert result.dtype == np.float32
    assert np.linalg.norm(result.astype(np.float64)) <= bound
    if norm <= bound:
        assert np.array_equal(result, vector)
    else:
        np.testing.assert_allclose(result, vector * (bound / norm), rtol=1e-5, atol=1e-30)


def test_an_update_that_is_not_finite_becomes_nothing() -> None:
    assert not clip_vector(np.array([1, np.nan], np.float32), 1.0).any()


def test_steps_by_gradient_sums_are_the_plain_steps(
    zoo: Any, records: Make, tmp_path: Path
) -> None:
    task, data = made(zoo, "minilm", tmp_path, records, method="lora")
    start = task.get_flat()
    step = task.stepper()
    for batch in (data[:4], data[4:8]):
        step(task.gradient_sum(batch, clip_norm=1e6)[0] / np.float32(4))
    private = task.get_flat()
    task.set_flat(start)
    optimizer = task._optimizer(task.terms.training)
    for batch in (data[:4], data[4:8]):
        optimizer.zero_grad()
        task._score(task._examples(batch))[0].mean().backward()
        optimizer.step()
    # Adam divides by the gradient's size: where that is rounding alone, so is the step's direction.
    moved = np.abs(task.get_flat() - start)
    assert np.median(np.abs(private - task.get_flat()) / moved.max()) < 1e-5
    assert np.mean(np.abs(private - task.get_flat()) > 1e-3 * moved.max()) < 0.01


def test_a_step_that_left_the_finite_numbers_is_refused(
    zoo: Any, records: Make, tmp_path: Path
) -> None:
    task, _ = made(zoo, "minilm", tmp_path, records)
    with pytest.raises((InputError, ProtocolError)):
        task.stepper()(np.full(task.terms.travelling, np.inf, np.float32))
