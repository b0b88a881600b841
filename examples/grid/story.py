"""The world of the grid example and its dispatch messages.

A message tells of two things at once: a report that calls for an action, and an older matter that
is closed. Which is which only its wording and word order say, so no list of keywords answers it.
Each desk reads it by its own words, one word that means something else elsewhere, its own
threshold, and its own rules (`desks.toml`). Of the 24 word orders, eight are kept for testing
alone. Everything is drawn from one seed; nothing here knows fedark.
"""

from __future__ import annotations

import itertools
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EQUIPMENT = ("transformer", "feeder", "busbar", "breaker", "generator", "capacitor")
STATES = ("loaded", "tripped", "overheating", "silent")
STANDARD = "standard"

# How the current report and the closed matter can be worded, by which comes first in the clause:
# thing or state.
REPORT = {
    "thing": (
        "{thing} {state}",
        "{thing} now {state}",
        "{thing} is {state}",
        "{thing} found {state}",
    ),
    "state": (
        "{state} is {thing}",
        "now {state} {thing}",
        "{state} at {thing}",
        "found {state} {thing}",
    ),
}
CLOSED = {
    "thing": (
        "{thing} {state} is closed",
        "{thing} {state} was handled",
        "{thing} no longer {state}",
        "ignore {thing} {state}",
    ),
    "state": (
        "{state} {thing} is closed",
        "{state} {thing} was handled",
        "no longer {state} {thing}",
        "ignore {state} {thing}",
    ),
}
BARE = {
    "thing": ("{thing} is fine", "{thing} is back", "{thing} all clear", "{thing} was checked"),
    "state": ("all clear on {thing}", "nothing on {thing}", "not {thing}", "ignore {thing}"),
}


@dataclass(frozen=True)
class Order:
    """One word order: which matter comes first, where the site stands, and what comes first in each
    clause.
    """

    report_first: bool
    site: str
    report: str
    closed: str


ORDERS = tuple(
    Order(*parts)
    for parts in itertools.product(
        (True, False), ("start", "middle", "end"), ("thing", "state"), ("thing", "state")
    )
)


@dataclass(frozen=True)
class Desk:
    """A control desk: how it speaks and what it decides.

    Attributes:
        words: for every thing, the words it may use, and how likely the first is.
        rules: (equipment, state) -> action.
        threshold: percent of load from which the rule for "loaded" applies.
    """

    name: str
    words: Mapping[str, Sequence[tuple[str, float]]]
    rules: Mapping[tuple[str, str], str]
    threshold: int
    sites: Sequence[str]


@dataclass(frozen=True)
class Row:
    desk: str
    message: str
    action: str


@dataclass(frozen=True)
class World:
    actions: tuple[str, ...]
    readings: tuple[int, ...]
    desks: Mapping[str, Desk]

    @classmethod
    def load(cls, path: Path) -> World:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        standard = table["standard"]
        rules = {
            (thing, state): standard["rules"][thing][state]
            for thing in EQUIPMENT
            for state in STATES
        }
        words = {key: [(word, 0.5) for word in pair] for key, pair in standard["words"].items()}
        desks = {STANDARD: Desk(STANDARD, words, rules, standard["threshold"], standard["sites"])}
        for name, region in table["regions"].items():
            own = {
                (thing, state): action
                for thing, row in region["rules"].items()
                for state, action in row.items()
            }
            friend = region["false_friend"]
            spoken = {}
            for key, pair in standard["words"].items():
                common = [word for word in pair if word != friend["word"]]
                if key == friend["means"]:
                    common = [friend["word"]]
                spoken[key] = [
                    (region["words"][key], 0.75),
                    *((word, 0.25 / len(common)) for word in common),
                ]
            desks[name] = Desk(name, spoken, rules | own, region["threshold"], region["sites"])
        return cls(tuple(table["actions"]), tuple(table["readings"]), desks)

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(name for name in self.desks if name != STANDARD)


def split_orders(seed: int) -> tuple[tuple[Order, ...], tuple[Order, ...]]:
    """The word orders for training (16) and, never seen there, for testing (8).

    Half of either begin with the report, so that "what comes first counts" is no answer.
    """
    rng = random.Random(f"{seed}/orders")
    halves = [[order for order in ORDERS if order.report_first is first] for first in (True, False)]
    for half in halves:
        rng.shuffle(half)
    return tuple(order for half in halves for order in half[4:]), tuple(
        order for half in halves for order in half[:4]
    )


def message(
    world: World, desk: Desk, order: Order, rng: random.Random, closed: int = 1, bare: float = 0.0
) -> Row:
    """Draw one message in `order`, with `closed` older matters in it, and its action.

    `bare` is the share of older matters that are told without their state. Only a message with an
    older matter shows all of its word order, so what is held out for testing has one.
    """

    def phrase(key: str) -> str:
        words, weights = zip(*desk.words[key], strict=True)
        return str(rng.choices(words, weights)[0])

    def matter(
        frames: Mapping[str, Sequence[str]], first: str, thing: str, state: str, reading: int
    ) -> str:
        said = phrase(state) + (f" at {reading} percent" if state == "loaded" else "")
        return rng.choice(frames[first]).format(thing=phrase(thing), state=said)

    things, states = rng.sample(EQUIPMENT, 1 + closed), rng.sample(STATES, 1 + closed)
    readings = rng.choices(world.readings, k=1 + closed)
    report = matter(REPORT, order.report, things[0], states[0], readings[0])
    older = [
        matter(BARE if rng.random() < bare else CLOSED, order.closed, *facts)
        for facts in zip(things[1:], states[1:], readings[1:], strict=True)
    ]
    clauses = [report, *older] if order.report_first else [*older, report]
    clauses.insert(
        {"start": 0, "middle": 1, "end": len(clauses)}[order.site], rng.choice(desk.sites)
    )
    quiet = states[0] == "loaded" and readings[0] < desk.threshold
    return Row(
        desk.name, ", ".join(clauses), "monitor" if quiet else desk.rules[things[0], states[0]]
    )


def messages(
    world: World,
    desk: str,
    count: int,
    orders: Sequence[Order],
    rng: random.Random,
    closed: Sequence[int] = (1,),
    bare: float = 0.0,
) -> list[Row]:
    """`count` different messages of one desk, each with one of `closed` older matters."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = message(world, world.desks[desk], rng.choice(orders), rng, rng.choice(closed), bare)
        rows.setdefault(row.message, row)
    return list(rows.values())
