"""What clients are sent: the objects of the OpenAI API."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedark.contract.contract import ModelTerms
from fedark.serving.models import Model
from fedark.tuning.mixed import Read
from fedark.tuning.writing import Piece, Token

__all__ = ["Reply", "classified", "embedded", "label_piece", "listed", "models_list", "sse"]


@dataclass
class Reply:
    """One answer to a chat or a completion, whole or in parts.

    Args:
        chat: of a chat; else of a completion.
        model: its name.
        terms: of its adapter.
    """

    chat: bool
    model: str
    terms: ModelTerms
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """All of it, from the pieces of each text."""
        choices = []
        for index, pieces in enumerate(answers):
            text = "".join(piece.text for piece in pieces)
            choice = self._choice(index, text, pieces[-1].end)
            choice["logprobs"] = self._told([one for piece in pieces for one in piece.tokens])
            if self.chat:
                content = {"role": "assistant", "content": text, "refusal": None}
                choice["message"] = content
            choices.append(choice)
        return self._object("", choices) | {"usage": usage([one[-1] for one in answers])}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        if self.chat:
            first = self._choice(0, "", "") | {"delta": {"role": "assistant", "content": ""}}
            yield self._object(".chunk", [first])

    def part(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece of a stream, if there is anything in it."""
        if piece.text or piece.end or piece.tokens:
            choice = self._choice(index, piece.text, piece.end)
            choice["logprobs"] = self._told(piece.tokens)
            if self.chat:
                choice["delta"] = {"content": piece.text} if piece.text else {}
            yield self._object(".chunk", [choice])

    def closing(self, last: Sequence[Piece]) -> dict[str, Any]:
        """The usage at the end of a stream."""
        return self._object(".chunk", []) | {"usage": usage(last)}

    def _object(self, form: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"chat.completion{form}" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.terms.weights[:16]}",
            "choices": choices,
        }

    def _choice(self, index: int, text: str, end: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": end or None}
        return choice if self.chat else choice | {"text": text}

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not tokens:
            return None
        if self.chat:
            return {
                "content": [
                    _named(one.text, one.logprob)
                    | {"top_logprobs": [_named(*other) for other in one.top]}
                    for one in tokens
                ],
                "refusal": None,
            }
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [dict(one.top) for one in tokens],
            "text_offset": [],
        }


def _named(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def label_piece(terms: ModelTerms, read: Read, top: int | None) -> Piece:
    """A model with labels answers with the likeliest one."""
    likely = np.log(np.maximum(read.values.astype(np.float64), 1e-45))
    order = likely.argsort(kind="stable")[::-1]
    named = [(terms.labels[index], float(likely[index])) for index in order]
    tokens = () if top is None else (Token(*named[0], tuple(named[:top])),)
    return Piece(0, named[0][0], tokens, "stop", read.tokens, 0)


def usage(last: Sequence[Piece]) -> dict[str, int]:
    """Tokens read and written, from the last piece of each text."""
    read, written = sum(one.read for one in last), sum(one.written for one in last)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def classified(model: Model, found: Sequence[Read]) -> dict[str, Any]:
    """Of /v1/classify: for each input the likeliest label, and the probability of every one."""
    labels = model.terms.labels
    data = []
    for index, one in enumerate(found):
        likely = [round(float(value), 6) for value in one.values]
        best = int(one.values.argmax())
        data.append(
            {
                "index": index,
                "label": labels[best],
                "probability": likely[best],
                "probabilities": dict(zip(labels, likely, strict=True)),
            }
        )
    return {
        "id": f"classify-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": model.name,
        "data": data,
        "usage": _read(found),
    }


def embedded(model: Model, found: Sequence[Read], *, encoded: bool) -> dict[str, Any]:
    """Of /v1/embeddings."""

    def vector(one: Read) -> Any:
        if encoded:
            return base64.b64encode(one.values.astype("<f4").tobytes()).decode()
        return [float(value) for value in one.values]

    data = [
        {"object": "embedding", "index": index, "embedding": vector(one)}
        for index, one in enumerate(found)
    ]
    return {"object": "list", "data": data, "model": model.name, "usage": _read(found)}


def _read(found: Sequence[Read]) -> dict[str, int]:
    tokens = sum(one.tokens for one in found)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def listed(model: Model, created: int) -> dict[str, Any]:
    """A model, as /v1/models has it; `created` is when this server began."""
    owner = model.owner or "fedark"
    return {"id": model.name, "object": "model", "created": created, "owned_by": owner}


def models_list(models: Sequence[Model], created: int) -> dict[str, Any]:
    """Of /v1/models."""
    return {"object": "list", "data": [listed(model, created) for model in models]}


def sse(value: dict[str, Any] | str) -> bytes:
    """One event of a stream (server-sent events)."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
