"""What the host of an enclave keeps, so that an enclave that died can go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from fedark.enclave.durable import JOURNAL, STATE, DurableEnclave
from fedark.foundation.errors import StorageError
from fedark.v1 import enclave_pb2 as pb


class Quiet:
    """An enclave that answers everything and changes no state; it counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def call(self, call: pb.Call, **_: Any) -> pb.Reply:
        self.asked += 1
        return pb.Reply(done=pb.Done())

    def close(self) -> None:
        pass


def submit(party: str) -> pb.Call:
    return pb.Call(submit=pb.Submit(round=1, party=party, protected=b"x" * 90))


def test_a_message_that_is_brought_again_is_journaled_once(tmp_path: Path) -> None:
    inner = Quiet()
    durable = DurableEnclave(
        lambda checkpoint: inner, tmp_path, journal=frozenset({"submit"}), ends="close", say=str
    )
    for party in ("north", "south", "north", "north"):
        durable.call(submit(party))
    assert inner.asked == 4
    entries = sorted((tmp_path / JOURNAL).iterdir())
    assert [pb.Call.FromString(path.read_bytes()).submit.party for path in entries] == [
        "north",
        "south",
    ]


class Changing(Quiet):
    """Each call changes its state."""

    def call(self, call: pb.Call, **_: Any) -> pb.Reply:
        reply = super().call(call)
        reply.checkpoint = bytes(40)
        return reply


def test_a_kept_state_is_gone_on_with_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    durable = DurableEnclave(lambda checkpoint: Changing(), tmp_path)
    durable.call(submit("north"))
    begun: list[bytes] = []

    def start(checkpoint: bytes) -> Quiet:
        begun.append(checkpoint)
        return Quiet()

    again = DurableEnclave(start, tmp_path)
    assert again.resumes
    assert again.done(submit("north")) == pb.Reply(done=pb.Done())
    again.wake()
    assert begun == [bytes(40)]
    state = tmp_path / STATE
    whole = state.read_bytes()
    for at in range(0, len(whole), 7):
        state.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StorageError, match="damaged or of another version"):
            DurableEnclave(start, tmp_path)
    for data in (b"", whole[:-1], whole + b"x", hashlib.sha256(b"\xa0").digest() + b"\xa0"):
        state.write_bytes(data)
        with pytest.raises(StorageError, match="damaged or of another version"):
            DurableEnclave(start, tmp_path)
