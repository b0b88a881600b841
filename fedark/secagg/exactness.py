"""Which training methods may be summed under masks, and why: the one place that knows.

Averaging is exact for what is linear in the tensors that travel. A masked sum can average them and
nothing else, so a method whose aggregation needs every client's factors apart cannot run under
masks at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedark.foundation.errors import ContractError

__all__ = ["METHODS", "Exactness", "check_method"]


@dataclass(frozen=True)
class Exactness:
    """What averaging does to a method.

    Attributes:
        maskable: whether it can run under masks.
        exact: whether the average of what travels is the average of the models.
        reason: for the reader of a job file.
    """

    maskable: bool
    exact: bool
    reason: str


METHODS = {
    "ffa-lora": Exactness(
        True,
        True,
        "A is frozen and common: B A is linear in B, the mean of B is exact (arXiv:2403.12313).",
    ),
    "head": Exactness(True, True, "A head is linear in its weights; their mean is exact."),
    "fed-sb": Exactness(
        True,
        True,
        "A and B are frozen and common: B R A is linear in R, the mean of R is exact"
        " (arXiv:2502.15436).",
    ),
    "lora": Exactness(
        True,
        False,
        "A and B are averaged apart, and mean(B) mean(A) is not mean(B A): about 8 % off in B A for"
        ' moderately different customers. Choose "ffa-lora" for an exact mean.',
    ),
    "flora": Exactness(
        False,
        True,
        "It stacks every customer's factors, which a masked sum does not show (arXiv:2409.05976).",
    ),
    "fedex-lora": Exactness(
        False,
        True,
        "Its residual needs every customer's factors apart, which a masked sum does not show"
        " (arXiv:2410.09432).",
    ),
}


def check_method(method: str, protection: str) -> str | None:
    """A warning to show if averaging `method` is inexact, or None.

    Args:
        method: an adapter method, or "head".
        protection: "masked", or "sealed" (to the attested aggregator, which sees each factor).

    Raises:
        ContractError: the method cannot run under this protection, or is unknown.
    """
    rule = METHODS.get(method)
    if rule is None:
        raise ContractError(
            "adapter method", [f"{method!r} is unknown; known are {', '.join(sorted(METHODS))}"]
        )
    if protection == "masked" and not rule.maskable:
        raise ContractError(
            "adapter method",
            [f"{method!r} cannot run under masks. {rule.reason}"],
            fix='Choose "ffa-lora", or protection "sealed".',
        )
    return None if rule.exact else f"{method!r} averages inexactly. {rule.reason}"
