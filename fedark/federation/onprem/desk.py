"""What a node's operator asks of it: contracts with decisions, and the ledger of what was attested, released, refused and spent.

Read from the node's folder whenever asked, with no key: the node daemon serves it on its socket, and commands read the same while
the node does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedark.contract import Contract
from fedark.errors import InputError
from fedark.federation.consent import Consent
from fedark.federation.node import LOG
from fedark.federation.party import PartyConfig
from fedark.federation.roster import read_roster
from fedark.translog.log import read_log
from fedark.v1 import node_pb2

__all__ = ["Desk"]


class Desk:
    """The desk of the node whose folder this is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._consent = Consent(folder)

    def jobs(self) -> node_pb2.JobsReply:
        """Every contract that the operator was asked about."""
        return node_pb2.JobsReply(jobs=[self._job(contract) for contract in self._consent.proposed()])

    def ledger(self) -> node_pb2.LedgerReply:
        """The node's own log, verified, and the contracts that are used up.

        Raises:
            LogRefused: the log was altered.
            StorageError: it cannot be read.
        """
        reply = node_pb2.LedgerReply(spent=[job for job in self.jobs().jobs if job.decision == "used"])
        public = bytes.fromhex(read_roster(self._folder)[PartyConfig.read(self._folder).name].signing_key)
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

    def decisions(self) -> Mapping[str, float]:
        """How many contracts there are of each decision, for metrics."""
        found = dict.fromkeys(("approved", "waiting", "refused", "used"), 0.0)
        for job in self.jobs().jobs:
            found[job.decision] += 1
        return found

    def _job(self, contract: Contract) -> node_pb2.Job:
        decision = self._consent.decision(contract)
        return node_pb2.Job(
            name=contract.job,
            contract=contract.digest(),
            decision=decision.status,
            reason=decision.reason,
            expires=contract.expires,
        )
