"""The grid example is a real task: reproducible, and not solved by looking at words alone."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

GRID = Path(__file__).resolve().parents[2] / "examples" / "grid"
sys.path.insert(0, str(GRID))

from story import EQUIPMENT, STANDARD, STATES, World, messages, split_orders  # noqa: E402

WORLD = World.load(GRID / "desks.toml")
KNOWN, UNSEEN = split_orders(7)
BARE = 0.7
MATTERS = {"train": (0, 1, 1), "held-out": (1,)}  # as make.py draws them


def rows(desk: str, count: int, orders: object, purpose: str) -> list[tuple[set[str], str]]:
    drawn = messages(
        WORLD, desk, count, orders, random.Random(f"7/{purpose}/{desk}"), MATTERS[purpose], BARE
    )
    return [({desk, *row.message.replace(",", "").split()}, row.action) for row in drawn]


TRAIN = [row for desk in WORLD.regions[:3] for row in rows(desk, 280, KNOWN, "train")]
TEST = [row for desk in WORLD.regions[:3] for row in rows(desk, 100, UNSEEN, "held-out")]


def test_the_same_seed_draws_the_same_messages() -> None:
    assert rows("south", 20, KNOWN, "train") == rows("south", 20, KNOWN, "train")


def test_the_word_orders_of_the_test_are_never_trained_on_and_favour_no_place() -> None:
    assert not set(KNOWN) & set(UNSEEN)
    assert sum(order.report_first for order in UNSEEN) == len(UNSEEN) / 2


def test_regions_differ_from_the_standard_desk_in_rules_and_words() -> None:
    standard = WORLD.desks[STANDARD]
    for name in WORLD.regions:
        desk = WORLD.desks[name]
        assert sum(desk.rules[key] != standard.rules[key] for key in standard.rules) == 6
        assert desk.threshold != standard.threshold or name == "west"


def test_the_most_frequent_action_is_a_poor_answer() -> None:
    common = Counter(action for _, action in TRAIN).most_common(1)[0][0]
    assert sum(action == common for _, action in TEST) / len(TEST) < 0.3


def test_a_keyword_lookup_does_not_solve_it() -> None:
    """Each word votes for the actions that it was seen with, by its share among them."""
    seen: dict[str, Counter[str]] = {}
    for words, action in TRAIN:
        for word in words:
            seen.setdefault(word, Counter())[action] += 1
    right = 0
    for words, action in TEST:
        votes: Counter[str] = Counter()
        for word in words & seen.keys():
            total = seen[word].total()
            for other, count in seen[word].items():
                votes[other] += count / total  # type: ignore[assignment]
        right += votes.most_common(1)[0][0] == action
    assert right / len(TEST) < 0.6


def test_the_most_similar_message_does_not_solve_it() -> None:
    right = 0
    for words, action in TEST:
        nearest = max(TRAIN, key=lambda row: len(words & row[0]) / len(words | row[0]))
        right += nearest[1] == action
    assert right / len(TEST) < 0.65


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_lookup_that_knows_every_word_rule_and_threshold_does_not_solve_it(place: int) -> None:
    """It takes the thing and the state that are named first, or last: it knows all but which matter
    is the current one.
    """
    right = total = 0
    for name in WORLD.regions[:3]:
        desk = WORLD.desks[name]
        meaning = {word: key for key, words in desk.words.items() for word, _ in words}
        for row in messages(
            WORLD, name, 200, UNSEEN, random.Random(f"7/held-out/{name}"), MATTERS["held-out"], BARE
        ):
            said = row.message.replace(",", "").split()
            thing = [meaning[word] for word in said if meaning.get(word) in EQUIPMENT][place]
            at, state = [
                (index, meaning[word])
                for index, word in enumerate(said)
                if meaning.get(word) in STATES
            ][place]
            quiet = state == "loaded" and int(said[at + 2]) < desk.threshold
            right += row.action == ("monitor" if quiet else desk.rules[thing, state])
            total += 1
    assert right / total < 0.65


@pytest.mark.parametrize("name", ["make.py", "bases.py", "job.toml", "desks.toml"])
def test_its_files_ship(name: str) -> None:
    assert (GRID / name).is_file()
