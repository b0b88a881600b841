"""What `privacy.mechanism` in a contract means; the mathematics is in `fedark.privacy.mechanisms`.

    example-distributed  Each round every record of every customer is drawn with probability q; a
                         customer adds up the clipped gradients of its draw, rounds the sum to a
                         grid and adds a share of integer noise; the shares of the fewest customers
                         that a round may have, less those who may collude, make up all of it. A
                         round below that minimum is never summed. One step of the server's
                         optimiser a round.
    example-local        Every step of a customer's local training is such a gradient with all of
                         the noise.
    customer-level       A customer's whole update is clipped, rounded and noised by a share.

Rounding comes before the noise, and the noise is integer: nothing depends on how a computer rounds,
and the sum of noised integers is the mechanism that is accounted for, under masks and sealed alike.
Sizes of draws are never published: a sum is divided by q times the public number of records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedark.contract.contract import (
    Contract,
    ModelTerms,
    PrivacyTerms,
    ProtectionTerms,
    ServerTerms,
    TrainingTerms,
)
from fedark.foundation.errors import InputError, ProtocolError
from fedark.privacy.accounting import Guarantee, Spend, View, cost, reachable
from fedark.privacy.kinds import TRAITS
from fedark.privacy.mechanisms import Mechanism, calibrated
from fedark.privacy.sampling import FINEST_RATE
from fedark.secagg import Contribution, Layout
from fedark.secagg.vector import RoundSum, mask

__all__ = [
    "NOISE_REFUSED",
    "NOISE_WARNED",
    "REACH_REFUSED",
    "REACH_WARNED",
    "Outline",
    "claim_problems",
    "futile_problems",
    "guarantees",
    "learning_lines",
    "learning_warnings",
    "mechanism",
    "noise_to_signal",
    "noised",
    "noised_layout",
    "noised_sum",
    "noised_words",
    "privacy_problems",
    "reach",
    "server_scale",
    "solved",
    "strongest_spend",
    "sum_clip",
]

NOISE_WARNED, NOISE_REFUSED = 0.1, 0.5
"""Ratios of noise to signal above which a job is warned of, and refused (docs/privacy.md)."""
_LOCAL_TERMS = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "lora_dropout": 0.0}
REACH_WARNED, REACH_REFUSED = 0.3, 0.03
"""How far a value can move at most (`reach`), below which a job is warned of, and refused."""
_BITS = 22
_LEAST_SUM = (
    16.0  # clip norms of one record that a customer's sum may have, however small its data are
)


@dataclass(frozen=True)
class Outline:
    """What of a contract the cost and the use of its privacy depend on, before there is one.

    Attributes:
        customers: their names, or anything of that number.
    """

    privacy: PrivacyTerms
    protection: ProtectionTerms
    rounds: int
    customers: Sequence[object]
    models: Sequence[ModelTerms]


def mechanism(contract: Contract | Outline) -> Mechanism | None:
    """The contract's mechanism, or None if it has none.

    Raises:
        InputError: its terms do not make one.
    """
    terms = contract.privacy
    if terms.mechanism == "none":
        return None
    grid, rounds, noise = _grid(contract), contract.rounds, terms.noise_multiplier
    customers, colluders = len(contract.customers), contract.protection.colluders
    dropped = customers - contract.protection.minimum_cohort
    rate, steps = _rate(terms), _steps(terms, rounds)
    if terms.mechanism == "customer-level":
        return Mechanism.customer_level(
            grid,
            noise_multiplier=noise,
            rounds=rounds,
            customers=customers,
            colluders=colluders,
            dropped=dropped,
        )
    if terms.mechanism == "example-local":
        return Mechanism.example_local(
            grid,
            record_norm=terms.clip_norm,
            noise_multiplier=noise,
            rate=rate,
            steps=steps,
            delta=terms.delta,
        )
    return Mechanism.example_distributed(
        grid,
        record_norm=terms.clip_norm,
        noise_multiplier=noise,
        rate=rate,
        rounds=rounds,
        delta=terms.delta,
        customers=customers,
        colluders=colluders,
        dropped=dropped,
    )


def noised_layout(contract: Contract, name: str) -> Layout:
    """The grid that sums are rounded to, with room for the noise."""
    found = mechanism(contract)
    return replace(
        _grid(contract), name=name, noise_bound=found.noise_bound if found is not None else 0
    )


def noised(contract: Contract, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` [all travelling values] clipped, rounded and noised: what one customer's integers
    say alone.
    """
    return noised_sum(contract, ("",), [noised_words(contract, vector)]).total()


def noised_words(contract: Contract, vector: NDArray[np.float32]) -> NDArray[np.uint64]:
    """`vector` [all travelling values] clipped, rounded and noised, as integers that can be summed
    over all customers: as it may leave where nothing is masked.
    """
    found, grid = mechanism(contract), noised_layout(contract, "noised")
    if found is None:
        raise ValueError("the contract has no mechanism")
    cohort = len(contract.customers)
    words = np.empty(grid.words(cohort), np.uint64)
    mask(words, grid, cohort, Contribution(vector), [], noise=found.noise())
    return words


def noised_sum(
    contract: Contract, parties: Sequence[str], words: Iterable[NDArray[np.uint64]]
) -> RoundSum:
    """The sum of `noised_words` of these parties: exact, whatever the order.

    Raises:
        ProtocolError: words of another length.
        Refused: no honest customers can have sent them.
    """
    grid, cohort = noised_layout(contract, "noised"), len(contract.customers)
    total = np.zeros(grid.words(cohort), np.uint64)
    for one in words:
        if one.shape != total.shape:
            raise ProtocolError("A noised update has not the length of the contract.")
        np.add(total, one, out=total)
    found = RoundSum(grid, tuple(parties), cohort, total)
    found.check()
    return found


def server_scale(contract: Contract) -> float:
    """What the mean over the customers in a sum is multiplied by: it makes a mean of gradients of
    their sums.
    """
    terms = contract.privacy
    if terms.mechanism == "none" or TRAITS[terms.mechanism].update != "gradient-sum":
        return 1.0
    return len(contract.customers) / (terms.sampling_rate * terms.records)


def noise_to_signal(contract: Contract | Outline) -> float:
    """Expected L2 norm of all noise in the finished adapter, over the largest norm that what was
    learned can have: every record drawn as often as expected, its gradient as long as the clip
    norm, and all of them pointing the same way in every step. Both grow over T steps: the signal by
    T, independent noise by sqrt(T). 0 without a mechanism.
    """
    found = mechanism(contract)
    if found is None:
        return 0.0
    terms, customers = contract.privacy, len(contract.customers)
    noise = _grid(contract).step * math.sqrt(found.variance(customers) * found.length)
    units = customers if found.unit == "customer" else float(found.rate) * terms.records
    if units <= 0:
        return math.inf
    return noise / (terms.clip_norm * units * math.sqrt(found.releases))


def reach(contract: Contract | Outline) -> float:
    """How far the values of the adapter that moves least can move in the whole job, at most: root
    mean square over its values, if every record of every round pulled the same way with a gradient
    as long as the clip norm. Infinite without a mechanism. Real gradients reach 4 to 7 % of it
    (docs/privacy.md).
    """
    terms = contract.privacy
    if terms.mechanism == "none":
        return math.inf
    clip = terms.clip_norm / math.sqrt(len(contract.models))
    steps = [_step(model, terms, clip) / math.sqrt(model.travelling) for model in contract.models]
    return contract.rounds * min(steps)


def _step(model: ModelTerms, terms: PrivacyTerms, clip: float) -> float:
    """The longest L2 norm by which noiseless gradients move a model in a round."""
    if TRAITS[terms.mechanism].update == "noised-steps":
        training = model.training
        rate = max(training.learning_rate, training.head_learning_rate)
        adaptive = training.optimizer == "adamw"  # about the rate for each value
        clip = terms.local_steps * rate * (math.sqrt(model.travelling) if adaptive else clip)
    return _server_step(model.server, clip, model.travelling)


def _server_step(server: ServerTerms, update: float, values: int) -> float:
    """The longest step of the server's optimiser for updates of this L2 norm."""
    if server.optimizer == "fedavg":
        return server.learning_rate * update
    # |m| <= update and sqrt(v) >= 0; and, value by value, m / sqrt(v) by Cauchy and Schwarz.
    first, second = server.beta1, server.beta2
    bound = math.inf
    if first**2 < second < 1:
        bound = (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second)) * math.sqrt(values)
    return server.learning_rate * min(update / server.tau, bound)


def learning_lines(contract: Contract | Outline) -> list[str]:
    """What noise and step sizes let the job learn, for people: nothing without a mechanism."""
    if contract.privacy.mechanism == "none":
        return []
    try:
        ratio, far = noise_to_signal(contract), reach(contract)
    except InputError as error:
        return [f"noise: {error.what}"]
    said = f"noise: {ratio:.2g} times the most that the job can learn"
    if ratio > NOISE_REFUSED:
        said += "; expect nothing to be learned"
    elif ratio > NOISE_WARNED:
        said += f"; expect little to be learned (good jobs stay below {NOISE_WARNED})"
    steps = f"steps: a value of the adapter moves by {far:.2g} at most in the whole job"
    if far < REACH_REFUSED:
        steps += "; the adapter stays as it was"
    elif far < REACH_WARNED:
        steps += f"; expect little to be learned (good jobs are above {REACH_WARNED})"
    return [said, steps]


def learning_warnings(contract: Contract | Outline) -> list[str]:
    """The lines of `learning_lines` that promise little or nothing."""
    return [line for line in learning_lines(contract) if "; " in line]


def futile_problems(contract: Contract | Outline) -> list[str]:
    """Why the job would spend its epsilon for nothing, unless it accepts that."""
    terms = contract.privacy
    if terms.mechanism == "none" or terms.accept_noise:
        return []
    noise, steps = (f"privacy: {line}\n    " for line in learning_lines(contract))
    accepted = "privacy.accept_noise = true runs the job all the same."
    found = []
    if noise_to_signal(contract) > NOISE_REFUSED:
        found.append(
            f"{noise}More records, a larger sampling_rate, more rounds, a larger epsilon, or fewer"
            f' values (method "head", a lower rank, fewer layers) lower it; {accepted}'
        )
    if reach(contract) < REACH_REFUSED:
        found.append(
            f"{steps}Under a mechanism a round moves the adapter by the server's learning_rate"
            " times clip_norm at most: a larger models.server.learning_rate, clip_norm or more"
            f" rounds make it longer (fedark plan proposes them); {accepted}"
        )
    return found


def guarantees(contract: Contract | Outline) -> tuple[Guarantee, ...]:
    """What the whole job guarantees, against whom."""
    found = mechanism(contract)
    if found is None:
        return ()
    views: tuple[View, ...] = ("adapter", "colluders") if found.traits.shared else ("adapter",)
    return tuple(found.guarantee(view, contract.privacy.delta) for view in views)


def solved(terms: PrivacyTerms, rounds: int) -> PrivacyTerms:
    """`terms` with the least noise that gives their epsilon, where a job file leaves it open.

    Raises:
        InputError: no noise does.
    """
    if terms.mechanism == "none" or terms.noise_multiplier > 0:
        return terms
    noise = calibrated(terms.epsilon, terms.delta, _rate(terms), _steps(terms, rounds))
    return terms.model_copy(update={"noise_multiplier": noise})


def _rate(terms: PrivacyTerms) -> Fraction:
    """With which each protected unit takes part in a release."""
    whole = TRAITS[terms.mechanism].unit == "customer"
    return Fraction(1) if whole else Fraction(str(terms.sampling_rate))


def _steps(terms: PrivacyTerms, rounds: int) -> int:
    """Releases of the whole job."""
    local = TRAITS[terms.mechanism].update == "noised-steps"
    return rounds * (terms.local_steps if local else 1)


def claim_problems(contract: Contract | Outline) -> list[str]:
    """What is wrong with the epsilon that the contract claims, computed again from its noise."""
    terms = contract.privacy
    if terms.mechanism == "none":
        return []
    if terms.noise_multiplier <= 0:
        return [f"its privacy mechanism {terms.mechanism!r} has no noise"]
    problems = privacy_problems(
        terms,
        contract.protection,
        [(model.name, model.training) for model in contract.models],
        contract.rounds,
    )
    if problems:
        return problems
    try:
        spend = strongest_spend(contract)
        epsilon = cost([spend], terms.delta)[0] if spend is not None else 0.0
    except InputError as error:
        return [error.what]
    if math.isinf(epsilon):
        return [
            f"privacy: epsilon {terms.epsilon:g} at delta {terms.delta:g} is beyond what can be"
            " accounted for so many values and rounds: ask for a smaller epsilon or a larger delta"
        ]
    if epsilon > terms.epsilon * (1 + 1e-6):
        return [f"it claims epsilon {terms.epsilon:g}, and its noise gives {epsilon:.3g}"]
    return []


def strongest_spend(contract: Contract | Outline) -> Spend | None:
    """What the whole job costs against the strongest party that the contract reckons with; None
    without a mechanism.
    """
    found = mechanism(contract)
    return (
        found.spend("colluders" if contract.protection.colluders else "adapter")
        if found is not None
        else None
    )


def privacy_problems(
    privacy: PrivacyTerms,
    protection: ProtectionTerms,
    models: Iterable[tuple[str, TrainingTerms]],
    rounds: int,
) -> list[str]:
    """Everything that keeps these terms from being kept, one line each, but for what depends on the
    number of values (`claim_problems`).

    Args:
        models: name and training of every model.
    """
    if privacy.mechanism == "none":
        return []
    found, models = list[str](), list(models)
    rate, steps = _rate(privacy), _steps(privacy, rounds)
    if privacy.noise_multiplier == 0 and not reachable(privacy.epsilon, rate, steps, privacy.delta):
        found.append(
            f"privacy: no noise reaches epsilon {privacy.epsilon:g} at delta {privacy.delta:g}: ask"
            " for a larger epsilon, a smaller rate or fewer rounds"
        )
    traits = TRAITS[privacy.mechanism]
    if traits.shared and protection.minimum_cohort <= max(1, protection.colluders):
        found.append(
            "privacy: with as many colluders as the minimum cohort nobody is left to add noise"
        )
    if traits.shared and protection.mode == "masked" and protection.agreement is False:
        found.append(
            "privacy: without agreement a lying aggregator could get a sum with fewer shares of"
            " noise than are counted"
        )
    if traits.unit == "record":
        if Fraction(str(privacy.sampling_rate)).denominator > FINEST_RATE:
            found.append("privacy.sampling_rate has more digits than can be drawn exactly")
        if privacy.records < 1:
            found.append(
                "privacy.records must say how many training records all customers have, about"
            )
        found += [
            f"model {name!r}: replay is not combined with the privacy of single records: set"
            " training.replay = 0"
            for name, training in models
            if training.replay > 0
        ]
        found += [
            f"model {name!r}: training.{term} is of local training, which the privacy of single"
            f" records does not have: leave it at {default!r}"
            for name, training in models
            for term, default in _LOCAL_TERMS.items()
            if getattr(training, term) != default
        ]
    return found


def sum_clip(contract: Contract | Outline) -> float:
    """L2 norm that a customer's vector is clipped to as a whole before it is rounded."""
    terms = contract.privacy
    if TRAITS[terms.mechanism].unit == "customer":
        return terms.clip_norm
    expected = terms.sampling_rate * terms.records / len(contract.customers)
    return terms.clip_norm * max(_LEAST_SUM, expected)


def _grid(contract: Contract | Outline) -> Layout:
    length, clip = sum(terms.travelling for terms in contract.models), sum_clip(contract)
    return Layout("grid", length, bits=_BITS, clip_norm=clip, value_range=clip)
