"""A customer's personal adapters at its own node: the folders, and what its people read of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedark.contract.contract import Contract
from fedark.contract.protection import makes_personal
from fedark.enclave.personal import open_personal
from fedark.foundation.errors import ProtocolError, printable
from fedark.foundation.keys import HpkeKey
from fedark.tuning.export import export_peft

__all__ = ["SEALED", "gain_lines", "write_personal"]

SEALED = "personal.sealed"
"""What a run leaves of personal adapters where the party named a key for them."""

NAMES = {"before": "before", "alone": "alone", "together": "together", "personal": "personal"}
_VERDICTS = {"gained": "better", "lost": "worse", "even": "no difference beyond noise"}


def write_personal(
    contract: Contract, run_id: str, data: bytes, out: Path, key: HpkeKey | None = None
) -> list[Path]:
    """Write the personal adapters that a trainer enclave gave as PEFT folders in `out`.

    Args:
        key: the customer's own, where they are sealed.

    Returns:
        The folders.

    Raises:
        Refused: they are sealed to another key.
        ProtocolError: they are malformed, or not of this contract.
        StorageError: they cannot be written.
    """
    vectors = open_personal(data, key, contract=contract.digest(), run_id=run_id)
    wanted = [terms for terms in contract.models if makes_personal(contract, terms)]
    if vectors.keys() != {terms.name for terms in wanted}:
        raise ProtocolError(
            "The personal adapters are not of the contract's models.", safe="None was stored."
        )
    for terms in wanted:
        export_peft(terms, vectors[terms.name], out / f"personal-{terms.name}")
    return [out / f"personal-{terms.name}" for terms in wanted]


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
            yield from _harm(one.get("together against", {}).get("alone"))
            for other, pair in one["personal against"].items():
                yield (
                    f"    personal against {other}: {_VERDICTS[pair['verdict']]},"
                    f" won {pair['won']}, lost {pair['lost']};"
                    f" {pair['low']:+.1f} to {pair['high']:+.1f} points"
                    f" (95 %), p {pair['p']:.2g}"
                )


def _harm(pair: Mapping[str, Any] | None) -> Iterator[str]:
    """A warning where the shared adapter is worse than the local-only one by more than noise."""
    if pair is not None and pair["verdict"] == "lost":
        yield (
            f"    WARNING: together is worse than alone here beyond noise: won {pair['won']}, lost"
            f" {pair['lost']}; {pair['low']:+.1f} to {pair['high']:+.1f} points (95 %)."
        )
        yield (
            "    The others' records are unlike these, or somebody's are wrong or meant to harm."
            " Use the personal adapter, and look at the next job's terms"
            " (protection.clip_norm, models.server.mean)."
        )
