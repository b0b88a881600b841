"""What a node keeps of a run: an answer that spent nonces stays until the run ends, of the others
the last few.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import SigningKey
from fedark.stages import runs
from fedark.stages.runs import RunMemory

RUN = "0" * 32


@pytest.fixture
def memory(tmp_path: Path) -> RunMemory:
    return RunMemory(tmp_path, SigningKey())


def test_of_the_answers_the_last_four_are_kept(memory: RunMemory) -> None:
    for number in range(9):
        memory.keep(RUN, b"request %d" % number, b"reply %d" % number)
    kept = [memory.answer(RUN, b"request %d" % number) for number in range(9)]
    assert kept == [None] * 5 + [b"reply %d" % number for number in range(5, 9)]


def test_no_later_answer_displaces_one_that_spent_nonces_but_the_runs_end_does(
    memory: RunMemory,
) -> None:
    for stage in ("attest", "release"):
        memory.keep(RUN, stage.encode(), b"reply to " + stage.encode(), once=stage)
    for number in range(9):
        memory.keep(RUN, b"request %d" % number, b"reply")
    assert memory.answer(RUN, b"attest") == b"reply to attest"
    assert memory.answer(RUN, b"release") == b"reply to release"
    memory.forget(RUN)
    assert memory.answer(RUN, b"attest") is None
    assert memory.answer(RUN, b"request 8") == b"reply"


def test_of_a_stage_that_spends_nonces_one_answer_is_kept_the_newest(memory: RunMemory) -> None:
    for number in range(3):
        memory.keep(RUN, b"request %d" % number, b"reply %d" % number, once="attest")
    memory.keep(RUN, b"other", b"reply", once="release")
    assert [memory.answer(RUN, b"request %d" % number) for number in range(3)] == [
        None,
        None,
        b"reply 2",
    ]
    assert len([path for path in memory.folder(RUN).rglob("*") if path.is_file()]) == 2


def test_a_run_cannot_fill_the_disk_with_requests(
    memory: RunMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_MOST_BEGUN", 3)
    assert not any(memory.begin(RUN, b"request %d" % number) for number in range(3))
    with pytest.raises(ProtocolError, match="without end"):
        memory.begin(RUN, b"request 3")
    assert memory.begin(RUN, b"request 2"), "what was begun stays so"
