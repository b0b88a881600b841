"""Checkpoints open for the enclave that sealed them and for nobody else, and hold all that a
session must not forget.
"""

from __future__ import annotations

import inspect
import os
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedark.attestation.claims import SandboxFacts
from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot
from fedark.enclave.aggregator import AggregatorSession
from fedark.enclave.checkpoint import Sealer
from fedark.enclave.masking import AggregatorMasks, TrainerMasks
from fedark.enclave.session import SessionBase
from fedark.enclave.trainer import TrainerSession
from fedark.foundation.errors import FedarkError, ProtocolError, Refused
from fedark.secagg import Client

KEY = os.urandom(32)
REGISTERS = {
    "launcher": bytes(48),
    "runtime": bytes(48),
    "application": bytes(48),
    "runconfig": bytes(48),
}
FACTS = SandboxFacts("namespaces", b"s" * 48)


def sealer(key: bytes = KEY) -> Sealer:
    return Sealer(lambda: key)


def test_what_was_sealed_opens() -> None:
    state = {"round": 3, "keys": b"secret", "peers": {"north": [1.5, None]}}
    assert sealer().open(sealer().seal(state)) == state


def test_nothing_of_a_state_is_in_its_checkpoint_and_no_two_are_alike() -> None:
    state = {"keys": b"a secret of the enclave"}
    one, other = sealer().seal(state), sealer().seal(state)
    assert one != other
    assert b"secret" not in one


def test_another_key_opens_nothing() -> None:
    with pytest.raises(Refused, match="does not open"):
        sealer(os.urandom(32)).open(sealer().seal({"a": 1}))


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_checkpoint_that_was_altered_anywhere_is_refused(at: int, change: int) -> None:
    data = bytearray(sealer().seal({"a": 1}))
    data[at % len(data)] ^= change
    with pytest.raises(FedarkError):
        sealer().open(bytes(data))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_checkpoint_or_a_refusal(data: bytes) -> None:
    with pytest.raises(FedarkError):
        sealer().open(data)


def test_a_checkpoint_of_another_version_says_so() -> None:
    data = bytearray(sealer().seal({"a": 1}))
    data[4] = 9
    with pytest.raises(ProtocolError, match="of version 9"):
        sealer().open(bytes(data))


@pytest.fixture(scope="module")
def device_here() -> SimulatedDevice:
    now = datetime.now(UTC)
    return SimulatedRoot(now=now).issue(now=now)


@pytest.mark.parametrize("register", REGISTERS)
def test_an_enclave_with_another_register_gets_another_key(
    device_here: SimulatedDevice, register: str
) -> None:
    mine = device_here.sealing_key(REGISTERS, FACTS)
    assert mine == device_here.sealing_key(dict(REGISTERS), FACTS)
    assert mine != device_here.sealing_key(REGISTERS | {register: b"x" * 48}, FACTS)


@pytest.mark.parametrize(
    "facts",
    [
        SandboxFacts("none"),
        SandboxFacts("landlock", b"s" * 48, b"l" * 48),
        SandboxFacts("namespaces", b"t" * 48),
    ],
)
def test_an_enclave_that_is_confined_otherwise_gets_another_key(
    device_here: SimulatedDevice, facts: SandboxFacts
) -> None:
    assert device_here.sealing_key(REGISTERS, FACTS) != device_here.sealing_key(REGISTERS, facts)


def test_another_device_derives_another_key(device_here: SimulatedDevice) -> None:
    now = datetime.now(UTC)
    other = SimulatedRoot(now=now).issue(now=now)
    assert device_here.sealing_key(REGISTERS, FACTS) != other.sealing_key(REGISTERS, FACTS)


KEPT = {
    SessionBase: {"_hpke", "_signing", "_nonces", "_answered", "_host", "_proofs"},
    AggregatorSession: {
        *(
            "_group",
            "_trainers",
            "_round",
            "_base",
            "_vectors",
            "_history",
            "_resumed",
            "_figures_open",
        ),
        *("_masks", "_optimizers"),
    },
    TrainerSession: {
        *(
            "_aggregator",
            "_grants",
            "_digest_of_data",
            "_data_expected",
            "_figures",
            "_begun",
            "_round",
            "_base",
            "_masks",
        )
    },
    TrainerMasks: {"_nonce", "_combined", "_session", "_hellos", "_client"},
    AggregatorMasks: {"_hellos", "_opening", "_survivors"},
    Client: {
        "_secret",
        "_public",
        "_hello",
        "_chains",
        "_last",
        "_releases",
        "_directory",
        "_me",
        "_round",
    },
}
"""What is in a checkpoint, by class and attribute."""
NOT_KEPT = {
    # of the run configuration, or made from it
    SessionBase: {"config", "contract", "digest", "message_bytes", "_quote", "_sealer", "_used"},
    # messages of the open round: brought again by the host; the scale is the contract's
    AggregatorSession: {"_received", "_scale"},
    # weights and records: brought again; the group key comes with the grant; the privacy mechanism
    # is the contract's
    TrainerSession: {
        "_group",
        "_openings",
        "_models",
        "_train",
        "_test",
        "_data_closed",
        "_private",
    },
    TrainerMasks: {"_contract", "_nonces", "_policy", "_me", "_private"},
    # follows from the messages of the open round; the mean is memory to write on
    AggregatorMasks: {
        "_mean",
        "_contract",
        "_policy",
        "_directory",
        "_server",
        "_round",
        "_closed",
        "_waiting",
        "_uploaded",
        "_answers",
    },
    Client: {"_policy", "_party", "_signing", "_threads"},
}
"""What is not, and why it need not be."""


@pytest.mark.parametrize("kind", KEPT)
def test_every_attribute_of_a_session_is_in_its_checkpoint_or_is_known_not_to_need_it(
    kind: type,
) -> None:
    """Who adds one decides here what becomes of it when the enclave is killed."""
    assigned = set()
    for line in inspect.getsource(kind.__init__).splitlines():
        left, equals, _ = line.strip().partition(" = ")
        if equals and left.startswith("self."):
            assigned |= set(re.findall(r"self\.(\w+)", left))
    assert assigned == KEPT[kind] | NOT_KEPT[kind]
