"""The adapter's shape, its seeded half and the flat vector."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

from fedark.contract.contract import AdapterTerms, TensorSpec
from fedark.foundation.errors import ModelError, ProtocolError
from fedark.tuning.layout import adapter_layout, flatten, seeded_tensor, unflatten

KNOWN = "596ecb9bff953a3f5c2e0cbf3dc242dc1f8f0c897f3816c3df7b3d76e4ca4f9e"
LAYOUT = (
    TensorSpec(name="m.lora_A.weight", shape=(2, 3), travels=False),
    TensorSpec(name="m.lora_B.weight", shape=(4, 2), travels=True),
    TensorSpec(name="head.bias", shape=(3,), travels=True),
)


@given(arrays.arrays(np.float32, 11, elements=st.floats(-1e3, 1e3, width=32)))
def test_flat_and_named_are_inverse(flat: np.ndarray) -> None:
    named = unflatten(LAYOUT, flat, 1)
    assert np.array_equal(flatten(LAYOUT, named), flat)
    assert np.array_equal(named["m.lora_B.weight"].reshape(-1), flat[:8])
    assert np.array_equal(named["m.lora_A.weight"], seeded_tensor(1, LAYOUT[0]))


@pytest.mark.parametrize(
    "flat",
    [
        np.zeros(10, np.float32),
        np.zeros(11),
        np.full(11, np.nan, np.float32),
        np.zeros((11, 1), np.float32),
    ],
)
def test_a_vector_of_another_shape_type_or_with_a_nan_is_refused(flat: np.ndarray) -> None:
    with pytest.raises(ProtocolError):
        unflatten(LAYOUT, flat, 1)


def test_a_missing_or_misshapen_tensor_is_refused() -> None:
    with pytest.raises(ModelError):
        flatten(LAYOUT, {"m.lora_B.weight": np.zeros((4, 2), np.float32)})
    with pytest.raises(ModelError):
        flatten(
            LAYOUT,
            {"m.lora_B.weight": np.zeros((2, 4), np.float32), "head.bias": np.zeros(3, np.float32)},
        )


def test_the_seeded_tensor_is_fixed_for_ever() -> None:
    tensor = seeded_tensor(7, TensorSpec(name="x", shape=(64, 256), travels=False))
    assert hashlib.sha256(tensor.astype("<f4").tobytes()).hexdigest() == KNOWN
    assert tensor.dtype == np.float32
    assert np.abs(tensor).max() <= 1 / 16
    assert abs(tensor.mean()) < 1e-3
    assert abs(tensor.std() - 1 / 16 / 3**0.5) < 1e-3


def test_seed_name_and_shape_each_change_the_seeded_tensor() -> None:
    spec = TensorSpec(name="x", shape=(2, 6), travels=False)
    base = seeded_tensor(1, spec).reshape(-1)
    for seed, change in ((2, {}), (1, {"name": "y"}), (1, {"shape": (6, 2)})):
        other = seeded_tensor(seed, spec.model_copy(update=change)).reshape(-1)
        assert not np.isin(other, base).any()


@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
def test_the_layout_from_headers_is_that_of_the_loaded_model(zoo: Any, name: str) -> None:
    for method in ("ffa-lora", "lora"):
        terms = zoo[name].terms(method=method, layers=(1, 2))
        task = zoo[name].load(terms)  # refuses any difference
        assert task.initial().shape == (terms.travelling,)
        assert any(
            spec.name.endswith("lora_A.weight") and spec.travels == (method == "lora")
            for spec in terms.layout
        )
        assert not any(".0." in spec.name for spec in terms.layout)


def test_the_names_are_those_that_peft_saves(zoo: Any) -> None:
    tiny = zoo["bert"]
    model = AutoModelForSequenceClassification.from_pretrained(tiny.folder, num_labels=3)
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    saved = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    assert {spec.name: spec.shape for spec in tiny.terms().layout} == saved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"targets": ("query", "q_proj")}, "q_proj"),
        ({"layers": (2, 9)}, "no layer 9"),
        ({"targets": ("attention",)}, "not a linear layer"),
        ({"head": False}, "head"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    zoo: Any, change: dict[str, Any], says: str
) -> None:
    adapter = AdapterTerms(**{"targets": ("query",), **change})
    with pytest.raises(ModelError, match=says):
        adapter_layout(zoo["bert"].folder, "classification", ("a", "b"), adapter)


def test_classification_needs_two_labels(zoo: Any) -> None:
    with pytest.raises(ModelError):
        adapter_layout(
            zoo["bert"].folder, "classification", ("a",), AdapterTerms(targets=("query",))
        )


def test_a_layout_needs_no_memory_for_weights(zoo: Any) -> None:
    from fedark.tuning.base import load_base

    base = load_base(zoo["llama"].files(), "instruction", (), shapes_only=True)
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in base.model.parameters()
    }
    assert sum(held.values()) < sum(p.numel() for p in base.model.parameters())
    assert all(isinstance(p, torch.Tensor) for p in base.model.parameters())
