"""What a provider's transparency log shows to another party of one enclave in one run.

Before a record is opened: what the provider did for this party's enclave stands in its log, and the
log goes on from what the party saw of it before. Before the first update leaves: the other
customers were shown the same log. Where the provider refused: its log says so, which is kept for
the party's own people. The proofs themselves are in `fedark.translog`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedark.contract.contract import Contract
from fedark.contract.lease import INFERENCE, Lease
from fedark.foundation.errors import LogForked, LogRefused, ProtocolError, printable
from fedark.foundation.files import write_atomic
from fedark.translog.entry import Entry, Fact
from fedark.translog.head import TreeHead
from fedark.translog.memory import HeadMemory
from fedark.translog.view import check_views
from fedark.v1 import stage_pb2
from fedark.vault.release import logged_as

__all__ = ["ShownLog", "provider_key"]


class ShownLog:
    """The provider's log, as `party` sees it in one run.

    Args:
        heads: what the party remembers of logs; outlives its process.
        evidence: SHA-384 of what the party's enclave proved to the provider.
        asked: the head that was sent with the question, where it is still known.
    """

    def __init__(
        self,
        heads: HeadMemory,
        contract: Contract | Lease,
        *,
        party: str,
        run_id: str,
        evidence: bytes,
        asked: TreeHead | None,
    ) -> None:
        self._heads, self._contract, self._asked = heads, contract, asked
        self._key, self._by = provider_key(contract), contract.provider.name
        self._party, self._run_id, self._evidence = party, run_id, evidence

    def check_grants(self, grants: stage_pb2.Grants, *, signing: bytes, hpke: bytes) -> TreeHead:
        """The head of the log, once the enclave's admission and the release of each key stand under
        it.

        Args:
            signing, hpke: public keys of the enclave.

        Raises:
            ProtocolError: keys for other models than the contract's.
            LogForked, LogRefused: the log does not hold what it must, or was rewritten.
        """
        models = self._contract.models
        if set(grants.by_model) != {terms.name for terms in models}:
            raise ProtocolError(
                f"{self._by} answered with keys for other models than the contract's.",
                safe="Nothing of the answer was used.",
            )
        witnessed = self._heads.take(
            grants.log,
            self._key,
            by=self._by,
            party=self._party,
            run_id=self._run_id,
            asked=self._asked,
        )
        own = self._facts()
        leased = isinstance(self._contract, Lease)
        role, kind = (INFERENCE, "lease") if leased else ("trainer", "release")
        witnessed.find("attestation", **own, role=role, signing=signing)
        for terms in models:
            index, entry = witnessed.find(
                kind,
                **own,
                model=terms.name,
                bundle=bytes.fromhex(terms.bundle),
                recipient=hashlib.sha384(hpke).digest(),
            )
            if logged_as(grants.by_model[terms.name], self._key) != (index, entry.leaf()):
                raise LogRefused(
                    f"The key for model {terms.name} was released under another log entry than"
                    f" {self._by} shows.",
                    safe="It was not given to the enclave, and no record was opened to it.",
                )
        return witnessed.head

    def refusal(self, proof: bytes) -> tuple[int, Entry]:
        """Index and entry of the refusal of this enclave.

        Raises:
            LogForked, LogRefused: the log was rewritten, or `proof` does not show it.
        """
        witnessed = self._heads.take(
            proof, self._key, by=self._by, party=self._party, run_id=self._run_id, asked=self._asked
        )
        return witnessed.find("refusal", **self._facts())

    def refused_at(self, proof: bytes) -> int | None:
        """Index of the refusal in the log, if `proof` shows it.

        Raises:
            LogForked: the log was rewritten.
        """
        try:
            return self.refusal(proof)[0] if proof else None
        except LogForked:
            raise
        except LogRefused:
            return None

    def keep_refusal(
        self, fault: stage_pb2.StageFault, path: Path, say: Callable[[str], None]
    ) -> None:
        """Write down why the provider refused this party's enclave, and the proof that its log says
        so.

        Raises:
            LogForked, LogRefused: the log was rewritten, or what was shown as the proof is none.
        """
        told: dict[str, Any] = {"by": self._by, "what": printable(fault.what, 4000), "logged": None}
        try:
            if fault.log:
                index, entry = self.refusal(fault.log)
                told |= {"logged": index, "entry": entry.encode().hex(), "shown": fault.log.hex()}
        finally:
            write_atomic(path, json.dumps(told, indent=2).encode())
            proven = (
                "no proof came that its log says so"
                if told["logged"] is None
                else f"entry {told['logged']} of its log"
            )
            say(f"{self._by} refused this customer's enclave ({proven}): {told['what']}")

    def agree(self, own: TreeHead, views: Mapping[str, bytes]) -> None:
        """Return if the other customers were shown the same log as this one.

        Raises:
            LogForked, LogRefused: they were not, or too few views came.
        """
        contract = self._contract
        assert isinstance(contract, Contract)  # a lease has one customer, who compares with nobody
        check_views(
            views,
            own=own,
            party=self._party,
            run_id=self._run_id,
            contract=contract.digest(),
            customers={
                party.name: bytes.fromhex(party.signing_key) for party in contract.customers
            },
            minimum=contract.protection.minimum_cohort,
            owner=self._key,
            by=self._by,
            memory=self._heads,
        )

    def _facts(self) -> dict[str, Fact]:
        return {
            "party": self._party,
            "run_id": self._run_id,
            "contract": self._contract.digest(),
            "evidence": self._evidence,
        }


def provider_key(contract: Contract | Lease) -> bytes:
    """The provider's public signing key."""
    return bytes.fromhex(contract.provider.signing_key)
