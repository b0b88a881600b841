"""Whatever bytes another party sends to any parser: no crash, no hang, nothing accepted that was
not meant.

Here a short slice for each parser; `make fuzz` tries a million inputs each (`run.py`).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import cbor2
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine import Target, bent, fuzz
from targets import PARSERS, targets

from fedark.v1 import stage_pb2

INPUTS = int(os.environ.get("FEDARK_FUZZ_SLICE", "150"))


@pytest.mark.parametrize("name", PARSERS)
def test_no_bent_sample_crashes_hangs_or_is_accepted(name: str) -> None:
    done, failures = fuzz(targets()[name], INPUTS, seed=0)
    assert done == INPUTS
    assert not failures, [(failure.what, failure.data.hex()) for failure in failures]


def test_every_parser_has_a_target_and_accepts_its_samples_where_it_should() -> None:
    found = targets()
    assert set(found) == set(PARSERS)
    for name in (
        "cbor",
        "evidence",
        "cose",
        "simulated token",
        "snp token",
        "tdx quote",
        "nitro document",
        "guest token",
        "grant",
    ):
        for sample in found[name].samples:
            found[name].parse(sample)


@pytest.mark.parametrize("role", ["provider", "customer"])
def test_a_digest_that_no_contract_has_is_refused_before_a_file_is_looked_for(role: str) -> None:
    """Found by fuzzing: as a file name it was too long, and the node failed instead of refusing."""
    target = targets()[f"stage request, {role}"]
    for sample in target.samples:
        message = stage_pb2.StageRequest.FromString(sample)
        message.contract_digest = bytes(300)
        target.parse(message.SerializeToString())


@pytest.mark.parametrize(
    ("parse", "kind", "why"),
    [
        (lambda data: data[999], "open", "crashed: IndexError"),
        (lambda data: data, "closed", "was accepted"),
        (lambda data: data + b"x", "exact", "another encoding"),
    ],
)
def test_the_fuzzer_itself_finds_what_it_is_for(parse, kind: str, why: str) -> None:
    done, failures = fuzz(Target("itself", [b"sample"], parse, kind), 1000, seed=1)
    assert failures
    assert all(why in failure.what for failure in failures)
    assert done < 1000


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.HANG_SECONDS", 0.2)

    def loop(data: bytes) -> None:
        while True:
            pass

    _, failures = fuzz(Target("loop", [b"sample"], loop, "open"), 10, seed=1)
    assert [failure.what for failure in failures] == ["took over 0.2 s"]


def test_inputs_follow_from_the_seed() -> None:
    first = fuzz_inputs(7)
    assert fuzz_inputs(7) == first
    assert fuzz_inputs(8) != first
    assert len(set(first)) > 150


def test_what_is_tagged_is_bent_inside_its_tag() -> None:
    sample = cbor2.dumps(
        cbor2.CBORTag(18, [cbor2.dumps({1: b"x" * 20}), {}, b"payload", b"signature"])
    )
    fields = [set(), set(), set(), set()]
    for data in bent(Target("tagged", [sample], bytes, "open"), 2000, seed=1):
        with suppress(Exception):
            for seen, value in zip(fields, cbor2.loads(data).value, strict=True):
                seen.add(repr(value))
    assert min(map(len, fields)) > 20


def fuzz_inputs(seed: int) -> list[bytes]:
    seen: list[bytes] = []
    fuzz(
        Target("inputs", [bytes(range(200))], seen.append, "open", structure=False), 200, seed=seed
    )
    return seen
