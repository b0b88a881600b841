"""What a customer's own dossier adds to the shared one, checked against it: step 13 of
`fedark.report.verify`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract
from fedark.contract.privacy import strongest_spend
from fedark.contract.protection import makes_personal
from fedark.enclave.statements import Own
from fedark.foundation import canonical
from fedark.foundation.errors import Refused
from fedark.privacy.accounting import Spend, cost
from fedark.privacy.ledger import chained
from fedark.stages.budget import read_head
from fedark.stages.dossier import Dossier, OwnDossier

__all__ = ["OwnCheck"]

_MAX_FIGURES = 8 << 20


@dataclass
class OwnCheck:
    """The check of one customer's own part.

    Attributes:
        own: the customer's.
        contract, dossier: of the shared dossier in it, which holds.
        peers: the enclaves that are proven.
        reasons: what does not hold.
        proven: (what, by whose signature).
    """

    own: OwnDossier
    contract: Contract
    dossier: Dossier
    peers: Mapping[str, AttestedPeer]
    reasons: list[str] = field(default_factory=list)
    proven: list[tuple[str, str]] = field(default_factory=list)

    def run(self, signature: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The customer's figures, and the digests of its personal adapters, by model.

        Args:
            signature: the customer's.

        Raises:
            Refused, ProtocolError: nothing of it can be believed.
        """
        own, party = self.own, self.own.party
        own.proven_by(signature, self.contract.signing_keys.get(party, b""))
        if party not in self.dossier.proofs.receipts:
            raise Refused(f"This is the own dossier of {party!r}, who loaded no weights.")
        said = Own.verify(
            own.statement,
            signing_public=self.peers[party].signing_public,
            contract=self.contract.digest(),
            run_id=self.dossier.run_id,
        )
        by = f"the trainer enclave of {party}"
        if (said.party, said.figures) != (party, hashlib.sha384(own.figures).digest()):
            self._no("its figures are not what its trainer enclave measured")
        self.proven.append((f"the own figures of {party}", by))
        if said.personal:
            models = {m.name for m in self.contract.models if makes_personal(self.contract, m)}
            if said.personal.keys() != models:
                self._no("its personal adapters are not of the contract's models")
            self.proven.append((f"the personal adapters of {party}", by))
        self._ledger()
        return canonical.decode(own.figures, max_bytes=_MAX_FIGURES), said.personal

    def _ledger(self) -> None:
        """The charge that the shared head witnesses, and what was charged before it."""
        contract, party = self.contract, self.own.party
        spend, known = strongest_spend(contract), contract.party(party)
        head = self.dossier.proofs.ledger_heads.get(party)
        if spend is None or head is None or known is None:
            if self.own.ledger:
                self._no("it shows a privacy ledger for a job that charges none")
            return
        facts: Mapping[str, Any] = read_head(
            head, contract, self.dossier.run_id, known, now=datetime.now(UTC)
        ).facts
        entries, at = chained(facts["ledger"], self.own.ledger), facts["sequence"]
        if not entries or (len(entries), entries[-1][0]) != (at, facts["head"]):
            self._no("its privacy ledger does not end with the head that was witnessed")
            return
        charge = entries[-1][1]
        wanted = [contract.digest(), self.dossier.run_id, spend.to_dict(), contract.rounds]
        if [charge.get(name) for name in ("contract", "run", "spend", "releases")] != wanted:
            self._no("its privacy ledger charged other terms than the contract's")
            return
        charges = [Spend.from_dict(b["spend"]) for _, b in entries if b["kind"] == "charge"]
        alike = [
            past.of_record() if spend.unit == "record" else past
            for past in charges
            if spend.unit in ("record", past.unit)
        ]
        epsilon, delta = cost(alike, contract.privacy.delta)[0], contract.privacy.delta
        self.proven.append(
            (
                f"{party} charged this job, and spent at most epsilon {epsilon:.3g} at delta"
                f" {delta:g} in {len(charges)} jobs, of a budget of {charge['budget'][0]:.3g}",
                f"the privacy ledger of {party}",
            )
        )

    def _no(self, why: str) -> None:
        self.reasons.append(f"{self.own.party}: {why}")
