"""The finished adapter as a standard PEFT folder, written without torch and without the base model.

adapter_config.json, adapter_model.safetensors   what `peft.PeftModel.from_pretrained(base, folder)` reads
labels.json                                      the labels in the order of the head's rows, for classification
head.safetensors                                 a mean-pooling classifier's head, which PEFT has no place for
README.md                                        the few lines of code that use it outside fedark

Where the head is all that was trained (method "head") there is nothing for PEFT: head.safetensors
alone holds it, for a sequence classifier under the names of `transformers`' own state dict.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fedark.contract.contract import ModelTerms
from fedark.foundation.errors import StorageError
from fedark.tuning.layout import Flat, unflatten

__all__ = ["export_peft"]

_PREFIX = "base_model.model."


def export_peft(terms: ModelTerms, flat: Flat, out: Path, base_name: str) -> list[Path]:
    """Write the adapter that `flat` holds to the folder `out`, made if need be; files of the same
    names are replaced.

    Args:
        terms: the contract's, which give `flat` its meaning.
        flat: float32 [terms.travelling].
        out: the folder.
        base_name: what the base is called, for `base_model_name_or_path` and the README.

    Returns:
        The files written.

    Raises:
        ProtocolError: `flat` is not a vector of this contract.
        StorageError: the folder cannot be written; each file is either the old one or the new one,
            whole.
    """
    named = unflatten(terms.layout, flat, terms.adapter.seed)
    pooled = terms.task == "classification" and "head.weight" in named
    alone = terms.adapter.method == "head"
    head = {
        name.removeprefix("head.").removeprefix(_PREFIX): value
        for name, value in named.items()
        if _in_head(name, alone)
    }
    adapter = {name: value for name, value in named.items() if not _in_head(name, alone)}
    lora = [
        name.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
        for name in adapter
        if name.endswith(".lora_B.weight")
    ]
    whole = {
        name.removeprefix(_PREFIX).rpartition(".")[0] for name in adapter if ".lora_" not in name
    }
    kind = (
        "CAUSAL_LM"
        if terms.task == "instruction"
        else "FEATURE_EXTRACTION"
        if pooled
        else "SEQ_CLS"
    )
    config = {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": base_name,
        "r": terms.adapter.rank,
        "lora_alpha": terms.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": lora,
        "modules_to_save": sorted(whole) or None,
    }
    contents: dict[str, bytes] = {}
    if not alone:
        contents |= {
            "adapter_model.safetensors": _tensors(adapter),
            "adapter_config.json": _json(config),
        }
    if terms.task == "classification":
        contents["labels.json"] = _json(list(terms.labels))
    if head:
        contents["head.safetensors"] = _tensors(head)
    contents["README.md"] = _readme(terms, kind, base_name).encode()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            _write(out / name, content)
    except OSError as error:
        raise StorageError(
            f"The adapter could not be written to {out} ({error.strerror}).",
            safe="The run's result is kept by the federation; files that stood there are whole.",
            fix="Free some space or name another folder, and export again.",
        ) from None
    return [out / name for name in contents]


def _in_head(name: str, alone: bool) -> bool:
    """Whether a tensor goes to head.safetensors: fedark's own head, and everything where nothing
    but a head was trained.
    """
    return alone or name.startswith("head.")


def _write(path: Path, content: bytes) -> None:
    """Replace `path` by `content` at once: a full disk leaves what stood there."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _tensors(named: dict[str, npt.NDArray[np.float32]]) -> bytes:
    data: bytes = save(
        {name: np.ascontiguousarray(value) for name, value in named.items()},
        metadata={"format": "pt"},
    )
    return data


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


_USE = {
    "CAUSAL_LM": (
        """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
"""
    ),
    "SEQ_CLS": (
        """\
import json
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

labels = json.load(open(f"{folder}/labels.json", encoding="utf-8"))
classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
# A decoder needs classifier.config.pad_token_id to be set before it takes batches.
model = PeftModel.from_pretrained(classifier, folder).eval()
"""
    ),
    "FEATURE_EXTRACTION": (
        """\
import json, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

labels, head = json.load(open(f"{folder}/labels.json", encoding="utf-8")), load_file(f"{folder}/head.safetensors")
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
batch = AutoTokenizer.from_pretrained(base)(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
mask = batch["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    logits = torch.nn.functional.normalize(mean, dim=-1) @ head["weight"].T + head.get("bias", 0)
answers = [labels[i] for i in logits.argmax(-1)]
"""
    ),
}
_ALONE = {
    "SEQ_CLS": (
        """\
import json
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

labels = json.load(open(f"{folder}/labels.json", encoding="utf-8"))
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), ignore_mismatched_sizes=True).eval()
# A decoder needs model.config.pad_token_id to be set before it takes batches.
assert not model.load_state_dict(load_file(f"{folder}/head.safetensors"), strict=False).unexpected_keys
"""
    ),
    "FEATURE_EXTRACTION": (
        _USE["FEATURE_EXTRACTION"]
        .replace("from peft import PeftModel\n", "")
        .replace(
            "PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)",
            "AutoModel.from_pretrained(base)",
        )
    ),
}


def _readme(terms: ModelTerms, kind: str, base_name: str) -> str:
    alone = terms.adapter.method == "head"
    code = (_ALONE if alone else _USE)[kind].replace("MAX_LENGTH", str(terms.training.max_length))
    how = "the head alone" if alone else f"{terms.adapter.method}, rank {terms.adapter.rank}"
    return (
        f"# Adapter for {base_name}\n\n"
        f"Trained with fedark ({how}, {terms.task}). With `base` the base model's "
        f"folder or name and `folder` this folder:\n\n```python\n{code}```\n"
    )
