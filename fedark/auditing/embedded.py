"""A task that is audited in seconds: a small encoder with random weights and a head of twenty
classes, on made-up sentences.

A sentence's answer is told by the word that stands in it three times. What is audited is the path
from a record to a released sum, which is the same for any model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from fedark.contract.contract import (
    AdapterTerms,
    ModelTerms,
    PrivacyTerms,
    ServerTerms,
    TrainingTerms,
)
from fedark.records.reading import Record
from fedark.tuning.layout import adapter_layout
from fedark.tuning.sources import model_files
from fedark.tuning.task import TaskModel

__all__ = ["LABELS", "PRIVACY", "ROUNDS", "small_records", "small_task"]

LABELS = tuple(f"answer {number}" for number in range(20))
WORDS = tuple(f"w{number}" for number in range(300))
_KEYS = 60
PRIVACY = PrivacyTerms(
    mechanism="example-distributed", epsilon=3.0, delta=1e-5, clip_norm=1.0, sampling_rate=0.1
)
ROUNDS = 60
_WIDTH = 128
_MAX_LENGTH = 32


def small_task(
    adapter: AdapterTerms | None = None,
    *,
    words: Sequence[str] = WORDS,
    labels: Sequence[str] = LABELS,
) -> TaskModel:
    """The model, with a lone head without bias unless another adapter is given.

    Args:
        words: the vocabulary; a text is split at blanks.
        labels: the answers.
    """
    adapter = adapter or AdapterTerms(method="head", head_bias=False)
    torch.manual_seed(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fedark-audit-") as name:
        folder = Path(name)
        config = BertConfig(
            vocab_size=len(words) + 2,
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_MAX_LENGTH,
        )
        BertModel(config).save_pretrained(folder)
        vocabulary = {"[PAD]": 0, "[UNK]": 1} | {
            word: number + 2 for number, word in enumerate(words)
        }
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token of a vocabulary
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}', encoding="utf-8"
        )
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(
            '{"pooling_mode_mean_tokens": true}', encoding="utf-8"
        )
        terms = ModelTerms(
            name="small",
            task="classification",
            bundle="0" * 96,
            weights="0" * 96,
            prompt="{text}",
            labels=tuple(labels),
            adapter=adapter,
            training=TrainingTerms(batch_size=64, max_length=_MAX_LENGTH),
            server=ServerTerms(),
            layout=adapter_layout(folder, "classification", labels, adapter),
        )
        return TaskModel.load(
            {key: bytearray(path.read_bytes()) for key, path in model_files(folder).items()}, terms
        )


def small_records(count: int, seed: int) -> list[Record]:
    """Different sentences of eight words, and their answers."""
    generator = np.random.default_rng(seed)
    found: dict[str, Record] = {}
    while len(found) < count:
        key = int(generator.integers(_KEYS))
        words = generator.permutation([key] * 3 + generator.integers(_KEYS, len(WORDS), 5).tolist())
        prompt = " ".join(WORDS[word] for word in words)
        found[prompt] = Record(prompt, LABELS[key % len(LABELS)])
    return list(found.values())
