"""The OpenAI API over HTTP, as an ASGI application.

    POST /v1/chat/completions  /v1/completions  /v1/embeddings  /v1/classify
    GET  /v1/models  /v1/models/NAME            each with an API key
    GET  /health  /ready                        without one

A request is read whole, up to a size and a time; checked; queued, or refused where the queue is
full; and answered, all at once or in a stream. A client that goes away frees its place. Whatever
fails, the reply is an error in OpenAI's form, and nothing of another request is in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedark.foundation.errors import FedarkError
from fedark.foundation.logs import explain
from fedark.serving.engine import LOST
from fedark.serving.faults import ApiError, api_error
from fedark.serving.keys import ApiKey, Keys
from fedark.serving.models import Model, Models
from fedark.serving.observed import Observed
from fedark.serving.replies import (
    Reply,
    classified,
    embedded,
    label_piece,
    listed,
    models_list,
    sse,
    usage,
)
from fedark.serving.requests import Chat, Classify, Completion, Embeddings, Request, parse, too_long
from fedark.serving.worker import Full, Job
from fedark.tuning.mixed import Asked, Read
from fedark.tuning.writing import Piece, Wish

__all__ = ["Limits", "Server"]

R = TypeVar("R", bound=Request)
_log = logging.getLogger("fedark.serving")
_BUSY = "The server is busy: its queue is full."


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Attributes:
        body: bytes.
        reading: seconds in which its body is to be here.
        answering: seconds in which it is to be answered.
    """

    body: int = 4 << 20
    reading: float = 30.0
    answering: float = 600.0


@dataclass
class _Call:
    """A request on its way, and what is written down of it."""

    http: HttpRequest
    route: str
    began: float = field(default_factory=time.monotonic)
    key: str = ""
    model: str = ""
    tokens: tuple[int, int] = (0, 0)


class Server:
    """Answers for the models of `models` to holders of `keys`.

    Attributes:
        app: the ASGI application.
        stopping: not ready: it will end soon.
    """

    def __init__(self, models: Models, keys: Keys, limits: Limits | None = None) -> None:
        self.models, self._keys, self._limits = models, keys, limits or Limits()
        self.observed = Observed(lambda: self.models)
        self.stopping = False
        self._created = int(time.time())
        posts = (
            ("/v1/chat/completions", self._chat),
            ("/v1/completions", self._completion),
            ("/v1/embeddings", self._embeddings),
            ("/v1/classify", self._classify),
        )
        gets = (("/v1/models", self._list), ("/v1/models/{name:path}", self._model))
        self.app = Starlette(
            routes=[
                *(Route(path, self._guarded(path, act), methods=["POST"]) for path, act in posts),
                *(Route(path, self._guarded(path, act), methods=["GET"]) for path, act in gets),
                Route("/health", self._health, methods=["GET"]),
                Route("/ready", self._ready, methods=["GET"]),
            ],
            exception_handlers={HTTPException: self._strange, Exception: self._broken},
        )

    # -- around every request

    def _guarded(
        self, route: str, act: Callable[[_Call, ApiKey], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def answer(http: HttpRequest) -> Response:
            call = _Call(http, route)
            try:
                response = await act(call, self._known(call))
            except ApiError as error:
                response = _refusal(error)
            except FedarkError as error:
                response = _refusal(api_error(error))
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                _log.error("a request failed: %s", explain(error))
                response = _refusal(ApiError(500, "The server failed at this request."))
            if not isinstance(response, StreamingResponse):
                self._ended(call, response.status_code)
            return response

        return answer

    def _ended(self, call: _Call, status: int) -> None:
        self.observed.ended(
            route=call.route,
            model=call.model,
            key=call.key,
            status=status,
            seconds=time.monotonic() - call.began,
            tokens=call.tokens,
        )

    def _known(self, call: _Call) -> ApiKey:
        """Whose request it is.

        Raises:
            ApiError: nobody's that is known.
        """
        kind, _, key = call.http.headers.get("authorization", "").partition(" ")
        found = self._keys.find(key.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise ApiError(401, "There is no such API key: send Authorization: Bearer KEY.")
        call.key = found.name
        return found

    async def _read(self, call: _Call, kind: type[R]) -> R:
        """The body, as a request of that kind."""
        data = bytearray()
        try:
            async with asyncio.timeout(self._limits.reading):
                async for chunk in call.http.stream():
                    data += chunk
                    if len(data) > self._limits.body:
                        raise ApiError(413, f"The body has more than {self._limits.body:,} bytes.")
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.") from None
        return parse(kind, bytes(data))

    def _asked(self, call: _Call, name: str, key: ApiKey) -> Model:
        model = self.models.find(name, key)
        if model is None:
            raise ApiError(
                404,
                "There is no such model, or you may not ask it.",
                param="model",
                code="model_not_found",
            )
        call.model = model.name
        return model

    # -- what can be asked

    async def _list(self, call: _Call, key: ApiKey) -> Response:
        own = [model for model in self.models if model.may_be_asked(key)]
        return JSONResponse(models_list(own, self._created))

    async def _model(self, call: _Call, key: ApiKey) -> Response:
        model = self._asked(call, call.http.path_params["name"], key)
        return JSONResponse(listed(model, self._created))

    async def _classify(self, call: _Call, key: ApiKey) -> Response:
        request = await self._read(call, Classify)
        model = self._asked(call, request.model, key)
        if not model.terms.labels:
            raise ApiError(400, "This model writes text: it has no labels.", param="model")
        found = await self._computed(call, model, "label", request.prompts(model.terms.prompt))
        return JSONResponse(classified(model, found))

    async def _embeddings(self, call: _Call, key: ApiKey) -> Response:
        request = await self._read(call, Embeddings)
        model = self._asked(call, request.model, key)
        found = await self._computed(call, model, "embed", request.prompts)
        encoded = request.encoding_format == "base64"
        return JSONResponse(embedded(model, found, encoded=encoded))

    async def _chat(self, call: _Call, key: ApiKey) -> Response:
        request = await self._read(call, Chat)
        model = self._asked(call, request.model, key)
        prompts = [request.prompt(model.terms.prompt)]
        return await self._answered(call, model, request, prompts, request.top)

    async def _completion(self, call: _Call, key: ApiKey) -> Response:
        request = await self._read(call, Completion)
        model = self._asked(call, request.model, key)
        return await self._answered(call, model, request, request.prompts, request.logprobs)

    async def _answered(
        self,
        call: _Call,
        model: Model,
        request: Chat | Completion,
        prompts: Sequence[str],
        top: int | None,
    ) -> Response:
        reply = Reply(isinstance(request, Chat), model.name, model.terms)
        if model.terms.labels:
            found = await self._computed(call, model, "label", prompts)
            pieces = [[label_piece(model.terms, one, top)] for one in found]
            if not request.stream:
                return JSONResponse(reply.whole(pieces))
            return self._streamed(call, reply, request, _given([one[0] for one in pieces]))
        if top is not None and not model.worker.engine.tells:
            raise ApiError(
                400,
                "A leased base tells no probabilities of tokens: its provider leased its answers"
                " alone.",
                param="logprobs",
            )
        limit = model.terms.training.max_length
        wishes = [request.wish(model.name, prompt, limit, top) for prompt in prompts]
        if request.stream:
            written = self._written(call, model, wishes)
            first = await anext(written)  # an error before it still has its status
            return self._streamed(call, reply, request, _after(first, written))
        seen: list[list[Piece]] = [[] for _ in wishes]
        async with _while_there(call.http) as there:
            async for index, piece in self._written(call, model, wishes, there):
                seen[index].append(piece)
        call.tokens = _count([pieces[-1] for pieces in seen])
        return JSONResponse(reply.whole(seen))

    # -- the engine

    async def _computed(
        self, call: _Call, model: Model, kind: Any, prompts: Sequence[str]
    ) -> list[Read]:
        asked = [Asked(model.name, prompt) for prompt in prompts]
        limit = model.terms.training.max_length
        async with (
            _while_there(call.http) as there,
            self._queued(model, lambda tell: [Job(kind, tell(0), asked)]) as outcomes,
        ):
            _, found = await outcomes.next(there)
        if any(one.cut for one in found):
            raise too_long("an input is longer", limit)
        self.observed.first(call.route, time.monotonic() - call.began)
        call.tokens = (sum(one.tokens for one in found), 0)
        return list(found)

    async def _written(
        self, call: _Call, model: Model, wishes: Sequence[Wish], there: asyncio.Event | None = None
    ) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all texts, each with the index of its text, until all have ended."""
        limit = model.terms.training.max_length
        left, first = set(range(len(wishes))), True
        async with self._queued(
            model, lambda tell: [Job("write", tell(i), (), wish) for i, wish in enumerate(wishes)]
        ) as outcomes:
            while left:
                index, piece = await outcomes.next(there)
                if piece.end == "too long":
                    raise too_long(
                        f"the prompt has {piece.read}, besides {wishes[index].longest} for the"
                        " answer",
                        limit,
                    )
                if piece.end == "failed":
                    raise ApiError(500, "The model's answer was no number.")
                if piece.end == LOST:
                    raise ApiError(503, "The lease has ended, or its enclave has.", wait=5)
                if first:
                    self.observed.first(call.route, time.monotonic() - call.began)
                    first = False
                left -= {index} if piece.end else set()
                yield index, piece

    @asynccontextmanager
    async def _queued(
        self, model: Model, make: Callable[[Any], list[Job]]
    ) -> AsyncIterator[_Outcomes]:
        """Queue jobs, and give up their places when the block is left."""
        outcomes = _Outcomes(asyncio.get_running_loop().time() + self._limits.answering)
        jobs = make(outcomes.teller)
        try:
            model.worker.submit(*jobs)
        except Full:
            raise ApiError(429, _BUSY, wait=1) from None
        try:
            yield outcomes
        finally:
            for job in jobs:
                model.worker.cancel(job)

    def _streamed(
        self,
        call: _Call,
        reply: Reply,
        request: Chat | Completion,
        pieces: AsyncIterator[tuple[int, Piece]],
    ) -> Response:
        async def events() -> AsyncIterator[bytes]:
            status, last = 499, dict[int, Piece]()
            try:
                for one in reply.opening():
                    yield sse(one)
                async for index, piece in pieces:
                    last[index] = piece
                    for one in reply.part(index, piece):
                        yield sse(one)
                if request.usage_at_the_end:
                    yield sse(reply.closing(list(last.values())))
                yield sse("[DONE]")
                status = 200
            except ApiError as error:
                status = error.status
                yield sse(error.body)
            except Exception as error:
                status = 500
                _log.error("a stream failed: %s", explain(error))
                yield sse(ApiError(500, "The server failed at this request.").body)
            finally:
                if hasattr(pieces, "aclose"):
                    await pieces.aclose()
                call.tokens = _count(list(last.values()))
                self._ended(call, status)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _Stream(events(), media_type="text/event-stream", headers=headers)

    # -- everything else

    async def _health(self, http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, http: HttpRequest) -> Response:
        ready = not self.stopping and any(True for _ in self.models)
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _strange(self, http: HttpRequest, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        what = (
            "There is no such address." if status == 404 else "This address takes no such method."
        )
        return _refusal(ApiError(status, what))

    async def _broken(self, http: HttpRequest, error: Exception) -> Response:
        _log.error("a request failed: %s", explain(error))
        return _refusal(ApiError(500, "The server failed at this request."))


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _count(last: Sequence[Piece]) -> tuple[int, int]:
    counts = usage(last)
    return counts["prompt_tokens"], counts["completion_tokens"]


async def _given(pieces: Sequence[Piece]) -> AsyncIterator[tuple[int, Piece]]:
    for index, piece in enumerate(pieces):
        yield index, piece


async def _after(
    first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    try:
        yield first
        async for one in rest:
            yield one
    finally:
        if hasattr(rest, "aclose"):
            await rest.aclose()


@asynccontextmanager
async def _while_there(http: HttpRequest) -> AsyncIterator[asyncio.Event]:
    """An event that is set when the client of a request that was read whole goes away."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    task = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class _Outcomes:
    """What comes from a worker's thread for one request, with the index of its job."""

    def __init__(self, until: float) -> None:
        self._until, self._loop = until, asyncio.get_running_loop()
        self._queue = asyncio.Queue[tuple[int, Any]]()

    def teller(self, index: int) -> Callable[[Any], None]:
        """Takes the outcomes of one job, in any thread."""

        def told(outcome: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, outcome))

        return told

    async def next(self, gone: asyncio.Event | None) -> tuple[int, Any]:
        """The next one.

        Raises:
            ApiError: it is an error, or time is over.
            ClientDisconnect: the client has gone.
        """
        wanted = asyncio.ensure_future(self._queue.get())
        left = asyncio.ensure_future(gone.wait()) if gone is not None else None
        both = {wanted} | ({left} if left is not None else set())
        try:
            seconds = max(0.0, self._until - self._loop.time())
            await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                if left is not None and left.done():
                    raise ClientDisconnect
                raise ApiError(503, "The answer took too long.", wait=10)
            index, outcome = wanted.result()
        finally:
            for one in both:
                one.cancel()
        if isinstance(outcome, FedarkError):
            raise api_error(outcome)
        return index, outcome


class _Stream(StreamingResponse):
    """Ends what it streams when the client has gone, wherever it was."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
