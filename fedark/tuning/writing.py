"""Free text for many prompts at once, a token of each at every step: prompts join and leave while
others are being written (continuous batching; Orca, OSDI 2022).

Keys and values of all rows are one tensor a layer, [rows, heads, tokens, width], in which shorter
rows are padded on their left; a row that joins is read by itself and put beside the others, one
that leaves is cut out. Its bound is the number of rows times `max_length`, in bytes.

`transformers` has a `ContinuousBatchingManager`, which does the same with pages of keys and values.
It is not used: all its requests share one adapter and one seed, its temperature and probabilities
are settings of the whole manager, and it runs in threads of its own.

Padding on the left is not something that every architecture can be told about. `Writer` tries it
when it is made, with rows that join and leave, against each row alone; where the answers differ,
rows are written one after the other (`rows` is 1).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache

from fedark.tuning.mixed import Mixed, near

__all__ = ["ROWS", "Piece", "Token", "Wish", "Writer"]

ROWS = 32
"""That are written at once, at most."""
_CACHE_BYTES = 1 << 30
_TRIED = ("a", "a b c d e", "a b")
_STEPS = 4


@dataclass(frozen=True)
class Wish:
    """What is to be written.

    Attributes:
        adapter: its name.
        prompt: as it is.
        longest: tokens, at most.
        stop: texts at which it ends.
        temperature: 0 for greedy decoding.
        top_p: share of the probability from whose most likely tokens one is drawn.
        seed: of the draw.
        top: so many likeliest tokens are told of each that was written; None: not even its own
            probability.
    """

    adapter: str
    prompt: str
    longest: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top: int | None = None


@dataclass(frozen=True)
class Token:
    """A token that was written, its log probability in nats, and the likeliest in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a step added to one text.

    Attributes:
        id: of the wish.
        text: the next part; parts never change once they are out.
        tokens: where the wish asked for them.
        end: "" while it goes on; else "stop", "length", "too long" (the prompt; nothing was
            written) or "failed" (the model's answer was no number).
        read, written: tokens of the prompt, and so far of the answer.
    """

    id: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    end: str = ""
    read: int = 0
    written: int = 0

    def plain(self) -> tuple[int, str, str, int, int]:
        """What crosses from an inference enclave: all but `tokens`."""
        return self.id, self.text, self.end, self.read, self.written


@dataclass
class _Row:
    id: int
    wish: Wish
    prompt: list[int]
    draw: random.Random
    ids: list[int] = field(default_factory=list)
    told: str = ""


class Writer:
    """Writes with the adapters of `mixed`.

    Attributes:
        rows: that are written at once, at most: fewer than asked where keys and values would take
            more than `cache_bytes`.
    """

    def __init__(self, mixed: Mixed, *, rows: int = ROWS, cache_bytes: int = _CACHE_BYTES) -> None:
        self._mixed, self._encoder = mixed, mixed.encoder
        self._body, self._takes = mixed.decoder.body, mixed.decoder.takes
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self.rows = rows
        self.rows = self._fitting(cache_bytes)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to write."""
        return bool(self._waiting or self._running)

    def read_tokens(self, wish: Wish) -> int:
        """How many tokens of the prompt would be read.

        Raises:
            ModelError: the tokenizer fails on it.
        """
        return len(self._encoder.whole_prompts([wish.prompt])[0])

    def add(self, number: int, wish: Wish) -> None:
        """Write this, too, from the next step on; its pieces carry `number`.

        Raises:
            InputError: there is no such adapter.
            ModelError: the tokenizer fails on the prompt.
        """
        self._mixed.require(wish.adapter)
        prompt = self._encoder.whole_prompts([wish.prompt])[0]
        # The numbers choose tokens, and hide nothing.
        self._waiting.append(_Row(number, wish, prompt, random.Random(wish.seed)))  # noqa: S311

    def drop(self, number: int) -> None:
        """Write no more of this; no harm if there is none of that number."""
        self._waiting = deque(row for row in self._waiting if row.id != number)
        self._keep([row.id != number for row in self._running])

    def forget(self, adapter: str) -> list[int]:
        """Write no more with this adapter; returns whose texts ended so."""
        rows = [row.id for row in (*self._waiting, *self._running) if row.wish.adapter == adapter]
        for number in rows:
            self.drop(number)
        return rows

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Read prompts that have waited, as long as there is room, and write one token of each text
        that was begun before.
        """
        pieces: list[Piece] = []
        if self._running:
            following = torch.tensor([[row.ids[-1]] for row in self._running])
            pieces += self._written(self._running, self._further(following))
            self._keep([not piece.end for piece in pieces])
        fresh: list[_Row] = []
        while self._waiting and self._fits(self._waiting[0], fresh):
            row = self._waiting.popleft()
            room = self._mixed.terms.training.max_length - row.wish.longest
            if len(row.prompt) > room:
                pieces.append(Piece(row.id, end="too long", read=len(row.prompt)))
            else:
                fresh.append(row)
        return pieces + self._joined(fresh)

    # -- rows

    def _fits(self, row: _Row, fresh: Sequence[_Row]) -> bool:
        beside = [*self._running, *fresh]
        alike = all(other.wish.adapter == row.wish.adapter for other in beside)
        return len(beside) < self.rows and (self._mixed.together or alike)

    def _joined(self, fresh: list[_Row]) -> list[Piece]:
        """Read the prompts of rows and put them beside the others."""
        if not fresh:
            return []
        pieces = self._written(fresh, self._opened(fresh))
        ended = {piece.id for piece in pieces if piece.end}
        self._keep([row.id not in ended for row in self._running])
        return pieces

    def _opened(self, fresh: list[_Row]) -> torch.Tensor:
        """Read prompts, all of them together, and put their rows beside the others. Returns logits
        [fresh, vocabulary].
        """
        longest = max(len(row.prompt) for row in fresh)
        short = [longest - len(row.prompt) for row in fresh]
        pad = self._encoder.pad_id
        ids = torch.tensor([[pad] * n + row.prompt for n, row in zip(short, fresh, strict=True)])
        mask = (torch.arange(longest).unsqueeze(0) >= torch.tensor(short).unsqueeze(1)).long()
        logits, cache = self._read(fresh, ids, mask, None)
        self._merge(fresh, mask, cache)
        return logits

    def _merge(self, rows: list[_Row], mask: torch.Tensor, cache: Any) -> None:
        if self._running:
            length = max(mask.shape[1], self._mask.shape[1])
            for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = [_left(getattr(one, name), length) for one in (ours, theirs)]
                    setattr(ours, name, torch.cat(both))
            widened = [_left(one[:, None, :, None], length) for one in (self._mask, mask)]
            mask, cache = torch.cat(widened)[:, 0, :, 0], self._cache
        self._mask, self._cache = mask, cache
        self._running += rows

    def _keep(self, keep: Sequence[bool]) -> None:
        """Cut rows out, and the columns that pad all of those that stay."""
        if all(keep):
            return
        self._running = [row for row, stays in zip(self._running, keep, strict=True) if stays]
        if not self._running:
            self._cache = None
            return
        index = torch.tensor([place for place, stays in enumerate(keep) if stays])
        mask = self._mask[index]
        cut = int(mask.argmax(1).min())
        self._mask = mask[:, cut:]
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[index][:, :, cut:])

    # -- one reading of the model

    def _further(self, following: torch.Tensor) -> torch.Tensor:
        """Read one more token of every row that runs."""
        self._mask = torch.cat([self._mask, torch.ones_like(following)], dim=1)
        logits, self._cache = self._read(self._running, following, self._mask, self._cache)
        return logits

    def _read(
        self, rows: Sequence[_Row], ids: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Logits [rows, vocabulary] of what follows, and the cache."""
        more: dict[str, Any] = {}
        if "position_ids" in self._takes:
            places = (mask.cumsum(1) - 1).clamp(min=0)
            more["position_ids"] = places[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            more["logits_to_keep"] = 1
        if cache is None and self.rows > 1:
            cache = DynamicCache()
        with self._mixed.rows([row.wish.adapter for row in rows]):
            read = self._body(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
            )
        return read.logits[:, -1].float(), read.past_key_values

    def _written(self, rows: Sequence[_Row], logits: torch.Tensor) -> list[Piece]:
        """Choose the next token of every row."""
        sound = torch.isfinite(logits).all(1).tolist()
        likeliest = logits.argmax(1).tolist()
        return [
            self._next(row, logits[place], likeliest[place])
            if sound[place]
            else self._piece(row, "", "failed")
            for place, row in enumerate(rows)
        ]

    def _next(self, row: _Row, logits: torch.Tensor, likeliest: int) -> Piece:
        wish = row.wish
        token = likeliest if wish.temperature == 0 else _drawn(logits, wish, row.draw)
        row.ids.append(token)
        ended = token == self._encoder.eos_id
        full = len(row.ids) >= wish.longest
        text = self._encoder.text(row.ids[:-1] if ended else row.ids)
        at = min((at for stop in wish.stop if (at := text.find(stop)) >= 0), default=-1)
        if at >= 0:
            text, ended = text[:at].strip(), True
        end = "stop" if ended else "length" if full else ""
        told = text if end else _settled(text, wish.stop)
        added = told[len(row.told) :] if told.startswith(row.told) else ""
        row.told += added
        piece = self._piece(row, added, end)
        if wish.top is not None and not (ended and at < 0):
            return replace(piece, tokens=(self._token(logits, token, wish.top),))
        return piece

    def _piece(self, row: _Row, text: str, end: str) -> Piece:
        return Piece(row.id, text, (), end, len(row.prompt), len(row.ids))

    def _token(self, logits: torch.Tensor, token: int, top: int) -> Token:
        likely = torch.log_softmax(logits, dim=-1)
        found = likely.topk(min(top, len(likely)))
        others = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return Token(
            self._encoder.token(token),
            float(likely[token]),
            tuple((self._encoder.token(one), value) for one, value in others),
        )

    # -- what the architecture can be asked

    def _fitting(self, cache_bytes: int) -> int:
        """How many rows may be written together."""
        if self.rows == 1:
            return 1
        name = "\0tried"
        self._mixed.put(name, self._mixed.task.initial())
        wishes = [Wish(name, prompt, _STEPS) for prompt in _TRIED]
        try:
            together, size = self._tried(wishes, later=1)
            alone = [self._tried([wish])[0][0] for wish in wishes]
            sound = all(map(near, together, alone))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            sound, size = False, 1  # the library, where a model has no such cache
        finally:
            self._mixed.drop(name)
        most = cache_bytes // max(1, size * self._mixed.terms.training.max_length)
        return max(1, min(self.rows, most)) if sound else 1

    @torch.no_grad()
    def _tried(self, wishes: Sequence[Wish], later: int = 0) -> tuple[list[torch.Tensor], int]:
        """The logits of each wish at every step, and the bytes of a token's keys and values; the
        last `later` wishes join a step after the others. The same tokens follow in all of them, so
        that a tie decides nothing.
        """
        prompts = self._encoder.whole_prompts([wish.prompt for wish in wishes])
        draw = random.Random(0)  # noqa: S311  # nothing is drawn
        rows = [_Row(n, wish, prompts[n], draw) for n, wish in enumerate(wishes)]
        seen: list[list[torch.Tensor]] = [[] for _ in wishes]
        size = 0
        for fresh in (rows[: len(rows) - later], rows[len(rows) - later :], *[[]] * _STEPS):
            if self._running:
                following = torch.full((len(self._running), 1), self._encoder.pad_id)
                logits = self._further(following)
                for row, values in zip(self._running, logits, strict=True):
                    seen[row.id].append(values)
                self._keep([len(seen[row.id]) < _STEPS for row in self._running])
            if fresh:
                for row, values in zip(fresh, self._opened(fresh), strict=True):
                    seen[row.id].append(values)
                size = size or _bytes(self._cache)
        self._running, self._cache = [], None
        return [torch.stack(values) for values in seen], size


def _left(values: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, heads, tokens, width], padded with zeros on the left to `length` tokens."""
    missing = length - values.shape[2]
    shape = (*values.shape[:2], missing, values.shape[3])
    return torch.cat([values.new_zeros(shape), values], dim=2) if missing else values


def _bytes(cache: Any) -> int:
    """What one token of one row takes."""
    tensors = [one for layer in cache.layers for one in (layer.keys, layer.values)]
    return sum(one.numel() // (one.shape[0] * one.shape[2]) * one.element_size() for one in tensors)


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of a text that no further token changes: no half character, and no beginning of a
    text at which it would end.
    """
    text = text.rstrip("\ufffd")
    held = max((n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0)
    return text[: len(text) - held].rstrip()


def _drawn(logits: torch.Tensor, wish: Wish, draw: random.Random) -> int:
    """A token, by nucleus sampling (arXiv:1904.09751)."""
    likely = torch.softmax(logits.double() / wish.temperature, dim=-1)
    values, order = likely.sort(descending=True, stable=True)
    total = values.cumsum(0)
    kept = int((total - values < wish.top_p).sum())
    at = torch.searchsorted(total[:kept], draw.random() * float(total[kept - 1]), right=True)
    return int(order[min(int(at), kept - 1)])
