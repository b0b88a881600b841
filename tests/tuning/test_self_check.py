"""The self-check passes on every family, and sees each way in which private training is known to
break in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from fedark.foundation.errors import ModelError
from fedark.records.reading import Record
from fedark.tuning import per_example
from fedark.tuning.export import export_peft
from fedark.tuning.self_check import self_check
from fedark.tuning.task import TaskModel

ANSWERS = ("open line", "close the breaker", "shed load now", "hold")
Make = Callable[[tuple[str, ...]], list[Record]]


def made(zoo: Any, name: str, records: Make, **terms: Any) -> tuple[TaskModel, list[Record]]:
    tiny = zoo[name]
    if terms.get("method") == "head":
        tiny = replace(tiny, task="classification", labels=tiny.labels or ("a", "b", "c", "d"))
    return tiny.load(tiny.terms(**terms)), records(tiny.labels or ANSWERS)


@pytest.mark.parametrize("method", ["ffa-lora", "lora", "head"])
@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
def test_a_sound_model_passes_and_is_left_as_it_was(
    zoo: Any, records: Make, name: str, method: str
) -> None:
    task, data = made(zoo, name, records, method=method)
    before = task.get_flat()
    self_check(task, data)
    assert np.array_equal(task.get_flat(), before)
    assert all(parameter.grad is None for parameter in task.scorer.parameters())


def test_a_sound_model_passes_with_a_trunk_and_one_record(zoo: Any, records: Make) -> None:
    task, data = made(zoo, "llama", records, layers=(2,))
    self_check(task, data[:1] * 3)


def failing(task: TaskModel, data: list[Record]) -> str:
    before = task.get_flat()
    with pytest.raises(ModelError) as caught:
        self_check(task, data)
    assert np.array_equal(task.get_flat(), before)
    assert not any(
        record.prompt in str(caught.value) for record in data if len(record.prompt.split()) > 2
    )
    return caught.value.what


@pytest.mark.parametrize("where", ["one layer", "all layers"])
@pytest.mark.parametrize("name", ["minilm", "llama"])
def test_a_detached_b_is_seen(zoo: Any, records: Make, name: str, where: str) -> None:
    """The model answers and its loss falls by its head, but the adapter gets no gradient."""
    task, data = made(zoo, name, records)
    modules = [
        module
        for module_name, module in task.scorer.named_modules()
        if module_name.endswith("lora_B.default")
    ]
    for module in modules[:1] if where == "one layer" else modules:
        module.register_forward_hook(lambda _module, _inputs, output: output.detach())
    alone = name == "llama" and where == "all layers"  # without a head, nothing is left to train
    said = (
        "the loss does not depend on the adapter"
        if alone
        else "no record has a gradient with respect to"
    )
    assert said in failing(task, data)


@pytest.mark.parametrize("name", ["minilm", "gpt2"])
def test_the_gradient_of_a_copy_is_seen(zoo: Any, records: Make, name: str) -> None:
    """What travels is a copy that the model does not compute with: it stays as it was, whatever is
    trained.
    """
    task, data = made(zoo, name, records)
    key = next(key for key in task._tensors if ".lora_B." in key)
    clone = nn.Parameter(task._tensors[key].detach().clone())
    task.trained[[id(p) for p in task.trained].index(id(task._tensors[key]))] = clone
    task._tensors[key] = clone
    assert "would not be exact" in failing(task, data)


def test_an_optimizer_that_holds_a_copy_is_seen(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrapped after the optimiser was made: steps go to parameters that nobody reads."""
    task, data = made(zoo, "minilm", records)
    monkeypatch.setattr(
        task,
        "_optimizer",
        lambda _terms: torch.optim.AdamW([copy.deepcopy(p) for p in task.trained]),
    )
    assert "the customer's own does not change" in failing(task, data)


def test_an_adapter_that_is_saved_from_a_copy_is_seen(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedark.tuning import self_check as module

    task, data = made(zoo, "minilm", records)
    state = module.get_peft_model_state_dict(task.scorer.body, save_embedding_layers=False)
    initial = {key: value.clone() for key, value in state.items()}
    monkeypatch.setattr(module, "get_peft_model_state_dict", lambda *_args, **_named: dict(initial))
    assert "as it would be saved" in failing(task, data)


def test_a_path_that_does_not_clip_is_seen(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data = made(zoo, "minilm", records)
    monkeypatch.setattr(
        per_example,
        "clip_factors",
        lambda norms, _bound: torch.ones_like(norms, dtype=torch.float64),
    )
    assert "larger than the clipping bound" in failing(task, data)


def test_parts_that_are_scaled_as_if_all_were_clipped_alike_are_seen(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data = made(zoo, "minilm", records)
    monkeypatch.setattr(
        per_example,
        "clip_factors",
        lambda norms, bound: torch.full_like(norms, 0.5 * bound / float(norms.max())).double(),
    )
    assert "not that of a batch of one" in failing(task, data)


def test_a_batch_that_is_clipped_as_one_is_seen(
    zoo: Any, records: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data = made(zoo, "minilm", records)
    monkeypatch.setattr(
        per_example,
        "clip_factors",
        lambda norms, bound: (bound / norms.double().norm()).clamp(max=1).expand(len(norms)),
    )
    assert "depends on the batch" in failing(task, data)


def test_kept_rows_of_another_model_are_seen(zoo: Any, records: Make) -> None:
    task, data = made(zoo, "minilm", records, method="head")
    task.evaluate(data)
    assert task._features is not None
    task._features._rows = task._features._rows.roll(1, 0)
    assert "not that of a batch of one" in failing(task, data)


def test_a_loss_that_sees_other_records_is_seen(zoo: Any, records: Make) -> None:
    task, data = made(zoo, "minilm", records)
    score = task._score

    def mixed(batch: Any, length: int = 0) -> Any:
        losses, hits = score(batch, length)
        return losses * losses.mean(), hits

    task._score = mixed  # type: ignore[method-assign]
    assert "batch" in failing(task, data)


def test_without_a_record_nothing_is_vouched_for(zoo: Any) -> None:
    with pytest.raises(ModelError, match="no record"):
        self_check(zoo["minilm"].load(), [])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_file_that_is_written_after_a_private_step_is_the_adapter_in_memory(
    zoo: Any, records: Make, tmp_path: Path
) -> None:
    tiny = zoo["llama"]
    task, data = made(zoo, "llama", records, method="lora")
    before = task.get_flat()
    step = task.stepper()
    for _ in range(2):
        step(task.gradient_sum(data, clip_norm=1.0)[0] / np.float32(10))
    export_peft(task.terms, task.get_flat(), tmp_path)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.folder), tmp_path
    ).eval()
    ids, mask = task._padded(task._encoder.texts([record.prompt for record in data]))
    with torch.no_grad():
        saved = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(saved, task.scorer(ids, mask))
        task.set_flat(before)
        assert not torch.allclose(saved, task.scorer(ids, mask), atol=1e-3)
