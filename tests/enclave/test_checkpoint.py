"""Checkpoints open for the enclave that sealed them and for nobody else, and hold all that a
session must not forget.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from datetime import UTC, datetime
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedark.attestation.claims import SandboxFacts
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot
from fedark.enclave.aggregator import AggregatorSession
from fedark.enclave.checkpoint import Sealer
from fedark.enclave.intake import RecordIntake
from fedark.enclave.masking import AggregatorMasks, TrainerMasks
from fedark.enclave.session import SessionBase
from fedark.enclave.trainer import TrainerSession
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, ProtocolError, Refused
from fedark.foundation.snapshot import Bytes32, Real, Row, Snapshot
from fedark.secagg import Client
from fedark.secagg.client import Releases
from fedark.secagg.schedule import Chain
from fedark.tuning.server_optimizer import FedAdam, FedAvg

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


class Peer(Snapshot):
    at: Real
    proof: bytes | None


class Kept(Snapshot):
    round: int
    keys: Bytes32
    peers: dict[str, Peer]
    counts: Annotated[tuple[int, Real], Row]


STATE = Kept(
    round=3,
    keys=b"a secret of the enclave, 32 byte",
    peers={"north": Peer(at=1.5, proof=None)},
    counts=(1, 2.0),
)


def test_what_was_sealed_opens() -> None:
    assert sealer().open(sealer().seal(STATE), Kept) == STATE


@pytest.mark.parametrize(
    "change",
    [
        {"round": True},
        {"round": 3.0},
        {"keys": bytes(31)},
        {"keys": "a" * 32},
        {"peers": {"north": {"at": 1.5}}},
        {"peers": {"north": {"at": 1, "proof": None}}},
        {"peers": {"north": {"at": 1.5, "proof": None, "more": 1}}},
        {"peers": {1: {"at": 1.5, "proof": None}}},
        {"counts": [1, 2.0, 3.0]},
        {"counts": [1.0, 2.0]},
        {"more": 1},
    ],
)
def test_a_state_of_another_form_is_refused_by_its_fields_name_alone(change: dict) -> None:
    whole = STATE.model_dump() | change
    with pytest.raises(ProtocolError, match="does not hold what it must") as caught:
        Kept.decode(canonical.encode(whole))
    assert next(iter(change)) in caught.value.what
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", Kept.model_fields)
def test_a_state_without_one_of_its_fields_is_neither_read_nor_made(field: str) -> None:
    rest = {name: value for name, value in STATE.model_dump().items() if name != field}
    with pytest.raises(ProtocolError, match=field):
        Kept.decode(canonical.encode(rest))
    with pytest.raises(ValidationError):
        Kept(**rest)


def test_a_state_does_not_show_what_is_in_it() -> None:
    assert "secret" not in f"{STATE!r} {STATE}"
    with pytest.raises(ValidationError) as caught:
        STATE.keys = b"another secret"
    assert "secret" not in str(caught.value)


def test_nothing_of_a_state_is_in_its_checkpoint_and_no_two_are_alike() -> None:
    one, other = sealer().seal(STATE), sealer().seal(STATE)
    assert one != other
    assert b"secret" not in one


def test_another_key_opens_nothing() -> None:
    with pytest.raises(Refused, match="does not open"):
        sealer(os.urandom(32)).open(sealer().seal(STATE), Kept)


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_checkpoint_that_was_altered_anywhere_is_refused(at: int, change: int) -> None:
    data = bytearray(sealer().seal(STATE))
    data[at % len(data)] ^= change
    with pytest.raises(FedarkError):
        sealer().open(bytes(data), Kept)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_checkpoint_or_a_refusal(data: bytes) -> None:
    with pytest.raises(FedarkError):
        sealer().open(data, Kept)


def test_a_checkpoint_of_another_version_says_so() -> None:
    data = bytearray(sealer().seal(STATE))
    data[4] = 9
    with pytest.raises(ProtocolError, match="of version 9"):
        sealer().open(bytes(data), Kept)


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
    SessionBase: {
        "_at",
        "_hpke",
        "_signing",
        "_nonces",
        "_answered",
        "_host",
        "_proofs",
        "_number",
    },
    AggregatorSession: {
        *("_group", "_trainers", "_base", "_vectors", "_history", "_figures_open"),
        *("_masks", "_optimizers", "_due", "_curve"),
    },
    TrainerSession: {
        *("_aggregator", "_grants", "_records", "_figures", "_base", "_masks"),
        *("_personal", "_shown"),
    },
    RecordIntake: {"digest"},
    TrainerMasks: {"_nonce", "_combined", "_session", "_hellos", "_client"},
    AggregatorMasks: {"_hellos", "_opening", "_survivors"},
    Client: {
        *("_secret", "_public", "_hello", "_chains", "_last", "_releases", "_directory", "_me"),
        "_round",
    },
    NonceBook: {"_database"},
    FedAvg: {"_size"},
    FedAdam: {"_m", "_v"},
    Chain: {"_key", "_round"},
    Releases: {"done", "sessions"},
}
"""What is in a checkpoint, by class and attribute."""
NOT_KEPT = {
    # of the run configuration, or made from it; steps and report are of the call under way
    SessionBase: {
        *("config", "contract", "digest", "message_bytes", "_table", "_quote", "_sealer"),
        *("_steps", "_report"),
    },
    # messages of the open round: brought again by the host; scale and shares of noise are the
    # contract's; that it was restarted is true of every enclave that goes on from a checkpoint
    AggregatorSession: {"_received", "_measured", "_scale", "_shares_noise", "_resumed"},
    # weights and records: brought again; the group key comes with the grant; the privacy mechanism
    # is the contract's, and who is told of an opened model the simulation's; the local-only
    # adapters are trained again, which gives the same
    TrainerSession: {*("_group", "_openings", "_models", "_private", "_on_model"), "_alone"},
    RecordIntake: {"train", "test", "_hashed", "_party", "_private", "_by_record", "_answers"},
    TrainerMasks: {"_contract", "_nonces", "_terms", "_me", "_private"},
    # follows from the messages of the open round; the mean is memory to write on
    AggregatorMasks: {
        *("_mean", "_contract", "_terms", "_directory", "_server", "_round", "_closed"),
        *("_waiting", "_uploaded", "_answers"),
    },
    Client: {"_terms", "_party", "_signing", "_threads"},
    NonceBook: {"_lock"},
    FedAvg: {"_rate"},
    FedAdam: {"_terms"},
    Chain: set(),
    Releases: set(),
}
"""What is not, and why it need not be."""


def assigned(kind: type) -> set[str]:
    """Every attribute that any method of a class gives to `self`, or that its fields declare."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                found.add(node.attr)
    body = tree.body[0].body
    return found | {
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    }


@pytest.mark.parametrize("kind", KEPT)
def test_every_attribute_of_a_session_is_in_its_checkpoint_or_is_known_not_to_need_it(
    kind: type,
) -> None:
    """Who adds one decides here what becomes of it when the enclave is killed."""
    bases = [base for base in kind.__mro__ if base in KEPT]
    wanted = set().union(*(KEPT[base] | NOT_KEPT[base] for base in bases))
    assert set().union(*(assigned(base) for base in bases)) == wanted


def snapshots() -> list[type[Snapshot]]:
    found, waiting = list[type[Snapshot]](), [Snapshot]
    while waiting:
        below = [
            one for one in waiting.pop().__subclasses__() if one.__module__.startswith("fedark")
        ]
        found += below
        waiting += below
    return found


def test_no_field_of_any_snapshot_may_be_left_out() -> None:
    """A default would let whoever makes a snapshot forget the field."""
    assert len(snapshots()) >= 12
    for kind in snapshots():
        assert all(field.is_required() for field in kind.model_fields.values()), kind
        assert kind.model_config["strict"]
        assert kind.model_config["extra"] == "forbid"
