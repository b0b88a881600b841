"""The provider's transparency log, as a customer's node watches it.

Before a record is opened: what the provider did for this customer's enclave stands in its log, and
the log goes on from what was seen before. Before the first update leaves: the other customers were
shown the same log. Where the provider refused: that its log says so, kept for this node's people.
The proofs themselves are in `fedark.translog`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract
from fedark.foundation.errors import FederationError, LogRefused, ProtocolError, printable
from fedark.foundation.files import write_atomic
from fedark.stages.customer_run import CustomerRun
from fedark.translog.entry import Fact
from fedark.translog.head import TreeHead
from fedark.translog.memory import HeadMemory
from fedark.translog.view import check_views
from fedark.v1 import stage_pb2
from fedark.vault.release import logged_as

__all__ = ["WatchedLog", "provider_key"]


class WatchedLog:
    """What the node of `party` knows of the provider's log; `memory` outlives the node's process."""

    def __init__(self, party: str, folder: Path, memory: Path, say: Callable[[str], None]) -> None:
        self._party, self._folder, self._say = party, folder, say
        self._heads = HeadMemory(memory)
        self._asked: dict[bytes, TreeHead | None] = {}

    def last(self, contract: Contract) -> bytes:
        """The latest head that was seen, encoded; empty for none."""
        seen = self._heads.last(provider_key(contract), by=contract.provider.name)
        self._asked[contract.digest()] = seen
        return seen.encoded if seen is not None else b""

    def check_release(
        self, run_id: str, run: CustomerRun, trainer: AttestedPeer, grants: stage_pb2.Grants
    ) -> TreeHead:
        """The head of the provider's log, once what it did for this trainer stands in it, and its
        past is what it was.
        """
        contract, provider = run.contract, provider_key(run.contract)
        for terms in contract.models:
            if terms.name not in grants.by_model:
                raise FederationError(
                    f"Model {terms.name} came without a key.",
                    safe="No record was opened to the trainer.",
                )
        name = contract.provider.name
        asked = self._asked.get(contract.digest())
        witnessed = self._heads.take(
            grants.log, provider, by=name, party=self._party, run_id=run_id, asked=asked
        )
        own: dict[str, Fact] = {
            "party": self._party,
            "run_id": run_id,
            "contract": contract.digest(),
            "evidence": run.evidence,
        }
        witnessed.find("attestation", **own, role="trainer", signing=trainer.signing_public)
        for terms in contract.models:
            recipient = hashlib.sha384(trainer.hpke_public).digest()
            index, entry = witnessed.find(
                "release",
                **own,
                model=terms.name,
                bundle=bytes.fromhex(terms.bundle),
                recipient=recipient,
            )
            if logged_as(grants.by_model[terms.name], provider) != (index, entry.leaf()):
                raise LogRefused(
                    f"The key for model {terms.name} was released under another log entry than"
                    f" {name} shows.",
                    safe="No record was opened to the trainer.",
                )
        self._say(
            f"the log of {name} holds what it did here, and goes on from what was seen before"
        )
        return witnessed.head

    def take_refusal(self, run_id: str, run: CustomerRun, request: stage_pb2.AbortRequest) -> None:
        """Why the provider refused this customer's enclave, and the proof that its log says so, for
        this node's people.

        Raises:
            LogForked, LogRefused: the log was forked, or what was shown as the proof is none.
        """
        if not request.HasField("refused"):
            return
        name, fault = run.contract.provider.name, request.refused
        told: dict[str, Any] = {"by": name, "what": printable(fault.what, 4000), "logged": None}
        try:
            if fault.log:
                key = provider_key(run.contract)
                asked = self._asked.get(run.contract.digest())
                witnessed = self._heads.take(
                    fault.log, key, by=name, party=self._party, run_id=run_id, asked=asked
                )
                facts: dict[str, Fact] = {
                    "party": self._party,
                    "run_id": run_id,
                    "contract": run.contract.digest(),
                }
                index, entry = witnessed.find("refusal", **facts, evidence=run.evidence)
                told |= {"logged": index, "entry": entry.encode().hex(), "shown": fault.log.hex()}
        finally:
            write_atomic(
                self._folder / "runs" / run_id / "refused.json", json.dumps(told, indent=2).encode()
            )
            proven = (
                "no proof came that its log says so"
                if told["logged"] is None
                else f"entry {told['logged']} of its log"
            )
            self._say(f"{name} refused this customer's enclave ({proven}): {told['what']}")

    def agree(self, run_id: str, run: CustomerRun, views: Mapping[str, bytes]) -> None:
        """Before the first update leaves: the other customers were shown the same log."""
        if run.log_head is None:
            raise ProtocolError("The provider's log was not shown yet.", safe="No update left.")
        contract = run.contract
        check_views(
            views,
            own=run.log_head,
            party=self._party,
            run_id=run_id,
            contract=contract.digest(),
            customers={
                party.name: bytes.fromhex(party.signing_key) for party in contract.customers
            },
            minimum=contract.protection.minimum_cohort,
            owner=provider_key(contract),
            by=contract.provider.name,
            memory=self._heads,
        )
        run.log_agreed = True


def provider_key(contract: Contract) -> bytes:
    return bytes.fromhex(contract.provider.signing_key)
