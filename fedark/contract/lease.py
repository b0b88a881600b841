"""A lease: what a provider and one customer agree on before the provider's base may answer with the
customer's adapters.

Both sign it; an inference enclave is started for it, and the provider's broker releases the weight
key under it in portions: each is good for `seconds` and for `tokens`, and all of them together for
`total` tokens. Every portion is paid when it is given out, so that what an enclave forgets, or its
host rolls back, is never given twice. The provider ends a lease early by giving no further portion.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedark.attestation.terms import AttestationTerms
from fedark.contract.contract import ModelTerms, Party
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError
from fedark.foundation.keys import verify_signature
from fedark.foundation.terms import Name, Terms, explain, to_tuples

__all__ = ["INFERENCE", "LEASE_LABEL", "Lease", "SignedLease"]

LEASE_LABEL = "fedark/lease/1"
INFERENCE = "inference"
"""The role of an enclave that answers under a lease."""
_MAX_BYTES = 4 << 20


class Lease(Terms):
    """What provider and customer sign.

    Attributes:
        job: the job that made the adapters; for readers.
        created, expires: ISO 8601 with time zone; no portion outlives it.
        seconds: for which one portion is good.
        tokens: read and written under one portion.
        total: read and written under all portions.
        provider, customer: the two.
        terms: the base, and what an adapter on it is.
        attestation: which evidence counts; its `inference` are the enclave's reference values.
    """

    version: Literal[1] = 1
    job: Name
    created: str
    expires: str
    seconds: Annotated[int, Field(ge=1, le=366 * 86400)]
    tokens: Annotated[int, Field(ge=1, lt=1 << 50)]
    total: Annotated[int, Field(ge=1, lt=1 << 50)]
    provider: Party
    customer: Party
    terms: ModelTerms
    attestation: AttestationTerms

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if (self.provider.role, self.customer.role) != ("provider", "customer"):
            problems.append("its parties are not a provider and a customer")
        if self.provider.signing_key == self.customer.signing_key:
            problems.append("its parties share one signing key")
        if not self.attestation.inference:
            problems.append("it names no reference values of an inference enclave")
        if self.tokens > self.total:
            problems.append("one portion has more tokens than all of them")
        for field in ("created", "expires"):
            try:
                if datetime.fromisoformat(getattr(self, field)).tzinfo is None:
                    problems.append(f"{field} has no time zone")
            except ValueError:
                problems.append(f"{field} is not an ISO 8601 time")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def models(self) -> tuple[ModelTerms, ...]:
        return (self.terms,)

    @property
    def signing_keys(self) -> dict[str, bytes]:
        """Party -> its Ed25519 public key."""
        both = (self.provider, self.customer)
        return {party.name: bytes.fromhex(party.signing_key) for party in both}

    def model(self, name: str) -> ModelTerms | None:
        return self.terms if name == self.terms.name else None

    def expired(self, now: datetime) -> bool:
        """Whether `now` (aware) is outside the lease's validity."""
        begun, ends = map(datetime.fromisoformat, (self.created, self.expires))
        return not begun <= now < ends

    def encode(self) -> bytes:
        """The canonical form that is hashed and signed."""
        return canonical.encode(self.model_dump(mode="python"))

    def digest(self) -> bytes:
        """SHA-384 of the canonical form, 48 bytes."""
        return hashlib.sha384(self.encode()).digest()

    @classmethod
    def decode(cls, data: bytes) -> Lease:
        """Read the canonical form.

        Raises:
            ProtocolError: not canonical CBOR.
            ContractError: not a valid lease, with every problem.
        """
        value: Any = canonical.decode(data, max_bytes=_MAX_BYTES)
        if not isinstance(value, dict):
            raise ContractError("lease", ["it is not a map"])
        try:
            lease = cls.model_validate(to_tuples(value))
        except ValidationError as error:
            raise ContractError("lease", explain(error)) from None
        if lease.encode() != data:
            raise ContractError("lease", ["it is not in its one form"])
        return lease


class SignedLease:
    """A lease that provider and customer have signed. Only `verify` makes one."""

    __slots__ = ("contract", "digest", "signatures")

    def __init__(self) -> None:
        raise TypeError("use SignedLease.verify")

    contract: Lease
    digest: bytes
    signatures: dict[str, bytes]

    @classmethod
    def verify(cls, lease: Lease, signatures: dict[str, bytes]) -> SignedLease:
        """Check that both signed exactly this lease.

        Raises:
            ContractError: a signature is missing.
            Refused: a signature is wrong.
        """
        digest = lease.digest()
        missing = [name for name in lease.signing_keys if name not in signatures]
        if missing:
            raise ContractError("lease", [f"{name} has not signed" for name in missing])
        for name, key in lease.signing_keys.items():
            verify_signature(key, LEASE_LABEL, digest, signatures[name], by=name)
        signed = object.__new__(cls)
        signed.contract, signed.digest = lease, digest
        signed.signatures = {name: signatures[name] for name in lease.signing_keys}
        return signed
