"""Splits of records: into a part to train on and a part to test on, and into customers.

Splits are functions of the content and a seed alone. The train/test split hashes the prompt, so
equal prompts fall on the same side, and a re-ordered or grown file moves no record. The
label-skewed split follows Hsu, Qi and Brown (arXiv:1909.06335).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fedark.foundation.errors import InputError
from fedark.records.reading import Record

__all__ = ["dirichlet_split", "split_train_test"]

_DRAWS = 1000


def split_train_test(
    records: Sequence[Record], test_fraction: float, salt: str = ""
) -> tuple[list[Record], list[Record]]:
    """Split by a hash of the prompt: about `test_fraction` (0 to 1) of the distinct prompts go to
    the test side.

    Returns:
        (train, test), each in the order of `records`. Which side a record falls on depends on its
        prompt and `salt` alone.
    """
    if not 0 <= test_fraction <= 1:
        raise ValueError("test_fraction must be between 0 and 1")
    bound = int(test_fraction * (1 << 64))
    sides: tuple[list[Record], list[Record]] = ([], [])
    prefix = b"fedark/split/1\0" + salt.encode() + b"\0"
    for record in records:
        draw = int.from_bytes(hashlib.sha256(prefix + record.prompt.encode()).digest()[:8], "big")
        sides[draw < bound].append(record)
    return sides


def dirichlet_split(
    records: Sequence[Record], customers: int, alpha: float, seed: int, *, minimum: int = 8
) -> list[list[Record]]:
    """Deal records to customers with label skew: each label's shares are one draw from
    Dirichlet(alpha, ..., alpha).

    Args:
        records: all of them; every record goes to exactly one customer.
        customers: how many, at least 1.
        alpha: concentration; 0.1 is strongly skewed, 0.5 moderately, 100 is nearly even.
        seed: of the draws and of the shuffle inside each label.
        minimum: fewest records a customer may get; a draw that gives one of them fewer is drawn
            anew.

    Raises:
        InputError: no draw of many gave every customer `minimum` records.
    """
    if customers < 1 or not alpha > 0:
        raise ValueError("customers must be at least 1 and alpha positive")
    generator = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        by_label.setdefault(record.answer, []).append(index)
    for _ in range(_DRAWS):
        shares: list[list[int]] = [[] for _ in range(customers)]
        for label in sorted(by_label):
            indices = generator.permutation(by_label[label])
            cuts = np.cumsum(generator.dirichlet(np.full(customers, alpha)))[:-1]
            for share, part in zip(
                shares, np.split(indices, np.round(cuts * len(indices)).astype(int)), strict=True
            ):
                share.extend(int(index) for index in part)
        if min(len(share) for share in shares) >= minimum:
            return [[records[index] for index in sorted(share)] for share in shares]
    raise InputError(
        f"{len(records)} records cannot be dealt to {customers} customers with at least {minimum}"
        f" each at alpha {alpha}.",
        safe="Nothing was started.",
        fix="Use fewer customers, more records, or a larger alpha.",
    )
