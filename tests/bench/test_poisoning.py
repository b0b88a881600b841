"""One harmful customer of eight, with and without a defence, by functions that enclaves call: a
lone head on the small task of audits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedark.bench.poisoning import Cohort, small_cohort
from fedark.contract.contract import ServerTerms

pytestmark = pytest.mark.slow

PLAIN, MEDIAN, TRIMMED = (
    ServerTerms(mean=mean)  # type: ignore[arg-type]
    for mean in ("weighted", "median-norm", "trimmed")
)
WIDE = 1e9


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return small_cohort()


@pytest.fixture(scope="module")
def clean(cohort: Cohort) -> tuple[float, float]:
    """What is right where nobody harms, and the median of the updates' norms."""
    norms = sorted(cohort.run("nobody harms", PLAIN, WIDE))
    return cohort.right(), norms[len(norms) // 2]


def right(cohort: Cohort, attack: str, server: ServerTerms, clip: float = WIDE) -> float:
    cohort.run(attack, server, clip)
    return cohort.right()


@pytest.mark.attack("a scaled update against a robust mean")
def test_attack_scaled_update_ruins_the_plain_mean_and_costs_less_with_a_defence(
    cohort: Cohort, clean: tuple[float, float], refusal: Callable[[str], None]
) -> None:
    whole, bound = clean
    ruined = right(cohort, "scaled update", PLAIN)
    assert ruined < 15 < whole - 30
    for name, server, clip in (
        ("clipping", PLAIN, bound),
        ("median-norm", MEDIAN, WIDE),
        ("trimmed", TRIMMED, WIDE),
    ):
        assert right(cohort, "scaled update", server, clip) > ruined + 10, name
    refusal("not refused but bounded: clip_norm, median-norm and trimmed; the plain mean is ruined")


@pytest.mark.attack("a backdoor's trigger, scaled")
def test_attack_backdoor_works_by_scaling_and_is_trimmed_away(
    cohort: Cohort, refusal: Callable[[str], None]
) -> None:
    cohort.run("backdoor", PLAIN, WIDE)
    works = cohort.fooled()
    cohort.run("backdoor", TRIMMED, WIDE)
    assert works > 60
    assert cohort.fooled() < works - 30
    refusal("trimmed: the trigger works on less by 30 points or more")


@pytest.mark.attack("flipped labels of one customer in eight")
def test_attack_label_flips_at_one_of_eight_cost_little(
    cohort: Cohort, clean: tuple[float, float], refusal: Callable[[str], None]
) -> None:
    assert right(cohort, "label flips", PLAIN, clean[1]) > clean[0] - 25
    assert right(cohort, "label flips", TRIMMED) > clean[0] - 25
    refusal("not refused but bounded: within 25 points of no attack, clipped or trimmed")
