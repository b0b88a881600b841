"""Terms for a private job, proposed from what is known before any record is read.

The rule (docs/privacy.md has the figures behind it):

1. Rounds, sampling rate and clip norm are those of the runs that were measured: 200 rounds of one
   step over half of the records, clip norm 0.4. More of either costs time and lowers the ratio of
   noise to signal little; fewer rounds are fewer steps.
2. The noise follows from epsilon by the accountant (`fedark.privacy.accounting`).
3. The server's learning rate lets the noise in each value of the finished adapter have a standard
   deviation of 0.95: the best rates that were found at epsilon 1, 3 and 8 give 1.01, 0.95 and 0.87.
   With little noise the rate ends where a value could move by 160 at most, twice the measured.

For adapters with LoRA no rate was measured over the protocol. Prototypes at 0.03 kept most of what
was learned without privacy, so this is proposed, and said to be a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedark.contract.contract import ModelTerms, PrivacyTerms, ProtectionTerms, TensorSpec
from fedark.contract.privacy import (
    Outline,
    claim_problems,
    futile_problems,
    learning_lines,
    noise_to_signal,
    privacy_problems,
    solved,
    strongest_spend,
)
from fedark.foundation.errors import ContractError, InputError
from fedark.privacy.accounting import cost
from fedark.privacy.kinds import MechanismName

__all__ = ["MEASURED", "Plan", "plan"]

ROUNDS, LOCAL_ROUNDS, LOCAL_STEPS = 200, 10, 10
_RATE, _CLIP = 0.5, 0.4
_HEAD_NOISE, _LORA_NOISE = 0.95, 0.03  # of each value of the finished adapter
_FURTHEST = 160.0
_LOCAL_RATE = 0.2  # of the head, in a customer's own steps

MEASURED = (
    ("example-distributed", 8.0, 0.011, 91.3),
    ("example-distributed", 3.0, 0.024, 89.1),
    ("example-distributed", 3.0, 0.028, 87.2),
    ("example-distributed", 1.0, 0.064, 83.3),
    ("example-local", 3.0, 0.069, 79.0),
    ("example-distributed", 1.0, 0.074, 78.8),
    ("example-distributed", 3.0, 0.121, 75.3),
    ("example-distributed", 3.0, 0.241, 59.9),
    ("example-distributed", 3.0, 0.482, 41.9),
)
"""Mechanism, epsilon, noise to signal, test accuracy in percent of heads on Banking77, which have
62.2 before training. docs/privacy.md says which were whole jobs, and which heads alone on fewer
records.
"""


@dataclass(frozen=True)
class Plan:
    """Proposed terms, and what is to be expected of them.

    Attributes:
        privacy: with the noise solved.
        learning_rate: of the server's "fedavg".
        head_learning_rate: of a customer's own steps, under "example-local"; else None.
        epsilon: that the accountant computes from the terms, against the strongest view.
        ratio: of noise to signal.
        said: what noise and steps leave, and what comparable runs reached, for people.
        problems: why such a job would be refused.
    """

    privacy: PrivacyTerms
    rounds: int
    learning_rate: float
    head_learning_rate: float | None
    epsilon: float
    ratio: float
    said: tuple[str, ...]
    problems: tuple[str, ...]

    def toml(self) -> str:
        """Lines for a job file."""
        terms = self.privacy
        lines = ["[job]", f"rounds = {self.rounds}", "", "[privacy]"]
        lines += [f'mechanism = "{terms.mechanism}"', f"epsilon = {terms.epsilon:g}"]
        lines += [f"delta = {terms.delta:g}", f"clip_norm = {terms.clip_norm:g}"]
        if terms.mechanism != "customer-level":
            lines += [f"sampling_rate = {terms.sampling_rate:g}", f"records = {terms.records}"]
        if terms.mechanism == "example-local":
            lines += [f"local_steps = {terms.local_steps}", "", "[models.training]"]
            lines.append(f"head_learning_rate = {self.head_learning_rate:g}")
        lines += ["", "[models.server]", 'optimizer = "fedavg"']
        return "\n".join([*lines, f"learning_rate = {self.learning_rate:g}"])


def plan(
    *,
    records: int,
    customers: int,
    values: int,
    epsilon: float,
    delta: float = 1e-5,
    mechanism: MechanismName = "example-distributed",
    rounds: int = 0,
    sampling_rate: float = 0.0,
    clip_norm: float = 0.0,
    protection: ProtectionTerms | None = None,
    lora: bool = False,
) -> Plan:
    """Propose the terms of a private job. 0 leaves a term to the rule of the module's text.

    Args:
        records: that all customers train on together.
        customers: how many.
        values: that travel each way in a round, of all models together.
        protection: how many may drop and collude; by default nobody.
        lora: whether values of LoRA matrices are among them.

    Raises:
        ContractError: no such job can be, with every problem.
    """
    if mechanism == "none":
        raise InputError(
            "There is nothing to plan without a privacy mechanism.",
            safe="Nothing was written.",
            fix="Name one by --mechanism.",
        )
    local = mechanism == "example-local"
    whole = mechanism == "customer-level"
    kept = protection or ProtectionTerms(minimum_cohort=max(2, customers), colluders=0)
    rounds = rounds or (LOCAL_ROUNDS if local else ROUNDS)
    terms = PrivacyTerms(
        mechanism=mechanism,
        epsilon=epsilon,
        delta=delta,
        clip_norm=clip_norm or _CLIP,
        sampling_rate=sampling_rate or _RATE,
        local_steps=LOCAL_STEPS if local else 1,
        records=0 if whole else records,
    )
    problems = privacy_problems(terms, kept, (), rounds)
    if records < customers or customers < kept.minimum_cohort:
        problems.append("there are fewer records than customers, or fewer customers than a sum has")
    if problems:
        raise ContractError("the plan", problems)
    privacy = solved(terms, rounds)
    ratio = noise_to_signal(_outline(privacy, kept, rounds, customers, values, 1.0, 1.0))
    rate, own = _rates(ratio * rounds * privacy.clip_norm / math.sqrt(values), lora=lora), None
    rate = min(rate, _FURTHEST * math.sqrt(values) / (rounds * privacy.clip_norm))
    if local:
        rate, own = 1.0, _LOCAL_RATE
    elif whole:
        rate = min(rate, 1.0)  # an average of whole updates is gone to, and not beyond
    rate = float(f"{rate:.2g}")
    outline = _outline(privacy, kept, rounds, customers, values, rate, own or 1e-3)
    said = [*learning_lines(outline), *_expected(mechanism, ratio, lora=lora)]
    unkept = claim_problems(outline)
    found = [*unkept, *futile_problems(outline)]
    spend = strongest_spend(outline) if not unkept else None
    proven = cost([spend], delta)[0] if spend is not None else math.inf
    return Plan(privacy, rounds, rate, own, proven, ratio, tuple(said), tuple(found))


def _rates(noise: float, *, lora: bool) -> float:
    """The server's rate. `noise`: standard deviation in each value at a rate of 1."""
    return (_LORA_NOISE if lora else _HEAD_NOISE) / max(noise, 1e-30)


def _outline(
    privacy: PrivacyTerms,
    protection: ProtectionTerms,
    rounds: int,
    customers: int,
    values: int,
    rate: float,
    own: float,
) -> Outline:
    model = ModelTerms.model_validate(
        {
            **{"name": "planned", "task": "classification", "prompt": "{text}", "labels": ()},
            **{"bundle": "0" * 96, "weights": "0" * 96, "adapter": {}},
            "training": {"head_learning_rate": own},
            "server": {"learning_rate": rate},
            "layout": (TensorSpec(name="head.weight", shape=(values,), travels=True),),
        }
    )
    return Outline(privacy, protection, rounds, range(customers), [model])


def _expected(mechanism: str, ratio: float, *, lora: bool) -> list[str]:
    """What runs with about this ratio reached."""
    if mechanism == "customer-level":
        return ["accuracy: no job of this mechanism was measured"]
    alike: Sequence[tuple[str, float, float, float]] = sorted(
        (run for run in MEASURED if run[0] == mechanism),
        key=lambda run: abs(math.log(run[2] / max(ratio, 1e-9))),
    )[:2]
    lines = [
        f"accuracy: Banking77 (77 classes, a head on MiniLM) came from 62.2 to {reached:g} % at a"
        f" ratio of {its:g} (epsilon {epsilon:g}); without privacy to 93.0 %"
        for _, epsilon, its, reached in sorted(alike, key=lambda run: run[2])
    ]
    if lora:
        lines.append(
            "learning rate: a guess. No rate was measured for LoRA under a mechanism over the"
            ' protocol; the runs above are of method "head"'
        )
    return lines
