"""Adapters of 100 MB fit through an enclave's border, sealed and masked, in bounded memory."""

from __future__ import annotations

import os
import resource
import socket
import time

import pytest

from fedark.contract.contract import MAX_TRAVELLING
from fedark.enclave.channel import Channel, message_limit
from fedark.v1 import enclave_pb2 as pb

VALUES = 25_000_000


def test_the_contract_admits_adapters_of_a_hundred_megabytes() -> None:
    assert MAX_TRAVELLING >= VALUES


@pytest.mark.slow
def test_the_largest_message_of_a_hundred_megabyte_adapter_crosses_in_four_times_its_size() -> None:
    """In a child of its own, whose peak memory is this message's alone."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        status = 1
        try:
            with Channel(theirs.detach()) as channel:
                channel.limit = message_limit(VALUES)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                frame = channel.receive(time.monotonic() + 200)
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
                channel.send(
                    pb.Frame(
                        progress=pb.Progress(
                            stage="grown", done=max(grown, 0), total=frame.ByteSize()
                        )
                    )
                )
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    with Channel(ours.detach()) as channel:
        channel.limit = message_limit(VALUES)
        frame = pb.Frame(
            call=pb.Call(
                submit=pb.Submit(round=1, party="north", protected=os.urandom(4 * VALUES + 200))
            )
        )
        begun = time.monotonic()
        channel.send(frame, begun + 200)
        answer = channel.receive(begun + 200).progress
    assert os.waitpid(child, 0)[1] == 0
    assert answer.total == frame.ByteSize()
    assert answer.done < 4 * frame.ByteSize()
