"""What a causal language model answers: by writing, or by ranking given answers.

Prompts of one length are read together, so that none needs padding on its left, which not every
architecture can be told about.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from fedark.tuning.batches import by_length, padded
from fedark.tuning.tokens import TextEncoder

__all__ = ["Decoder"]

_TOGETHER = 64  # prompts that are answered in one batch
_RANKED_ROWS = 256  # prompts times answers in one batch


class Decoder:
    """Reads prompts with one model and tokenizer.

    Attributes:
        body: the model, with an adapter where it has one.
        takes: names of what it can be called with.
    """

    def __init__(self, body: nn.Module, model: nn.Module, encoder: TextEncoder) -> None:
        """Args:
        body: the model, with an adapter where it has one.
        model: the library's model inside it, which says what can be asked of `body`.
        """
        self.body = body
        self._encoder = encoder
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}

    def write(self, prompts: Sequence[str], limit: int, stop: Sequence[str] = ()) -> list[str]:
        """What the model writes after each prompt by greedy decoding, up to its end token, the
        first of the texts `stop`, or `limit` tokens.
        """
        ids = self._encoder.prompts(prompts, [limit] * len(prompts))
        found = [""] * len(prompts)
        for _, part in by_length([len(prompt) for prompt in ids], _TOGETHER):
            rows = self._written(torch.tensor([ids[index] for index in part]), limit, stop)
            for index, row in zip(part, rows, strict=True):
                found[index] = _before(self._encoder.text(row), stop)
        return found

    def rank(self, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        """Mean log-likelihood a token [prompts, answers] of every answer after every prompt, which
        is read once for all of them.

        The mean and not the sum (Brown et al., arXiv:2005.14165, section 2.4): a sum would prefer
        the shortest answer whatever the prompt says.
        """
        following = self._encoder.answers(answers)
        longest = max(len(ids) for ids in following)
        ids = self._encoder.prompts(prompts, [longest] * len(prompts))
        tokens, mask = padded(following, self._encoder.pad_id)
        scores = torch.zeros(len(prompts), len(answers))
        size = max(1, _RANKED_ROWS // len(answers))
        for _, part in by_length([len(prompt) for prompt in ids], size):
            read = torch.tensor([ids[index] for index in part])
            scores[part] = self._likelihoods(read, tokens, mask) / mask.sum(1)
        return scores

    def _written(self, prompts: torch.Tensor, limit: int, stop: Sequence[str]) -> list[list[int]]:
        following, cache = prompts, None
        mask = torch.ones_like(prompts)
        end = self._encoder.eos_id
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(limit):
            read = self.body(
                input_ids=following, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            cache, chosen = read.past_key_values, read.logits[:, -1].argmax(-1)
            for place, token in enumerate(chosen.tolist()):
                ended[place] = ended[place] or token == end
                if not ended[place]:
                    rows[place].append(token)
                    if stop:
                        text = self._encoder.text(rows[place])
                        ended[place] = any(one in text for one in stop)
            if all(ended):
                break
            following = chosen.unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(following)], dim=1)
        return rows

    def _likelihoods(
        self, prompts: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Log-likelihood [prompts, answers] of every answer with its end token after every prompt,
        all of one length.
        """
        count, answers = len(prompts), len(tokens)
        read = self.body(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            use_cache=True,
            **self._last_only,
        )
        first = functional.log_softmax(read.logits[:, -1], dim=-1)[:, tokens[:, 0]]
        if tokens.shape[1] == 1:
            return first
        cache = read.past_key_values
        cache.batch_repeat_interleave(answers)
        following = tokens[:, :-1].repeat(count, 1)
        seen = torch.cat(
            [
                torch.ones(count * answers, prompts.shape[1], dtype=torch.long),
                mask[:, :-1].repeat(count, 1),
            ],
            dim=1,
        )
        logits = self.body(
            input_ids=following, attention_mask=seen, past_key_values=cache, use_cache=True
        ).logits
        targets = tokens[:, 1:].repeat(count, 1)
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        rest = (losses * mask[:, 1:].repeat(count, 1)).sum(1).reshape(count, answers)
        return first - rest


def _before(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the texts `stop` in it."""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))].strip()
