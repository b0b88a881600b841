"""A host that brings an old checkpoint to its enclave: no cohort's sum comes out twice, no round is
unmasked twice.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from mortal import Fate, World
from small import write_job

from fedark.contract.job import Job
from fedark.foundation.errors import FederationError, ProtocolError, Refused
from fedark.simulation.local import Federation, prepare
from fedark.v1 import enclave_pb2 as pb

pytestmark = pytest.mark.usefixtures("measured_once")


class Past:
    """Everything that a run's hosts saw of their enclaves."""

    def __init__(self, running: World) -> None:
        self.world, self.calls = running, running.fate.calls

    def of(self, who: str, kind: str) -> list[tuple[Any, Any]]:
        return [
            (call, reply)
            for party, call, reply in self.calls
            if party == who and call.WhichOneof("body") == kind
        ]

    def before(self, who: str, kind: str, number: int = 0) -> bytes:
        """The checkpoint that `who` had when its call `kind` of round `number` came."""
        last = b""
        for party, call, reply in self.calls:
            if party != who:
                continue
            if call.WhichOneof("body") == kind and number in (
                0,
                getattr(getattr(call, kind), "round", 0),
            ):
                return last
            last = reply.checkpoint or last
        raise AssertionError("no such call")

    def submissions(self, number: int, without: str = "") -> list[pb.Call]:
        return [
            call
            for call, _ in self.of("pool", "submit")
            if call.submit.round == number and call.submit.party != without
        ]


@pytest.fixture(scope="module")
def pasts(tmp_path_factory: pytest.TempPathFactory):
    """One finished run for each protection; two of three customers may make a round."""
    folder = tmp_path_factory.mktemp("past")
    with pytest.MonkeyPatch.context() as patch:
        made: dict[str, Past] = {}
        for mode, minimum in (("sealed", 2), ("masked", 3)):
            path = write_job(folder / mode / "job", rounds=2, minimum=minimum, records=16)
            job = Job.load(path, (f'protection.mode="{mode}"', "protection.max_records=40"))
            federation = prepare(job, folder / mode / "work", sandbox="none")
            kept = folder / mode / "kept"
            real = shutil.rmtree
            patch.setattr(
                shutil, "rmtree", lambda *_, **__: None
            )  # the host keeps what it should forget
            running = World(Federation(federation.work, federation.contract, {}), Fate(), patch)
            running.run()
            patch.setattr(shutil, "rmtree", real)
            made[mode] = Past(running)
            assert not kept.exists()
        yield made
        for past in made.values():
            past.world.close()


def test_a_rolled_back_aggregator_gets_no_round_beyond_the_one_that_it_closes_again(pasts) -> None:
    """The attack: close round 1 once with all, once without one customer, and subtract."""
    past = pasts["sealed"]
    pool = past.world.again("pool", past.before("pool", "close", 1))
    for call in past.submissions(1, without="south"):
        pool.call(call)
    other = pool.call(pb.Call(close=pb.Close(round=1))).closed.state
    # What came out is encrypted to trainer enclaves; every one that had round 2 refuses it.
    for name in ("north", "east", "south"):
        trainer = past.world.nodes[name]
        latest = [
            reply.checkpoint for party, _, reply in past.calls if party == name and reply.checkpoint
        ][-1]
        restarted = past.world.again(name, latest)
        feed(trainer, restarted, past, name)
        with pytest.raises((ProtocolError, Refused)):
            restarted.call(pb.Call(round=pb.Round(round=2, state=other)))
    # And the updates that they made of the real round 2 do not fit into this history.
    for call in past.submissions(2):
        with pytest.raises(Refused):
            pool.call(call)
    with pytest.raises(FederationError, match="has 0 of the 2 customers"):
        pool.call(pb.Call(close=pb.Close(round=2)))
    with pytest.raises(ProtocolError, match="not finished"):
        pool.call(pb.Call(deliver=pb.Deliver(party="north")))


@pytest.fixture(scope="module")
def other_end(pasts) -> tuple[Any, bytes]:
    """The attack on the last round, in mode "sealed": closed once with all, and here once without
    one customer, to subtract.
    """
    past = pasts["sealed"]
    pool = past.world.again("pool", past.before("pool", "close", 2))
    for call in past.submissions(2, without="south"):
        pool.call(call)
    return pool, pool.call(pb.Call(close=pb.Close(round=2))).closed.state


def test_a_last_round_that_was_closed_again_is_not_delivered(pasts, other_end) -> None:
    """Nor are the last measurements, which must be closed before, those of anybody who took part in
    the real ones.
    """
    past, (pool, _) = pasts["sealed"], other_end
    assert past.of("pool", "deliver")
    with pytest.raises(ProtocolError, match="not finished"):
        pool.call(pb.Call(deliver=pb.Deliver(party="north")))
    for call in past.submissions(3):
        with pytest.raises(Refused):
            pool.call(call)
    with pytest.raises(FederationError, match="has 0 of the 2 customers"):
        pool.call(pb.Call(close=pb.Close(round=3)))
    with pytest.raises(ProtocolError, match="not finished"):
        pool.call(pb.Call(deliver=pb.Deliver(party="north")))


def feed(node: Any, enclave: Any, past: Past, name: str) -> None:
    for kind in ("sealed", "records"):
        if kind == "sealed":
            enclave.call(pb.Call(reopen=pb.Reopen(model="tiny")))
        for call, _ in past.of(name, kind):
            enclave.call(call)


def test_a_restarted_aggregator_takes_a_cohort_that_meets_every_other_possible_one(pasts) -> None:
    past = pasts["sealed"]  # 3 customers, at least 2: two cohorts of two always share one
    pool = past.world.again("pool", past.before("pool", "close", 1))
    pool.call(past.submissions(1)[0])
    with pytest.raises(FederationError, match="has 1 of the 2 customers"):
        pool.call(pb.Call(close=pb.Close(round=1)))


def test_an_aggregator_restarted_amid_the_last_measurements_gives_no_figures(pasts) -> None:
    past = pasts["sealed"]
    assert past.of("pool", "close")[-1][1].closed.metrics != b"\x80"
    pool = past.world.again("pool", past.before("pool", "close", 3))
    for call in past.submissions(3, without="south"):
        pool.call(call)
    assert pool.call(pb.Call(close=pb.Close(round=3))).closed.metrics == b"\x80"  # an empty list


def test_under_masks_a_rolled_back_aggregator_unmasks_no_second_sum(pasts) -> None:
    """The members' answers of the real round are for its survivors; nothing of them fits another
    set.
    """
    past = pasts["masked"]
    pool = past.world.again("pool", past.before("pool", "open_round", 1))
    pool.call(pb.Call(open_round=pb.OpenRound(round=1, parties=["north", "east", "south"])))
    for call in past.submissions(1):
        if call.submit.part == pb.Submit.UPDATE:
            pool.call(call)
    asked = pool.call(pb.Call(survivors=pb.Survivors(round=1))).asked
    north = past.world.again(
        "north", [r.checkpoint for p, _, r in past.calls if p == "north" and r.checkpoint][-1]
    )
    with pytest.raises((Refused, ProtocolError)):  # the member has gone on to later rounds
        north.call(pb.Call(endorse=pb.Endorse(request=asked.endorse["north"])))


def test_a_member_that_was_restarted_repeats_its_answer_and_gives_no_other(pasts) -> None:
    past = pasts["masked"]
    (call, reply), *_ = past.of("east", "unmask")
    east = past.world.again("east", reply.checkpoint)
    again = east.call(call)
    assert len(again.update.protected) == len(reply.update.protected)
    other = pb.Call(unmask=pb.Unmask(request=past.of("east", "unmask")[1][0].unmask.request))
    with pytest.raises((Refused, ProtocolError)):
        east.call(other)


def test_a_round_that_a_rolled_back_trainer_runs_again_is_not_taken_twice(pasts) -> None:
    past = pasts["sealed"]
    (call, reply), *_ = past.of("north", "round")
    north = past.world.again("north", past.before("north", "round", 1))
    feed(None, north, past, "north")
    again = north.call(call).update.protected
    assert again != reply.update.protected
    pool = past.world.again("pool", past.before("pool", "close", 1))
    pool.call(past.submissions(1)[0])
    with pytest.raises(Refused, match="two different messages for one round"):
        pool.call(pb.Call(submit=pb.Submit(round=1, party="north", protected=again)))


def test_a_round_that_is_in_the_checkpoint_is_not_trained_again(pasts) -> None:
    past = pasts["sealed"]
    (call, reply), *_ = past.of("north", "round")
    north = past.world.again("north", reply.checkpoint)
    feed(None, north, past, "north")
    with pytest.raises(ProtocolError, match="no round is trained twice"):
        north.call(call)


def test_a_trainer_measures_one_final_adapter(pasts, other_end) -> None:
    """Else figures could be subtracted. The same adapter again is measured as before, for whoever
    was killed.
    """
    past, (_, other) = pasts["sealed"], other_end
    (call, reply), *_ = past.of("north", "evaluate")
    north = past.world.again("north", reply.checkpoint)
    feed(None, north, past, "north")
    with pytest.raises(ProtocolError, match="Another final adapter was measured already"):
        north.call(pb.Call(evaluate=pb.Evaluate(state=other, round=call.evaluate.round)))
    again = north.call(call)
    assert again.measured.local == reply.measured.local
    restarted = past.world.again("north", again.checkpoint)
    feed(None, restarted, past, "north")
    with pytest.raises(ProtocolError, match="Another final adapter was measured already"):
        restarted.call(pb.Call(evaluate=pb.Evaluate(state=other, round=call.evaluate.round)))


def test_a_restarted_trainer_takes_no_other_records(pasts) -> None:
    past = pasts["sealed"]
    north = past.world.again("north", past.before("north", "round", 1))
    north.call(pb.Call(reopen=pb.Reopen(model="tiny")))
    for call, _ in past.of("north", "sealed"):
        north.call(call)
    calls = [
        pb.Call.FromString(call.SerializeToString()) for call, _ in past.of("north", "records")
    ]
    calls[0].records.records[0].prompt += " more"
    for call in calls[:-1]:
        north.call(call)
    with pytest.raises(Refused, match="not those that this run began with"):
        north.call(calls[-1])
    with pytest.raises(ProtocolError, match="before weights and records were complete"):
        north.call(past.of("north", "round")[0][0])


@pytest.mark.parametrize("name", ["east", "pool"])
def test_a_checkpoint_opens_in_no_other_partys_enclave(pasts, name: str) -> None:
    past = pasts["sealed"]
    with pytest.raises(Refused, match="does not open"):
        past.world.again(name, past.before("north", "round", 1))


def test_a_checkpoint_only_begins_a_session(pasts) -> None:
    past = pasts["sealed"]
    checkpoint = past.before("north", "round", 1)
    north = past.world.again("north", checkpoint)
    with pytest.raises(ProtocolError, match="can only begin"):
        north.call(pb.Call(resume=pb.Resume(checkpoint=checkpoint)))
