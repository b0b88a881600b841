"""The channel takes frames and nothing else, never hangs, and believes no claimed length."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.enclave.channel import MAX_FRAME, Channel, ChannelTimeout, Disconnected, message_limit
from fedark.foundation.errors import ProtocolError
from fedark.v1 import enclave_pb2 as pb

ECHO = pb.Frame(progress=pb.Progress(stage="a stage", done=1, total=2))


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the raw socket at its other end."""
    ours, theirs = socket.socketpair()
    with Channel(ours.detach()) as channel, theirs:
        yield channel, theirs


def framed(body: bytes, size: int | None = None) -> bytes:
    return (len(body) if size is None else size).to_bytes(4, "big") + body


def test_what_is_sent_arrives(pair) -> None:
    channel, raw = pair
    other = Channel(os.dup(raw.fileno()))
    with other:
        channel.send(ECHO, soon())
        assert other.receive(soon()) == ECHO


def test_a_frame_of_the_largest_size_arrives_through_a_small_buffer(pair) -> None:
    channel, raw = pair
    frame = pb.Frame(reply=pb.Reply(update=pb.Update(protected=b"x" * (MAX_FRAME - 32))))
    with Channel(os.dup(raw.fileno())) as other:
        sender = threading.Thread(target=channel.send, args=(frame, soon()))
        sender.start()
        assert other.receive(soon()) == frame
        sender.join()


def test_a_frame_over_the_limit_is_not_sent(pair) -> None:
    channel, raw = pair
    with pytest.raises(ProtocolError, match="over the limit"):
        channel.send(pb.Frame(reply=pb.Reply(update=pb.Update(protected=bytes(MAX_FRAME)))), soon())
    raw.setblocking(False)
    with pytest.raises(BlockingIOError):
        raw.recv(1)


def test_a_claimed_length_over_the_limit_is_refused_before_a_byte_of_it_comes(pair) -> None:
    channel, raw = pair
    raw.sendall(framed(b"", size=MAX_FRAME + 1))
    with pytest.raises(ProtocolError, match="the limit is"):
        channel.receive(soon())


@pytest.mark.parametrize("size", [MAX_FRAME, MAX_FRAME + 1, 3 * MAX_FRAME - 20, 3 * MAX_FRAME + 5])
def test_a_frame_of_several_pieces_arrives_whole_where_the_contract_asks_for_it(
    pair, size: int
) -> None:
    channel, raw = pair
    frame = pb.Frame(reply=pb.Reply(update=pb.Update(protected=os.urandom(size))))
    with Channel(os.dup(raw.fileno())) as other:
        channel.limit = other.limit = message_limit(1_000_000)
        sender = threading.Thread(
            target=lambda: (channel.send(frame, soon()), channel.send(ECHO, soon()))
        )
        sender.start()
        assert other.receive(soon()) == frame
        assert other.receive(soon()) == ECHO
        sender.join()


def test_pieces_that_add_up_to_more_than_the_limit_are_refused_before_the_last_of_them_is_read(
    pair,
) -> None:
    channel, raw = pair
    channel.limit = MAX_FRAME + 100
    more = 1 << 31
    sent = framed(bytes(1000), size=more | 1000) + framed(b"", size=MAX_FRAME - 899)
    raw.sendall(sent)
    with pytest.raises(ProtocolError, match="the limit is"):
        channel.receive(soon())


def test_one_piece_over_its_limit_is_refused_whatever_the_frame_may_have(pair) -> None:
    channel, raw = pair
    channel.limit = message_limit(25_000_000)
    raw.sendall(framed(b"", size=MAX_FRAME + 1))
    with pytest.raises(ProtocolError, match="the limit is"):
        channel.receive(soon())


def test_empty_pieces_without_end_are_refused_at_the_first(pair) -> None:
    channel, raw = pair
    raw.sendall((1 << 31).to_bytes(4, "big") * 2)
    with pytest.raises(ProtocolError, match="empty piece"):
        channel.receive(soon())


def test_an_end_between_two_pieces_is_a_broken_protocol(pair) -> None:
    channel, raw = pair
    raw.sendall(framed(b"ab", size=(1 << 31) | 2))
    raw.close()
    with pytest.raises(ProtocolError, match="middle of a frame"):
        channel.receive(soon())


def test_frames_that_arrive_byte_by_byte_are_put_together(pair) -> None:
    channel, raw = pair
    data = framed(ECHO.SerializeToString()) * 2

    def trickle() -> None:
        for number in data:
            raw.sendall(bytes([number]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert [channel.receive(soon()), channel.receive(soon())] == [ECHO, ECHO]
    sender.join()


def test_an_end_between_frames_is_a_disconnection(pair) -> None:
    channel, raw = pair
    raw.sendall(framed(ECHO.SerializeToString()))
    raw.close()
    assert channel.receive(soon()) == ECHO
    with pytest.raises(Disconnected):
        channel.receive(soon())


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_an_end_inside_a_frame_is_a_broken_protocol(pair, cut: int) -> None:
    channel, raw = pair
    raw.sendall(framed(ECHO.SerializeToString())[:cut])
    raw.close()
    with pytest.raises(ProtocolError, match="middle of a frame"):
        channel.receive(soon())


@pytest.mark.parametrize("body", [b"\xff" * 8, b"\x0a\xff", b"not protobuf at all"])
def test_garbage_is_refused(pair, body: bytes) -> None:
    channel, raw = pair
    raw.sendall(framed(body))
    with pytest.raises(ProtocolError):
        channel.receive(soon())


@pytest.mark.parametrize("body", [b"", b"\xa2\x06\x01x"], ids=["empty", "unknown field"])
def test_a_frame_without_a_kind_is_refused(pair, body: bytes) -> None:
    channel, raw = pair
    raw.sendall(framed(body))
    with pytest.raises(ProtocolError, match="no kind"):
        channel.receive(soon())


@pytest.mark.parametrize("sent", [b"", b"\0\0", framed(b"x" * 10)[:9]])
def test_silence_ends_at_the_deadline(pair, sent: bytes) -> None:
    channel, raw = pair
    raw.sendall(sent)
    with pytest.raises(ChannelTimeout):
        channel.receive(soon(0.05))


def test_a_reader_that_reads_nothing_does_not_hold_the_sender(pair) -> None:
    channel, _ = pair
    frame = pb.Frame(reply=pb.Reply(update=pb.Update(protected=bytes(MAX_FRAME // 2))))
    with pytest.raises(ChannelTimeout):
        channel.send(frame, soon(0.05))


def test_sending_to_nobody_is_a_disconnection(pair) -> None:
    channel, raw = pair
    raw.close()
    with pytest.raises(Disconnected):
        channel.send(ECHO, soon())


def test_closing_twice_is_harmless(pair) -> None:
    channel, _ = pair
    channel.close()
    channel.close()


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(framed)))
def test_any_bytes_give_a_frame_or_a_refusal(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with Channel(ours.detach()) as channel:
        theirs.sendall(data)
        theirs.close()
        try:
            while True:
                assert channel.receive(soon()).WhichOneof("kind") is not None
        except (ProtocolError, Disconnected):
            pass
