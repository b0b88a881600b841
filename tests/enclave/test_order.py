"""The table of an enclave's calls: every call out of order is refused and changes nothing, every
legal one can be reached, and the page in the docs is of today's table.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedark.contract.lease import Lease
from fedark.enclave.aggregator import AggregatorSession
from fedark.enclave.inference import InferenceSession
from fedark.enclave.order import TABLES, If, State, Table, find, name_of, start
from fedark.enclave.session import LeaseConfig, RunConfig, SessionBase
from fedark.enclave.trainer import TrainerSession
from fedark.foundation.errors import FedarkError, ProtocolError
from fedark.v1 import enclave_pb2 as pb

sys.path.append(str(Path(__file__).parents[1] / "stages"))
import parties

ROOT = Path(__file__).parents[2]
At = dict[str, State]
KINDS = {"trainer": TrainerSession, "aggregator": AggregatorSession, "inference": InferenceSession}
JOBS = [key for key in TABLES if key[0] != "inference"]
CALLS: dict[str, pb.Call] = {
    field.name: pb.Call(**{field.name: field.message_type._concrete_class()})
    for field in pb.Call.DESCRIPTOR.oneofs[0].fields
    if field.name not in ("submit", "close", "records")
} | {
    "records": pb.Call(records=pb.Records()),
    "records, last": pb.Call(records=pb.Records(last=True)),
    "close": pb.Call(close=pb.Close(round=1)),
    "close, curve": pb.Call(close=pb.Close(round=2, curve=True)),
    "submit, curve": pb.Call(submit=pb.Submit(round=2, part=pb.Submit.CURVE)),
    "close, loading": pb.Call(close=pb.Close(round=0)),
    "submit": pb.Call(submit=pb.Submit(round=1)),
    "submit, loading": pb.Call(submit=pb.Submit(round=0)),
    "submit, endorsement": pb.Call(submit=pb.Submit(round=1, part=pb.Submit.ENDORSEMENT)),
    "submit, shares": pb.Call(submit=pb.Submit(round=1, part=pb.Submit.SHARES)),
}


def session(role: str, mode: str) -> SessionBase:
    contract = parties.contract(protection={"minimum_cohort": 3, "mode": mode})
    party = "north" if role == "trainer" else "pool"
    config = RunConfig(role=role, party=party, contract=contract, run_id="0" * 32)

    def never(report: bytes, nonce: bytes) -> tuple[str, bytes]:
        raise AssertionError("evidence was made for a call that is out of order")

    return KINDS[role](config, never, lambda: bytes(32))


def combinations(table: Table) -> Iterator[At]:
    for states in itertools.product(*(region.steps for region in table.values())):
        yield dict(zip(table, states, strict=True))


def legal(table: Table, at: At, call: str) -> bool:
    """What the table says, read in another way than `find` reads it."""
    having = [name for name, region in table.items() if call in region.calls]
    return bool(having) and all(call in table[name].steps[at[name]] for name in having)


def reachable(table: Table) -> list[At]:
    """Every combination of states that calls lead to, restarts from a checkpoint included."""
    found, waiting = list[At](), [start(table)]
    while waiting:
        at = waiting.pop()
        if at in found:
            continue
        found.append(at)
        if at.get("run") is not State.NEW:
            waiting.append({name: at[name] if r.lasts else r.start for name, r in table.items()})
        for call in CALLS:
            if not legal(table, at, call):
                continue
            choices = []
            for name in table:
                step = table[name].steps[at[name]].get(call)
                following = step.next if step else None
                both = isinstance(following, If)
                choices.append([following.then, following.otherwise] if both else [following])
            for chosen in itertools.product(*choices):
                new = dict(zip(table, chosen, strict=True))
                waiting.append({name: new[name] or at[name] for name in table})
    return found


def test_every_message_of_the_protocol_has_its_name_in_the_table() -> None:
    known = {
        call for table in TABLES.values() for region in table.values() for call in region.calls
    }
    assert {name_of(call) for call in CALLS.values()} == set(CALLS) == known


def leased() -> InferenceSession:
    contract = parties.contract(protection={"minimum_cohort": 3})
    reference = {"inference": {"application": "00" * 48}}
    lease = Lease(
        job="grid",
        created=contract.created,
        expires=contract.expires,
        seconds=60,
        tokens=10,
        total=10,
        provider=contract.provider,
        customer=contract.customers[0],
        terms=contract.models[0],
        attestation=contract.attestation.model_copy(update=reference),
    )
    config = LeaseConfig(lease.customer.name, lease, "0" * 32)
    return InferenceSession(config, lambda report, nonce: ("simulated", b""))


def test_an_inference_enclave_answers_no_call_out_of_order() -> None:
    table, enclave = TABLES["inference", "leased"], leased()
    for at in combinations(table):
        for name, call in CALLS.items():
            if legal(table, at, name):
                continue
            enclave._at = dict(at)
            with pytest.raises(ProtocolError) as caught:
                enclave.handle(call, lambda progress: None)
            assert caught.value.safe or "does not answer" in caught.value.what
            assert enclave._at == at
            assert (enclave._granted, enclave._portion) == (set(), None)
            assert enclave._adapters == enclave._used == {}


@pytest.mark.parametrize(("role", "mode"), JOBS)
def test_every_call_out_of_order_is_refused_and_changes_nothing(role: str, mode: str) -> None:
    table, enclave = TABLES[role, mode], session(role, mode)
    refused = 0
    for at in combinations(table):
        enclave._at = dict(at)
        before = enclave._snapshot().encode()
        for name, call in CALLS.items():
            if legal(table, at, name):
                continue
            with pytest.raises(ProtocolError) as caught:
                enclave.handle(call, lambda progress: None)
            assert "{" not in caught.value.what
            assert caught.value.safe or "does not answer" in caught.value.what
            assert enclave._at == at
            assert enclave._snapshot().encode() == before
            refused += 1
    assert refused > len(CALLS)


@pytest.mark.parametrize(("role", "mode"), TABLES)
def test_every_legal_call_is_reachable_and_has_one_handler_of_the_session(
    role: str, mode: str
) -> None:
    table, seen = TABLES[role, mode], set[tuple[str, State, str]]()
    for at in reachable(table):
        for call in CALLS:
            if legal(table, at, call):
                steps = find(table, at, call, role=role, round=0, number=0)
                seen |= {(name, at[name], call) for name in steps}
                handlers = [step.handler for step in steps.values() if step.handler]
                assert len(handlers) == 1
                assert callable(getattr(KINDS[role], handlers[0]))
    never = table["masks"].refusals if mode == "sealed" else ()
    assert seen == {
        (name, state, call)
        for name, region in table.items()
        for state, steps in region.steps.items()
        for call in steps
        if call not in never
    }


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_nothing_of_a_customer_is_touched_before_all_is_proven_and_in_place(mode: str) -> None:
    table = TABLES["trainer", mode]
    early = (State.NEW, State.PROVING)
    for at in reachable(table):
        for call in ("grant", "reopen", "sealed", "records", "records, last", "begin", "round"):
            assert not (legal(table, at, call) and at["run"] in early)
        assert not legal(table, at, "records") or at["memory"] is State.WEIGHTS
        for call in ("begin", "round", "evaluate"):
            assert not legal(table, at, call) or at["memory"] is State.FILLED
        assert not legal(table, at, "round") or at["run"] in (State.BEGUN, State.TRAINING)
        if mode == "masked":
            assert not legal(table, at, "grant") or at["masks"] is State.JOINED


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_no_state_of_a_run_is_ever_entered_again(mode: str) -> None:
    """So no checkpoint of a later state leads back to an earlier one by calls alone."""
    for role in ("trainer", "aggregator"):
        region = TABLES[role, mode]["run"]
        order = list(region.steps)
        for state, steps in region.steps.items():
            for step in steps.values():
                following = step.next
                ends = (
                    [following.then, following.otherwise]
                    if isinstance(following, If)
                    else [following or state]
                )
                assert all(order.index(end) >= order.index(state) for end in ends)


@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_a_sum_is_delivered_only_at_its_time(mode: str) -> None:
    table = TABLES["aggregator", mode]
    ready = {State.ENDED} if mode == "sealed" else {State.MEASURING, State.ENDED}
    assert {at["run"] for at in reachable(table) if legal(table, at, "deliver")} == ready


def test_a_trainer_that_comes_after_the_loading_was_closed_is_not_admitted() -> None:
    """The attack: a customer is admitted in the midst of the rounds, and the aggregator is rolled
    back to before. It counts fewer trainers then, and its cohort need not meet the real one.
    """
    enclave = session("aggregator", "sealed")
    enclave._at["run"] = State.ROUNDS
    with pytest.raises(ProtocolError, match="after the loading was closed"):
        enclave.handle(pb.Call(admit_peer=pb.AdmitPeer(peer="east")), lambda progress: None)
    assert enclave._trainers == {}


def test_a_handler_that_fails_leaves_the_session_where_it_was() -> None:
    enclave = session("trainer", "sealed")
    before = dict(enclave._at)
    with pytest.raises(FedarkError):
        enclave.handle(pb.Call(challenge=pb.Challenge(peer="nobody")), lambda progress: None)
    assert enclave._at == before


def test_the_page_of_the_states_is_of_todays_table() -> None:
    path = ROOT / "docs" / "enclave_states.py"
    specification = importlib.util.spec_from_file_location("enclave_states", path)
    assert specification is not None
    assert specification.loader is not None
    made: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    assert made.PAGE.read_text() == made.page(), "run `make states`"
