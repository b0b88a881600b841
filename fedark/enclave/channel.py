"""Frames over the one descriptor that host and enclave share, in pieces: a header of four bytes,
big-endian, then its bytes.

The header's lowest 31 bits are the piece's length, at most 8 MiB; its top bit says that another
piece of the same frame follows. A frame is one unit: it is handed on whole, and all its pieces
together are at most `Channel.limit`, which starts at one piece and is raised to what the contract's
adapters need (`message_limit`) once the run configuration is known on both sides.

Both sides treat the other as a stranger: a length above a limit, an empty piece with another behind
it, bytes that are no frame, a frame without a kind, and an end in the middle of one are
ProtocolErrors. The host's side has deadlines and never waits for ever; the enclave's side waits for
its host, whose death closes the descriptor. Only read(2), write(2) and poll(2) are used: inside the
sandbox no socket call exists. Sending holds a frame twice, as fields and as bytes; so does
receiving.
"""

from __future__ import annotations

import os
import select
import time

from google.protobuf.message import DecodeError, EncodeError

from fedark.foundation.closing import Closing
from fedark.foundation.errors import ProtocolError
from fedark.v1 import enclave_pb2 as pb

__all__ = ["MAX_FRAME", "Channel", "ChannelTimeout", "Disconnected", "Torn", "message_limit"]

MAX_FRAME = 8 << 20
"""Of one piece; and of a whole frame until `Channel.limit` is raised."""
_BYTES_A_VALUE = 32
_HEADER = 4
_MORE = 1 << 31
_CHUNK = 1 << 18


def message_limit(values: int) -> int:
    """Bytes that a frame may have where adapters of `values` travelling values are trained.

    The largest is the aggregator's answer to the end of a round with its sealed checkpoint: the
    next adapter twice and the best one so far (4 bytes a value), and two moments of the server's
    optimiser (8 each), 28 in all.
    """
    return MAX_FRAME + _BYTES_A_VALUE * values


class Torn(ProtocolError):
    """The other side ended in the middle of a frame."""


class Disconnected(Exception):
    """The other side closed the channel between two frames, or is gone."""


class ChannelTimeout(Exception):
    """The deadline passed; the stream is in an unknown place and must not be used again."""


class Channel(Closing):
    """One side of the channel. Owns the descriptor, which is made non-blocking.

    Attributes:
        limit: bytes that a frame may have.

    Every method takes a `deadline` on `time.monotonic()`'s clock; None waits for ever.
    """

    def __init__(self, descriptor: int) -> None:
        self.limit = MAX_FRAME
        self._descriptor = descriptor
        self._poll = select.poll()
        os.set_blocking(descriptor, False)

    def send(self, frame: pb.Frame, deadline: float | None = None) -> None:
        """Send one frame.

        Raises:
            ProtocolError: the frame is over the limit; nothing was sent.
            Disconnected, ChannelTimeout: the channel is of no more use.
        """
        size = frame.ByteSize()
        if size > self.limit:
            raise ProtocolError(
                f"A frame of {size} bytes is over the limit of {self.limit}.",
                safe="Nothing was sent.",
            )
        try:
            body = memoryview(frame.SerializeToString())
        except EncodeError:
            raise ProtocolError("A frame cannot be encoded.", safe="Nothing was sent.") from None
        for start in range(0, max(1, len(body)), MAX_FRAME):
            piece = body[start : start + MAX_FRAME]
            more = _MORE if start + MAX_FRAME < len(body) else 0
            # A small frame is one write: the reader wakes once.
            first = piece[: _CHUNK - _HEADER]
            self._write(
                memoryview((more | len(piece)).to_bytes(_HEADER, "big") + bytes(first)), deadline
            )
            self._write(piece[len(first) :], deadline)

    def _write(self, rest: memoryview, deadline: float | None) -> None:
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
        body, more = bytearray(), True
        while more:
            start = bytearray()
            self._read(start, _HEADER, deadline, first=not body)
            header = int.from_bytes(start, "big")
            more, size = bool(header & _MORE), header & ~_MORE
            if size > MAX_FRAME or len(body) + size > self.limit:
                raise ProtocolError(
                    f"A frame claims {len(body) + size} bytes; the limit is {self.limit}."
                )
            if more and not size:
                raise ProtocolError("A frame over an enclave's channel has an empty piece.")
            self._read(body, size, deadline)
        frame = pb.Frame()
        try:
            frame.ParseFromString(body)  # takes any buffer: bytes(body) would be one more copy
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

    def _read(
        self, data: bytearray, size: int, deadline: float | None, *, first: bool = False
    ) -> None:
        """Append `size` bytes. The buffer grows as they arrive: a claimed length alone reserves
        nothing.
        """
        end = len(data) + size
        while len(data) < end:
            try:
                part = os.read(self._descriptor, min(end - len(data), _CHUNK))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except ConnectionResetError:
                part = b""
            if not part:
                if first and not data:
                    raise Disconnected
                raise Torn("An enclave's channel ended in the middle of a frame.")
            data += part

    def _wait(self, event: int, deadline: float | None) -> None:
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._poll.register(self._descriptor, event)
        if not self._poll.poll(None if remaining is None else remaining * 1000):
            raise ChannelTimeout
