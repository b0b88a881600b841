"""A whole job whose update takes many frames, through every border as bytes.

Six million values here; with FEDARK_FULL in the environment 25 million, the most that a contract
admits (a minute for each mode).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small import write_job
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from fedark.contract.contract import MAX_TRAVELLING
from fedark.contract.job import Job
from fedark.links.link import Passed
from fedark.simulation import simulate

pytestmark = pytest.mark.slow
_FULL = "FEDARK_FULL" in os.environ
_HIDDEN, _LABELS = 1024, 24_350 if _FULL else 6_000


def _wide_job(folder: Path) -> Path:
    """One narrow layer and a head over as many labels as it takes."""
    path = write_job(folder, rounds=1, records=12, minimum=3)
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=_HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder / "base")
    labels = ["open", "close", "shed", *(f"l{number}" for number in range(_LABELS - 3))]
    (folder / "labels.json").write_text(json.dumps(labels))
    text = path.read_text().replace(
        'labels = ["open", "close", "shed"]', 'labels_file = "labels.json"'
    )
    path.write_text(
        text.replace("baseline_epochs = 1", "baseline_epochs = 0").replace(
            "batch_size = 8", "batch_size = 64"
        )
    )
    return path


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_an_adapter_of_many_frames_is_trained_and_delivered(
    tmp_path: Path, mode: str, measured_once: None
) -> None:
    sizes: dict[str, int] = {}

    def tap(passed: Passed) -> None:
        sizes[f"{passed.direction} {passed.stage}"] = len(passed.data)

    job = Job.load(
        _wide_job(tmp_path / "job"), (f'protection.mode="{mode}"', "protection.max_records=40")
    )
    with simulate(job, tmp_path / "work", tap=tap) as running:
        report = running.run()
        folder = running.federation.folder("north") / "runs" / running.run_id / "adapter-tiny"
    values = report["models"]["tiny"]["values"]
    assert (MAX_TRAVELLING - 100_000 if _FULL else 6_000_000) < values <= MAX_TRAVELLING
    assert report["customers"] == ["north", "east", "south"]
    assert sizes["request round"] > 4 * values
    # Sealed: float32, which is encrypted and so does not compress. Masked: packed, bits and the
    # room that a sum of three needs.
    assert (
        sizes["reply round"] > 4 * values
        if mode == "sealed"
        else 2 * values < sizes["reply round"] < 2.7 * values
    )
    delivered = [
        tensor
        for name in ("adapter_model.safetensors", "head.safetensors")
        for tensor in load_file(folder / name).values()
    ]
    assert sum(tensor.size for tensor in delivered) >= values
    assert all(np.isfinite(tensor).all() for tensor in delivered)
