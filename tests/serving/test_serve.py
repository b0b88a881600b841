"""`fedark serve` speaks the OpenAI API: what the official client is given, and what bad input,
strangers and other owners are refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from fedark.cli.show import how_to_serve
from fedark.foundation.errors import FedarkError, InputError, ModelError
from fedark.serving.http import Limits, Server
from fedark.serving.keys import KeyFile
from fedark.serving.model import load
from fedark.serving.models import Clear, Models, named, read_list
from fedark.serving.running import Place, beside
from fedark.serving.trying import ask
from fedark.tuning.adapter import Adapter, read_adapter
from fedark.tuning.mixed import Asked

KEYS = {"plain": "", "north": "north", "south": "south"}


@dataclass
class Served:
    """A server in this process, with keys of two owners and of nobody."""

    url: str
    keys: dict[str, str]
    file: KeyFile
    server: Server
    done: Any

    def client(self, key: str = "plain") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[key], max_retries=0)

    def post(self, path: str, body: Any, key: str = "plain", **more: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.keys.get(key, key)}"}
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.post(f"{self.url}{path}", content=content, headers=headers, **more)


@pytest.fixture
def serve(finish: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serves a tiny base: models "a", "north/b" and "south/c", each with an adapter of its own."""
    ends: list[Callable[[], None]] = []

    def make(
        name: str = "gpt2", *, waiting: int = 256, limits: Limits | None = None, **more: Any
    ) -> Served:
        done = finish(name, **more)
        file = KeyFile(tmp_path / "keys.json")
        keys = {key: file.create(key, owner) for key, owner in KEYS.items()}
        models = Models(Clear(str(done.base)), waiting=waiting)
        for number, model in enumerate(("a", "north/b", "south/c")):
            models.load(model, adapter(done, number))
        server = Server(models, file, limits)
        place = beside(server.app)
        url = place.__enter__()
        ends.extend((models.stop, lambda: place.__exit__(None, None, None)))
        return Served(url, keys, file, server, done)

    yield make
    for end in reversed(ends):
        end()


def adapter(done: Any, number: int) -> Adapter:
    flat = (np.random.default_rng(number).normal(size=done.terms.travelling) * 0.4).astype("f4")
    return Adapter(done.terms, flat)


def answers(done: Any, number: int, prompts: list[str], **more: Any) -> list[str]:
    return load(adapter(done, number), str(done.base)).answers(prompts, **more)


USER = [{"role": "user", "content": "open line now"}]


def test_the_official_client_is_answered_as_predict_answers(serve: Callable[..., Served]) -> None:
    served = serve()
    client = served.client()
    right = answers(served.done, 0, ["open line now"], longest=6)[0]
    chat = client.chat.completions.create(model="a", messages=USER, max_tokens=6)
    assert chat.choices[0].message.content == right
    assert chat.choices[0].finish_reason in ("stop", "length")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == 4
    assert 1 <= chat.usage.completion_tokens <= 6
    parts = list(
        client.chat.completions.create(
            model="a",
            messages=USER,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(one.choices[0].delta.content or "" for one in parts if one.choices)
    assert text == right
    assert parts[-1].usage == chat.usage
    done = client.completions.create(
        model="a", prompt=["open line now", "hold"], max_tokens=6, stop=["nothing like it"]
    )
    assert [one.text for one in done.choices] == answers(
        served.done, 0, ["open line now", "hold"], longest=6
    )
    parts = list(client.completions.create(model="a", prompt="hold", max_tokens=6, stream=True))
    assert "".join(one.choices[0].text for one in parts) == done.choices[1].text
    assert [one.id for one in client.models.list()] == ["a"]
    assert client.models.retrieve("a").owned_by == "fedark"


def test_sampling_follows_seed_temperature_and_top_p(serve: Callable[..., Served]) -> None:
    client = serve("llama").client()

    def write(**more: Any) -> str:
        done = client.completions.create(model="a", prompt="open line", max_tokens=9, **more)
        return done.choices[0].text

    hot: dict[str, Any] = {"temperature": 2.0, "seed": 5}
    assert write(**hot) == write(**hot)
    assert len({write(temperature=2.0, seed=seed) for seed in range(6)}) > 2
    assert write(temperature=2.0, seed=1, top_p=1e-9) == write(temperature=0) == write()


def test_probabilities_of_tokens_are_in_openais_form(serve: Callable[..., Served]) -> None:
    client = serve().client()
    chat = client.chat.completions.create(
        model="a", messages=USER, max_tokens=3, logprobs=True, top_logprobs=4
    )
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [len(one.top_logprobs) for one in told.content] == [4] * 3
    assert all(one.logprob == one.top_logprobs[0].logprob <= 0 for one in told.content)
    done = client.completions.create(model="a", prompt="open line now", max_tokens=3, logprobs=2)
    spare = done.choices[0].logprobs
    assert spare is not None
    assert spare.token_logprobs == [one.logprob for one in told.content]
    assert spare.top_logprobs is not None
    assert [len(one) for one in spare.top_logprobs] == [2] * 3


def test_a_classifier_gives_labels_probabilities_and_vectors(serve: Callable[..., Served]) -> None:
    served = serve("minilm")
    texts = ["open line now", "hold", "close the breaker at five"]
    model = load(adapter(served.done, 0), str(served.done.base))
    likely = model.probabilities(texts)
    labels = served.done.terms.labels
    found = served.post("/v1/classify", {"model": "a", "input": texts}).json()
    for row, given in zip(likely, found["data"], strict=True):
        assert given["label"] == labels[int(row.argmax())]
        assert list(given["probabilities"].values()) == pytest.approx(row.tolist(), abs=2e-5)
    assert found["usage"]["prompt_tokens"] == model.task.read_tokens(texts)
    named = {"model": "a", "input": [{"text": texts[0]}]}
    assert served.post("/v1/classify", named).json()["data"] == found["data"][:1]
    client = served.client()
    chat = client.chat.completions.create(model="a", messages=USER, logprobs=True, top_logprobs=3)
    assert chat.choices[0].message.content == labels[int(likely[0].argmax())]
    assert chat.choices[0].logprobs is not None
    (token,) = chat.choices[0].logprobs.content or []
    assert np.exp(token.logprob) == pytest.approx(likely[0].max(), abs=1e-4)
    vectors = client.embeddings.create(model="a", input=texts)
    rows = np.array([one.embedding for one in vectors.data])
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    floats = served.post("/v1/embeddings", {"model": "a", "input": texts[0]}).json()
    assert floats["data"][0]["embedding"] == pytest.approx(rows[0].tolist(), abs=1e-6)


@pytest.mark.attack("another owner's adapter asked for")
def test_an_owners_adapter_answers_nobody_else(
    serve: Callable[..., Served], refusal: Callable[[str], None]
) -> None:
    served = serve()
    right = [answers(served.done, n, ["open line now"], longest=6)[0] for n in range(3)]
    assert len(set(right)) == 3
    for key, own, model in (("north", 1, "north/b"), ("south", 2, "south/c")):
        client = served.client(key)
        assert [one.id for one in client.models.list()] == ["a", model]
        done = client.completions.create(model=model, prompt="open line now", max_tokens=6)
        assert done.choices[0].text == right[own]
    tries = [
        ("north", "south/c"), ("south", "north/b"), ("plain", "north/b"), ("plain", "b"),
        ("north", "south/../south/c"), ("north", "SOUTH/c"), ("north", "south/c\u0000"),
    ]  # fmt: skip
    stranger = {"model": "nobody/has-it", "prompt": "open line now"}
    for key, model in tries:
        body = {"model": model, "prompt": "open line now"}
        reply = served.post("/v1/completions", body, key)
        assert reply.status_code == 404
        assert reply.json() == served.post("/v1/completions", stranger, key).json()
    refusal(f"404: {reply.json()['error']['message']}")
    assert served.client("north").models.list().data[1].owned_by == "north"


def test_requests_of_several_owners_at_once_are_each_answered_with_their_own_adapter(
    serve: Callable[..., Served], texts: list[str]
) -> None:
    served = serve("llama")
    right = {
        (n, text): answer
        for n in range(3)
        for text, answer in zip(
            texts[:8], answers(served.done, n, texts[:8], longest=8), strict=True
        )
    }
    asked = [(n, text) for text in texts[:8] for n in range(3)]
    models = [("plain", "a"), ("north", "north/b"), ("south", "south/c")]

    async def ask(n: int, text: str) -> str:
        key, model = models[n]
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key=served.keys[key], max_retries=0
        ) as client:
            done = await client.completions.create(model=model, prompt=text, max_tokens=8)
            return done.choices[0].text

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(ask(*one) for one in asked))

    given = asyncio.run(all_of_them())
    assert given == [right[one] for one in asked]


def test_a_key_is_stored_hashed_and_a_revoked_one_is_refused_at_once(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve("minilm")
    stored = (tmp_path / "keys.json").read_text()
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    body = {"model": "a", "input": "hold"}
    assert served.post("/v1/classify", body).status_code == 200
    assert not any(key in stored or key[10:] in stored for key in served.keys.values())
    other = KeyFile(tmp_path / "keys.json")  # the command line's
    assert sorted((one.name, one.owner) for one in other.list()) == sorted(KEYS.items())
    other.revoke("plain")
    with pytest.raises(openai.AuthenticationError) as error:
        served.client().models.list()
    assert error.value.code == "invalid_api_key"
    assert served.post("/v1/classify", body, "north").status_code == 200
    for key in ("x", "sk-fedark-", served.keys["north"][:-1], "\u00e9"):
        headers = {"Authorization": b"Bearer " + key.encode()}
        refusal = httpx.post(
            f"{served.url}/v1/classify", json=body, headers=headers, trust_env=False
        )
        assert refusal.status_code == 401
        assert refusal.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    with pytest.raises(InputError, match="already"):
        other.create("north")
    (tmp_path / "keys.json").chmod(0o644)
    with pytest.raises(InputError, match="can be read or written by others"):
        KeyFile(tmp_path / "keys.json").list()


LONG = "line " * 60
BAD: dict[str, tuple[str, Any, int, str]] = {
    "no such model": ("completions", {"model": "zz", "prompt": "x"}, 404, "model_not_found"),
    "no model": ("completions", {"prompt": "x"}, 400, "model"),
    "malformed JSON": ("completions", b'{"model": "a", ', 400, "invalid_json"),
    "not UTF-8": ("completions", b'{"model": "a", "prompt": "\xff\xfe"}', 400, "invalid_json"),
    "half a surrogate pair": ("completions", b'{"model":"a","prompt":"\\ud800"}', 400, "invalid"),
    "nested deeply": ("completions", b"[" * 100_000, 400, "invalid_json"),
    "an array": ("completions", [1], 400, "invalid_json"),
    "nothing": ("completions", b"", 400, "invalid_json"),
    "a wrong type": ("completions", {"model": "a", "prompt": "x", "max_tokens": "5"}, 400, "max_t"),
    "a huge number": ("completions", b'{"model":"a","prompt":"x","seed":1' + b"0" * 400 + b"}",
                      400, "seed"),
    "no number": ("completions", b'{"model":"a","prompt":"x","temperature":NaN}', 400, "temp"),
    "too warm": ("completions", {"model": "a", "prompt": "x", "temperature": 9}, 400, "temp"),
    "many stops": ("completions", {"model": "a", "prompt": "x", "stop": ["y"] * 99}, 400, "stop"),
    "an empty stop": ("completions", {"model": "a", "prompt": "x", "stop": [""]}, 400, "stop"),
    "an unknown member": ("completions", {"model": "a", "prompt": "x", "best": 1}, 400, "best"),
    "what is not served": ("completions", {"model": "a", "prompt": "x", "n": 3}, 400, "n"),
    "an empty prompt": ("completions", {"model": "a", "prompt": ""}, 400, "prompt"),
    "tokens": ("completions", {"model": "a", "prompt": [1, 2]}, 400, "prompt"),
    "a long prompt": ("completions", {"model": "a", "prompt": LONG}, 400, "context_length_ex"),
    "a long prompt in a stream": ("completions", {"model": "a", "prompt": LONG, "stream": True},
                                  400, "context_length_exceeded"),
    "a long answer": ("completions", {"model": "a", "prompt": "x", "max_tokens": 99}, 400,
                      "context_length_exceeded"),
    "no messages": ("chat/completions", {"model": "a", "messages": []}, 400, "messages"),
    "a strange role": ("chat/completions",
                       {"model": "a", "messages": [{"role": "root", "content": "x"}]}, 400, "role"),
    "a picture": ("chat/completions", {"model": "a", "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,"messages.0.content"),
    "empty messages": ("chat/completions",
                       {"model": "a", "messages": [{"role": "user", "content": " "}]}, 400, "mess"),
    "tools": ("chat/completions", {"model": "a", "messages": USER, "tools": []}, 400, "tools"),
    "labels of a writer": ("classify", {"model": "a", "input": "x"}, 400, "no labels"),
    "vectors of a writer": ("embeddings", {"model": "a", "input": "x"}, 400, "no vectors"),
    "too much": ("classify", b" " * (5 << 20), 413, "bytes"),
}  # fmt: skip


def test_bad_input_gets_an_error_in_openais_form_and_nothing_of_what_was_sent(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    caplog.set_level(logging.DEBUG)
    for case, (path, body, status, told) in BAD.items():
        reply = served.post(f"/v1/{path}", body)
        assert reply.status_code == status, (case, reply.text)
        error = reply.json()
        assert error.keys() == {"error"}, case
        assert error["error"].keys() == {"message", "type", "param", "code"}, case
        assert told in json.dumps(error), (case, error)
        assert "line line" not in reply.text
        assert "Traceback" not in reply.text
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/v1/nothing").json()["error"]["message"] == "There is no such address."
        assert client.get("/v1/completions").status_code == 405
    # a request after all of these is answered as before
    done = served.client().completions.create(model="a", prompt="hold", max_tokens=4)
    assert done.choices[0].text == answers(served.done, 0, ["hold"], longest=4)[0]
    written = caplog.text
    assert not any(key in written for key in served.keys.values())
    assert "line line" not in written
    assert "Traceback" not in written
    assert not any(value in written for value in ("root", "image_url", "hold"))


@contextmanager
def _held(worker: Any) -> Iterator[None]:
    """A worker that stands still while this is open, whatever comes of the test."""
    held, begun = threading.Event(), threading.Event()

    def stand() -> None:
        held.set()
        begun.wait()

    thread = threading.Thread(target=worker.order, args=(stand,))
    thread.start()
    held.wait()
    try:
        yield
    finally:
        begun.set()
        thread.join()


def test_a_text_that_the_model_fails_on_takes_no_other_along(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("minilm")
    (worker,) = served.server.models.workers
    plain = worker.engine.label

    def fails(asked: list[Asked]) -> Any:
        if any("poison" in one.prompt for one in asked):
            raise RuntimeError(f"index out of range in {[one.prompt for one in asked]}")
        return plain(asked)

    monkeypatch.setattr(worker.engine, "label", fails)
    replies: dict[str, httpx.Response] = {}

    def ask(text: str) -> None:
        replies[text] = served.post("/v1/classify", {"model": "a", "input": text})

    threads = [threading.Thread(target=ask, args=(t,)) for t in ("hold", "poison secret", "open")]
    with _held(worker):
        for thread in threads:
            thread.start()
        while worker.waiting < 3:
            time.sleep(0.01)
    for thread in threads:
        thread.join(20)
    assert [replies[text].status_code for text in ("hold", "open", "poison secret")] == [
        200, 200, 500,
    ]  # fmt: skip
    assert (
        replies["poison secret"].json()["error"]["message"] == "The model failed at this request."
    )


def test_a_full_queue_answers_429_and_a_client_that_goes_away_frees_its_place(
    serve: Callable[..., Served],
) -> None:
    served = serve("minilm", waiting=2)
    (worker,) = served.server.models.workers
    body = json.dumps({"model": "a", "input": ["hold", "open"]}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with _held(worker):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(
                b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
                + f"Authorization: Bearer {served.keys['plain']}\r\n".encode()
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            while worker.waiting < 2:
                time.sleep(0.01)
            refusal = served.post("/v1/classify", {"model": "a", "input": "hold"})
            assert refusal.status_code == 429
            assert refusal.headers["retry-after"] == "1"
            assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
        while worker.waiting:  # it has gone without a word
            time.sleep(0.01)
    assert served.post("/v1/classify", {"model": "a", "input": "hold"}).status_code == 200


def test_a_stream_whose_client_goes_away_is_not_written_on(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("gpt2", training={"max_length": 60})
    (worker,) = served.server.models.workers
    plain, steps = worker.engine.write, threading.Semaphore(2)

    def slowly(begin: Any, drop: Any) -> Any:
        if begin or not drop:
            steps.acquire()
        return plain(begin, drop)

    monkeypatch.setattr(worker.engine, "write", slowly)
    stream = served.client().completions.create(
        model="a", prompt="open", max_tokens=50, stream=True, temperature=2.0, seed=1
    )
    next(iter(stream))
    assert worker.running == 1
    stream.response.close()
    deadline = time.monotonic() + 20
    while worker.running and time.monotonic() < deadline:
        steps.release()
        time.sleep(0.05)
    assert worker.running == 0
    assert not worker.engine._writer.busy


def test_a_body_that_does_not_come_and_an_answer_that_takes_too_long_are_ended(
    serve: Callable[..., Served],
) -> None:
    served = serve("minilm", limits=Limits(reading=0.2, answering=0.3))
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"Authorization: Bearer {served.keys['plain']}\r\nContent-Length: 10\r\n\r\n{{"
        sock.sendall(f"POST /v1/classify HTTP/1.1\r\nHost: x\r\n{head}".encode())
        assert b"408" in sock.recv(100)
    (worker,) = served.server.models.workers
    with _held(worker):
        late = served.post("/v1/classify", {"model": "a", "input": "hold"})
        assert (late.status_code, late.headers["retry-after"]) == (503, "10")
        assert worker.waiting == 0


def test_models_are_loaded_replaced_and_unloaded_while_it_runs(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve()
    models, client = served.server.models, served.client()

    def write() -> str:
        return (
            client.completions.create(model="a", prompt="open line", max_tokens=6).choices[0].text
        )

    before = write()
    models.load("a", adapter(served.done, 7))
    assert write() == answers(served.done, 7, ["open line"], longest=6)[0] != before
    (tmp_path / "list.toml").write_text('[models]\n"a" = "adapter-gpt2"\n"broken" = "nowhere"\n')
    said: list[str] = []
    models._say = said.append
    models.follow(read_list(tmp_path / "list.toml"))
    assert any("broken is not served" in text for text in said)
    assert [one.name for one in models] == ["a"]
    assert served.post("/v1/models", {}).status_code == 405
    with pytest.raises(openai.NotFoundError):
        served.client("north").completions.create(model="north/b", prompt="x")
    assert httpx.get(f"{served.url}/ready").status_code == 200
    models.follow({})
    assert httpx.get(f"{served.url}/ready").status_code == 503
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_adapters_of_other_terms_share_the_base_in_memory_and_of_another_base_are_refused(
    serve: Callable[..., Served], finish: Callable[..., Any]
) -> None:
    served = serve("minilm")
    models, done = served.server.models, served.done
    other = done.terms.model_copy(update={"name": "renamed", "prompt": "{a} {b}"})
    models.load("renamed", Adapter(other, adapter(done, 5).flat))
    assert len(models.workers) == 1
    reply = served.post("/v1/classify", {"model": "renamed", "input": {"a": "open", "b": "line"}})
    model = load(adapter(done, 5), str(done.base))
    likely = model.probabilities(["open line"])[0]
    assert list(reply.json()["data"][0]["probabilities"].values()) == pytest.approx(
        likely.tolist(), abs=2e-5
    )
    refusal = served.post("/v1/classify", {"model": "renamed", "input": "open line"})
    assert "a, b" in refusal.json()["error"]["message"]
    terms = done.tiny.terms(method="head").model_copy(update={"weights": done.terms.weights})
    models.load("head", Adapter(terms, np.zeros(terms.travelling, "f4")))
    first, second = (one.engine._mixed.task.scorer.body for one in models.workers)
    ours = dict(first.named_parameters())
    shared = [
        name
        for name, value in second.named_parameters()
        for key, own in ours.items()
        if key.endswith(name) and own.data_ptr() == value.data_ptr()
    ]
    assert len(shared) > 20
    with pytest.raises(ModelError, match="other weights"):
        models.load("x", replace(adapter(done, 1), terms=finish("bert").terms.model_copy(
            update={"weights": "1" * 96})))  # fmt: skip


def test_without_tls_only_this_machine_is_listened_to(tmp_path: Path) -> None:
    for listen in ("0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.org:1"):
        with pytest.raises(InputError, match="others could read"):
            Place.parse(listen)
        assert Place.parse(listen, tmp_path, tmp_path).cert == tmp_path
    for listen in ("127.0.0.1:80", "localhost:80", "[::1]:80"):
        assert Place.parse(listen).port == 80
    for listen in ("127.0.0.1", "127.0.0.1:x", ":80", "127.0.0.1:99999"):
        with pytest.raises(InputError, match="HOST:PORT"):
            Place.parse(listen)
    with pytest.raises(InputError, match="needs both"):
        Place.parse("127.0.0.1:80", cert=tmp_path)


def test_names_of_models_are_checked(tmp_path: Path, finish: Callable[..., Any]) -> None:
    assert named(["x/adapter-a", "b=y"]) == {"a": Path("x/adapter-a"), "b": Path("y")}
    with pytest.raises(InputError, match="Two adapters"):
        named(["x/a", "y/adapter-a"])
    for text in ("models = 1", "[models]\na = 1", "[models]\n[x]\n", "\x00", "[models"):
        (tmp_path / "m.toml").write_text(text)
        with pytest.raises(InputError):
            read_list(tmp_path / "m.toml")
    done = finish("minilm")
    models = Models(Clear(str(done.base)))
    for name in ("", "a/b/c", "/a", "a b", "../x", "a\n", "A/b"):
        with pytest.raises(InputError):
            models.load(name, read_adapter(done.folder))


@pytest.mark.slow
def test_the_command_serves_follows_its_list_and_ends_in_order(
    finish: Callable[..., Any], tmp_path: Path
) -> None:
    done = finish("minilm")
    listed = tmp_path / "models.toml"
    listed.write_text('[models]\n"one" = "adapter-minilm"\n')
    command = [
        sys.executable, "-c", "from fedark.cli import main; main()", "serve",
        "--models", str(listed), "--base", str(done.base),
        "--listen", "127.0.0.1:0", "--metrics", "0",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        key = process.stdout.readline().split()[-1]
        told: list[dict[str, Any]] = []

        def until(text: str) -> str:
            for line in process.stderr or ():
                if line.startswith("{"):
                    told.append(json.loads(line))
                    if text in told[-1]["text"]:
                        return str(told[-1]["text"])
            raise AssertionError(told)

        metrics = until("metrics on").split()[-1]
        url = until("listening on").split()[-1]
        body = json.dumps({"model": "one", "input": "open the secret line"})
        curl = ["curl", "-sS", "-H", f"Authorization: Bearer {key}", "-d", body, f"{url}/classify"]
        found = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
        assert found["data"][0]["label"] in done.terms.labels
        counts = httpx.get(metrics).text
        assert (
            'fedark_serve_requests_total{model="one",route="/v1/classify",status="200"}' in counts
        )
        listed.write_text('[models]\n"two" = "adapter-minilm"\n')
        os.kill(process.pid, signal.SIGHUP)
        until("serving two")
        with openai.OpenAI(base_url=url, api_key=key) as client:
            assert [one.id for one in client.models.list()] == ["two"]
        os.kill(process.pid, signal.SIGTERM)
        until("stopped")
        assert process.wait(60) == 0
        written = json.dumps(told)
        assert "secret line" not in written
        assert key not in written
    finally:
        process.kill()
        process.communicate()


def test_an_order_that_fails_says_so_and_the_worker_goes_on(serve: Callable[..., Served]) -> None:
    served = serve("minilm")
    (worker,) = served.server.models.workers
    with pytest.raises(FedarkError):
        worker.order(lambda: 1 / 0)
    assert served.post("/v1/classify", {"model": "a", "input": "hold"}).status_code == 200


@pytest.mark.parametrize("name", ["minilm", "gpt2"])
def test_a_served_model_is_asked_before_and_after(finish: Callable[..., Any], name: str) -> None:
    done = finish(name)
    prompts = ["open line now", "hold", "shed the load at five"]
    model = load(read_adapter(done.folder), str(done.base))

    def right(flat: Any) -> list[str]:
        model.task.set_flat(flat)
        if not done.terms.labels:
            return model.answers(prompts)
        return [done.terms.labels[row] for row in model.probabilities(prompts).argmax(1)]

    found = ask(read_adapter(done.folder), str(done.base), prompts)
    before, after = right(model.task.initial()), right(done.flat)
    assert found == list(zip(before, after, strict=True))
    assert before != after


def test_the_command_printed_at_the_end_of_a_run_names_folder_and_base(
    finish: Callable[..., Any],
) -> None:
    done = finish("minilm")
    command = how_to_serve(done.folder, str(done.base)).split()
    assert command == ["fedark", "serve", str(done.folder), "--base", str(done.base)]
    assert named(command[2:3]) == {"minilm": done.folder}
    assert how_to_serve(done.folder).endswith("--base FOLDER_OF_THE_BASE")
