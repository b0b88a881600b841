"""One run of a job at a customer's node, and what of it outlives the node's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, SignedContract
from fedark.enclave.durable import DurableEnclave
from fedark.privacy.ledger import ChargeReceipt
from fedark.translog.head import TreeHead

__all__ = ["CustomerRun"]


@dataclass
class CustomerRun:
    """One run of a job at this customer. A field is set only by the stage that earns it."""

    contract: Contract
    enclave: DurableEnclave
    nonces: dict[str, bytes] = field(default_factory=dict)
    signed: SignedContract | None = None
    aggregator: AttestedPeer | None = None
    trainer: AttestedPeer | None = None
    evidence: bytes = b""
    log_head: TreeHead | None = None
    log_agreed: bool = False
    charge: ChargeReceipt | None = None
    loaded: bool = False
    number: int = 0
    base: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)

    def state(self, proof: Callable[[AttestedPeer | None], list[Any] | None]) -> dict[str, Any]:
        """What the node must not forget of it."""
        return {
            "contract": self.contract.encode(),
            "nonces": self.nonces,
            "signatures": self.signed.signatures if self.signed is not None else None,
            "aggregator": proof(self.aggregator),
            "trainer": proof(self.trainer),
            "evidence": self.evidence,
            "log_head": self.log_head.encoded if self.log_head is not None else None,
            "log_agreed": self.log_agreed,
            "loaded": self.loaded,
            "number": self.number,
            "base": self.base,
            "local": self.local,
        }
