"""What a node's operator asks of it: contracts with decisions, and the ledgers of what was
attested, released, refused and spent.

Read from the node's folder whenever asked, with no key: the node daemon serves it on its socket,
and commands read the same while the node does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedark.contract.contract import Contract
from fedark.foundation.errors import InputError
from fedark.operate.party import PartyConfig
from fedark.privacy.accounting import Spend, cost
from fedark.privacy.ledger import LEDGER, Ledger
from fedark.stages.consent import Consent
from fedark.stages.node import LOG
from fedark.stages.roster import read_roster
from fedark.translog.log import read_log
from fedark.v1 import node_pb2

__all__ = ["NodeQueries"]


class NodeQueries:
    """The desk of the node whose folder this is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._consent = Consent(folder)
        self._budget: tuple[tuple[int, float], dict[str, float]] | None = None

    def jobs(self) -> node_pb2.JobsReply:
        """Every contract that the operator was asked about."""
        return node_pb2.JobsReply(
            jobs=[self._job(contract) for contract in self._consent.proposed()]
        )

    def ledger(self) -> node_pb2.LedgerReply:
        """The node's own log and its privacy ledger, both verified, and the contracts that are used
        up.

        Raises:
            Refused: one of them was altered.
            StorageError: one cannot be read.
        """
        reply = node_pb2.LedgerReply(
            spent=[job for job in self.jobs().jobs if job.decision == "used"],
            charges=self._charges(),
        )
        public = bytes.fromhex(
            read_roster(self._folder)[PartyConfig.read(self._folder).name].signing_key
        )
        try:
            contents = read_log(self._folder / LOG, public)
        except InputError:
            return reply  # no log yet: nothing was ever asked of this node
        for logged in contents.entries:
            facts = logged.entry.facts
            reply.entries.append(
                node_pb2.LedgerEntry(
                    index=logged.index,
                    time=logged.entry.time,
                    kind=logged.entry.kind,
                    party=str(facts["party"]),
                    run_id=str(facts["run_id"]),
                    note=logged.note,
                )
            )
        return reply

    def budget(self) -> Mapping[str, float]:
        """Epsilon that a record (or the customer) has spent which was in every job, and the most
        that the operator allows.

        No record of the ledger has spent more; most have spent less.
        """
        limit = PartyConfig.read(self._folder).budget
        entries = self._ledger_entries()
        key = (len(entries), limit.delta)
        if self._budget is None or self._budget[0] != key:
            spends = [
                Spend.from_dict(entry["spend"]) for entry in entries if entry["kind"] == "charge"
            ]
            spent = {
                unit: [spend for spend in spends if spend.unit == unit]
                for unit in ("record", "customer")
            }
            found = {
                f"spent by a {unit}": cost(of_unit, limit.delta)[0]
                for unit, of_unit in spent.items()
            }
            self._budget = (key, found)
        return {**self._budget[1], "limit": limit.epsilon}

    def decisions(self) -> Mapping[str, float]:
        """How many contracts there are of each decision, for metrics."""
        found = dict.fromkeys(("approved", "waiting", "refused", "used", "ended"), 0.0)
        for job in self.jobs().jobs:
            found[job.decision] += 1
        return found

    def _ledger_entries(self) -> list[dict[str, Any]]:
        path = self._folder / LEDGER
        if not path.exists():
            return []
        with Ledger.open(path) as ledger:
            return ledger.entries()

    def _charges(self) -> list[node_pb2.Charge]:
        entries = self._ledger_entries()
        released = {
            entry["charge"]: entry["number"] + 1 for entry in entries if entry["kind"] == "release"
        }
        charges = []
        for entry in entries:
            if entry["kind"] == "charge":
                spend, delta = Spend.from_dict(entry["spend"]), entry["budget"][1]
                charge = node_pb2.Charge(
                    contract=entry["contract"], run_id=entry["run"], time=entry["time"]
                )
                charge.unit, charge.epsilon, charge.delta = (
                    spend.unit,
                    cost([spend], delta)[0],
                    delta,
                )
                charge.records, charge.releases = entry["records"], entry["releases"]
                charge.released = released.get(entry["sequence"], 0)
                charges.append(charge)
        return charges

    def _job(self, contract: Contract) -> node_pb2.Job:
        decision = self._consent.decision(contract)
        return node_pb2.Job(
            name=contract.job,
            contract=contract.digest(),
            decision=decision.status,
            reason=decision.reason,
            expires=contract.expires,
        )
