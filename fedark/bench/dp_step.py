"""`fedark bench dp-step`: a private training step against the plain LoRA step, in time and peak
memory, beside Opacus' hooks.

Models of three families with random weights, LoRA r=8 on the queries and values of every layer (A
and B trained), two batches. Plain is one step of `TaskModel.train`; ours is per-example gradients,
clipped, summed, noise added, and a step of the same AdamW (`TaskModel.gradient_sum`, `stepper`).
Opacus is the same scorer under `GradSampleModule`, its gradients clipped and summed flat, with the
same noise and optimiser. The three take turns, and a ratio is the median of the ratios within a
turn, so that what slows the machine for a while slows all three. The clock is the processor time of
the process: other work on the machine does not count.

Peak memory is what torch's allocator holds at most during a step, above what it held before, from
the profiler's record of every allocation; it does not depend on the machine's load.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from opacus.grad_sample import GradSampleModule
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

from fedark.bench import Row
from fedark.contract.contract import AdapterTerms, ModelTerms, ServerTerms, TrainingTerms
from fedark.records.reading import Record
from fedark.tuning.layout import adapter_layout
from fedark.tuning.per_example import clip_factors
from fedark.tuning.sources import model_files
from fedark.tuning.task import TaskModel

__all__ = ["rows"]

_TURNS = 9
_BATCHES = ((32, 32), (64, 64))  # records, tokens
_MAX_TIME = _MAX_MEMORY = 1.05
_CLIP_NORM, _SIGMA = 1.0, 0.5
_WORDS = 1000
_LABELS = tuple(f"label {number}" for number in range(77))
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES = {
    "vocab_size": _WORDS,
    "max_position_embeddings": 128,
    "num_hidden_layers": 4,
    "hidden_size": 256,
}
_FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "BERT": (
        lambda: BertModel(BertConfig(**_SIZES, num_attention_heads=8, intermediate_size=1024)),
        ("query", "value"),
    ),
    "GPT-2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=_WORDS, n_positions=128, n_layer=4, n_embd=256, n_head=8, **_IDS)
        ),
        ("c_attn",),
    ),
    "Llama": (
        lambda: LlamaForCausalLM(
            LlamaConfig(
                **_SIZES,
                num_attention_heads=8,
                num_key_value_heads=4,
                intermediate_size=688,
                **_IDS,
            )
        ),
        ("q_proj", "v_proj"),
    ),
}

Step = Callable[[], object]


@dataclass(frozen=True)
class _Case:
    """The three steps of one model on one batch, and the two copies of the model that they move:
    Opacus changes its own.
    """

    task: TaskModel
    watched: TaskModel
    ours: Step
    plain: Step
    opacus: Step


def rows() -> Iterator[Row]:
    """For every family and batch: time and memory of ours against plain, and of Opacus' hooks
    against plain.
    """
    for family in _FAMILIES:
        for records, tokens in _BATCHES:
            case = _case(family, records, tokens)
            text = f"{family} {records} x {tokens}"
            turns = _turns(case)
            yield from _rows(text, "time", "s", turns, _MAX_TIME)
            peaks = tuple(_peak(step) / 2**20 for step in (case.ours, case.plain, case.opacus))
            yield from _rows(text, "peak memory", "MiB", [peaks], _MAX_MEMORY)


def _rows(
    text: str, what: str, unit: str, turns: Sequence[tuple[float, ...]], bound: float
) -> Iterator[Row]:
    ours, plain, opacus = (statistics.median(turn[side] for turn in turns) for side in range(3))
    ratios = [statistics.median(turn[side] / turn[1] for turn in turns) for side in (0, 2)]
    yield Row(f"{text}: {what}", ours, plain, unit, ratios[0], f"<= {bound}", ratios[0] <= bound)
    yield Row(f"{text}: {what}, Opacus hooks", opacus, plain, unit, ratios[1])


def _turns(case: _Case) -> list[tuple[float, ...]]:
    turns = []
    for turn in range(1 + _TURNS):
        # Every other turn runs backwards: none of the three always follows the same one.
        steps = (case.ours, case.plain, case.opacus)
        seconds = {}
        for step in steps if turn % 2 else reversed(steps):
            begun = time.process_time()
            step()
            seconds[step] = time.process_time() - begun
        turns.append(tuple(seconds[step] for step in steps))
    return turns[1:]


def _peak(step: Step) -> int:
    """Bytes at most in use during `step`, above those before it."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, nothing reaches the error stream: the profiler writes a line to it whenever it
    starts and stops.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _case(family: str, records: int, tokens: int) -> _Case:
    build, targets = _FAMILIES[family]
    task, watched = _load(build, targets, records, tokens), _load(build, targets, records, tokens)
    batch = _records(task, records, tokens)
    generator = np.random.default_rng(0)

    def noise(size: int) -> npt.NDArray[np.float64]:
        return generator.standard_normal(size) * _SIGMA * _CLIP_NORM

    def ours() -> None:
        step = task.stepper()
        summed, _ = task.gradient_sum(batch, clip_norm=_CLIP_NORM)
        step(((summed + noise(summed.size)) / records).astype(np.float32))

    def plain() -> None:
        task.train(batch, epochs=1, seed=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched.scorer = GradSampleModule(watched.scorer, batch_first=True, loss_reduction="sum")

    def opacus() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch remarks on backward hooks of modules that take integers
            step = watched.stepper()
            watched.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
        samples: list[Any] = [parameter.grad_sample.flatten(1) for parameter in watched.trained]  # type: ignore[attr-defined]
        norms = torch.stack([sample.norm(dim=1) for sample in samples], 1).norm(dim=1)
        factors = clip_factors(norms, _CLIP_NORM).float()
        flat = torch.cat([factors @ sample for sample in samples]).numpy()
        step(((flat + noise(flat.size)) / records).astype(np.float32))
        for parameter in watched.trained:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    return _Case(task, watched, ours, plain, opacus)


def _records(task: TaskModel, count: int, tokens: int) -> list[Record]:
    """Records of exactly so many tokens; those of an instruction are its last two."""
    generator = np.random.default_rng(1)
    causal = task.terms.task == "instruction"
    prompts = [
        " ".join(f"w{n}" for n in generator.integers(3, _WORDS, tokens - 2 * causal))
        for _ in range(count)
    ]
    answers = ["w9" if causal else _LABELS[index % len(_LABELS)] for index in range(count)]
    return [Record(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def _load(
    build: Callable[[], Any], targets: tuple[str, ...], records: int, tokens: int
) -> TaskModel:
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as name:
        folder = Path(name)
        model = build()
        model.save_pretrained(folder)
        encoder = model.config.model_type == "bert"
        vocabulary = {
            ("w" if index > 2 else "special") + str(index): index for index in range(_WORDS)
        }
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="special0"))  # noqa: S106 - a token of a vocabulary
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8"
        )
        if encoder:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling/config.json").write_text(
                '{"pooling_mode_mean_tokens": true}', encoding="utf-8"
            )
        adapter = AdapterTerms(method="lora", targets=targets)
        labels = _LABELS if encoder else ()
        terms = ModelTerms(
            name="bench",
            task="classification" if encoder else "instruction",
            bundle="0" * 96,
            weights="0" * 96,
            prompt="{text}",
            labels=labels,
            adapter=adapter,
            training=TrainingTerms(batch_size=records, max_length=tokens),
            server=ServerTerms(),
            layout=adapter_layout(
                folder, "classification" if encoder else "instruction", labels, adapter
            ),
        )
        return TaskModel.load(
            {key: bytearray(path.read_bytes()) for key, path in model_files(folder).items()}, terms
        )
