"""The dossier of a run: everything that proves it, in one file that a stranger can check offline.

It holds what crossed the coordinator anyway, and nothing that is private to one customer: the
contract and its signatures, the evidence of every enclave with the collateral for it, what the
provider's log says of each of them, receipts, the heads of privacy ledgers, the aggregator
enclave's own statements of sums and figures, and the report. The aggregator collects and signs it,
so nobody can take a part away later; what is in it speaks for itself (`fedark.report.verify`).

Form: canonical CBOR of {"body", "signature"}; the body is a `Dossier`.
"""

from __future__ import annotations

from typing import Any

from fedark.contract.contract import Contract
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.snapshot import Snapshot

__all__ = ["DOSSIER", "MAX_DOSSIER", "OWN", "Dossier", "OwnDossier", "Proofs", "sign_dossier"]

DOSSIER = "dossier.fedark"
"""Its name in a run's folder."""
MAX_DOSSIER = 256 << 20

OWN = "own.fedark"
"""Beside it at a customer: the same, and what concerns this customer alone."""

_LABEL = "fedark/dossier/1"
_OWN_LABEL = "fedark/own-dossier/1"


class Proofs(Snapshot):
    """What a coordinator collects while the run goes on. By party, where it is a map of bytes.

    Attributes:
        signatures: on the contract.
        evidence: of the trainers and of the aggregator enclave, for the provider's challenges.
        log: what the provider's log says of each of those enclaves.
        manifests: by model: the sealed bundles' signed manifests.
        refused: what that log says of the trainers that got no key.
        receipts: customer -> model -> the trainer enclave's receipt.
        views: the customers' signed word which head of the provider's log they were shown.
        ledger_heads: the signed heads of the customers' privacy ledgers, after the charge.
        sums: the aggregator enclave's statement of each round that was closed, in order.
    """

    signatures: dict[str, bytes]
    evidence: dict[str, bytes]
    log: dict[str, bytes]
    manifests: dict[str, bytes]
    refused: dict[str, bytes]
    receipts: dict[str, dict[str, bytes]]
    views: dict[str, bytes]
    ledger_heads: dict[str, bytes]
    sums: list[bytes]

    @classmethod
    def none(cls) -> Proofs:
        """Those of a run that has not begun."""
        return cls(
            signatures={},
            evidence={},
            log={},
            manifests={},
            refused={},
            receipts={},
            views={},
            ledger_heads={},
            sums=[],
        )


class Dossier(Snapshot):
    """Everything of a run that ended with an adapter.

    Attributes:
        contract: its canonical form.
        run_id: of the run.
        collateral: by which the evidence was appraised (`fedark.attestation.trust`).
        proofs: what was collected while it went on.
        delivered: the aggregator enclave's statement of the adapters.
        report, report_signature: as every party gets them.
    """

    called = "A dossier"

    contract: bytes
    run_id: str
    collateral: dict[str, bytes]
    proofs: Proofs
    delivered: bytes
    report: bytes
    report_signature: bytes

    @classmethod
    def read(cls, data: bytes) -> Dossier:
        """The dossier in a file that the aggregator named in its contract signed.

        Raises:
            ProtocolError: it is malformed, or too large.
            ContractError: the contract in it is not valid.
            Refused: it was altered, or that aggregator did not sign it.
        """
        outer = _signed(data)
        dossier = cls.decode(outer["body"])
        aggregator = Contract.decode(dossier.contract, "the dossier's contract").aggregator
        verify_signature(
            bytes.fromhex(aggregator.signing_key),
            _LABEL,
            outer["body"],
            outer["signature"],
            by=aggregator.name,
        )
        return dossier


class OwnDossier(Snapshot):
    """A customer's own: the shared one, and what its trainer enclave and its ledger say for it
    alone. It never leaves the customer's node by itself.

    Attributes:
        party: the customer.
        dossier: the shared one, as the aggregator signed it.
        figures: the customer's own figures, canonical CBOR; they show records of the acceptance
            set, and none of the customer's.
        statement: the trainer enclave's, of those figures and of the personal adapters.
        ledger: the entries of its privacy ledger up to this charge, if the contract is charged.
    """

    called = "A customer's own dossier"

    party: str
    dossier: bytes
    figures: bytes
    statement: bytes
    ledger: list[bytes]

    def sign(self, key: SigningKey) -> bytes:
        """The file, signed by the customer whose key it is."""
        body = self.encode()
        return canonical.encode({"body": body, "signature": key.sign(_OWN_LABEL, body)})

    @classmethod
    def of(cls, data: bytes) -> tuple[OwnDossier, bytes] | None:
        """What the file claims, and its signature (`proven_by` checks it); None if it is a shared
        dossier.

        Raises:
            ProtocolError: it is malformed, or too large.
        """
        outer = _signed(data)
        body = canonical.decode(outer["body"], max_bytes=MAX_DOSSIER)
        if type(body) is not dict or "contract" in body:
            return None
        return cls.decode(outer["body"]), outer["signature"]

    def proven_by(self, signature: bytes, public: bytes) -> None:
        """Raise Refused unless the customer with this key signed it."""
        verify_signature(public, _OWN_LABEL, self.encode(), signature, by=self.party)


def _signed(data: bytes) -> dict[str, bytes]:
    outer: Any = canonical.decode(data, max_bytes=MAX_DOSSIER, max_depth=1)
    if type(outer) is not dict or {name: type(value) for name, value in outer.items()} != {
        "body": bytes,
        "signature": bytes,
    }:
        raise ProtocolError("This is no dossier.", safe="Nothing was concluded from it.")
    return outer


def sign_dossier(key: SigningKey, body: bytes, contract: bytes, run_id: str) -> bytes:
    """The file, signed by the aggregator whose key it is.

    Args:
        body: `Dossier.encode()`.
        contract: the canonical form of the run's contract.

    Raises:
        ProtocolError: it is malformed, or of another contract or run.
    """
    dossier = Dossier.decode(body)
    if (dossier.contract, dossier.run_id) != (contract, run_id):
        raise ProtocolError("The dossier is of another contract or run.", safe="It was not signed.")
    return canonical.encode({"body": body, "signature": key.sign(_LABEL, body)})
