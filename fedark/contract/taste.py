"""What `taste` in a contract means: whose round it is, the shape of what travels in it, and which
problems it can have. The mathematics is in `fedark.tuning.moments`.

A customer's message of the taster's round holds, for each model in the contract's order, its
moments as pairs of integers (`fedark.tuning.moments.to_limbs`). They are summed exactly, masked or
sealed: the grid of the masked sum has a step of 1 and holds every such integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedark.contract.contract import (
    MAX_TRAVELLING,
    AdapterTerms,
    Contract,
    ModelTerms,
    PrivacyTerms,
    ServerTerms,
    TasteTerms,
    TensorSpec,
    TrainingTerms,
)
from fedark.foundation.errors import ContractError
from fedark.secagg import Layout

__all__ = [
    "LIMB_BITS",
    "TASTED",
    "Shape",
    "head_of",
    "is_taste",
    "moments_shape",
    "start_terms",
    "taste_layout",
    "taste_problems",
    "taste_values",
    "tasted_problems",
]

TASTED = "tasted"
"""The kind of a customer's message in the taster's round."""
LIMB_BITS = 23
"""Of either half of an integer as it travels: float32 and the grid of a masked sum hold it."""
_MOST_PLACES = 15
_PARTS = 2  # what the head is fitted on, and what its regularisation is chosen on
_OWN_NORM = 4.0  # of a feature's root mean square, for a head that transformers brings


@dataclass(frozen=True)
class Shape:
    """What a model's moments are made of.

    Attributes:
        width, labels: of the features, and how many classes.
        norm: features of a greater L2 norm are scaled down to it, and all are divided by it.
        centred: the head has a bias.
        records: most records of one customer.
    """

    width: int
    labels: int
    norm: float
    centred: bool
    records: int

    @property
    def values(self) -> int:
        """Integers in one part: the upper triangle of X'X, X'Y, and the counts."""
        return self.width * (self.width + 1) // 2 + (self.width + 1) * self.labels

    @property
    def places(self) -> int:
        """Binary places of a feature, so that no customer's sum leaves its two limbs."""
        room = 2 * LIMB_BITS - 1 - math.ceil(math.log2(max(self.records, 2)))
        return min(_MOST_PLACES, room // 2)


def is_taste(contract: Contract, number: int) -> bool:
    """Whether round `number` is the taster's."""
    return contract.taste.first and number == 1


def start_terms(contract: Contract, terms: ModelTerms) -> TrainingTerms:
    """How a model is trained in the rounds of tuning: more slowly after the taster's round."""
    if not contract.taste.first:
        return terms.training
    own, rate = terms.training, contract.taste.rate
    return own.model_copy(
        update={
            "learning_rate": own.learning_rate * rate,
            "head_learning_rate": own.head_learning_rate * rate,
        }
    )


def head_of(terms: ModelTerms) -> tuple[TensorSpec, TensorSpec | None]:
    """The last linear layer of a classifier: its weight [labels, width], and its bias or None.

    Raises:
        ContractError: the model has none, or trains none.
    """
    travelling = {spec.name: spec for spec in terms.layout if spec.travels}
    heads = [
        spec
        for spec in travelling.values()
        if terms.labels
        and ".lora_" not in spec.name
        and len(spec.shape) == 2
        and spec.shape[0] == len(terms.labels)
    ]
    if terms.task != "classification" or not heads:
        raise ContractError(
            f"model {terms.name!r}",
            ["the taster needs a classifier with a linear head: it cannot taste this model"],
        )
    weight = heads[-1]
    return weight, travelling.get(weight.name.removesuffix("weight") + "bias")


def moments_shape(contract: Contract, terms: ModelTerms) -> Shape:
    """Of a model's moments; both parts have it."""
    weight, bias = head_of(terms)
    labels, width = weight.shape
    # fedark's own head reads unit vectors; what another reads is cut at a public length.
    norm = 1.0 if weight.name == "head.weight" else _OWN_NORM * math.sqrt(width)
    return Shape(width, labels, norm, bias is not None, contract.protection.max_records)


def taste_values(contract: Contract, terms: ModelTerms) -> int:
    """How many numbers of a model a customer's message of the taster's round holds."""
    return 2 * _PARTS * moments_shape(contract, terms).values


def taste_layout(contract: Contract) -> Layout:
    """The grid of the taster's masked sum: integers, which are neither clipped nor rounded."""
    length = sum(taste_values(contract, terms) for terms in contract.models)
    largest = float((1 << LIMB_BITS) - 1)
    return Layout(
        TASTED,
        length,
        bits=LIMB_BITS + 1,
        clip_norm=largest * math.sqrt(max(length, 1)) * 2,
        value_range=largest,
    )


def tasted_problems(contract: Contract) -> list[str]:
    """What keeps the taster's round of a contract from being run, one line each."""
    if not contract.taste.first:
        return []
    found = taste_problems(
        contract.taste,
        contract.privacy,
        [(terms.name, terms.task, terms.adapter, terms.server) for terms in contract.models],
    )
    total = 0
    for terms in contract.models if not found else ():
        try:
            total += taste_values(contract, terms)
        except ContractError as error:
            found += error.problems
    if total > MAX_TRAVELLING:
        found.append(
            f"taste: the moments of its models are {total} numbers, over the limit of"
            f" {MAX_TRAVELLING} in this release: taste fewer or narrower models"
        )
    return found


def taste_problems(
    taste: TasteTerms,
    privacy: PrivacyTerms,
    models: Iterable[tuple[str, str, AdapterTerms, ServerTerms]],
) -> list[str]:
    """What keeps these terms from being kept, one line each.

    Args:
        models: name, task, adapter and server of each.
    """
    if not taste.first:
        return []
    found = []
    if privacy.mechanism != "none":
        found.append(
            "taste: the taster's sums are not noised, so it cannot run under a privacy mechanism:"
            " leave [taste] out, or the mechanism"
        )
    for name, task, adapter, server in models:
        if task != "classification" or not adapter.head:
            found.append(f"model {name!r}: the taster needs a classifier with a head")
        if server.mean != "weighted":
            found.append(
                f"model {name!r}: the taster sums all records alike, which server.mean"
                f" {server.mean!r} forbids"
            )
    return found
