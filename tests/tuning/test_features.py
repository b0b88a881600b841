"""A head alone: nothing else travels, and the frozen body is computed once for each text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fedark.contract.contract import AdapterTerms
from fedark.foundation.errors import ModelError
from fedark.records.reading import Record
from fedark.tuning.layout import adapter_layout

ALL = ["bert", "minilm", "gpt2", "llama"]
Make = Callable[[tuple[str, ...]], list[Record]]


def classifier(zoo: Any, name: str) -> Any:
    return replace(
        zoo[name], task="classification", labels=zoo[name].labels or ("a", "b", "c", "d")
    )


@pytest.mark.parametrize("name", ALL)
def test_only_the_head_travels_and_only_the_head_changes(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = classifier(zoo, name)
    task = tiny.load(tiny.terms(method="head"))
    assert not any(".lora_" in spec.name for spec in task.terms.layout)
    data = records(tiny.labels)
    before = {key: value.clone() for key, value in task.scorer.state_dict().items()}
    first = task.evaluate(data)
    task.train(data, epochs=8, seed=1)
    assert task.evaluate(data).loss_sum < first.loss_sum
    changed = {
        key
        for key, value in task.scorer.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {key for key, value in task.scorer.named_parameters() if value.requires_grad}
    assert all(any(part in key for part in ("head", "classifier", "score")) for key in changed)


@pytest.mark.parametrize("name", ALL)
def test_kept_rows_change_neither_training_nor_evaluation(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = classifier(zoo, name)
    data = records(tiny.labels)
    results = []
    for kept in (True, False):
        task = tiny.load(tiny.terms(method="head"))
        assert task._features is not None
        if not kept:
            task._features = None
        stats = task.train(data, epochs=3, seed=4)
        assert kept is False or task._features._places
        results.append((stats.loss, task.get_flat(), task.evaluate(data)))
    (loss1, flat1, last1), (loss2, flat2, last2) = results
    assert loss1 == pytest.approx(loss2, rel=1e-5)
    np.testing.assert_allclose(flat1, flat2, atol=2e-5)
    assert last1.correct == last2.correct


def test_the_body_is_not_run_again_for_a_text_that_is_known(zoo: Any, records: Make) -> None:
    task = zoo["minilm"].load(zoo["minilm"].terms(method="head"))
    data = records(task.terms.labels)
    task.evaluate(data)
    calls: list[int] = []
    task.scorer.body.register_forward_hook(lambda *_: calls.append(1))
    task.train(data, epochs=2, seed=0)
    task.evaluate(data)
    assert not calls
    task.evaluate([*data, Record("open now open now", task.terms.labels[0])])
    assert calls


def test_a_model_that_answers_otherwise_than_by_its_head_is_computed_in_full(
    zoo: Any, records: Make
) -> None:
    task = zoo["minilm"].load(zoo["minilm"].terms(method="head"))
    task.scorer.register_forward_hook(lambda _module, _inputs, logits: logits * 2)
    data = records(task.terms.labels)
    task.evaluate(data)
    assert task._features is not None
    assert not task._features._places
    assert task.train(data, epochs=1, seed=0).steps == 6


def test_a_head_of_several_layers_is_trained_above_a_kept_trunk(
    zoo: Any, records: Make, tmp_path: Path
) -> None:
    """A base without pooler weights has them in its head."""
    folder = Path(shutil.copytree(zoo["bert"].folder, tmp_path / "base"))
    state = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "pooler" not in key},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tiny = replace(zoo["bert"], folder=folder)
    data = records(tiny.labels)
    flats = []
    for kept in (True, False):
        task = tiny.load(tiny.terms(method="head"))
        assert task._features is None
        assert task._trunk is not None
        assert any("pooler" in spec.name for spec in task.terms.layout)
        if not kept:
            task._trunk = None
        task.train(data, epochs=2, seed=0)
        assert not kept or task._trunk._states
        flats.append(task.get_flat())
    np.testing.assert_allclose(*flats, atol=2e-5)


def test_a_round_on_1250_records_takes_milliseconds(zoo: Any) -> None:
    generator = np.random.default_rng(0)
    labels = zoo["minilm"].labels
    data = [
        Record(
            " ".join(generator.choice(["open", "close", "line", "bus", "hot", "shed"], 8)),
            labels[index % 3],
        )
        for index in range(1250)
    ]
    tiny = zoo["minilm"]
    task = tiny.load(tiny.terms(method="head", training={"batch_size": 32}))
    task.evaluate(data)
    begun = time.process_time()
    task.train(data, epochs=1, seed=0)
    assert (
        time.process_time() - begun < 0.5
    )  # 20 to 40 ms; a fresh pass through the body takes seconds


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"method": "head", "targets": ("query",)}, "leave targets and layers empty"),
        ({"method": "head", "layers": (1,)}, "leave targets and layers empty"),
        ({"method": "head", "head": False}, "train nothing"),
        ({"method": "lora", "targets": ()}, "at least one target"),
        ({"targets": ()}, "at least one target"),
    ],
)
def test_targets_belong_to_every_method_but_head(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AdapterTerms(**terms)
    assert AdapterTerms(method="head").targets == ()


def test_a_language_model_has_no_head_to_train(zoo: Any) -> None:
    with pytest.raises(ModelError, match="no classification head"):
        adapter_layout(zoo["llama"].folder, "instruction", (), AdapterTerms(method="head"))
