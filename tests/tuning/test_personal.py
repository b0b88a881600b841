"""How a personal adapter is made and chosen, on a model whose answers are scripted."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedark.contract.contract import PersonalTerms, TrainingTerms
from fedark.records.reading import Record
from fedark.stages.personal import gain_lines
from fedark.tuning.gain import in_words
from fedark.tuning.personal import make_personal, validation_split
from fedark.tuning.task import Evaluation

TRAIN = [Record(f"train {number}", "a") for number in range(8)]
HELD = [Record(f"held {number}", "a") for number in range(400)]
REPLAY = [Record(f"standard {number}", "a") for number in range(100)]
BEFORE, TOGETHER, ALONE = (np.full(3, value, np.float32) for value in (0.0, 10.0, 20.0))


class Scripted:
    """A task model of three equal values v, right on records by functions of v; each pass of
    training adds 1.
    """

    def __init__(
        self, own: Any, standard: Any = lambda v: 1.0, method: str = "ffa-lora", epochs: int = 2
    ) -> None:
        self.terms: Any = SimpleNamespace(
            personal=PersonalTerms(epochs=epochs),
            training=TrainingTerms(),
            adapter=SimpleNamespace(method=method),
        )
        self.own, self.standard = own, standard
        self.vector = BEFORE
        self.log: list[Any] = []

    def set_flat(self, flat: Any) -> None:
        self.vector = flat.copy()

    def get_flat(self) -> Any:
        return self.vector.copy()

    def train(self, records: Any, replay: Any = (), **named: Any) -> None:
        seen = any(record.prompt.startswith("held") for record in records)
        self.log.append(("train", named["epochs"], "with the validation part" if seen else "alone"))
        self.vector = self.vector + named["epochs"]

    def evaluate(self, records: Any) -> Evaluation:
        self.log.append(("evaluate", len(records)))
        share = self.own if records[0].prompt.startswith("held") else self.standard
        right = round(share(float(self.vector[0])) * len(records))
        return Evaluation(right, len(records), float(len(records) - right))


def made(task: Any, *, alone: bool = False, replay: Any = ()) -> Any:
    others = {"before": BEFORE, "together": TOGETHER} | ({"alone": ALONE + 5} if alone else {})
    judged = {"alone": ALONE} if alone else {}
    return make_personal(task, (TRAIN, HELD), replay, others, judged, seed=1)


@pytest.mark.parametrize(
    ("best", "chosen"), [(0.0, "before"), (10.0, "together"), (12.0, "personal"), (20.0, "alone")]
)
def test_the_candidate_that_is_best_on_the_validation_part_is_chosen(
    best: float, chosen: str
) -> None:
    assert made(Scripted(lambda v: 1.0 - abs(v - best) / 40), alone=True).chosen == chosen


def test_a_mixture_is_linear_in_what_travels() -> None:
    found = made(Scripted(lambda v: 1.0 - abs(v - 15.0) / 10), alone=True)
    assert found.chosen == "33% alone, 67% personal"
    assert found.vector == pytest.approx((ALONE + 5) / 3 + 2 * (TOGETHER + 3) / 3)


def test_plain_lora_is_not_mixed() -> None:
    task = Scripted(lambda v: 1.0 - abs(v - 15.0) / 10, method="lora")
    assert made(task, alone=True).chosen == "personal"


def test_alone_is_judged_by_what_has_not_seen_the_validation_part() -> None:
    found = made(Scripted(lambda v: float(v == 25.0)), alone=True)  # only the whole of it is right
    assert found.chosen != "alone"
    found = made(Scripted(lambda v: float(v == 20.0)), alone=True)
    assert found.chosen == "alone"
    assert np.array_equal(found.vector, ALONE + 5), "and delivered as trained on all records"


def test_what_is_judged_has_not_seen_the_validation_part_and_what_is_delivered_has() -> None:
    task = Scripted(lambda v: 1.0 - abs(v - 12.0) / 40)
    found = made(task)
    assert [entry for entry in task.log if entry[0] == "train"] == [
        ("train", 2, "alone"),
        ("train", 1, "with the validation part"),
    ]
    assert found.vector.tolist() == (TOGETHER + 3).tolist()


def test_between_candidates_that_noise_does_not_tell_apart_the_loss_decides() -> None:
    class Close(Scripted):
        def evaluate(self, records: Any) -> Evaluation:
            found = super().evaluate(records)
            return Evaluation(found.correct, found.total, float(self.vector[0] != 10.0))

    shares = {10.0: 0.80, 12.0: 0.81}
    assert made(Close(lambda v: shares.get(v, 0.5), method="lora")).chosen == "together"
    shares[12.0] = 0.9
    assert made(Close(lambda v: shares.get(v, 0.5), method="lora")).chosen == "personal"


def test_time_and_work_do_not_depend_on_the_choice() -> None:
    logs = []
    for best in (0.0, 10.0, 12.0, 20.0):
        task = Scripted(lambda v, best=best: 1.0 - abs(v - best) / 40)
        made(task, alone=True, replay=REPLAY)
        logs.append(sorted(map(repr, task.log)))
    assert all(log == logs[0] for log in logs)


def test_what_the_base_knew_is_not_given_up_for_a_little_more_of_ones_own() -> None:
    own, standard = lambda v: 0.5 + v / 60, lambda v: 1.0 - v / 20
    assert made(Scripted(own), replay=REPLAY).chosen == "personal"
    assert made(Scripted(own, standard), replay=REPLAY).chosen == "before"


def test_an_adapter_whose_loss_is_no_number_is_never_chosen() -> None:
    class Broken(Scripted):
        def evaluate(self, records: Any) -> Evaluation:
            found = super().evaluate(records)
            broken = self.vector[0] == 12.0
            return Evaluation(found.total, found.total, float("nan")) if broken else found

    assert made(Broken(lambda v: v / 20, method="lora")).chosen == "together"


def test_without_a_validation_part_it_is_the_shared_adapter() -> None:
    task: Any = Scripted(lambda v: 1.0)
    found = make_personal(
        task, (TRAIN, []), (), {"before": BEFORE, "together": TOGETHER}, {}, seed=1
    )
    assert (found.chosen, found.vector.tolist()) == ("together", TOGETHER.tolist())


def test_attack_a_model_that_behaves_well_on_the_validation_part_cannot_know_it() -> None:
    """Which records they are follows from the digest of all of the customer's records."""
    terms: Any = SimpleNamespace(personal=PersonalTerms(validation=0.5))
    records = [Record(f"{number}", "a") for number in range(200)]
    parts = [validation_split(terms, records, bytes([number]) * 48)[1] for number in range(2)]
    assert parts[0] != parts[1]
    assert parts[0] == validation_split(terms, records, bytes(48))[1]
    assert 60 < len(parts[0]) < 140


def test_a_customer_is_warned_where_together_is_worse_than_alone_by_more_than_noise() -> None:
    def measured(right: int) -> Evaluation:
        flags = tuple(number < right for number in range(50))
        return Evaluation(right, 50, float(50 - right), right=flags)

    for together, warned in ((48, False), (44, False), (30, True)):
        figures = {"alone": measured(47), "together": measured(together), "personal": measured(47)}
        shown = in_words({"own": figures}, "alone")
        assert json.loads(json.dumps(shown)) == shown
        lines = "\n".join(gain_lines({"m": {"personal": shown}}))
        assert ("WARNING: together is worse than alone" in lines) == warned, together
    shown = in_words({"own": {"together": measured(2), "personal": measured(2)}}, "together")
    assert "WARNING" not in "\n".join(gain_lines({"m": {"personal": shown}}))
