"""What a customer's own people read of their personal adapter: beside the base, their own records
alone, and the shared adapter, on the same records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedark.foundation.errors import printable

__all__ = ["gain_lines"]

NAMES = {"before": "before", "alone": "alone", "together": "together", "personal": "personal"}
_VERDICTS = {"gained": "better", "lost": "worse", "even": "no difference beyond noise"}


def gain_lines(local: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text.

    Args:
        local: `local.json` of a run.
    """
    for model, figures in local.items():
        found = figures.get("personal")
        if not found:
            continue
        yield f"{printable(model)}: the personal adapter is {printable(found['chosen'])}"
        for name, one in found["sets"].items():
            what = "own held-out records" if name == "own" else printable(name.replace("/", " "))
            shares = ", ".join(
                f"{when} {100 * one['right'][when] / one['records']:.1f}"
                for when in NAMES
                if when in one["right"]
            )
            yield f"  {what} ({one['records']}), % right: {shares}"
            for other, pair in one["personal against"].items():
                yield (
                    f"    personal against {other}: {_VERDICTS[pair['verdict']]},"
                    f" won {pair['won']},"
                    f" lost {pair['lost']}; {pair['low']:+.1f} to {pair['high']:+.1f} points"
                    f" (95 %), p {pair['p']:.2g}"
                )
