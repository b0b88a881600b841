"""Under the privacy of single records nothing of one record enters what another adds: architectures
are admitted from a list, and the self-check sees each way in which records can mix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fedark.contract.job import Job
from fedark.foundation.errors import ModelError
from fedark.records.reading import Record
from fedark.simulation.local import prepare
from fedark.tuning.self_check import self_check
from fedark.tuning.separable import ADMITTED, ModelState, require_separable
from fedark.tuning.task import TaskModel

Make = Callable[[tuple[str, ...]], list[Record]]
LABELS = ("open_line", "close_breaker", "shed_load")
ANSWERS = ("open line", "close the breaker", "shed load now", "hold")

_COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_QUERIES: dict[str, tuple[str, ...]] = {
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.v"),
    "deberta-v2": ("query_proj", "value_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "phi3": ("qkv_proj",),
}
_ENCODERS = frozenset(
    [
        "fnet",
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "mpnet",
        "roberta",
        "xlm-roberta",
    ]
)
_OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
    },
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 1},
    "smollm3": {"num_key_value_heads": 1},
}


def tiny(zoo: Any, name: str, folder: Path, **changed: Any) -> Any:
    """A tiny random model of an architecture, beside the tokenizer of the zoo."""
    encoder = name in _ENCODERS
    like = zoo["bert" if encoder else "llama"]
    words = json.loads((like.folder / "config.json").read_text())["vocab_size"]
    settings = {**_COMMON, **_OWN.get(name, {}), **changed, "vocab_size": words}
    config = AutoConfig.for_model(name, **settings)
    torch.manual_seed(7)
    if name == "distilbert":  # as a sentence encoder, which has no head of its own
        model: Any = AutoModel.from_config(config)
        (folder / "1_Pooling").mkdir(parents=True)
        pooling = json.dumps({"pooling_mode_mean_tokens": True})
        (folder / "1_Pooling/config.json").write_text(pooling)
    elif encoder:
        config.num_labels = len(LABELS)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    for path in like.folder.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    plain = ("query", "value") if encoder else ("q_proj", "v_proj")
    return type(like)(
        folder,
        "classification" if encoder else "instruction",
        _QUERIES.get(name, plain),
        LABELS if encoder else (),
    )


@pytest.mark.parametrize("name", sorted(ADMITTED))
def test_every_admitted_architecture_keeps_records_apart(
    zoo: Any, records: Make, name: str, tmp_path: Path
) -> None:
    base = tiny(zoo, name, tmp_path / name)
    task, data = base.load(), records(LABELS if base.labels else ANSWERS)
    self_check(task, data)
    assert task.config["model_type"] == name


@pytest.mark.parametrize("name", ["big_bird", "fnet", "convbert", "mamba", "mixtral", "bart"])
def test_an_architecture_that_is_not_on_the_list_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is not among those"):
        require_separable({"model_type": name})


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "longrope"}},
        {"rope_parameters": {"full": {"rope_type": "dynamic"}, "local": {"rope_type": "default"}}},
        {"text_config": {"rope_parameters": {"rope_type": "longrope"}}},
        {"rope_parameters": {"rope_type": "of tomorrow"}},
        {"conv_kernel_size": 3},
    ],
)
def test_settings_that_depend_on_a_batch_are_refused(changed: dict[str, Any]) -> None:
    require_separable({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}})
    with pytest.raises(ModelError, match="not trained under the privacy of single records"):
        require_separable({"model_type": "llama", **changed})


def test_a_private_job_with_such_a_model_is_refused_before_anything_is_sealed(
    zoo: Any, tmp_path: Path
) -> None:
    tiny(zoo, "fnet", tmp_path / "base", type_vocab_size=2)
    (tmp_path / "data.csv").write_text("message,action\nopen it,open_line\nshed it,shed_load\n")
    (tmp_path / "job.toml").write_text(JOB)
    work = tmp_path / "work"
    with pytest.raises(ModelError, match="'fnet' is not among those"):
        prepare(Job.load(tmp_path / "job.toml"), work, sandbox="none")
    assert not list((work / "catalogue").iterdir())


JOB = """
[job]
name = "mixed"
rounds = 2
[provider]
name = "maker"
[aggregator]
name = "pool"
[[customers]]
name = "north"
data = "data.csv"
[[customers]]
name = "east"
data = "data.csv"
[[customers]]
name = "south"
data = "data.csv"
[data]
prompt = "{message}"
answer = "action"
labels = ["open_line", "shed_load"]
[[models]]
name = "tiny"
source = "dir:base"
task = "classification"
adapter = {targets = ["intermediate.dense"]}
[privacy]
mechanism = "example-distributed"
records = 6
"""


class _Planted:
    """What stands behind the first block of a model, and breaks a rule."""

    def __init__(self, kind: str, block: nn.Module) -> None:
        self.kind, self.block, self.seen = kind, block, 0

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        changed = self._changed(hidden)
        return (changed, *rest) if isinstance(output, tuple) else changed

    def _changed(self, hidden: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "state":  # in a place that nothing but its effect shows
                self.seen += 1
                return hidden * (1 + 0.05 * self.seen)
            case "state of the module":
                self.block.switched = True  # type: ignore[assignment]
            case "state of the class":
                type(self.block).switched = True  # type: ignore[attr-defined]
            case "state in a buffer":
                self.block.get_buffer("kept").add_(1)
            case "frozen weights":
                with torch.no_grad():
                    next(p for p in self.block.parameters() if not p.requires_grad).mul_(1.0)
            case "padding":
                return hidden + hidden.mean(1, keepdim=True)
            case "batch statistics":
                return hidden - hidden.mean((0, 1), keepdim=True)
            case "position in the batch":
                return hidden * torch.linspace(1, 2, len(hidden)).view(-1, 1, 1)
            case "length switch":
                return hidden * (2.0 if hidden.shape[1] < 9 else 1.0)
            case "length switch for good":
                self.seen |= hidden.shape[1] < 9
                return hidden * (2.0 if self.seen else 1.0)
            case "random state":
                return nn.functional.dropout(hidden, 0.1, training=True)
        return hidden


@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
@pytest.mark.parametrize(
    "kind",
    [
        "state",
        "state of the module",
        "state of the class",
        "state in a buffer",
        "frozen weights",
        "padding",
        "batch statistics",
        "position in the batch",
        "length switch",
        "length switch for good",
        "random state",
    ],
)
def test_a_planted_violation_is_seen(zoo: Any, records: Make, name: str, kind: str) -> None:
    task = zoo[name].load()
    blocks = next(m for m in task.scorer.modules() if isinstance(m, nn.ModuleList))
    block = blocks[0]
    block.register_buffer("kept", torch.zeros(1))
    planted = _Planted(kind, block)
    data = records(zoo[name].labels or ANSWERS)
    before = task.get_flat()
    block.register_forward_hook(planted)
    try:
        with pytest.raises(ModelError) as caught:
            self_check(task, data)
    finally:
        if "switched" in vars(type(block)):
            del type(block).switched
    assert np.array_equal(task.get_flat(), before)
    assert any(
        said in caught.value.what
        for said in (
            "changed itself",
            "depends on the batch",
            "earlier batches",
            "how it is padded",
            "not that of a batch of one",
        )
    ), caught.value.what


def test_a_model_that_stays_as_it_is_is_found_unchanged(zoo: Any, records: Make) -> None:
    task = zoo["llama"].load()
    held = ModelState(task.scorer, task.trained)
    data = records(ANSWERS)
    task.gradient_sum(data, clip_norm=1.0)
    task.evaluate(data)
    step = task.stepper()
    step(task.gradient_sum(data, clip_norm=1.0)[0])
    held.require_unchanged()
    task.scorer.body.config.sliding_window = 3
    with pytest.raises(ModelError, match="changed itself"):
        held.require_unchanged()


def neighbours(task: TaskModel, data: list[Record], extra: Record) -> float:
    """How far one record moves a clipped sum at norm 1."""
    without, _ = task.gradient_sum(data, clip_norm=1.0)
    with_it, _ = task.gradient_sum([*data, extra], clip_norm=1.0)
    return float(np.linalg.norm(with_it.astype(np.float64) - without))


@pytest.mark.parametrize("name", ["bert", "minilm", "gpt2", "llama"])
def test_a_record_moves_a_sum_by_at_most_its_own_part(zoo: Any, records: Make, name: str) -> None:
    task, data = zoo[name].load(), records(zoo[name].labels or ANSWERS)
    answer = data[0].answer
    for extra in (Record("", answer), Record("now " * 50, answer), data[0]):
        own = float(np.linalg.norm(task.gradient_sum([extra], clip_norm=1.0)[0]))
        assert own <= 1 + 1e-6
        assert neighbours(task, data, extra) == pytest.approx(own, abs=1e-4)
