"""What clients send: the requests of the OpenAI API that are served here, read strictly.

Members that change nothing of an answer (`user`, `metadata`, ...) are read over; a member that is
unknown, or asks for what is not served, is refused, as OpenAI does.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedark.foundation.errors import printable
from fedark.foundation.jsontext import read_json
from fedark.foundation.terms import explain_at
from fedark.records.template import Template
from fedark.serving.faults import ApiError
from fedark.tuning.writing import Wish

__all__ = ["Chat", "Classify", "Completion", "Embeddings", "Request", "parse", "too_long"]

Text = Annotated[str, Field(max_length=1 << 20)]
Prompt = Annotated[str, Field(min_length=1, max_length=1 << 20)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
_DEFAULT = 64


class Request(BaseModel):
    """What all have; the ignored members change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=200)]
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Any = None


class _Writing(Request):
    """What chats and completions share. `temperature` is 0 if it is not given: greedy decoding, as
    in evaluation.
    """

    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def usage_at_the_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def wish(self, adapter: str, prompt: str, limit: int, top: int | None) -> Wish:
        """What is to be written of at most `limit` tokens for prompt and answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        longest = self.longest or min(_DEFAULT, limit // 2)
        if longest >= limit:
            raise too_long(f"max_tokens is {longest}", limit)
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        warm = 0.0 if self.temperature is None else self.temperature
        share = 1.0 if self.top_p is None else self.top_p
        return Wish(adapter, prompt, longest, tuple(stop), warm, share, seed, top)

    @property
    def longest(self) -> int | None:
        return self.max_tokens


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[_Part], Field(min_length=1, max_length=64)]
    name: Any = None
    refusal: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _TextForm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class Chat(_Writing):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _TextForm | None = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompt(self, template: str) -> str:
        """The texts of the messages, with an empty line between them, in the one column of the
        template that the adapter was trained with.
        """
        form = Template.parse(template)
        text = "\n\n".join(one.text for one in self.messages)
        if not text.strip():
            raise ApiError(400, "The messages hold no text.", param="messages")
        if len(set(form.columns)) > 1:
            raise ApiError(
                400,
                "This model was trained on prompts of several columns, which a message cannot name:"
                " send the whole prompt to /v1/completions, or the columns to /v1/classify.",
                param="messages",
            )
        return form.fill([text] * len(form.columns))


class Completion(_Writing):
    """POST /v1/completions."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Embeddings(Request):
    """POST /v1/embeddings."""

    input: Prompt | Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None

    @property
    def prompts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


Row = Annotated[dict[str, Text], Field(min_length=1, max_length=64)]
Rows = Annotated[list[Row], Field(min_length=1, max_length=256)]


class Classify(Request):
    """POST /v1/classify: texts, which are put into the one column of the job's template, or objects
    that name its columns.
    """

    input: Prompt | Row | Prompts | Rows

    def prompts(self, template: str) -> list[str]:
        """The prompts as the adapter was trained on them."""
        form = Template.parse(template)
        found = self.input if isinstance(self.input, list) else [self.input]
        rows = [one if isinstance(one, dict) else self._row(one, form) for one in found]
        missing = next((c for row in rows for c in form.columns if c not in row), None)
        if missing is not None:
            raise ApiError(400, f"Each input needs the column {missing!r}.", param="input")
        return [form.fill([row[column] for column in form.columns]) for row in rows]

    def _row(self, text: str, form: Template) -> dict[str, str]:
        if len(set(form.columns)) > 1:
            named = ", ".join(form.columns)
            raise ApiError(400, f"Each input is an object of the columns {named}.", param="input")
        return {form.columns[0]: text}


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """Read the body of a request.

    Raises:
        ApiError: it is not JSON in UTF-8, or not such a request; names the member and never what
            stands there.
    """
    try:
        value = read_json(body)
    except ValueError:
        raise ApiError(400, "The body is not JSON in UTF-8.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        where, what = explain_at(error)[0]
        known = {*kind.model_fields, "type", "text", "role", "content", "include_usage"}
        name = ".".join(str(one) for one in where if isinstance(one, int) or one in known)
        if what == "unknown key":
            strange = printable(str(where[-1]), 60)
            raise ApiError(
                400, f"Unrecognized request argument supplied: {strange}", param=strange
            ) from None
        raise ApiError(400, f"{name or 'The body'}: {what}", param=name or None) from None


def too_long(what: str, limit: int) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens, and {what}.",
        code="context_length_exceeded",
    )
