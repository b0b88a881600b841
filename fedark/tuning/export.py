"""The finished adapter as a standard PEFT folder, written without torch and without the base model.

adapter_config.json, adapter_model.safetensors   for `peft.PeftModel.from_pretrained(base, folder)`
labels.json                                      for classification, in the order of the head's rows
head.safetensors                                 the head over a pooled encoder: PEFT has none
fedark.json                                      what it is: the contract's terms of this model,
                                                 with the digest of the base's weights, for
                                                 `fedark predict`
README.md                                        how it is used, with fedark and outside of it

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

__all__ = ["ADAPTER", "CONFIG", "FORM", "HEAD", "LABELS", "TERMS", "export_peft", "parts"]

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, LABELS, TERMS = "head.safetensors", "labels.json", "fedark.json"
FORM = "fedark/adapter/1"
"""Of `fedark.json`."""
_PREFIX = "base_model.model."


def export_peft(terms: ModelTerms, flat: Flat, out: Path) -> list[Path]:
    """Write the adapter that `flat` holds to the folder `out`, made if need be; files of the same
    names are replaced.

    Args:
        terms: the contract's, which give `flat` its meaning.
        flat: float32 [terms.travelling].
        out: the folder.

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
    files: dict[str, dict[str, npt.NDArray[np.float32]]] = {ADAPTER: {}, HEAD: {}}
    for name, value in named.items():
        file, key = parts(terms, name)
        files[file][key] = value
    adapter, head = files[ADAPTER], files[HEAD]
    lora = [
        name.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
        for name in adapter
        if name.endswith(".lora_B.weight")
    ]
    whole = {_module(name.removeprefix(_PREFIX)) for name in adapter if ".lora_" not in name}
    base, _, revision = terms.base.partition("@")
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
        # A name that is not the hub's would be looked up there, and be somebody else's model.
        "base_model_name_or_path": base or None,
        "revision": revision or None,
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
        contents |= {ADAPTER: _tensors(adapter), CONFIG: _json(config)}
    if terms.task == "classification":
        contents[LABELS] = _json(list(terms.labels))
    if head:
        contents[HEAD] = _tensors(head)
    contents[TERMS] = _json({"form": FORM, "terms": terms.model_dump(mode="json")})
    contents["README.md"] = _readme(terms, kind).encode()
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


def _module(tensor: str) -> str:
    """The module that training took whole: a head, however many parts it has, or a pooler inside
    the base (see `Base.head_modules`).
    """
    return tensor.rpartition(".")[0] if ".pooler." in tensor else tensor.partition(".")[0]


def parts(terms: ModelTerms, name: str) -> tuple[str, str]:
    """The file that holds a tensor of the layout, and its name there: fedark's own head, and
    everything where nothing but a head was trained, lies in `HEAD`.
    """
    if terms.adapter.method == "head" or name.startswith("head."):
        return HEAD, name.removeprefix("head.").removeprefix(_PREFIX)
    return ADAPTER, name


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


_CLASSIFIER = """\
import json, torch
FROM_PEFT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

labels = json.load(open(f"{folder}/labels.json", encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForSequenceClassification.from_pretrained(
    base, num_labels=len(labels), ignore_mismatched_sizes=True, dtype=torch.float32
)
if model.config.pad_token_id is None:
    model.config.pad_token_id = tokenizer.pad_token_id
ADAPTED
batch = tokenizer(
    texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_token_type_ids=False,
    return_tensors="pt",
)
with torch.no_grad():
    logits = model(**batch).logits
answers = [labels[i] for i in logits.argmax(-1)]
"""
_POOLED = """\
import json, torch
FROM_PEFT
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

labels = json.load(open(f"{folder}/labels.json", encoding="utf-8"))
head = load_file(f"{folder}/head.safetensors")
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
model = AutoModel.from_pretrained(base, dtype=torch.float32)
ADAPTED
batch = tokenizer(
    texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_token_type_ids=False,
    return_tensors="pt",
)
mask = batch["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
    vector = POOLED
    logits = torch.nn.functional.normalize(vector, dim=-1) @ head["weight"].T + head.get("bias", 0)
answers = [labels[i] for i in logits.argmax(-1)]
"""
_LANGUAGE = """\
import torch
FROM_PEFT
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ADAPTED
ends = (model.config.eos_token_id, tokenizer.eos_token_id)
end = next((one for one in ends if one is not None), None)

def answer(prompt, longest=64):
    \"\"\"The answer to a prompt that is filled in as in training, with no blank at its end.\"\"\"
    ids = tokenizer(prompt.rstrip())["input_ids"]
    ids = ids[:-1] if len(ids) > 1 and ids[-1] == end else ids  # the answer goes on from here
    mask = torch.ones(1, len(ids), dtype=torch.long)
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": mask}
    # Training put a blank before the answer and the end token after it, where generation stops.
    new = model.generate(
        **batch, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return tokenizer.decode(new[0, len(ids):], skip_special_tokens=True).strip()
"""
_CODE = {"SEQ_CLS": _CLASSIFIER, "FEATURE_EXTRACTION": _POOLED, "CAUSAL_LM": _LANGUAGE}
_HEAD_ALONE = """\
found = model.load_state_dict(load_file(f"{folder}/head.safetensors"), strict=False)
assert not found.unexpected_keys
model.eval()"""
_MEAN = "(hidden * mask).sum(1) / mask.sum(1)"


def _readme(terms: ModelTerms, kind: str) -> str:
    alone = terms.adapter.method == "head"
    adapted = "model = PeftModel.from_pretrained(model, folder).eval()"
    load = "from peft import PeftModel"
    if alone:
        pooled = kind == "FEATURE_EXTRACTION"
        adapted = "model.eval()" if pooled else _HEAD_ALONE
        load = "" if pooled else "from safetensors.torch import load_file"
    code = _CODE[kind]
    for name, text in (
        ("FROM_PEFT\n", f"{load}\n" if load else ""),
        ("ADAPTED", adapted),
        ("MAX_LENGTH", str(terms.training.max_length)),
        ("POOLED", "hidden[:, 0]" if terms.pooling == "cls" else _MEAN),
    ):
        code = code.replace(name, text)
    how = "the head alone" if alone else f"{terms.adapter.method}, rank {terms.adapter.rank}"
    given = "the prompts" if kind == "CAUSAL_LM" else "`texts`, a list of texts"
    if terms.base:
        where = f'`base = "{terms.base.partition("@")[0]}"`, from the Hugging Face hub'
        where += f" at revision {terms.base.partition('@')[2]}" * ("@" in terms.base)
        if kind == "CAUSAL_LM":
            where += "; `peft.AutoPeftModelForCausalLM.from_pretrained(folder)` finds it by itself"
    else:
        where = (
            "`base` the folder of the base model. It is not public: only its provider has it in the"
            " clear, and whoever is to use the adapter outside a federation needs it from there."
            " peft's AutoPeftModel classes cannot find it"
        )
    return (
        f"# Adapter for {terms.name}\n\n"
        f"Trained with fedark ({how}, {terms.task}). Where fedark is installed:"
        f"\n\n```console\n$ fedark predict FOLDER --base BASE IN.csv OUT.csv\n```\n\n"
        f"Without it, transformers and peft are needed. With {where};"
        f" `folder` this folder; and {given}:\n\n```python\n{code}```\n"
    )
