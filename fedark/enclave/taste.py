"""The taster's round inside the two enclaves: a trainer's message, and the heads that the
aggregator enclave makes of their sum.

No moment leaves either of them but so: masked or sealed from a trainer enclave to the aggregator
enclave, which gives out the heads alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedark.contract.contract import Contract, ModelTerms
from fedark.contract.taste import head_of, moments_shape, taste_values
from fedark.foundation.snapshot import Snapshot
from fedark.records.reading import Record
from fedark.records.splits import split_train_test
from fedark.tuning import moments as math

__all__ = ["Tasted", "heads_of", "tasted"]

Vector = NDArray[np.float32]
_SALT = "taste"
_BATCH = 4096


class Tasted(Snapshot):
    """What is said of a model's head besides the head.

    Attributes:
        regularisation: that was chosen.
        error: mean squared error that chose it, on held-out sums; negative where there was none.
    """

    regularisation: float
    error: float


def tasted(contract: Contract, terms: ModelTerms, task: Any, records: Sequence[Record]) -> Vector:
    """One customer's moments of a model, as they travel: float32 [taste_values].

    Args:
        task: the `fedark.tuning.task.TaskModel`, at its initial adapter.
        records: the customer's own; of more than the contract's max_records the rest is left out.

    Raises:
        InputError, ModelError: the model gives no features of a record.
    """
    shape = moments_shape(contract, terms)
    known = {label: index for index, label in enumerate(terms.labels)}
    parts = split_train_test(
        records[: contract.protection.max_records], contract.taste.held_out, salt=_SALT
    )
    found = []
    for part in parts:
        total = np.zeros(shape.values, np.int64)
        for at in range(0, len(part), _BATCH):
            batch = part[at : at + _BATCH]
            answers = [known[one.answer] for one in batch]
            total += math.integers(shape, task.features(batch).numpy(), answers)
        found.append(total)
    return math.to_limbs(np.concatenate(found))


def heads_of(
    contract: Contract, total: NDArray[Any], initial: Mapping[str, Vector]
) -> tuple[dict[str, Vector], dict[str, Tasted]]:
    """The adapters that begin with the taster's heads: model -> float32 [travelling], and what is
    said of each.

    Args:
        total: the sum of all customers' `tasted`, all models in a row.
        initial: the adapters before; all but the heads stays.

    Raises:
        ProtocolError, Refused: no honest customers can have that sum.
    """
    ends = np.cumsum([taste_values(contract, terms) for terms in contract.models])[:-1]
    vectors, said = dict(initial), {}
    for terms, limbs in zip(contract.models, np.split(total, ends), strict=True):
        shape = moments_shape(contract, terms)
        fitted, held = (math.moments(shape, part) for part in np.split(math.from_limbs(limbs), 2))
        head = math.solve(shape, fitted, held)
        said[terms.name] = Tasted(regularisation=head.regularisation, error=head.error)
        vectors[terms.name] = _with_head(terms, initial[terms.name], head, contract)
    return vectors, said


def _with_head(terms: ModelTerms, vector: Vector, head: math.Head, contract: Contract) -> Vector:
    weight, bias = head_of(terms)
    warm = contract.taste.temperature
    parts = {weight.name: warm * head.weight}
    if bias is not None:
        parts[bias.name] = warm * head.bias
    found, at = vector.copy(), 0
    for spec in terms.layout:
        if spec.travels:
            if spec.name in parts:
                found[at : at + spec.size] = parts[spec.name].reshape(-1)
            at += spec.size
    return found
