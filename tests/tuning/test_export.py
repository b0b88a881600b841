"""The exported folder, read by PEFT alone: fedark's own predictions come out, without fedark's
model code.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
)

from fedark.foundation.errors import ModelError, ProtocolError, StorageError
from fedark.tuning.export import export_peft
from fedark.tuning.layout import adapter_layout, unflatten

ALL = ["bert", "minilm", "gpt2", "llama"]


def some_vector(size: int) -> np.ndarray:
    return (np.random.default_rng(1).normal(size=size) * 0.3).astype(np.float32)


def outside(folder: Path, base: Path, texts: list[str]) -> torch.Tensor:
    """Logits as a user gets them: transformers and peft, nothing of fedark."""
    kind = json.loads((folder / "adapter_config.json").read_text())["task_type"]
    batch = AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        if kind == "CAUSAL_LM":
            return (
                PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
                .eval()(**batch)
                .logits
            )
        if kind == "SEQ_CLS":
            count = len(json.loads((folder / "labels.json").read_text()))
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=count)
            model.config.pad_token_id = 0
            return PeftModel.from_pretrained(model, folder).eval()(**batch).logits
        hidden = (
            PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
            .eval()(**batch)
            .last_hidden_state
        )
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        head = {
            name: torch.from_numpy(value)
            for name, value in load_file(folder / "head.safetensors").items()
        }
        return torch.nn.functional.normalize(mean, dim=-1) @ head["weight"].T + head["bias"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["ffa-lora", "lora"])
@pytest.mark.parametrize("name", ALL)
def test_peft_alone_reproduces_the_predictions(
    zoo: Any, texts: list[str], tmp_path: Path, name: str, method: str
) -> None:
    tiny = zoo[name]
    terms = tiny.terms(method=method, layers=(0, 2))
    vector = some_vector(terms.travelling)
    export_peft(terms, vector, tmp_path / "out")
    task = tiny.load(terms)
    ids, mask = task._padded(task._encoder.texts(texts))
    with torch.no_grad():
        fresh = task.scorer(ids, mask)
        task.set_flat(vector)
        ours = task.scorer(ids, mask)
    theirs = outside(tmp_path / "out", tiny.folder, texts)
    real = mask.unsqueeze(-1).bool() if ours.ndim == 3 else torch.ones_like(ours, dtype=torch.bool)
    assert torch.equal(ours.masked_select(real), theirs.masked_select(real))
    assert not torch.allclose(fresh, ours, atol=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["bert", "minilm", "minilm without bias", "gpt2", "llama"])
def test_a_head_alone_works_outside_as_its_readme_says(
    zoo: Any, texts: list[str], tmp_path: Path, name: str
) -> None:
    name, _, bias = name.partition(" without ")
    tiny = replace(
        zoo[name], task="classification", labels=zoo[name].labels or ("a", "b", "c", "d")
    )
    terms = tiny.terms(method="head", head_bias=not bias)
    assert any(spec.name.endswith("bias") for spec in terms.layout) is (
        not bias and name in ("bert", "minilm")
    )
    vector = some_vector(terms.travelling)
    files = export_peft(terms, vector, tmp_path / "out")
    assert {path.name for path in files} == {
        "fedark.json",
        "head.safetensors",
        "labels.json",
        "README.md",
    }
    task = tiny.load(terms)
    task.set_flat(vector)
    with torch.no_grad():
        ours = task.scorer(*task._padded(task._encoder.texts(texts)))
    code = re.search(r"```python\n(.*)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {
        "base": str(tiny.folder),
        "folder": str(tmp_path / "out"),
        "texts": texts,
    }
    exec(code[1], scope)
    theirs = scope.get("logits")
    if theirs is None:
        scope["model"].config.pad_token_id = 0
        batch = AutoTokenizer.from_pretrained(tiny.folder)(texts, padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.no_grad():
            theirs = scope["model"](**batch).logits
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "no-pooler"])
def test_decoders_and_encoders_without_a_pooler_classify_too(
    zoo: Any, texts: list[str], tmp_path: Path, name: str
) -> None:
    """Whatever a classifier has beyond the base's files is part of the adapter: nothing random is
    left outside it.
    """
    tiny = zoo["bert" if name == "no-pooler" else name]
    folder = tiny.folder
    if name == "no-pooler":
        import shutil

        from safetensors.torch import load_file as load_torch
        from safetensors.torch import save_file

        folder = Path(shutil.copytree(folder, tmp_path / "base"))
        state = load_torch(folder / "model.safetensors")
        save_file(
            {k: v for k, v in state.items() if "pooler" not in k},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    tiny = replace(tiny, folder=folder, task="classification", labels=("a", "b", "c", "d"))
    terms = tiny.terms()
    names = {spec.name for spec in terms.layout if ".lora_" not in spec.name}
    assert any("pooler" in n for n in names) == (name == "no-pooler")
    task = tiny.load(terms)
    vector = some_vector(terms.travelling)
    task.set_flat(vector)
    export_peft(terms, vector, tmp_path / "out")
    with torch.no_grad():
        ours = task.scorer(*task._padded(task._encoder.texts(texts)))
    assert torch.equal(ours, outside(tmp_path / "out", folder, texts))


@pytest.mark.parametrize("name", ALL)
def test_the_readme_shows_code_that_runs(zoo: Any, tmp_path: Path, name: str) -> None:
    tiny = zoo[name]
    terms = tiny.terms()
    export_peft(terms, some_vector(terms.travelling), tmp_path)
    code = re.search(r"```python\n(.*)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {
        "base": str(tiny.folder),
        "folder": str(tmp_path),
        "texts": ["open the line", "hold"],
    }
    exec(code[1], scope)
    assert isinstance(scope["model"], PeftModel)
    if name == "minilm":
        assert len(scope["answers"]) == 2
        assert set(scope["answers"]) <= set(terms.labels)


def test_the_files_hold_exactly_the_adapter(zoo: Any, tmp_path: Path) -> None:
    terms = zoo["minilm"].terms()
    vector = some_vector(terms.travelling)
    written = export_peft(terms, vector, tmp_path)
    assert sorted(written) == sorted(tmp_path.iterdir())
    named = unflatten(terms.layout, vector, terms.adapter.seed)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored |= {
        f"head.{name}": value for name, value in load_file(tmp_path / "head.safetensors").items()
    }
    assert stored.keys() == named.keys()
    assert all(np.array_equal(stored[name], named[name]) for name in named)
    assert json.loads((tmp_path / "labels.json").read_text()) == list(terms.labels)


def test_a_vector_of_another_contract_writes_nothing(zoo: Any, tmp_path: Path) -> None:
    terms = zoo["minilm"].terms()
    with pytest.raises(ProtocolError):
        export_peft(terms, some_vector(terms.travelling + 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_older_files_whole(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = zoo["minilm"].terms()
    export_peft(terms, some_vector(terms.travelling), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        export_peft(terms, terms and some_vector(terms.travelling) * 2, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_exporting_needs_neither_torch_nor_the_base() -> None:
    import subprocess
    import sys

    modules = "fedark.tuning.export, fedark.tuning.server_optimizer, fedark.records.reading"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_gpt2_classifiers_keep_their_layout_without_a_language_head(tmp_path: Path) -> None:
    """A decoder saved without its language head is a base too."""
    from tokenizers import Tokenizer, models

    GPT2Model(
        GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=16)
    ).save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    from fedark.contract.contract import AdapterTerms

    layout = adapter_layout(
        tmp_path, "classification", ("x", "y"), AdapterTerms(targets=("c_attn",))
    )
    assert [spec.name for spec in layout][-1] == "base_model.model.score.weight"


def test_a_model_that_brings_its_own_head_keeps_its_bias(zoo: Any) -> None:
    with pytest.raises(ModelError, match="head of its own"):
        zoo["bert"].terms(method="head", head_bias=False)
