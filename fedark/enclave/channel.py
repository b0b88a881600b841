"""Frames over the one descriptor that host and enclave share: four bytes of length, big-endian, then that many of `Frame`.

Both sides treat the other as a stranger: a length above 8 MiB, bytes that are no frame, a frame without a kind, and an end in the
middle of one are ProtocolErrors. The host's side has deadlines and never waits for ever; the enclave's side waits for its host,
whose death closes the descriptor. Only read(2), write(2) and poll(2) are used: inside the sandbox no socket call exists.
"""

from __future__ import annotations

import os
import select
import time
from types import TracebackType

from google.protobuf.message import DecodeError, EncodeError

from fedark.errors import ProtocolError
from fedark.v1 import enclave_pb2 as pb

__all__ = ["MAX_FRAME", "Channel", "ChannelTimeout", "Disconnected"]

MAX_FRAME = 8 << 20
_HEADER = 4
_CHUNK = 1 << 18


class Disconnected(Exception):
    """The other side closed the channel between two frames, or is gone."""


class ChannelTimeout(Exception):
    """The deadline passed; the stream is in an unknown place and must not be used again."""


class Channel:
    """One side of the channel. Owns the descriptor, which is made non-blocking.

    Every method takes a `deadline` on `time.monotonic()`'s clock; None waits for ever.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        os.set_blocking(descriptor, False)

    def send(self, frame: pb.Frame, deadline: float | None = None) -> None:
        """Send one frame.

        Raises:
            ProtocolError: the frame is over `MAX_FRAME`; nothing was sent.
            Disconnected, ChannelTimeout: the channel is of no more use.
        """
        size = frame.ByteSize()
        if size > MAX_FRAME:
            raise ProtocolError(f"A frame of {size} bytes is over the limit of {MAX_FRAME}.", safe="Nothing was sent.")
        try:
            body = frame.SerializeToString()
        except EncodeError:
            raise ProtocolError("A frame cannot be encoded.", safe="Nothing was sent.") from None
        rest = memoryview(len(body).to_bytes(_HEADER, "big") + body)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest[:_CHUNK]) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except (BrokenPipeError, ConnectionResetError):
                raise Disconnected from None

    def receive(self, deadline: float | None = None) -> pb.Frame:
        """The next frame.

        Raises:
            ProtocolError: what came is not a frame; the stream must not be used again.
            Disconnected: the other side ended, between two frames.
            ChannelTimeout: nothing whole came in time.
        """
        header = self._read(_HEADER, deadline, start=True)
        size = int.from_bytes(header, "big")
        if size > MAX_FRAME:
            raise ProtocolError(f"A frame claims {size} bytes; the limit is {MAX_FRAME}.")
        frame = pb.Frame()
        try:
            frame.ParseFromString(bytes(self._read(size, deadline, start=False)))
        except DecodeError:
            raise ProtocolError("What came over an enclave's channel is not a frame.") from None
        if frame.WhichOneof("kind") is None:
            raise ProtocolError("A frame over an enclave's channel has no kind.")
        return frame

    def close(self) -> None:
        """Close the descriptor; harmless when done twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read(self, size: int, deadline: float | None, *, start: bool) -> bytearray:
        # Grows as bytes arrive: a claimed length alone reserves nothing.
        data = bytearray()
        while len(data) < size:
            try:
                part = os.read(self._descriptor, min(size - len(data), _CHUNK))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                if start and not data:
                    raise Disconnected
                raise ProtocolError("An enclave's channel ended in the middle of a frame.")
            data += part
        return data

    def _wait(self, event: int, deadline: float | None) -> None:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._poll.register(self._descriptor, event)
        if not self._poll.poll(None if remaining is None else remaining * 1000):
            raise ChannelTimeout
