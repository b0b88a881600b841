"""Key release (RFC 9334's relying party at work): a weight key for one attested enclave, one
contract, one run, and no other.

The order, which comments in the code name:

1. the provider appraised the enclave (`AttestedPeer`);
2. contract and claims are held against the signed release policy;
3. the decision goes to the provider's transparency log, on the disk;
4. the key is wrapped;
5. the provider signs the grant, with the log's tree head and the proof that the release is under
   it.

The HPKE `info` is a digest over everything that the release
was decided on, the log entry among it: a key that is wrapped before it was logged cannot be, and a
grant opens in no other context. The grant travels through an aggregator that is trusted with
nothing.

The enclave takes nothing from the grant that it knows itself: it computes model, run, nonce,
evidence, policy and recipient from its own state, and reads only the expiry, and time and place of
the log entry, from what the provider signed. So it computes the entry itself, and takes no key
whose release was not logged as what it is. Nothing is negotiated: an enclave has a key of one KEM,
its evidence binds that key, the provider's signed policy names the admissible KEMs (the hybrid
alone by default), and the KEM is part of what the grant is bound to. So a relay can downgrade
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, SignedContract
from fedark.contract.lease import INFERENCE, Lease, SignedLease
from fedark.foundation import canonical
from fedark.foundation.errors import (
    LogRefused,
    ProtocolError,
    Refused,
    ReleaseRefused,
    SealBroken,
    printable,
)
from fedark.foundation.keys import HpkeKey, Kem, SigningKey, verify_signature
from fedark.translog.entry import KINDS, Entry
from fedark.translog.head import TreeHead
from fedark.translog.log import TransparencyLog
from fedark.translog.merkle import verify_inclusion
from fedark.vault.manifest import VerifiedManifest
from fedark.vault.opener import OpenedBundle
from fedark.vault.weightkey import WeightKey

__all__ = ["Accepted", "Receipt", "ReleaseTerms", "accept", "logged_as", "release"]

_GRANT_LABEL = "fedark/grant/1"
_RELEASE_LABEL = "fedark/release/1"
_RECEIPT_LABEL = "fedark/receipt/1"
_MAX_BYTES = 8192
_TIME_LIMIT = 1 << 40
_LIFETIME = timedelta(hours=1)
_SKEW = 300  # seconds by which two clocks may differ


@dataclass(frozen=True)
class ReleaseTerms:
    """All that a release is bound to. Digests are SHA-384.

    Attributes:
        model: its name in the contract.
        bundle: digest of the bundle's manifest.
        contract, policy: digests of the job contract and of the provider's release policy.
        run_id: of the run.
        nonce: the provider's challenge that the enclave's evidence answered.
        evidence: digest of that evidence.
        party: who hosts the enclave.
        kem: of the enclave's HPKE key.
        recipient: digest of the enclave's HPKE public key.
        logged: time of the log entry, seconds since 1970, UTC.
        log_index, log_entry: its place in the provider's log, and its leaf hash.
        expires: seconds since 1970, UTC; no enclave accepts the grant from then on, and an
            inference enclave answers no longer.
        role: of the enclave.
        tokens: that an inference enclave may read and write for it.
    """

    model: str
    bundle: bytes
    contract: bytes
    policy: bytes
    run_id: str
    nonce: bytes
    evidence: bytes
    party: str
    kem: Kem
    recipient: bytes
    logged: int
    log_index: int
    log_entry: bytes
    expires: int
    role: str = "trainer"
    tokens: int = 0

    def entry(self) -> Entry:
        """What the provider's log says of this release."""
        kind = "lease" if self.role == INFERENCE else "release"
        return Entry(kind, self.logged, {name: getattr(self, name) for name in KINDS[kind]})

    def context(self) -> dict[str, Any]:
        """The HPKE context."""
        return {"label": _RELEASE_LABEL, "terms": canonical.digest([_RELEASE_LABEL, asdict(self)])}


def release(
    key: WeightKey,
    manifest: VerifiedManifest,
    peer: AttestedPeer,
    *,
    contract: SignedContract | SignedLease,
    model: str,
    provider: SigningKey,
    log: TransparencyLog,
    now: datetime,
) -> bytes:
    """The grant: the weight key of `manifest`, wrapped for the enclave `peer`, signed. Valid for an
    hour at most; under a lease, whose enclave is one for inference, for one portion of it.

    Args:
        model: its name in the contract.
        now: aware.

    Raises:
        ReleaseRefused: with every reason; the refusal is in the log.
        StorageError: the log cannot be written; nothing was released.
    """
    # 1. Only a verifier makes an AttestedPeer.
    if not isinstance(peer, AttestedPeer):
        raise TypeError("a weight key is released to an AttestedPeer alone")
    terms, policy, kem = contract.contract, manifest.policy, peer.kem
    leased = terms if isinstance(terms, Lease) else None
    lifetime = timedelta(seconds=leased.seconds) if leased else _LIFETIME
    expires = min(
        int((now + lifetime).timestamp()),
        int(datetime.fromisoformat(terms.expires).timestamp()),
        int(datetime.fromisoformat(policy.expires).timestamp()),
    )
    bound = ReleaseTerms(
        model=model,
        bundle=manifest.digest(),
        contract=contract.digest,
        policy=policy.digest(),
        run_id=peer.run_id,
        nonce=peer.nonce,
        evidence=peer.evidence_digest,
        party=peer.party,
        kem=kem,
        recipient=hashlib.sha384(peer.hpke_public).digest(),
        logged=int(now.timestamp()),
        log_index=0,
        log_entry=b"",
        expires=expires,
        role=peer.role,
        tokens=leased.tokens if leased else 0,
    )
    # 2. Contract and claims against the policy.
    reasons = _reasons(key, manifest, peer, contract, model, provider, now)
    if leased and (given := log.leased(contract.digest).total()) + leased.tokens > leased.total:
        reasons.append(f"{given:,} of the lease's {leased.total:,} tokens are given out already")
    if reasons:
        done = log.refuse(
            party=peer.party,
            run_id=peer.run_id,
            contract=contract.digest,
            asked=f"release:{model}",
            evidence=peer.evidence_digest,
            reasons="; ".join(reasons),
            now=now,
        )
        refused = ReleaseRefused(
            f"The weight key of {printable(model)!r} is not released to {printable(peer.party)}:\n"
            + "\n".join(f"  - {reason}" for reason in reasons),
            safe="It stays in the provider's node; the refusal is in its log.",
        )
        refused.logged = done.index
        raise refused
    # 3. The log, before the key is wrapped.
    done = log.append(bound.entry())
    bound = replace(bound, log_index=done.index, log_entry=done.entry.leaf())
    proof = {"log_head": done.head.encoded, "log_path": log.inclusion(done.index, done.head)}
    # 4. and 5. Wrap, then sign.
    body = canonical.encode(
        asdict(bound) | proof | {"wrapped": key.wrap(peer.hpke_public, bound.context(), kem=kem)}
    )
    return canonical.encode({"body": body, "signature": provider.sign(_GRANT_LABEL, body)})


class Accepted:
    """A weight key that this enclave accepted, and what it is bound to. Only `accept` makes one."""

    __slots__ = ("grant", "key", "terms")

    def __init__(self) -> None:
        raise TypeError("use accept")

    grant: bytes
    key: WeightKey
    terms: ReleaseTerms

    @classmethod
    def _of(cls, key: WeightKey, terms: ReleaseTerms, grant: bytes) -> Accepted:
        accepted = object.__new__(cls)
        accepted.key, accepted.terms, accepted.grant = key, terms, grant
        return accepted


def accept(
    grant: bytes,
    *,
    hpke: HpkeKey,
    manifest: VerifiedManifest,
    contract: Contract | Lease,
    model: str,
    run_id: str,
    party: str,
    nonce: bytes,
    evidence: bytes,
    now: datetime,
) -> Accepted:
    """Take a grant inside the enclave; everything but `grant` is what the enclave knows itself.

    Args:
        hpke: the enclave's own key.
        contract: the one in its measured run configuration; its kind says the enclave's role.
        nonce: the provider's challenge that it answered; `evidence`: SHA-384 of its answer.

    Raises:
        ReleaseRefused: with every field that is not this enclave's.
    """
    provider = bytes.fromhex(contract.provider.signing_key)
    body = _grant_body(grant, provider)
    names = [field.name for field in fields(ReleaseTerms)]
    own = ReleaseTerms(
        model=model,
        bundle=manifest.digest(),
        contract=contract.digest(),
        policy=manifest.policy.digest(),
        run_id=run_id,
        nonce=nonce,
        evidence=evidence,
        party=party,
        kem=hpke.kem,
        recipient=hashlib.sha384(hpke.public).digest(),
        logged=body["logged"],
        log_index=body["log_index"],
        log_entry=b"",
        expires=body["expires"],
        role=INFERENCE if isinstance(contract, Lease) else "trainer",
        tokens=contract.tokens if isinstance(contract, Lease) else 0,
    )
    with contextlib.suppress(
        LogRefused
    ):  # an enclave that was never challenged has nothing that could have been logged
        own = replace(own, log_entry=own.entry().leaf())
    reasons = [
        f"its {name} is not this enclave's" for name in names if body[name] != getattr(own, name)
    ]
    reasons += manifest.policy.kem_problems(hpke.kem)
    if hpke.kem != contract.attestation.kem:
        reasons.append(
            f"this enclave's key is of the KEM {hpke.kem}, the contract names"
            f" {contract.attestation.kem}"
        )
    terms = contract.model(model)
    if terms is None or bytes.fromhex(terms.bundle) != own.bundle:
        reasons.append("the contract names another bundle for this model")
    if manifest.provider.hex() != contract.provider.signing_key:
        reasons.append("the bundle is another provider's than the contract's")
    if now.timestamp() >= own.expires:
        reasons.append("it has expired")
    if isinstance(contract, Lease) and now.timestamp() < own.logged - _SKEW:
        reasons.append("this host's clock is before the time at which the provider made it")
    try:
        head = TreeHead.verify(body["log_head"], provider, by="the provider")
        verify_inclusion(own.log_entry, own.log_index, head.size, body["log_path"], head.root)
    except Refused as error:
        reasons.append(f"the provider's log does not hold this release: {error.what}")
    if reasons:
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise ReleaseRefused(
            f"A grant for {printable(model)!r} was refused:\n{lines}",
            safe="Nothing of it was used.",
        )
    try:
        key = WeightKey.unwrap(body["wrapped"], hpke, own.context())
        key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
    except Refused as error:
        raise ReleaseRefused(
            f"A grant for {printable(model)!r} was refused: {error.what}",
            safe="Nothing of it was used.",
        ) from None
    return Accepted._of(key, own, hashlib.sha384(grant).digest())


@dataclass(frozen=True)
class Receipt:
    """An enclave's signed word that it accepted a grant and opened the whole bundle under it.

    Attributes:
        grant: SHA-384 of the grant's bytes.
        loaded: when, by the clock of its host: seconds since 1970, UTC.
        others: as in `ReleaseTerms`.
    """

    model: str
    bundle: bytes
    contract: bytes
    run_id: str
    party: str
    log_index: int
    log_entry: bytes
    expires: int
    grant: bytes
    loaded: int

    @staticmethod
    def make(
        accepted: Accepted, opened: OpenedBundle, signing: SigningKey, *, now: datetime
    ) -> bytes:
        """The receipt, signed by the enclave's key.

        Raises:
            ReleaseRefused: what was opened is another bundle than what was granted.
        """
        terms = accepted.terms
        if opened.bundle != terms.bundle:
            raise ReleaseRefused(
                "The bundle that was opened is not the one that was granted.",
                safe="No receipt was made.",
            )
        shared = {
            field.name: getattr(terms, field.name)
            for field in fields(Receipt)
            if hasattr(terms, field.name)
        }
        receipt = Receipt(**shared, grant=accepted.grant, loaded=int(now.timestamp()))
        body = canonical.encode(asdict(receipt))
        return canonical.encode({"body": body, "signature": signing.sign(_RECEIPT_LABEL, body)})

    @staticmethod
    def verify(
        data: bytes, *, signing_public: bytes, contract: bytes, run_id: str, party: str
    ) -> Receipt:
        """Read a receipt of the enclave whose attested signing key is `signing_public`.

        Args:
            contract: digest of the contract, 48 bytes.

        Raises:
            ReleaseRefused: it is malformed, not that enclave's, or of another contract, run or
                party.
        """
        outer = _signed_map(data)
        try:
            verify_signature(
                signing_public,
                _RECEIPT_LABEL,
                outer["body"],
                outer["signature"],
                by=f"the trainer of {party}",
            )
            body = canonical.decode(outer["body"], max_bytes=_MAX_BYTES)
        except (Refused, ProtocolError) as error:
            raise ReleaseRefused(
                f"A receipt was refused: {error.what}", safe="Nothing was concluded from it."
            ) from None
        kinds = {
            field.name: {"str": str, "bytes": bytes, "int": int}[str(field.type)]
            for field in fields(Receipt)
        }
        if (
            not isinstance(body, dict)
            or {name: type(value) for name, value in body.items()} != kinds
        ):
            raise ReleaseRefused("A receipt is malformed.", safe="Nothing was concluded from it.")
        receipt = Receipt(**body)
        if (receipt.contract, receipt.run_id, receipt.party) != (contract, run_id, party):
            raise ReleaseRefused(
                "A receipt is of another contract, run or party.",
                safe="Nothing was concluded from it.",
            )
        return receipt

    def answers(self, grant: bytes) -> bool:
        """Whether this receipt is for exactly that grant."""
        return self.grant == hashlib.sha384(grant).digest()


def _reasons(
    key: WeightKey,
    manifest: VerifiedManifest,
    peer: AttestedPeer,
    signed: SignedContract | SignedLease,
    model: str,
    provider: SigningKey,
    now: datetime,
) -> list[str]:
    contract, policy = signed.contract, manifest.policy
    if isinstance(contract, Lease):
        role, customers = INFERENCE, {contract.customer.name}
        reasons = policy.kem_problems(contract.attestation.kem)
    else:
        role, customers = "trainer", {party.name for party in contract.customers}
        reasons = policy.contract_problems(contract)
    reasons += policy.role_problems(role) + policy.enclave_problems(peer.claims)
    if peer.kem != contract.attestation.kem:
        reasons.append(
            f"the enclave's key is of the KEM {peer.kem}, the contract names"
            f" {contract.attestation.kem}"
        )
    terms = contract.model(model)
    if terms is None:
        reasons.append("the contract names no such model")
    elif bytes.fromhex(terms.bundle) != manifest.digest():
        reasons.append("the contract names another bundle for this model")
    if not manifest.provider.hex() == contract.provider.signing_key == provider.public.hex():
        reasons.append("bundle, contract and this node are not of one provider")
    if peer.role != role:
        reasons.append(f"a weight key is for a {role} here, not for the role {peer.role!r}")
    if peer.party not in customers:
        reasons.append("it is not the enclave of a customer of the contract")
    if peer.contract_digest != signed.digest:
        reasons.append("the enclave is bound to another contract")
    if contract.expired(now):
        reasons.append("the contract has expired, or is not valid yet")
    if policy.expired(now):
        reasons.append("the provider's release policy has expired")
    try:
        key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
    except SealBroken as error:
        reasons.append(error.what)
    return reasons


def logged_as(grant: bytes, provider: bytes) -> tuple[int, bytes]:
    """Index and leaf hash of the log entry that a grant stands on, for the node that passes it on
    to its enclave.

    Args:
        provider: signing key.

    Raises:
        ReleaseRefused: it is malformed, or not the provider's.
    """
    body = _grant_body(grant, provider)
    return body["log_index"], body["log_entry"]


def _grant_body(grant: bytes, provider: bytes) -> dict[str, Any]:
    outer = _signed_map(grant)
    try:
        verify_signature(
            provider, _GRANT_LABEL, outer["body"], outer["signature"], by="the provider"
        )
        body = canonical.decode(outer["body"], max_bytes=_MAX_BYTES)
    except (Refused, ProtocolError) as error:
        raise ReleaseRefused(
            f"A grant was refused: {error.what}", safe="Nothing of it was used."
        ) from None
    own = {
        "wrapped": bytes,
        "log_index": int,
        "log_entry": bytes,
        "logged": int,
        "expires": int,
        "tokens": int,
        "log_head": bytes,
        "log_path": list,
    }
    if (
        not isinstance(body, dict)
        or body.keys() != {*own, *(field.name for field in fields(ReleaseTerms))}
        or any(type(body[name]) is not kind for name, kind in own.items())
        or any(type(node) is not bytes for node in body["log_path"])
        or not all(0 <= body[name] < _TIME_LIMIT for name in ("logged", "expires", "log_index"))
    ):
        raise ReleaseRefused("A grant is malformed.", safe="Nothing of it was used.")
    return body


def _signed_map(data: bytes) -> dict[str, bytes]:
    try:
        outer = canonical.decode(data, max_bytes=_MAX_BYTES)
    except ProtocolError as error:
        raise ReleaseRefused(
            f"A grant or receipt is malformed: {error.what}", safe="Nothing of it was used."
        ) from None
    if not isinstance(outer, dict) or {name: type(value) for name, value in outer.items()} != {
        "body": bytes,
        "signature": bytes,
    }:
        raise ReleaseRefused("A grant or receipt is malformed.", safe="Nothing of it was used.")
    return outer
