"""The target that anyone can reach who finds a host's port: bytes on a connection, before any key
or signature counts.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from engine import Target

from fedark.operate.host.front import FLEET_ROUTES, Front
from fedark.operate.host.service import MAX_BODY, PREFIX, HostAnswer, HostRequest

_KEY = "a public key"
_FLEET = sorted(FLEET_ROUTES)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nflwr-x: y\r\n\r\nok"
_WORDS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b": ", b"POST ", b" HTTP/1.1\r\n",
    b" HTTP/1.0\r\n", b"0\r\n\r\n",
    b"//", b"%2e",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n", b"Content-Length: 0\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 5, 5\r\n", b"Content-Length: +5\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"Content-Length : 5\r\n",
    b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Connection: close\r\n",
    b"Connection: content-length\r\n", b" folded\r\n",
    b"flwr-public-key: eA==\r\n", b"flwr-x: y\r\n", b"Host: b\r\n",
    b"x: " + b"y" * 20_000 + b"\r\n",
)  # fmt: skip
_HEAD = re.compile(rb"POST (/[a-z0-9/-]+) HTTP/1\.1\r\n((?:[!-9;-~]+: [^\r\n\0]*\r\n)+)\r\n")


class _Writer:
    """What a connection is written to; where there is `answered`, every request gets an answer
    there at once.
    """

    def __init__(self) -> None:
        self.data = b""
        self.answered: asyncio.StreamReader | None = None

    def write(self, data: bytes) -> None:
        self.data += data
        if self.answered is not None and data.startswith(b"POST "):
            self.answered.feed_data(_ANSWER)

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...


def strangers() -> Iterator[Target]:
    """The front of a host, with a SuperLink that says yes."""
    runner, onward = asyncio.Runner(), _Writer()

    class Own:
        def begin(
            self, method: str, target: str, headers: dict[str, str]
        ) -> HostRequest | HostAnswer:
            if not target.startswith(PREFIX):
                raise AssertionError("the host was shown another request than came")
            length = int(headers.get("content-length", 0))

            def act(body: bytes) -> HostAnswer:
                if length != len(body) or len(body) > MAX_BODY:
                    raise AssertionError("the host was shown another body than came")
                return HostAnswer(200, "text/plain", b"ok")

            return HostRequest("", MAX_BODY, act)

        def finish(self, call: HostRequest, body: bytes) -> HostAnswer:
            return call.act(body)

    async def connected(*_: Any, **__: Any) -> tuple[asyncio.StreamReader, _Writer]:
        onward.answered = asyncio.StreamReader()
        return onward.answered, onward

    front = Front(
        tls=None, upstream=Path("none.sock"), admits=lambda key: key == _KEY, service=Own()  # type: ignore[arg-type]
    )  # fmt: skip

    async def serve(data: bytes) -> bytes:
        reader, writer = asyncio.StreamReader(), _Writer()
        reader.feed_data(data)
        reader.feed_eof()
        onward.data = b""
        with patch("asyncio.open_unix_connection", connected), patch("asyncio.to_thread", _at_once):
            await front.serve(reader, writer, "192.0.2.1")  # type: ignore[arg-type]
        return writer.data

    def shown(data: bytes) -> SimpleNamespace:
        answer = runner.run(serve(data))
        if answer and not re.match(rb"HTTP/1\.1 (200|400|401|404|413|502) ", answer):
            raise AssertionError("an answer that a front does not give")
        return SimpleNamespace(answer=answer, passed=_requests(onward.data))

    key = base64.b64encode(_KEY.encode())
    fleet = (
        b"POST %s HTTP/1.1\r\nHost: a\r\nAccept: x/y\r\nContent-Length: 5\r\nflwr-public-key:"
        b" %s\r\n\r\nhello"
    )
    push = fleet % (_FLEET[0].encode(), key)
    samples = [
        push,
        push + fleet % (_FLEET[-1].encode(), key),
        f"GET {PREFIX}jobs HTTP/1.1\r\nHost: a\r\nfedark-version: 1\r\n\r\n".encode(),
        f"PUT {PREFIX}offers HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\noffer".encode() + push,
    ]
    assert [len(shown(sample).passed) for sample in samples] == [1, 2, 0, 1]
    assert all(shown(sample).answer.startswith(b"HTTP/1.1 200 ") for sample in samples)
    yield Target("front", samples, shown, "open", structure=False, words=_WORDS)


async def _at_once(function: Any, *args: Any) -> Any:
    return function(*args)


def _requests(data: bytes) -> list[str]:
    """The requests in what was passed on, read by other code than wrote it, and more strictly; the
    last may lack its end.
    """
    found = []
    while data:
        head = _HEAD.match(data)
        if head is None or head[1].decode() not in FLEET_ROUTES:
            raise AssertionError("something else than a request of a node was passed on")
        lines = [line.partition(b": ")[::2] for line in head[2].split(b"\r\n")[:-1]]
        names = [name for name, _ in lines]
        lengths = [value for name, value in lines if name == b"content-length"]
        allowed = {b"host", b"content-length", b"content-type", b"accept"}
        if len(lengths) != 1 or not lengths[0].isdigit() or names.count(b"host") != 1:
            raise AssertionError("a request without one length and one host was passed on")
        if any(name not in allowed and not name.startswith(b"flwr-") for name in names):
            raise AssertionError("a header that is not a node's was passed on")
        if [value for name, value in lines if name == b"flwr-public-key"] != [
            base64.b64encode(_KEY.encode())
        ]:
            raise AssertionError("a request without an approved node's key was passed on")
        found.append(head[1].decode())
        data = data[head.end() + int(lengths[0]) :]
    return found
