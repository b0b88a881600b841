"""What a customer's node charges to its privacy ledger, and when.

A whole job is charged before its records are opened to the trainer enclave; each round is ticked off before the update that it
made leaves the node. A contract without a mechanism is not charged: it promises nothing, and consent to it says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from fedark.contract import Contract
from fedark.mechanism import strongest_spend
from fedark.privacy.accounting import Budget
from fedark.privacy.ledger import LEDGER, ChargeReceipt, Ledger, record_bytes
from fedark.tuning.data import Record

__all__ = ["charge", "release"]


def charge(
    folder: Path, contract: Contract, run_id: str, records: Iterable[Record], budget: Budget, *, now: datetime
) -> ChargeReceipt | None:
    """Charge the job to these records, once however often this is called; None if the contract has no mechanism.

    Args:
        folder: the customer's own.

    Raises:
        BudgetExceeded: the budget does not allow it; nothing was charged.
        Refused: the run was charged with other records, or the ledger was altered.
    """
    spend = strongest_spend(contract)
    if spend is None:
        return None
    with Ledger.open(folder / LEDGER, create=True) as ledger:
        return ledger.charge(
            (record_bytes(record.prompt, record.answer) for record in records),
            contract_digest=contract.digest(),
            run_id=run_id,
            spend=spend,
            releases=contract.rounds,
            budget=budget,
            now=int(now.timestamp()),
        )


def release(folder: Path, receipt: ChargeReceipt, number: int, *, again: bool, now: datetime) -> None:
    """Note that the update of round `number` (from 1) leaves.

    Args:
        again: the very same bytes were about to leave before, when this node was interrupted: they tell nothing new.

    Raises:
        Refused: another update of this round left before.
    """
    with Ledger.open(folder / LEDGER) as ledger:
        if not (again and ledger.next_release(receipt.charge) >= number):
            ledger.release(receipt.charge, number - 1, int(now.timestamp()))
