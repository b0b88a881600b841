"""Reference values count if a trusted publisher signed them and they are valid now; every other
file is refused.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.attestation.reference import (
    REFERENCE_LABEL,
    ReferenceValues,
    VerifiedReference,
    sign_reference,
)
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, FedarkError, ProtocolError, Refused
from fedark.foundation.keys import SigningKey

PUBLISHER = SigningKey(b"p" * 32)


def values(now: Any, **changes: Any) -> ReferenceValues:
    fields: dict[str, Any] = {
        "role": "trainer",
        "release": "fedark 0.1.0",
        "issued": now.isoformat(),
        "expires": (now + timedelta(days=1)).isoformat(),
        "registers": {"launcher": "ab" * 48, "tdx.mrtd": "cd" * 48},
    }
    return ReferenceValues.model_validate(fields | changes)


def verify(data: bytes, now: Any, *publishers: bytes) -> VerifiedReference:
    return VerifiedReference.verify(
        data, publishers or [PUBLISHER.public], now=now, source="trainer.reference"
    )


def resigned(signed: bytes, key: SigningKey, label: str = REFERENCE_LABEL, **changes: Any) -> bytes:
    body = canonical.encode(canonical.decode(canonical.decode(signed)["body"]) | changes)
    return canonical.encode({"body": body, "signature": key.sign(label, body)})


def test_what_a_trusted_publisher_signed_is_read_back(lab: Any) -> None:
    reference = verify(sign_reference(values(lab.now), PUBLISHER), lab.now)
    assert reference.values == values(lab.now)
    assert reference.publisher == PUBLISHER.public


def test_a_verified_reference_is_made_by_verification_alone(lab: Any) -> None:
    with pytest.raises(TypeError):
        VerifiedReference()  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        verify(sign_reference(values(lab.now), PUBLISHER), lab.now).values = values(
            lab.now, role="aggregator"
        )


def test_another_publisher_is_refused_even_if_it_names_the_trusted_one(lab: Any) -> None:
    stranger = SigningKey()
    signed = sign_reference(values(lab.now), stranger)
    with pytest.raises(Refused, match="not one that is trusted here"):
        verify(signed, lab.now)
    with pytest.raises(Refused, match="does not verify"):
        verify(resigned(signed, stranger, publisher=PUBLISHER.public), lab.now)
    verify(signed, lab.now, PUBLISHER.public, stranger.public)


def test_a_signature_made_for_another_purpose_does_not_count(lab: Any) -> None:
    signed = sign_reference(values(lab.now), PUBLISHER)
    with pytest.raises(Refused, match="does not verify"):
        verify(resigned(signed, PUBLISHER, label="fedark/bundle/1"), lab.now)


@pytest.mark.parametrize("days", [-1, 1, 400])
def test_values_outside_their_validity_are_refused(lab: Any, days: int) -> None:
    signed = sign_reference(values(lab.now), PUBLISHER)
    with pytest.raises(Refused, match=r"count from 2027-03-01T12:00:00\+00:00 until"):
        verify(signed, lab.now + timedelta(days=days))


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "janitor"},
        {"release": "\x1b[2J"},
        {"issued": "yesterday"},
        {"expires": "2027-03-01T12:00:00"},
        {"registers": {}},
        {"registers": {"launcher": "ab"}},
        {"registers": {"LAUNCHER!": "ab" * 48}},
        {"registers": [1]},
    ],
)
def test_a_signed_file_that_breaks_the_form_is_refused(lab: Any, changes: dict[str, Any]) -> None:
    signed = sign_reference(values(lab.now), PUBLISHER)
    with pytest.raises(ContractError):
        verify(resigned(signed, PUBLISHER, **changes), lab.now)


@pytest.mark.parametrize("publisher", [None, 1, [], {}, "p" * 32, b""])
def test_a_publisher_of_any_other_type_is_a_stranger(lab: Any, publisher: Any) -> None:
    signed = sign_reference(values(lab.now), PUBLISHER)
    with pytest.raises(Refused, match="not one that is trusted"):
        verify(resigned(signed, PUBLISHER, publisher=publisher), lab.now)


@pytest.mark.parametrize("change", [{"extra": 1}, {"role": ...}])
def test_an_unknown_or_missing_field_is_refused(lab: Any, change: dict[str, Any]) -> None:
    body = canonical.decode(canonical.decode(sign_reference(values(lab.now), PUBLISHER))["body"])
    body = {name: value for name, value in (body | change).items() if value is not ...}
    raw = canonical.encode(body)
    with pytest.raises(ProtocolError, match="not a file of signed reference values"):
        verify(
            canonical.encode({"body": raw, "signature": PUBLISHER.sign(REFERENCE_LABEL, raw)}),
            lab.now,
        )


def test_every_single_byte_that_is_changed_is_noticed(lab: Any) -> None:
    signed = sign_reference(values(lab.now), PUBLISHER)
    for at in range(len(signed)):
        with pytest.raises(FedarkError):
            verify(signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :], lab.now)


# `FEDARK_FUZZ` sets the number of inputs; the default keeps the suite short.
@settings(max_examples=int(os.environ.get("FEDARK_FUZZ", "200")))
@given(data=st.binary(max_size=300))
def test_fuzzed_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(FedarkError):
        verify(data, datetime(2027, 3, 1, tzinfo=UTC))
