"""A base model's config.json: whatever its provider wrote, a model of the size of its weights or a
refusal, and soon.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Mamba2Config

from fedark.foundation.errors import ModelError
from fedark.tuning.base import load_base
from fedark.tuning.settings import bounded, make_config, read_settings
from fedark.tuning.task import TaskModel


def bent(tiny: Any, **fields: Any) -> dict[str, bytes]:
    files = tiny.files()
    return {**files, "config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}


def load(tiny: Any, files: dict[str, bytes]) -> Any:
    return load_base(files, tiny.task, tiny.labels, pooling=tiny.pooling)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[("llama", "num_hidden_layers", value) for value in (2**31, 2**62, 10**30, 65, 1e308)],
        ("llama", "vocab_size", 2**31),
        ("llama", "hidden_size", 2**31),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_attention_heads", 2**31),
        ("llama", "rope_parameters", {"rope_type": "yarn", "factor": []}),
        ("llama", "pad_token_id", 2**31),
        ("llama", "max_position_embeddings", 2**62),
        ("gpt2", "n_layer", 2**31),
        ("gpt2", "n_positions", 2**31),
        ("gpt2", "n_head", 0),
        ("gpt2", "activation_function", "no such"),
        ("gpt2", "to_dict", 5),
        ("bert", "num_attention_heads", 0),
        ("bert", "num_hidden_layers", 2**31),
        ("bert", "max_position_embeddings", 2**31),
        ("bert", "pad_token_id", 99),
        ("bert", "hidden_act", {}),
        ("bert", "text_config", {"depths": [[2**31]]}),
    ],
)
def test_a_number_that_fits_no_weights_is_refused_at_once(
    zoo: Any, name: str, field: str, value: object
) -> None:
    begun = time.monotonic()
    with pytest.raises(ModelError):
        load(zoo[name], bent(zoo[name], **{field: value}))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
def test_names_and_numbers_of_classes_are_not_taken_from_the_file(zoo: Any, name: str) -> None:
    files = bent(zoo[name], num_labels=2**31, label2id={"x": 2**31}, id2label={"x": "y"})
    assert load(zoo[name], files).layout(zoo[name].terms().adapter) == zoo[name].terms().layout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b'{"model_type": "bert", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "not a JSON object"),
        (b"{}", "no model_type"),
        (b'{"model_type": ["bert"]}', "does not know"),
        (b'{"model_type": "bert", "x": "' + bytes([120]) * (4 << 20) + b'"}', "longer than 4 MiB"),
        (b'{"model_type": "bert", "quantization_config": {}}', "quantised"),
        (b'{"model_type": "bert", "text_config": [{"quantization_config": {}}]}', "quantised"),
    ],
)
def test_what_is_no_configuration_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_settings({"config.json": text})


def test_a_missing_configuration_is_refused() -> None:
    with pytest.raises(ModelError, match="missing"):
        read_settings({})


def test_what_would_fetch_or_run_something_is_dropped_wherever_it_stands() -> None:
    hostile = {"auto_map": {"AutoModel": "x.y"}, "kernel_config": {}, "num_labels": 5}
    value = {"model_type": "bert", **hostile, "text_config": hostile, "list": [hostile]}
    cleaned = read_settings({"config.json": json.dumps(value).encode()})
    assert cleaned == {"model_type": "bert", "text_config": {}, "list": [{}]}


def test_an_infinite_number_is_read_as_the_library_writes_it() -> None:
    text = Mamba2Config(num_heads=4, head_dim=8, hidden_size=16).to_json_string()
    assert "__float__" in text
    settings = read_settings({"config.json": text.encode()})
    assert list(make_config(settings, {}).time_step_limit) == [0.0, math.inf]


def test_an_architecture_that_the_library_names_and_lacks_is_refused(zoo: Any) -> None:
    """Found by fuzzing: the library looks the class up when asked, and raises ValueError."""
    with pytest.raises(ModelError):
        load(zoo["minilm"], bent(zoo["minilm"], model_type="voxtral_realtime_text"))


def test_nothing_of_a_configuration_is_printed(zoo: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tiny, printed = zoo["bert"], []
    printer = logging.StreamHandler()
    printer.emit = printed.append
    library = logging.getLogger("transformers")
    library.addHandler(printer)
    try:
        with pytest.raises(ModelError):
            load(tiny, bent(tiny, model_type="xcodec"))
    finally:
        library.removeHandler(printer)
    assert not printed
    assert capfd.readouterr() == ("", "")


def test_layers_that_share_tensors_may_outnumber_them() -> None:
    settings = {
        "model_type": "albert",
        "num_hidden_layers": 24,
        "hidden_size": 16,
        "num_attention_heads": 2,
    }
    assert make_config(settings, {"one": torch.zeros(1)}).num_hidden_layers == 24


@pytest.mark.parametrize(
    "build",
    [
        lambda: [nn.Linear(1, 1) for _ in range(100)],
        lambda: nn.Linear(1 << 20, 1 << 20, device="meta"),
        lambda: nn.Sequential(*[nn.Identity() for _ in range(2000)]),
        lambda: nn.Module().register_buffer("mask", torch.empty(1 << 30, device="meta")),
    ],
    ids=["parameters", "values", "modules", "buffers"],
)
def test_building_stops_at_the_size_of_the_weights(build: Callable[[], Any]) -> None:
    with bounded({"one": torch.zeros(3)}), pytest.raises(ModelError, match="larger"):
        build()
    build()


def test_a_bound_is_that_of_its_own_thread() -> None:
    failed: list[BaseException] = []

    def build() -> None:
        try:
            nn.Sequential(*[nn.Identity() for _ in range(2000)])
        except BaseException as error:
            failed.append(error)

    with bounded({}):
        other = threading.Thread(target=build)
        other.start()
        other.join()
    assert not failed


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gpt2", "eos_token_id", 1000),
        ("gpt2", "n_head", 3),
        ("bert", "num_attention_heads", -1),
        ("minilm", "num_attention_heads", -1),
        ("llama", "num_key_value_heads", -1),
    ],
)
def test_a_model_that_fails_on_a_text_is_refused_when_it_is_loaded(
    zoo: Any, name: str, field: str, value: object
) -> None:
    tiny = zoo[name]
    with pytest.raises(ModelError):
        TaskModel.load(bent(tiny, **{field: value}), tiny.terms())
