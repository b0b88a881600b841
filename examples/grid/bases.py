"""The base models of the grid example, made by its provider: both know the standard desk, and no
region.

- `encoder`: the pretrained sentence encoder (all-MiniLM-L6-v2), whose upper layers the provider
  tuned on its standard desk.
- `language_model`: a causal LM of about 650,000 parameters (Llama architecture, byte-level BPE),
  trained from nothing on two kinds of text: standard-desk messages with their actions, and made-up
  notes with what they report. The notes, full of words that mean nothing here, teach it to read a
  report off its wording alone, so that it can learn a region's words later.

Both are written as ordinary model folders. Nothing here knows fedark; the same seed gives the same
model on the same machine.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from story import BARE, CLOSED, REPORT, STANDARD, Order, World, messages, split_orders
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["PROMPT", "encoder", "language_model"]

PROMPT = "{desk} desk: {message}."
CLOSED_MATTERS, BARE_SHARE = (0, 1, 1), 0.7
"""How many older matters a message tells of, and how often without the word that it is closed: for
all of the example.
"""

Report = Callable[[str], None]
Pair = tuple[str, str]

_ENCODER_STEPS, _ENCODER_BATCH, _ENCODER_RATE, _ENCODER_LAYERS, _SCALE = 75, 32, 5e-4, 4, 20.0
_LM_STEPS, _LM_BATCH, _LM_HIDDEN, _LM_LAYERS, _LM_NOTES = 360, 64, 128, 3, 0.5
_LM_MATRIX_RATE, _LM_RATE, _PROMPT_WEIGHT = 0.02, 3e-3, 0.05


def encoder(source: Path, out: Path, world: World, seed: int, report: Report) -> None:
    """Tune the upper layers of the sentence encoder in `source` on the standard desk, and write it
    to `out`.

    Each message is drawn to the name of its action: the loss is cross-entropy over cosine
    similarities (mean pooling), which is also how fedark starts a classifier's head.
    """
    torch.manual_seed(seed)
    # A folder of this machine; nothing is fetched.
    model = AutoModel.from_pretrained(source, local_files_only=True)  # nosec B615
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)  # nosec B615
    model.eval()
    top = range(model.config.num_hidden_layers - _ENCODER_LAYERS, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(f"layer.{index}." in name for index in top)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=_ENCODER_RATE, weight_decay=0.01
    )

    def embed(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        pooled = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return functional.normalize(pooled, dim=-1)

    rows = _standard(world, _ENCODER_STEPS * _ENCODER_BATCH, seed)
    for step in range(_ENCODER_STEPS):
        batch = rows[step * _ENCODER_BATCH : (step + 1) * _ENCODER_BATCH]
        for group in optimizer.param_groups:
            group["lr"] = (
                _ENCODER_RATE * min(1.0, (step + 1) / 15) * max(0.02, 1 - step / _ENCODER_STEPS)
            )
        scores = _SCALE * embed([prompt for prompt, _ in batch]) @ embed(world.actions).T
        loss = functional.cross_entropy(
            scores, torch.tensor([world.actions.index(answer) for _, answer in batch])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 30 == 0:
            report(f"encoder: step {step + 1} of {_ENCODER_STEPS}, loss {loss.item():.3f}")
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(".*", "*.py", "__pycache__"))
    model.save_pretrained(out)


def language_model(out: Path, world: World, seed: int, report: Report) -> None:
    """Train the causal LM and its tokenizer, and write both to `out`."""
    torch.manual_seed(seed)
    notes = int(_LM_STEPS * _LM_BATCH * _LM_NOTES)
    pairs = _standard(world, _LM_STEPS * _LM_BATCH - notes, seed) + _notes(world, notes, seed)
    random.Random(f"{seed}/mix").shuffle(pairs)
    tokenizer = _tokenizer(pairs)
    end = tokenizer.token_to_id("</s>")
    encoded = [
        (tokenizer.encode(prompt).ids, [*tokenizer.encode(f" {answer}").ids, end])
        for prompt, answer in pairs
    ]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=_LM_HIDDEN,
            intermediate_size=2 * _LM_HIDDEN,
            num_hidden_layers=_LM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.token_to_id("<pad>"),
            bos_token_id=None,
            eos_token_id=end,
        )
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers: tuple[Any, ...] = (
        _Muon(matrices, {"lr": _LM_MATRIX_RATE, "momentum": 0.95, "weight_decay": 0.01}),
        torch.optim.AdamW(others, lr=_LM_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
    )
    rates, began = (_LM_MATRIX_RATE, _LM_RATE), time.monotonic()
    for step, batch in enumerate(_batches(encoded, seed)):
        factor = min(1.0, (step + 1) / 40) * max(
            0.02, min(1.0, (_LM_STEPS - step) / (0.6 * _LM_STEPS))
        )
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        loss = _loss(model, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 20 == 0:
            left = (time.monotonic() - began) / (step + 1) * (_LM_STEPS - step - 1)
            report(
                f"language model: step {step + 1} of {_LM_STEPS}, loss {loss.item():.3f},"
                f" {left:.0f} s left"
            )
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "model_max_length": 128,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


class _Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, with Nesterov momentum) in single precision.

    `torch.optim.Muon` multiplies in bfloat16: on processors without instructions for it that took
    eight ninths of the training.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(
                    update, alpha=-group["lr"] * max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
                )


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix whose singular values are all equal: five Newton-Schulz steps with
    Muon's coefficients.
    """
    tall = matrix.size(0) > matrix.size(1)
    result = matrix.T if tall else matrix
    result = result / result.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = result @ result.T
        result = torch.addmm(
            result, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), result, beta=3.4445
        )
    return result.T if tall else result


def _standard(world: World, count: int, seed: int) -> list[Pair]:
    orders, _ = split_orders(seed)
    rng = random.Random(f"{seed}/standard")
    rows = messages(world, STANDARD, count, orders, rng, CLOSED_MATTERS, BARE_SHARE)
    return [(PROMPT.format(desk=row.desk, message=row.message), row.action) for row in rows]


def _notes(world: World, count: int, seed: int) -> list[Pair]:
    """Notes of things and manners in the same wordings; the answer is the reported thing and its
    manner.
    """
    things, manners = _vocabulary(world)
    orders, _ = split_orders(seed)
    rng = random.Random(f"{seed}/notes")
    return [_note(rng, rng.choice(orders), things, manners, world) for _ in range(count)]


def _note(
    rng: random.Random, order: Order, things: Sequence[str], manners: Sequence[str], world: World
) -> Pair:
    chosen, how = rng.sample(things, 2), rng.sample(manners, 2)

    def matter(frames: Any, first: str, index: int) -> str:
        said = how[index] + (
            f" at {rng.choice(world.readings)} percent" if rng.random() < 0.25 else ""
        )
        return str(rng.choice(frames[first]).format(thing=chosen[index], state=said))

    reported = matter(REPORT, order.report, 0)
    older = (
        [matter(BARE if rng.random() < BARE_SHARE else CLOSED, order.closed, 1)]
        if rng.random() < 0.7
        else []
    )
    clauses = [reported, *older] if order.report_first else [*older, reported]
    clauses.insert(
        {"start": 0, "middle": 1, "end": len(clauses)}[order.site],
        rng.choice(world.desks[STANDARD].sites),
    )
    return f"note: {', '.join(clauses)}.", f"{chosen[0]} {how[0]}"


def _vocabulary(world: World) -> tuple[list[str], list[str]]:
    """Words for notes: everyday ones and the regions' own, so that the tokenizer has them; what
    they mean is not told.
    """
    from story import EQUIPMENT

    words = tomllib.loads((Path(__file__).parent / "notes.toml").read_text(encoding="utf-8"))
    things, manners = set(words["things"].split()), set(words["manners"].split())
    for region in world.regions:
        for key, words in world.desks[region].words.items():
            (things if key in EQUIPMENT else manners).add(words[0][0])
    return sorted(things), sorted(manners)


def _tokenizer(pairs: Sequence[Pair]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=5,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [f"{prompt} {answer}" for prompt, answer in pairs[:20_000]], trainer
    )
    return tokenizer


def _batches(
    encoded: list[tuple[list[int], list[int]]], seed: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Batches of about equal lengths, in random order."""
    rng = random.Random(f"{seed}/batches")
    for start in range(0, len(encoded), 20 * _LM_BATCH):
        part = sorted(
            encoded[start : start + 20 * _LM_BATCH], key=lambda item: len(item[0]) + len(item[1])
        )
        batches = [part[index : index + _LM_BATCH] for index in range(0, len(part), _LM_BATCH)]
        rng.shuffle(batches)
        yield from batches


def _loss(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Cross-entropy of answers, and of prompts with a small weight."""
    length = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids, mask, weight = (
        torch.zeros(len(batch), length, dtype=kind)
        for kind in (torch.long, torch.long, torch.float)
    )
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, :end] = 1
        weight[row, 1 : len(prompt)] = _PROMPT_WEIGHT
        weight[row, len(prompt) : end] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = functional.cross_entropy(
        logits.reshape(-1, logits.size(-1)), ids[:, 1:].reshape(-1), reduction="none"
    )
    kept = weight[:, 1:]
    return (losses.view_as(kept) * kept).sum() / kept.sum()
