"""Base and adapter as one folder that `transformers` loads by itself, without peft or fedark.

A language model, and a sequence classifier with its head, are written whole. A pooled encoder is
written as an encoder: its classification head reads a text's pooled unit vector, for which
`transformers` has no class, so it lies beside it (head.safetensors), with the pooling that
sentence-transformers reads and a README with the few lines that answer. Weights are float32, as the
adapter was trained. The folder holds the base in clear.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file

from fedark.foundation.errors import ModelError
from fedark.foundation.files import disk_errors, new_directory
from fedark.serving.model import read_base
from fedark.tuning.adapter import Adapter
from fedark.tuning.base import POOLING
from fedark.tuning.export import HEAD, LABELS
from fedark.tuning.task import TaskModel

__all__ = ["merge"]

_OWN = ("config.json", "generation_config.json", POOLING, "modules.json")
_README = """\
# {name}, merged with its adapter

Written by `fedark merge`, in float32. {what}
It holds the base model's weights in clear: the base's licence applies to it.

```python
{code}```
"""
_SEQUENCE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
batch = tokenizer(
    texts, padding=True, truncation=True, max_length={length}, return_token_type_ids=False,
    return_tensors="pt",
)
logits = model(**batch).logits
answers = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
"""
_POOLED = """\
import json, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

labels = json.load(open(f"{{folder}}/labels.json", encoding="utf-8"))
head = load_file(f"{{folder}}/head.safetensors")
model = AutoModel.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
batch = tokenizer(
    texts, padding=True, truncation=True, max_length={length}, return_token_type_ids=False,
    return_tensors="pt",
)
mask = batch["attention_mask"].unsqueeze(-1)
hidden = model(**batch).last_hidden_state
vector = {vector}
logits = torch.nn.functional.normalize(vector, dim=-1) @ head["weight"].T + head.get("bias", 0)
answers = [labels[i] for i in logits.argmax(-1).tolist()]
"""
_LANGUAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
"""


def merge(adapter: Adapter, base: str, out: Path) -> str:
    """Write the new folder `out`; returns what it holds and how it is loaded, in a sentence.

    Args:
        base: as in `fedark.serving.model.load`.

    Raises:
        ModelError: as `load`.
        InputError: `out` exists.
        StorageError: it cannot be written; nothing is left of it.
    """
    terms = adapter.terms
    source, files = read_base(terms, base)
    task = TaskModel.load(files, terms)
    task.set_flat(adapter.flat)
    body: Any = task.scorer.body
    model = body.merge_and_unload() if isinstance(body, PeftModel) else body
    head = task.scorer.head
    if terms.task == "classification" and head is None:
        model.config.id2label = dict(enumerate(terms.labels))
        model.config.label2id = {label: index for index, label in enumerate(terms.labels)}
    with new_directory(out) as folder, disk_errors(out):
        try:
            model.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the library, at what a base's own configuration says
            raise ModelError(
                f"transformers cannot write this model ({type(error).__name__}).",
                safe="Nothing was left.",
                fix="Use the adapter with fedark predict, or with peft as its README says.",
            ) from None
        for name in files:
            if not name.endswith((".safetensors", ".index.json")) and name not in _OWN:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        if terms.task == "classification":
            (folder / LABELS).write_text(
                json.dumps(list(terms.labels), indent=2, ensure_ascii=False), encoding="utf-8"
            )
        vector = (
            "hidden[:, 0]" if terms.pooling == "cls" else "(hidden * mask).sum(1) / mask.sum(1)"
        )
        if head is not None:
            tensors = {name: value.detach().contiguous() for name, value in head.named_parameters()}
            save_file(tensors, folder / HEAD, {"format": "pt"})
            _write_pooling(folder, model.config.hidden_size, cls=terms.pooling == "cls")
        what, code = _described(task)
        text = code.format(length=terms.training.max_length, vector=vector)
        (folder / "README.md").write_text(
            _README.format(name=terms.name, what=what, code=text), encoding="utf-8"
        )
    return what


def _described(task: TaskModel) -> tuple[str, str]:
    if task.terms.task == "instruction":
        return "AutoModelForCausalLM.from_pretrained loads it.", _LANGUAGE
    if task.scorer.head is None:
        loads = "AutoModelForSequenceClassification.from_pretrained loads it, its head included."
        return loads, _SEQUENCE
    return (
        "AutoModel.from_pretrained loads the encoder; transformers has no place for a head over"
        f" pooled vectors, so it lies in {HEAD}, and README.md has the lines that use it.",
        _POOLED,
    )


def _write_pooling(folder: Path, width: int, *, cls: bool) -> None:
    """What sentence-transformers reads of how token vectors become one."""
    modes = {"pooling_mode_cls_token": cls, "pooling_mode_mean_tokens": not cls}
    path = folder / POOLING
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"word_embedding_dimension": width, **modes}, indent=2))
