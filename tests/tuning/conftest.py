"""Tiny random base models of every family, built once a session, and a tokenizer of a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fedark.contract.contract import AdapterTerms, ModelTerms, ServerTerms, TrainingTerms
from fedark.records.reading import Record
from fedark.tuning.layout import adapter_layout
from fedark.tuning.sources import model_files
from fedark.tuning.task import TaskModel

_TEXT = (
    "open close line bus breaker north south hot cold shed restore hold now the a of load is at"
    " five six seven"
)
WORDS = _TEXT.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LABELS = ("open_line", "close_breaker", "shed_load")
ANSWERS = ("open line", "close the breaker", "shed load now", "hold")


@dataclass(frozen=True)
class Tiny:
    """One tiny base: its folder, and how an adapter sits on it."""

    folder: Path
    task: str
    targets: tuple[str, ...]
    labels: tuple[str, ...] = ()
    pooling: str = "auto"

    def terms(
        self,
        *,
        method: str = "ffa-lora",
        layers: tuple[int, ...] = (),
        labels: tuple[str, ...] | None = None,
        seed: int = 5,
        head_bias: bool = True,
        training: dict[str, object] | None = None,
    ) -> ModelTerms:
        targets = () if method == "head" else self.targets
        adapter = AdapterTerms(
            method=method,
            rank=3,
            alpha=6.0,
            targets=targets,
            layers=layers,
            seed=seed,
            head_bias=head_bias,
        )
        labels = self.labels if labels is None else labels
        return ModelTerms(
            name="tiny",
            task=self.task,
            bundle="0" * 96,
            weights="0" * 96,
            prompt="{text}",
            labels=labels,
            adapter=adapter,
            training=TrainingTerms(
                **{
                    "learning_rate": 2e-2,
                    "head_learning_rate": 2e-2,
                    "batch_size": 4,
                    "max_length": 24,
                    **(training or {}),
                }
            ),
            server=ServerTerms(),
            pooling=self.pooling,
            layout=adapter_layout(self.folder, self.task, labels, adapter, self.pooling),
        )

    def files(self) -> dict[str, bytearray]:
        return {
            name: bytearray(path.read_bytes()) for name, path in model_files(self.folder).items()
        }

    def load(self, terms: ModelTerms | None = None) -> TaskModel:
        return TaskModel.load(self.files(), terms or self.terms())


@dataclass
class Zoo:
    """Tiny bases by name."""

    root: Path
    made: dict[str, Tiny] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tiny:
        if name not in self.made:
            self.made[name] = _BUILDERS[name](self.root / name)
        return self.made[name]


def _bert(folder: Path) -> Tiny:
    config = BertConfig(**_SIZES, intermediate_size=32, max_position_embeddings=64)
    _save(folder, BertModel(config, add_pooling_layer=True), encoder=True)
    return Tiny(folder, "classification", ("query", "value"), LABELS, "none")


def _minilm(folder: Path) -> Tiny:
    tiny = replace(_bert(folder), pooling="auto")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return tiny


def _gpt2(folder: Path) -> Tiny:
    config = GPT2Config(
        vocab_size=len(WORDS) + 4, n_embd=16, n_layer=3, n_head=2, n_positions=64, **_IDS
    )
    _save(folder, GPT2LMHeadModel(config), encoder=False)
    return Tiny(folder, "instruction", ("c_attn",))


def _llama(folder: Path) -> Tiny:
    config = LlamaConfig(
        **_SIZES, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=64, **_IDS
    )
    _save(folder, LlamaForCausalLM(config), encoder=False)
    return Tiny(folder, "instruction", ("q_proj", "v_proj"))


_SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_IDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
_BUILDERS: dict[str, Callable[[Path], Tiny]] = {
    "bert": _bert,
    "minilm": _minilm,
    "gpt2": _gpt2,
    "llama": _llama,
}


def _save(folder: Path, model: PreTrainedModel, *, encoder: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than usual, so that an error anywhere moves the logits visibly; norms stay near
            # one.
            spread = 0.1 if parameter.ndim == 1 else 0.4
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and "bias" not in name else 0.0))
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "[CLS] $A [SEP]" if encoder else "[CLS] $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(7)  # what a file may bring along must not matter
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "pad_token": "[PAD]",
        "eos_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    torch.set_num_threads(1)
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def texts() -> list[str]:
    """Prompts of many lengths, fixed."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (24,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator).tolist())
        for n in lengths
    ]


@pytest.fixture
def records(texts: list[str]) -> Callable[[tuple[str, ...]], list[Record]]:
    """Records whose answer follows from the prompt's first word."""
    return lambda answers: [
        Record(text, answers[WORDS.index(text.split()[0]) % len(answers)]) for text in texts
    ]
