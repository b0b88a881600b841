"""The privacy mechanisms that a contract can name, and what sets them apart. No other module tells
them apart by name.

To add one: its name and traits here, its mathematics in `fedark.privacy.mechanisms`, and how a
contract's terms become its parameters in `fedark.contract.privacy.mechanism`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["NAMES", "TRAITS", "Kind", "MechanismName", "Traits", "Unit"]

Kind = Literal["example-distributed", "example-local", "customer-level"]
MechanismName = Literal["none", Kind]
NAMES: tuple[MechanismName, ...] = get_args(MechanismName)
Unit = Literal["record", "customer"]


@dataclass(frozen=True)
class Traits:
    """What sets a mechanism apart.

    Attributes:
        unit: what is protected: single records, or a customer with all of them.
        shared: the noise of a sum is made up of its customers' shares; else every customer adds all
            of it.
        update: what a customer releases in a round: the clipped gradients of one draw, summed; the
            change that noised local steps made; or the change that ordinary training made.
    """

    unit: Unit
    shared: bool
    update: Literal["gradient-sum", "noised-steps", "training"]


TRAITS: Mapping[str, Traits] = {
    "example-distributed": Traits("record", shared=True, update="gradient-sum"),
    "example-local": Traits("record", shared=False, update="noised-steps"),
    "customer-level": Traits("customer", shared=True, update="training"),
}
