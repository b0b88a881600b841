"""Whatever bytes a caller sends: an answer that is an error of ours, and no key."""

from __future__ import annotations

import os
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import FedarkError
from fedark.v1 import broker_pb2 as pb

# `FEDARK_FUZZ` sets the number of inputs; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "200")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.binary(max_size=400))
def test_arbitrary_requests_get_no_key_and_never_crash(broker: Any, data: bytes) -> None:
    for kind, answer in (
        (pb.BrokerChallengeRequest, broker.challenge),
        (pb.BrokerReleaseRequest, broker.release),
    ):
        try:
            request = kind.FromString(data)
        except DecodeError:
            continue
        with pytest.raises(FedarkError):
            answer(request)


@FUZZ
@given(
    run_id=st.text(max_size=200),
    party=st.sampled_from(["north", "east"]),
    evidence=st.binary(max_size=400),
    head=st.binary(),
)
def test_arbitrary_evidence_under_a_signed_contract_gets_no_key_and_never_crashes(
    about: Any, broker: Any, run_id: str, party: str, evidence: bytes, head: bytes
) -> None:
    request = pb.BrokerReleaseRequest(about=about, evidence=evidence, log_head=head)
    request.about.run_id, request.about.party = run_id, party
    with pytest.raises(FedarkError):
        broker.release(request)


@pytest.fixture
def broker(world: Any) -> Any:
    return world.broker()


@pytest.fixture
def about(world: Any) -> Any:
    return world.about()
