"""A job that costs next to nothing to train, so that what is measured is everything else: one
random layer, a few records.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

__all__ = ["make_base", "small_job"]

CUSTOMERS = ("north", "east", "south")
_ANSWERS = ("open", "close", "shed")
_WORDS = [
    "open",
    "close",
    "shed",
    "line",
    "bus",
    "breaker",
    "hot",
    "cold",
    "now",
    "the",
    "load",
    "is",
    "at",
    "five",
    "six",
    "seven",
]


def small_job(
    folder: Path, *, rounds: int, mode: str, customers: Sequence[str] = CUSTOMERS
) -> Path:
    """Write base model, records and job file into `folder`; returns the job file."""
    folder.mkdir(parents=True)
    make_base(folder / "base", _WORDS)
    draw = random.Random(3)  # noqa: S311
    for name in customers:
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["message", "action"])
            for _ in range(16):
                answer = draw.choice(_ANSWERS)
                writer.writerow([" ".join([answer, *draw.sample(_WORDS, 4)]), answer])
    tables = "".join(f'[[customers]]\nname = "{name}"\ndata = "{name}.csv"\n' for name in customers)
    path = folder / "job.toml"
    path.write_text(f"""
[job]
name = "small"
rounds = {rounds}
[provider]
name = "maker"
[aggregator]
name = "pool"
{tables}
[data]
prompt = "{{message}}"
answer = "action"
labels = ["open", "close", "shed"]
test_fraction = 0.25
[[models]]
name = "tiny"
source = "dir:base"
task = "classification"
[models.adapter]
rank = 2
targets = ["query", "value"]
[models.training]
batch_size = 8
max_length = 16
[protection]
mode = "{mode}"
minimum_cohort = 3
max_records = 40
""")
    return path


def make_base(folder: Path, words: Sequence[str], *, layers: int = 1) -> None:
    """Write an untrained BERT of 32 dimensions whose tokens are `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
