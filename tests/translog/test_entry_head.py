"""Entries hold names, digests and numbers alone; heads are their owner's word; whatever is not
exactly that is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation import canonical
from fedark.foundation.errors import InputError, LogRefused
from fedark.foundation.keys import SigningKey
from fedark.translog.entry import KINDS, Entry, log_name, note_digest
from fedark.translog.head import HEAD_LABEL, TreeHead, log_id, sign_head
from fedark.translog.merkle import leaf_hash
from fedark.translog.update import LogUpdate

VALUES = {"name": "north", "sha384": bytes(48), "32 bytes": bytes(32), "number": 7}
KEY = SigningKey(bytes(32))
HEAD = sign_head(KEY, size=3, root=b"r" * 32, time=1_800_000_000)


def example(kind: str) -> Entry:
    return Entry(kind, 1_800_000_000, {name: VALUES[form] for name, form in KINDS[kind].items()})


# -- entries


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_reads_back_as_it_was_written_and_its_leaf_is_over_its_canonical_form(
    kind: str,
) -> None:
    entry = example(kind)
    assert Entry.decode(entry.encode()) == entry
    assert entry.leaf() == leaf_hash(entry.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_each_fact_of_an_entry_changes_its_leaf(kind: str) -> None:
    entry = example(kind)
    others = {"name": "south", "sha384": b"x" * 48, "32 bytes": b"x" * 32, "number": 8}
    leaves = {
        Entry(kind, entry.time, dict(entry.facts) | {name: others[form]}).leaf()
        for name, form in KINDS[kind].items()
    }
    assert (
        len(leaves | {entry.leaf(), Entry(kind, entry.time + 1, entry.facts).leaf()})
        == len(KINDS[kind]) + 2
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fact",
    [
        "two words",
        "a customer's record, in full",
        "",
        "x" * 129,
        "naïve",
        b"secret",
        bytes(47),
        bytes(49),
        1.5,
        -1,
        1 << 63,
        True,
        None,
    ],
)
def test_a_fact_cannot_hold_text_or_bytes_of_another_form(kind: str, fact: Any) -> None:
    entry = example(kind)
    for name in KINDS[kind]:
        with pytest.raises(LogRefused):
            Entry(kind, entry.time, dict(entry.facts) | {name: fact})


def test_an_entry_of_an_unknown_kind_or_with_facts_more_or_less_is_refused() -> None:
    entry = example("release")
    less = {name: fact for name, fact in entry.facts.items() if name != "model"}
    for kind, time, facts in (
        ("gossip", 1, entry.facts),
        (["release"], 1, entry.facts),
        ("release", 1, dict(entry.facts) | {"note": "x"}),
        ("release", 1, less),
        ("release", 1, "facts"),
        ("release", -1, entry.facts),
        ("release", True, entry.facts),
        ("attestation", 1, entry.facts),
    ):
        with pytest.raises(LogRefused):
            Entry(kind, time, facts)  # type: ignore[arg-type]


def test_names_of_others_are_made_fit_for_the_log() -> None:
    assert log_name("a b\x1b[2J\n") == "a?b?[2J?"
    assert log_name("") == "?"
    assert len(log_name("x" * 1000)) == 128


def test_an_entry_with_a_repeated_key_or_in_another_order_is_refused() -> None:
    entry = example("refusal").encode()
    with pytest.raises(LogRefused):
        Entry.decode(entry + b"\x00")
    with pytest.raises(LogRefused):
        Entry.decode(b"\xa5" + entry[1:] + canonical.encode("time") + canonical.encode(1))


# -- heads


def test_a_head_reads_back_as_it_was_signed() -> None:
    head = TreeHead.verify(HEAD.encoded, KEY.public, by="maker")
    assert head == HEAD
    assert (head.log, head.size, head.root, head.time) == (
        log_id(KEY.public),
        3,
        b"r" * 32,
        1_800_000_000,
    )


def test_a_head_that_was_not_verified_cannot_be_had_or_changed() -> None:
    with pytest.raises(TypeError):
        TreeHead()
    with pytest.raises(FrozenInstanceError):
        HEAD.size = 4  # type: ignore[misc]


def test_a_forged_head_signature_is_refused() -> None:
    outer = canonical.decode(HEAD.encoded)
    stranger = SigningKey()
    for signature in (
        stranger.sign(HEAD_LABEL, outer["body"]),
        bytes(64),
        KEY.sign("fedark/other/1", outer["body"]),
    ):
        with pytest.raises(LogRefused, match="signature"):
            TreeHead.verify(
                canonical.encode(outer | {"signature": signature}), KEY.public, by="maker"
            )
    with pytest.raises(LogRefused, match="signature"):
        TreeHead.verify(HEAD.encoded, stranger.public, by="maker")


@pytest.mark.parametrize(
    "change", [{"size": 4}, {"root": b"q" * 32}, {"time": 5}, {"log": bytes(32)}]
)
def test_each_field_of_a_head_is_under_the_signature(change: dict[str, Any]) -> None:
    outer = canonical.decode(HEAD.encoded)
    body = canonical.encode(canonical.decode(outer["body"]) | change)
    with pytest.raises(LogRefused, match="signature"):
        TreeHead.verify(canonical.encode(outer | {"body": body}), KEY.public, by="maker")


def test_a_head_with_a_wrong_log_id_is_refused_even_where_the_owner_signed_it() -> None:
    body = canonical.encode(
        {"log": log_id(SigningKey().public), "size": 3, "root": b"r" * 32, "time": 1}
    )
    data = canonical.encode({"body": body, "signature": KEY.sign(HEAD_LABEL, body)})
    with pytest.raises(LogRefused, match="another log"):
        TreeHead.verify(data, KEY.public, by="maker")


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": 1 << 63},
        {"size": "3"},
        {"root": b"r"},
        {"time": True},
        {"more": 1},
        {"log": b""},
    ],
)
def test_a_malformed_head_is_refused_even_where_the_owner_signed_it(change: dict[str, Any]) -> None:
    body = canonical.encode(canonical.decode(canonical.decode(HEAD.encoded)["body"]) | change)
    with pytest.raises(LogRefused, match="malformed"):
        TreeHead.verify(
            canonical.encode({"body": body, "signature": KEY.sign(HEAD_LABEL, body)}),
            KEY.public,
            by="maker",
        )


def test_a_head_in_json_reads_back_and_a_readable_field_that_lies_is_refused() -> None:
    text = HEAD.to_json(KEY.public)
    assert TreeHead.from_json(text, KEY.public, by="maker") == HEAD
    for name, value in {
        "size": 9,
        "root": "00" * 32,
        "time": "2030-01-01T00:00:00+00:00",
        "log": "",
        "more": 1,
    }.items():
        with pytest.raises(LogRefused, match="readable fields"):
            TreeHead.from_json(json.dumps(json.loads(text) | {name: value}), KEY.public, by="maker")
    for text in ("", "[]", "{}", '{"signed": 1}', '{"signed": "zz"}', "[" * 5000):
        with pytest.raises(InputError, match="fedark log head"):
            TreeHead.from_json(text, KEY.public, by="maker")


# -- parsers

PARSERS: tuple[Callable[[bytes], object], ...] = (
    Entry.decode,
    lambda data: TreeHead.verify(data, KEY.public, by="maker"),
    lambda data: LogUpdate.verify(data, KEY.public, by="maker"),
)
ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.text(max_size=20)
    | st.binary(max_size=100),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "label",
                    "kind",
                    "time",
                    "facts",
                    "body",
                    "signature",
                    "log",
                    "size",
                    "root",
                    "entries",
                    "head",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("parse", PARSERS)
@settings(max_examples=400)
@given(data=st.binary(max_size=400) | ITEMS.map(canonical.encode))
def test_bytes_of_a_stranger_are_refused_and_never_crash(
    parse: Callable[[bytes], object], data: bytes
) -> None:
    with pytest.raises(LogRefused):
        parse(data)


@settings(max_examples=300)
@given(
    body=ITEMS.map(canonical.encode) | st.binary(max_size=200),
    label=st.sampled_from([HEAD_LABEL, "fedark/log-update/1"]),
)
def test_what_the_owner_signed_but_is_no_head_or_update_is_refused_and_never_crashes(
    body: bytes, label: str
) -> None:
    data = canonical.encode({"body": body, "signature": KEY.sign(label, body)})
    for parse in PARSERS[1:]:
        with pytest.raises(LogRefused):
            parse(data)


@settings(max_examples=300)
@given(data=st.data())
def test_an_entry_or_head_with_any_byte_changed_is_refused_or_says_something_else(
    data: st.DataObject,
) -> None:
    good = data.draw(st.sampled_from([example(kind).encode() for kind in KINDS] + [HEAD.encoded]))
    raw = bytearray(good)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    if good == HEAD.encoded:
        with pytest.raises(LogRefused):
            TreeHead.verify(bytes(raw), KEY.public, by="maker")
        return
    try:
        changed = Entry.decode(bytes(raw))
    except LogRefused:
        return
    assert changed.leaf() != leaf_hash(good)


def test_a_notes_digest_is_of_its_text() -> None:
    assert note_digest("a") != note_digest("b")
    assert len(note_digest("")) == 48
