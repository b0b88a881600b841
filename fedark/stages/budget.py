"""What a customer's node charges to its privacy ledger, and when.

A whole job is charged before its records are opened to the trainer enclave; each round is ticked
off before the update that it made leaves the node. A contract without a mechanism is not charged:
it promises nothing, and consent to it says so.

A ledger is a file of its owner's, who can restore an old copy. So the head after a charge is signed
and goes, by way of the aggregator, into the provider's append-only log: a ledger that does not have
it in its past was rolled back, and `fedark ledger verify` can be given it. Who keeps two ledgers,
or runs other software, is not stopped by that.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from fedark.contract.contract import Contract, Party
from fedark.contract.privacy import strongest_spend
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.privacy.accounting import Budget
from fedark.privacy.ledger import LEDGER, ChargeReceipt, Ledger, record_bytes
from fedark.records.reading import Record
from fedark.translog.entry import Entry

__all__ = ["charge", "ledger_bodies", "read_head", "release", "show_head"]

_LABEL = "fedark/ledger-head/1"
_MAX_BYTES = 1024


def charge(
    folder: Path,
    contract: Contract,
    run_id: str,
    records: Iterable[Record],
    budget: Budget,
    *,
    now: datetime,
) -> ChargeReceipt | None:
    """Charge the job to these records, once however often this is called; None if the contract has
    no mechanism.

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


def release(
    folder: Path, receipt: ChargeReceipt, number: int, *, again: bool, now: datetime
) -> None:
    """Note that the update of round `number` (from 1) leaves.

    Args:
        again: the very same bytes were about to leave before, when this node was interrupted: they
            tell nothing new.

    Raises:
        Refused: another update of this round left before.
    """
    with Ledger.open(folder / LEDGER) as ledger:
        if not (again and ledger.next_release(receipt.charge) >= number):
            ledger.release(receipt.charge, number - 1, int(now.timestamp()))


def ledger_bodies(folder: Path, contract: Contract, run_id: str) -> list[bytes]:
    """The ledger's entries as its chain has them, up to the charge of this run, whose head others
    witness; none where the contract is not charged. They name contracts and costs, and hold
    nothing of a record.
    """
    if strongest_spend(contract) is None:
        return []
    with Ledger.open(folder / LEDGER) as ledger:
        return ledger.bodies(contract.digest(), run_id)


def show_head(key: SigningKey, receipt: ChargeReceipt, run_id: str, contract: Contract) -> bytes:
    """The head after a charge, signed by the customer, for the provider's log."""
    head = receipt.head
    body = canonical.encode([contract.digest(), run_id, head.ledger, head.sequence, head.hash])
    return canonical.encode([body, key.sign(_LABEL, body)])


def read_head(
    data: bytes, contract: Contract, run_id: str, party: Party, *, now: datetime
) -> Entry:
    """What `show_head` gave, as the log entry that witnesses it.

    Raises:
        ProtocolError: malformed, or of another run.
        Refused: not signed by this customer.
    """
    outer = canonical.decode(data, max_bytes=_MAX_BYTES, max_depth=2)
    if type(outer) is not list or [type(item) for item in outer] != [bytes, bytes]:
        raise ProtocolError("The head of a privacy ledger is malformed.")
    verify_signature(bytes.fromhex(party.signing_key), _LABEL, outer[0], outer[1], by=party.name)
    body = canonical.decode(outer[0], max_bytes=_MAX_BYTES, max_depth=2)
    if type(body) is not list or len(body) != 5 or body[:2] != [contract.digest(), run_id]:
        raise ProtocolError("The head of a privacy ledger is of another run.")
    facts = {
        "party": party.name,
        "run_id": run_id,
        "contract": body[0],
        "ledger": body[2],
        "sequence": body[3],
        "head": body[4],
    }
    return Entry("charge", int(now.timestamp()), facts)
