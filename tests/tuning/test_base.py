"""What a base model is taken for, and what is refused of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load, save

from fedark.contract.contract import AdapterTerms
from fedark.foundation.errors import ModelError
from fedark.tuning.base import load_base
from fedark.tuning.layout import adapter_layout, base_shapes
from fedark.tuning.settings import make_config, read_settings
from fedark.tuning.weights import read_header

POOLING = "1_Pooling/config.json"
OLD = {
    "word_embedding_dimension": 16,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
}


def taken(tiny: Any, pooling: object, asked: Any = "auto", **files: object) -> tuple[str, str]:
    """What the tiny encoder is taken for with this 1_Pooling/config.json, or none at all."""
    found: dict[str, Any] = {k: v for k, v in tiny.files().items() if k != POOLING}
    if pooling is not None:
        found[POOLING] = json.dumps(pooling).encode()
    found |= {name.replace("__", "."): json.dumps(v).encode() for name, v in files.items()}
    base = load_base(found, "classification", tiny.labels, pooling=asked)
    return base.pooling, base.why


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**OLD, "pooling_mode_mean_tokens": True}, "mean"),
        ({**OLD, "pooling_mode_cls_token": True}, "cls"),
        ({**OLD, "pooling_mode_lasttoken": True}, "none"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 16, "pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "none"),
    ],
)
def test_pooling_settings_of_every_form_are_read(zoo: Any, settings: object, expected: str) -> None:
    pooling, why = taken(zoo["minilm"], settings)
    assert pooling == expected
    assert POOLING in why


@pytest.mark.parametrize(
    "settings",
    [
        {**OLD, "pooling_mode_max_tokens": True},
        {**OLD, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode": {"mean": True}},
        OLD,
        {},
    ],
)
def test_a_pooling_that_is_not_computed_is_refused_unless_the_job_says_one(
    zoo: Any, settings: object
) -> None:
    with pytest.raises(ModelError, match='pooling = "mean", "cls" or "none"'):
        taken(zoo["minilm"], settings)
    for asked in ("mean", "cls", "none"):
        assert taken(zoo["minilm"], settings, asked) == (asked, "")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"1", b"[" * 99, b" " * (2 << 20)])
@pytest.mark.parametrize("name", [POOLING, "modules.json"])
def test_malformed_pooling_settings_are_refused(zoo: Any, name: str, content: bytes) -> None:
    if name == "modules.json" and content == b"[]":
        content = b"{}"
    with pytest.raises(ModelError, match="malformed"):
        load_base({**zoo["minilm"].files(), name: content}, "classification", ("a", "b"))


def test_a_dense_layer_after_the_pooling_is_named(zoo: Any) -> None:
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}, 3]
    pooling, why = taken(zoo["minilm"], {"pooling_mode": "mean"}, modules__json=modules)
    assert pooling == "mean"
    assert "without the Dense layer" in why


def test_a_bare_encoder_is_a_mean_and_a_language_model_or_decoder_is_not(
    zoo: Any, tmp_path: Any
) -> None:
    """An encoder of sentences saved again by save_pretrained has lost its 1_Pooling/."""
    pooling, why = taken(zoo["minilm"], None)
    assert pooling == "mean"
    assert "bare encoder (BertModel)" in why
    for name in ("bert", "roberta", "bart", "gpt2", "llama"):
        FAMILIES[name].save(tmp_path / name)
        assert base_shapes(tmp_path / name, "classification", ("a", "b"), "auto").pooling == "none"
    assert base_shapes(zoo["llama"].folder, "instruction", (), "auto").pooling == "none"


def test_a_first_token_is_read_where_the_contract_says_so(zoo: Any, texts: list[str]) -> None:
    rows = []
    for pooling in ("mean", "cls"):
        tiny = replace(zoo["minilm"], pooling=pooling)
        task = tiny.load()
        with torch.no_grad():
            rows.append(task.scorer.embed(*task._padded(task._encoder.texts(texts))))
    hidden = task.scorer.body
    with torch.no_grad():
        ids, mask = task._padded(task._encoder.texts(texts))
        first = hidden(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    assert torch.allclose(rows[1], torch.nn.functional.normalize(first, dim=-1))
    assert not torch.allclose(rows[0], rows[1], atol=1e-2)


def test_a_pooled_encoder_needs_no_pooler_weights(zoo: Any) -> None:
    tiny = zoo["minilm"]
    files = tiny.files()
    state = {k: v for k, v in load(bytes(files["model.safetensors"])).items() if "pooler" not in k}
    base = load_base({**files, "model.safetensors": save(state)}, "classification", tiny.labels)
    assert base.kind == "pooled"
    names = [spec.name for spec in base.layout(AdapterTerms(targets=("dense",)))]
    assert not any("pooler" in name for name in names)


def test_weights_that_are_shared_get_no_adapter(tmp_path: Any) -> None:
    """Merging it would change the embeddings too."""
    FAMILIES["llama, tied"].save(tmp_path / "tied")
    FAMILIES["llama"].save(tmp_path / "free")
    adapter = AdapterTerms(targets=("lm_head",))
    with pytest.raises(ModelError, match=r"lm_head shares its weights with model\.embed_tokens"):
        adapter_layout(tmp_path / "tied", "instruction", (), adapter)
    assert adapter_layout(tmp_path / "free", "instruction", (), adapter)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("bert", 64),
        ("roberta", 62),
        ("mpnet", 62),
        ("longformer", 62),
        ("xlnet", None),
        ("opt", 64),
    ],
)
def test_a_model_says_how_many_tokens_it_can_read(
    tmp_path: Any, name: str, limit: int | None
) -> None:
    family = FAMILIES[name]
    family.save(tmp_path)
    base = base_shapes(tmp_path, "classification", ("a", "b"), "none")
    assert base.longest == limit
    if limit is not None:
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        model = load_base(files, "classification", ("a", "b")).model
        model.config.pad_token_id = 1
        model(input_ids=torch.full((1, limit), 5))


def test_old_configurations_of_phi3_and_qwen2_are_read() -> None:
    factors = [1.0] * 4
    su = {"type": "su", "long_factor": factors, "short_factor": factors}
    phi = {
        **{"model_type": "phi3", "rope_scaling": su, "original_max_position_embeddings": 4096},
        **{"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"max_position_embeddings": 131072, "auto_map": {"AutoConfig": "x"}},
    }
    qwen = {"model_type": "qwen2", "max_window_layers": 70, "use_sliding_window": False}
    for old in (phi, qwen):
        config = make_config(read_settings({"config.json": json.dumps(old).encode()}), {})
        assert config.model_type == old["model_type"]
    config = make_config(read_settings({"config.json": json.dumps(phi).encode()}), {})
    assert config.rope_parameters["rope_type"] == "longrope"
    assert config.rope_parameters["long_factor"] == factors


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "U16"])
def test_weights_of_eight_bits_are_named(kind: str) -> None:
    header = json.dumps({"w": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"ab"
    with pytest.raises(ModelError, match=f"weights of type {kind}"):
        read_header("model.safetensors", data)
