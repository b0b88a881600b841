"""Canonical CBOR accepts one byte string for one value."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError

floats = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | floats | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_what_is_encoded_decodes_to_the_same_value(value: object) -> None:
    assert canonical.decode(canonical.encode(value)) == value


@given(st.binary(max_size=64))
def test_whatever_is_accepted_is_the_only_encoding_of_its_value(data: bytes) -> None:
    try:
        value = canonical.decode(data)
    except ProtocolError:
        return
    assert canonical.encode(value) == data


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("duplicate keys", bytes.fromhex("a2616101616101")),
        ("unsorted keys", bytes.fromhex("a2616201616101")),
        ("trailing bytes", bytes.fromhex("0101")),
        ("a longer integer than needed", bytes.fromhex("1801")),
        ("a longer float than needed", bytes.fromhex("fa3f800000")),
        ("an indefinite list", bytes.fromhex("9fff")),
        ("an indefinite byte string", bytes.fromhex("5f4161ff")),
        ("a tag", bytes.fromhex("c060")),
        ("a number that is not one", bytes.fromhex("f97e00")),
        ("infinity", bytes.fromhex("f97c00")),
        ("deep nesting", b"\x81" * 40 + b"\x01"),
        ("very deep nesting", b"\x81" * 100_000),
        ("an undefined", bytes.fromhex("f7")),
        ("nothing", b""),
    ],
)
def test_it_refuses(what: str, data: bytes) -> None:
    with pytest.raises(ProtocolError):
        canonical.decode(data)


@pytest.mark.parametrize("cap", [0, 1, 2, canonical.MAX_DEPTH])
@pytest.mark.parametrize("kind", ["list", "map"])
def test_an_item_at_the_cap_of_depth_is_accepted_and_a_deeper_one_refused_for_its_depth(
    kind: str, cap: int
) -> None:
    def nested(levels: int) -> object:
        value: object = 1
        for _ in range(levels):
            value = [value] if kind == "list" else {"a": value}
        return value

    assert canonical.decode(cbor2.dumps(nested(cap)), max_depth=cap) == nested(cap)
    for more in (1, 2, 50):
        with pytest.raises(ProtocolError) as caught:
            canonical.decode(cbor2.dumps(nested(cap + more)), max_depth=cap)
        assert any(
            word in str(caught.value.__context__) for word in ("nests too deeply", "nesting depth")
        )
        assert canonical.decode(cbor2.dumps(nested(cap + more)), max_depth=cap + more) == nested(
            cap + more
        )


def test_it_refuses_more_bytes_than_allowed() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        canonical.decode(canonical.encode(b"x" * 100), max_bytes=50)


def test_a_plain_decoder_would_accept_them() -> None:
    """The control: why the strict one is needed."""
    assert cbor2.loads(bytes.fromhex("a2616101616101")) == {"a": 1}


@pytest.mark.parametrize("value", [{1.5: 1}, {"a": object()}, float("nan"), 1 << 65, {("a",): 1}])
def test_it_does_not_encode(value: object) -> None:
    with pytest.raises(TypeError):
        canonical.encode(value)
