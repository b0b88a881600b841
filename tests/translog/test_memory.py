"""What a party remembers of another's log, and the views of a cohort: every way to show a log that
is not the one log.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.foundation import canonical
from fedark.foundation.errors import LogForked, LogRefused
from fedark.foundation.keys import SigningKey
from fedark.translog.head import TreeHead, sign_head
from fedark.translog.log import TransparencyLog
from fedark.translog.memory import HeadMemory, Witnessed
from fedark.translog.update import make_update
from fedark.translog.view import check_views, sign_view

Make = Callable[..., Any]
LABEL = "fedark/log-update/1"


def update(
    log: TransparencyLog,
    key: SigningKey,
    *,
    since: TreeHead | None = None,
    indexes: tuple[int, ...] = (),
    **changes: Any,
) -> bytes:
    values: dict[str, Any] = {
        "party": "north",
        "run_id": "run-1",
        "head": log.head(),
        "since": since,
        "indexes": indexes,
    }
    return make_update(log, key, **values | changes)


def take(memory: HeadMemory, data: bytes, key: SigningKey, **changes: str) -> Witnessed:
    return memory.take(
        data, key.public, **{"by": "maker", "party": "north", "run_id": "run-1"} | changes
    )


def resigned(data: bytes, key: SigningKey, **changes: Any) -> bytes:
    """The owner's own lie: its update with other fields, signed by it."""
    body = canonical.encode(canonical.decode(canonical.decode(data)["body"]) | changes)
    return canonical.encode({"body": body, "signature": key.sign(LABEL, body)})


def body_of(data: bytes) -> dict[str, Any]:
    body: dict[str, Any] = canonical.decode(canonical.decode(data)["body"])
    return body


# -- the good way


def test_the_first_head_is_remembered_and_later_ones_must_go_on_from_it(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, seen = make_log(count=3), None
    for number in range(3, 8):
        witnessed = take(memory, update(log, key, since=seen, indexes=(0, number - 1)), key)
        assert dict(witnessed.entries) == {0: make_entry(0), number - 1: make_entry(number - 1)}
        assert witnessed.find("attestation", evidence=make_entry(0).facts["evidence"]) == (
            0,
            make_entry(0),
        )
        seen = memory.last(key.public, by="maker")
        assert seen == witnessed.head == log.head()
        log.append(make_entry(number))


def test_a_head_may_be_shown_again_when_nothing_was_added(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=3)
    take(memory, update(log, key), key)
    assert take(memory, update(log, key, since=log.head()), key).head == log.head()


def test_logs_of_different_owners_are_remembered_apart(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey, tmp_path: Path
) -> None:
    other = SigningKey()
    second = TransparencyLog(tmp_path / "second.sqlite", other)
    second.append(make_entry(50))
    take(memory, update(make_log(count=3), key), key)
    take(memory, update(second, other), other)
    sizes = [
        head.size
        for head in (memory.last(key.public, by="a"), memory.last(other.public, by="b"))
        if head
    ]
    assert sizes == [3, 1]


def test_witnessed_entries_cannot_be_made_up() -> None:
    with pytest.raises(TypeError):
        Witnessed()


def test_an_entry_that_the_log_does_not_show_is_missed(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    witnessed = take(memory, update(make_log(count=3), key, indexes=(1,)), key)
    for kind, facts in (
        ("attestation", {"party": "south"}),
        ("release", {"party": "north"}),
        ("attestation", {"model": "m"}),
    ):
        with pytest.raises(LogRefused, match="does not show"):
            witnessed.find(kind, **facts)


# -- forks and rewinds


def forked(
    caught: pytest.ExceptionInfo[LogForked],
    memory: HeadMemory,
    key: SigningKey,
    earlier: TreeHead | None,
) -> None:
    """The earlier head is still remembered, and the proof lies in the file that the error names."""
    assert memory.last(key.public, by="maker") == earlier
    (path,) = (memory.path.parent / "forked-logs").iterdir()
    assert str(path) in caught.value.fix
    assert caught.value.safe
    assert path.stat().st_mode & 0o777 == 0o600
    proof = json.loads(path.read_bytes())
    assert (bytes.fromhex(proof["earlier"]), bytes.fromhex(proof["later"])) == caught.value.kept
    TreeHead.verify(bytes.fromhex(proof["earlier"]), key.public, by="maker")


def test_a_truncated_log_is_seen_by_a_party_that_remembers_an_old_head_also_after_its_restart(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, short = make_log(count=5), make_log("short", count=3)
    take(memory, update(log, key), key)
    memory.close()
    again = HeadMemory(memory.path)
    with pytest.raises(LogForked, match="has 3 entries and had 5") as caught:
        take(again, update(short, key), key)
    forked(caught, again, key, log.head())


def test_a_log_that_was_rewound_and_grew_again_is_seen(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, other = make_log(count=5), make_log("other", count=3)
    take(memory, update(log, key), key)
    for number in range(10, 15):
        other.append(make_entry(number))
    # The owner proves what it can: that its new head goes on from the tree of five entries that it
    # has now.
    five = sign_head(key, size=5, root=other._tree.root(5), time=log.head().time)
    with pytest.raises(LogForked, match="does not go on") as caught:
        take(memory, update(other, key, since=five), key)
    forked(caught, memory, key, log.head())


def test_a_log_that_was_rewritten_at_the_same_length_is_seen(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, other = make_log(count=5), make_log("other", count=5, party="south")
    take(memory, update(log, key), key)
    with pytest.raises(LogForked, match="two trees of 5 entries") as caught:
        take(memory, update(other, key), key)
    forked(caught, memory, key, log.head())
    later = TreeHead.verify(caught.value.kept[1], key.public, by="maker")
    assert (later.size, later.root != log.head().root) == (
        5,
        True,
    )  # two heads that prove it to anyone


def test_a_later_head_of_an_earlier_time_is_a_fork(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=3)
    take(memory, update(log, key), key)
    seen = log.head()
    log.append(make_entry(3))
    early = sign_head(key, size=4, root=log.head().root, time=5)
    with pytest.raises(LogForked, match="earlier time"):
        take(memory, resigned(update(log, key, since=seen), key, head=early.encoded), key)


def test_a_replayed_old_head_is_refused(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=3)
    old = update(log, key, run_id="run-0")
    take(memory, old, key, run_id="run-0")
    seen = log.head()
    log.append(make_entry(3))
    take(memory, update(log, key, since=seen), key)
    with pytest.raises(
        LogRefused, match="another party or run"
    ):  # the relay has nothing of this run to replay
        take(memory, old, key)
    with pytest.raises(
        LogForked, match="has 3 entries and had 4"
    ):  # the owner itself shows the old one
        take(memory, resigned(old, key, run_id="run-1"), key)


def test_an_answer_that_another_one_overtook_is_no_fork(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=2)
    take(memory, update(log, key), key)
    asked = log.head()  # two ask at the same time
    log.append(make_entry(2))
    first = update(log, key, since=asked)
    log.append(make_entry(3))
    second = update(log, key, since=asked)
    memory.take(second, key.public, by="maker", party="north", run_id="run-1", asked=asked)
    with pytest.raises(LogRefused, match="overtaken") as caught:
        memory.take(first, key.public, by="maker", party="north", run_id="run-1", asked=asked)
    assert not isinstance(caught.value, LogForked)
    assert not (memory.path.parent / "forked-logs").exists()
    # One that is older than the question itself was overtaken by nothing, and neither was another
    # tree of the same length.
    for lie, how in (
        ({"count": 1}, "has 1 entries and had 4"),
        ({"count": 4, "party": "south"}, "two trees of 4"),
    ):
        other = make_log(how, **lie)
        with pytest.raises(LogForked, match=how):
            memory.take(
                update(other, key),
                key.public,
                by="maker",
                party="north",
                run_id="run-1",
                asked=asked,
            )


def test_an_update_that_does_not_start_from_the_remembered_head_is_refused_and_remembered_nothing(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=2)
    first = log.head()
    log.append(make_entry(2))
    take(memory, update(log, key), key)
    known = log.head()
    log.append(make_entry(3))
    for since in (None, first):  # the relay dropped our head, or sent an older one in its place
        with pytest.raises(LogRefused, match="starts from") as caught:
            take(memory, update(log, key, since=since), key)
        assert not isinstance(caught.value, LogForked)
    assert memory.last(key.public, by="maker") == known
    with pytest.raises(LogRefused, match="starts from 3"):  # a party that has seen nothing
        take(HeadMemory(memory.path.with_name("fresh.sqlite")), update(log, key, since=known), key)


# -- lies about entries


def test_a_proof_for_another_leaf_is_refused(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    data = update(make_log(count=6), key, indexes=(2,))
    (shown,) = body_of(data)["entries"]
    for change in (
        {"entry": make_entry(3).encode()},
        {"entry": make_entry(99).encode()},
        {"index": 3},
        {"index": 6},
        {"index": -1},
        {"path": shown["path"][:-1]},
        {"path": [*shown["path"], bytes(32)]},
        {"path": shown["path"][::-1]},
    ):
        with pytest.raises(LogRefused, match="not under the tree head"):
            take(memory, resigned(data, key, entries=[shown | change]), key)
        data = resigned(data, key, since=6)  # the head itself held, and is remembered now


def test_an_altered_leaf_has_no_proof_under_the_head_that_was_signed_before(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, altered = make_log(count=4), make_log("altered")
    for number in (0, 1, 77, 3):
        altered.append(make_entry(number))
    take(memory, update(log, key), key)
    data = resigned(update(altered, key, indexes=(2,)), key, head=log.head().encoded, since=4)
    with pytest.raises(LogRefused, match="not under the tree head"):
        take(memory, data, key)


def test_reordered_entries_do_not_go_on_from_the_head_that_was_signed_before(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, other = make_log(count=4), make_log("other")
    for number in (0, 2, 1, 3):
        other.append(make_entry(number))
    take(memory, update(log, key), key)
    with pytest.raises(LogForked, match="two trees"):
        take(memory, update(other, key), key)


# -- who said it, and to whom


def test_the_word_of_a_log_to_another_party_or_of_another_run_is_refused(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=3)
    for changes in ({"party": "south"}, {"run_id": "run-2"}):
        with pytest.raises(LogRefused, match="another party or run"):
            take(memory, update(log, key, **changes), key)
    assert memory.last(key.public, by="maker") is None


def test_an_update_with_a_forged_signature_or_a_forged_head_is_refused(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log, stranger = make_log(count=3), SigningKey()
    data = update(log, key)
    for forged in (
        resigned(data, stranger),
        update(log, stranger),
        resigned(data, key, head=sign_head(stranger, size=3, root=log.head().root, time=1).encoded),
        canonical.encode(canonical.decode(data) | {"signature": bytes(64)}),
        data[:-1],
        data + b"\x00",
        b"",
    ):
        with pytest.raises(LogRefused):
            take(memory, forged, key)
    assert memory.last(key.public, by="maker") is None


@pytest.mark.parametrize(
    "change",
    [
        {"since": -1},
        {"since": "0"},
        {"consistency": [bytes(31)]},
        {"consistency": [bytes(32)] * 65},
        {"consistency": [bytes(32)]},
        {"entries": [{}]},
        {"entries": [1]},
        {"entries": [{"index": 0, "entry": b"", "path": []}]},
        {"entries": [{"index": 0, "entry": b"", "path": []}] * 300},
        {"more": 1},
        {"party": b"north"},
    ],
)
def test_a_malformed_update_is_refused_even_where_the_owner_signed_it(
    change: dict[str, Any], make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    with pytest.raises(LogRefused) as caught:
        take(memory, resigned(update(make_log(count=3), key), key, **change), key)
    assert not isinstance(caught.value, LogForked)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_relay_that_changes_any_byte_of_an_update_is_refused_and_blames_nobody(
    data: st.DataObject, tmp_path: Path, make_entry: Make
) -> None:
    key, path = SigningKey(bytes(32)), tmp_path / "relayed.sqlite"
    log = TransparencyLog(path, key)
    if not log.head().size:
        for number in range(5):
            log.append(make_entry(number))
    raw = bytearray(update(log, key, indexes=(1, 4)))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    memory = HeadMemory(tmp_path / "relayed-seen.sqlite")
    with pytest.raises(LogRefused) as caught:
        take(memory, bytes(raw), key)
    assert not isinstance(caught.value, LogForked)
    assert memory.last(key.public, by="maker") is None


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=4), fork=st.integers(0, 20))
def test_any_growth_is_followed_and_any_change_of_the_past_is_a_fork(
    steps: list[int], fork: int, tmp_path_factory: pytest.TempPathFactory, make_entry: Make
) -> None:
    folder, key = tmp_path_factory.mktemp("growth"), SigningKey()
    log, other = TransparencyLog(folder / "log", key), TransparencyLog(folder / "other", key)
    memory, number = HeadMemory(folder / "seen"), 0
    for step in steps:
        for _ in range(step):
            log.append(make_entry(number))
            other.append(make_entry(number if number != fork else 500))
            number += 1
        take(memory, update(log, key, since=memory.last(key.public, by="maker")), key)
    seen = memory.last(key.public, by="maker")
    other.append(make_entry(600))
    honest = sign_head(key, size=number, root=other._tree.root(number), time=0)
    data = update(other, key, since=honest)
    if fork < number:
        with pytest.raises(LogForked):
            take(memory, data, key)
        assert memory.last(key.public, by="maker") == seen
    else:
        assert take(memory, data, key).head.size == number + 1


# -- views

RUN: dict[str, Any] = {"run_id": "run-1", "contract": bytes(48)}


class Cohort:
    """Three customers who were each shown a head."""

    def __init__(self, key: SigningKey, memory: HeadMemory, heads: dict[str, TreeHead]) -> None:
        self.keys = {name: SigningKey() for name in heads}
        self.heads, self.owner, self.memory = heads, key, memory
        self.views = {
            name: sign_view(self.keys[name], party=name, head=heads[name], **RUN) for name in heads
        }

    def check(self, name: str, *, minimum: int = 2, views: dict[str, bytes] | None = None) -> None:
        check_views(
            self.views if views is None else views,
            own=self.heads[name],
            party=name,
            customers={other: key.public for other, key in self.keys.items()},
            minimum=minimum,
            owner=self.owner.public,
            by="maker",
            memory=self.memory,
            **RUN,
        )


def test_customers_who_were_shown_one_log_agree(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    cohort = Cohort(
        key, memory, dict.fromkeys(("north", "east", "south"), make_log(count=4).head())
    )
    for name in cohort.heads:
        cohort.check(name, minimum=3)


def test_a_fork_that_is_shown_to_two_customers_is_seen_by_both(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    one, two = make_log(count=4).head(), make_log("other", count=4, party="south").head()
    cohort = Cohort(key, memory, {"north": one, "east": two})
    for name, other in (("north", two), ("east", one)):
        with pytest.raises(LogForked, match="was shown another tree of 4 entries") as caught:
            cohort.check(name)
        assert caught.value.kept == (cohort.heads[name].encoded, other.encoded)
        assert "forked-logs" in caught.value.fix


def test_a_fork_behind_which_the_aggregator_keeps_views_back_leaves_too_few_that_agree(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    one, two = make_log(count=4).head(), make_log("other", count=4, party="south").head()
    cohort = Cohort(key, memory, {"north": one, "east": two, "south": two})
    with pytest.raises(LogRefused, match="Only 1 customers"):
        cohort.check("north", views={"north": cohort.views["north"]})
    cohort.check(
        "east", views={"south": cohort.views["south"]}
    )  # two of three agree, which is a sum's minimum


def test_customers_of_one_run_who_were_shown_different_sizes_do_not_agree(
    make_log: Make, make_entry: Make, memory: HeadMemory, key: SigningKey
) -> None:
    log = make_log(count=4)
    earlier = log.head()
    log.append(make_entry(4))
    cohort = Cohort(key, memory, {"north": log.head(), "east": earlier})
    with pytest.raises(LogRefused, match="shown differently to east"):
        cohort.check("north")


def test_a_forged_foreign_or_malformed_view_counts_as_none(
    make_log: Make, memory: HeadMemory, key: SigningKey
) -> None:
    head = make_log(count=4).head()
    cohort = Cohort(key, memory, {"north": head, "east": head})
    east, stranger = cohort.keys["east"], SigningKey()
    good: dict[str, Any] = {"party": "east", "head": head, **RUN}
    foreign = sign_head(stranger, size=4, root=head.root, time=1)
    for view in (
        sign_view(stranger, **good),
        sign_view(cohort.keys["north"], **good),
        sign_view(east, **good | {"party": "north"}),
        sign_view(east, **good | {"run_id": "run-2"}),
        sign_view(east, **good | {"contract": b"c" * 48}),
        sign_view(east, **good | {"head": foreign}),
        cohort.views["east"][:-1],
        b"",
        cohort.views["north"],
    ):
        with pytest.raises(LogRefused, match="Only 1 customers"):
            cohort.check(
                "north",
                views={
                    "east": view,
                    "stranger": sign_view(stranger, **good | {"party": "stranger"}),
                },
            )
    cohort.check("north")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_views_of_a_stranger_never_crash(data: bytes, memory: HeadMemory) -> None:
    key = SigningKey(bytes(32))
    head = sign_head(key, size=4, root=bytes(32), time=1)
    cohort = Cohort(key, memory, {"north": head, "east": head})
    with pytest.raises(LogRefused):
        cohort.check("north", views={"east": data})
