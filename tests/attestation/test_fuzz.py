"""Whatever another party sends: no crash, no hang, and nothing but what was signed is accepted.

`FEDARK_FUZZ` sets the number of inputs for each parser; the default keeps the suite short.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.attestation import cose
from fedark.attestation.binding import KeyBinding
from fedark.attestation.eat import SimulatedClaims
from fedark.attestation.evidence import Evidence
from fedark.foundation.errors import EvidenceRefused, ProtocolError

EXAMPLES = int(os.environ.get("FEDARK_FUZZ", "300"))
FUZZ = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 65), 1 << 65)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=80),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.integers(-70005, 300) | st.text(max_size=12), inner, max_size=5)
        | inner.map(lambda value: cbor2.CBORTag(18, value))
    ),
    max_leaves=12,
)
CBOR = ITEMS.map(cbor2.dumps) | st.binary(max_size=300)
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 2), st.binary(min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`data` with bytes replaced (0), inserted (1) or removed (2)."""
    for where, kind, what in edits:
        place = where % (len(data) + 1)
        data = (
            data[:place]
            + (b"" if kind == 2 else what)
            + data[place + (0 if kind == 1 else len(what)) :]
        )
    return data


@FUZZ
@given(CBOR)
def test_decoding_evidence_gives_evidence_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        assert Evidence.decode(data).encode() == data


@FUZZ
@given(CBOR.map(lambda data: b"\xd2" + data))
def test_parsing_a_token_gives_a_token_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        cose.parse(data)


@FUZZ
@given(CBOR)
def test_decoding_claims_gives_claims_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        assert SimulatedClaims.decode(data).encode() == data


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(KeyBinding.__dataclass_fields__)), ITEMS))
def test_reading_a_binding_gives_a_binding_or_a_protocol_error(value: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        KeyBinding.from_map(value)


@FUZZ
@given(EDITS)
def test_no_edit_of_genuine_evidence_is_admitted(
    lab: Any, edits: list[tuple[int, int, bytes]]
) -> None:
    gate = lab.gate()
    evidence = lab.evidence(gate)
    altered = edited(evidence, edits)
    if altered != evidence:
        with pytest.raises(EvidenceRefused):
            lab.admit(gate, altered)


@FUZZ
@given(EDITS)
def test_no_edit_of_a_genuine_token_is_verified(
    lab: Any, edits: list[tuple[int, int, bytes]]
) -> None:
    token = lab.attester().quote(b"r" * 64, b"n" * 32)
    altered = edited(token, edits)
    if altered != token:
        with pytest.raises(EvidenceRefused):
            lab.verifier().verify(altered, now=lab.now)


@FUZZ
@given(EDITS)
def test_no_edit_of_claims_signed_by_a_device_crashes_the_verifier(
    lab: Any, edits: list[Any]
) -> None:
    signed = cose.parse(lab.attester().quote(b"r" * 64, b"n" * 32))
    with suppress(EvidenceRefused):
        lab.verifier().verify(lab.device.sign(edited(signed.payload, edits)), now=lab.now)


@FUZZ
@given(EDITS)
def test_no_edit_of_a_certificate_crashes_the_verifier_or_is_believed(
    lab: Any, edits: list[Any]
) -> None:
    signed = cose.parse(lab.attester().quote(b"r" * 64, b"n" * 32))
    altered = edited(signed.chain[0], edits)
    if altered != signed.chain[0] and altered:
        token = cose.sign(signed.payload, [altered], lab.device._key)
        with pytest.raises(EvidenceRefused):
            lab.verifier().verify(token, now=lab.now)
