"""What the host of an enclave keeps, so that an enclave that died can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedark.enclave.durable import JOURNAL, DurableEnclave
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
