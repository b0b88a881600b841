"""The gate: the only way from bytes of a stranger to an `AttestedPeer`, and so to a weight key or a
record.

`Gate.admit` does, in this order, and refuses with every reason that it found:

 1. decode the evidence, strictly;
 2. the platform is one that the contract names and that this gate has a verifier for;
 3. spend the nonce: issued by this gate for this role and party, unexpired, unused. It is spent
    even if a later step refuses;
 4. the binding names the contract, run, role and party that the caller expects, and a key of the
    contract's KEM, and that party has signed that it started this enclave;
 5. the platform's verifier: the token's form, chain, revocation and signature;
 6. the token's report data is that of the binding;
 7. the contract's policy: reference values, run configuration, debug, security version, sandbox,
    clock; and then the own policy of the party whose gate this is, if it has one: evidence needs
    both.

Claims of a token that failed step 5 are not looked at: they are anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Never, NoReturn, final

from fedark.attestation import policy
from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.binding import HOST_LABEL, ROLES, KeyBinding
from fedark.attestation.claims import Claims
from fedark.attestation.evidence import Evidence
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.base import Verifier
from fedark.attestation.terms import AttestationTerms
from fedark.foundation import canonical
from fedark.foundation.errors import EvidenceRefused, ProtocolError, Refused, printable
from fedark.foundation.keys import Kem, verify_signature

__all__ = ["AttestedPeer", "Gate"]


@final
class AttestedPeer:
    """An enclave whose evidence passed the gate. Only `Gate.admit` makes one; it cannot be changed,
    copied or unpickled.

    Attributes:
        party, role: whose enclave it is, and which.
        hpke_public, signing_public: its keys, generated inside it.
        kem: of `hpke_public`; the one that the contract names.
        claims: what its platform vouches for.
        nonce: the challenge that its evidence answered.
        evidence_digest: SHA-384 of the evidence, 48 bytes.
        contract_digest, run_id: what it is bound to.
    """

    __slots__ = (
        "claims",
        "contract_digest",
        "evidence_digest",
        "hpke_public",
        "kem",
        "nonce",
        "party",
        "role",
        "run_id",
        "signing_public",
    )

    claims: Claims
    contract_digest: bytes
    evidence_digest: bytes
    hpke_public: bytes
    kem: Kem
    nonce: bytes
    party: str
    role: str
    run_id: str
    signing_public: bytes

    def __init__(self, _only_gate_admit_makes_one: Never, /) -> None:
        raise TypeError("an AttestedPeer is made by Gate.admit alone")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("AttestedPeer is final")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"an AttestedPeer is immutable: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an AttestedPeer is immutable: {name}")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an AttestedPeer is not copied or pickled: it is good in the process whose gate made it"
        )

    def __repr__(self) -> str:
        return (
            f"AttestedPeer({self.role} of {self.party}, {self.claims.platform}, run {self.run_id})"
        )


class Gate:
    """Admits enclaves under one contract and run.

    Args:
        terms: which evidence counts.
        contract_digest: SHA-384 of the contract, 48 bytes.
        run_id: of this run.
        verifiers: platform name -> verifier; a platform needs both this and the terms.
        nonces: where challenges are kept.
        hosts: party -> the public key by which it signs that an enclave is its own: the one that
            the contract names.
        own: this party's own appraisal policy, which a contract can narrow and never widen.
    """

    def __init__(
        self,
        *,
        terms: AttestationTerms,
        contract_digest: bytes,
        run_id: str,
        verifiers: Mapping[str, Verifier],
        nonces: NonceBook,
        hosts: Mapping[str, bytes],
        own: AppraisalPolicy | None = None,
    ) -> None:
        self._terms = terms
        self._contract_digest = contract_digest
        self._run_id = run_id
        self._verifiers = dict(verifiers)
        self._nonces = nonces
        self._hosts = dict(hosts)
        self._own = own

    def challenge(self, role: str, party: str, *, now: datetime) -> bytes:
        """A single-use nonce of 32 bytes for the enclave of `role` that `party` hosts.

        Raises:
            ProtocolError: there is no such role.
        """
        if role not in ROLES:
            raise ProtocolError(f"There is no enclave role {printable(role)!r}.")
        return self._nonces.issue(self._purpose(role, party), now=now)

    def expect(self, nonce: bytes, role: str, party: str, *, now: datetime) -> None:
        """Let that enclave answer `nonce`, once, which the caller derived from a fresh nonce of the
        same book.

        Raises:
            EvidenceRefused: it was expected from that enclave before.
        """
        self._nonces.adopt(nonce, self._purpose(role, party), now=now)

    def admit(
        self,
        evidence: bytes,
        *,
        role: str,
        party: str,
        run_config_digest: bytes,
        now: datetime,
        again: bool = False,
    ) -> AttestedPeer:
        """The peer that `evidence` proves to be the enclave of `role` that `party` hosts, started
        with the run configuration whose SHA-384 is `run_config_digest`.

        Args:
            again: the caller repeats a step that a crash has interrupted; the very same evidence is
                then no replay.

        Raises:
            EvidenceRefused: with every reason.
        """
        return self._examine(evidence, role, party, run_config_digest, now, again=again)

    def readmit(
        self,
        evidence: bytes,
        *,
        role: str,
        party: str,
        run_config_digest: bytes,
        admitted: datetime,
        now: datetime,
    ) -> AttestedPeer:
        """The peer that a gate of this owner admitted at `admitted` by this evidence: everything is
        verified as it was then, but the nonce, which was spent on it, and revocation. What the
        lists at hand revoke is refused, and they may have been renewed between `admitted` and
        `now`.

        For owners who were restarted, and only with evidence from their own authenticated state
        (`fedark.enclave.checkpoint`): nothing here says that it is fresh.

        Raises:
            EvidenceRefused: with every reason.
        """
        return self._examine(
            evidence, role, party, run_config_digest, max(now, admitted), admitted=admitted
        )

    def _examine(
        self,
        evidence: bytes,
        role: str,
        party: str,
        run_config_digest: bytes,
        now: datetime,
        *,
        again: bool = False,
        admitted: datetime | None = None,
    ) -> AttestedPeer:
        subject = f"the {printable(role)} of {printable(party)}"
        try:
            decoded = Evidence.decode(evidence)
        except ProtocolError as error:
            raise EvidenceRefused(subject, [error.what]) from None
        binding, reasons, answered = decoded.binding, list[str](), False

        verifier = self._verifiers.get(decoded.platform)
        if decoded.platform not in self._terms.platforms:
            reasons.append(
                f"the contract does not admit evidence of platform {printable(decoded.platform)!r}"
            )
        elif verifier is None:
            reasons.append(
                f"evidence of platform {printable(decoded.platform)!r} cannot be verified here"
            )
        if admitted is None:
            try:
                purpose = self._purpose(role, party)
                self._nonces.spend(
                    binding.nonce, purpose, now=now, by=decoded.digest(), again=again
                )
                answered = True
            except EvidenceRefused as error:
                reasons += error.reasons
        reasons += self._binding_reasons(binding, role, party)
        try:
            verify_signature(
                self._hosts.get(party, b""),
                HOST_LABEL,
                binding.host_statement(),
                decoded.host,
                by=party,
            )
        except Refused:
            reasons.append(f"{printable(party)} has not signed that this enclave is its own")

        claims = None
        if verifier is not None:
            try:
                claims = verifier.verify(decoded.token, now=now, admitted=admitted)
            except EvidenceRefused as error:
                reasons += error.reasons
            except Exception as error:
                # Evidence is a stranger's bytes: whatever a parser below trips over is that
                # stranger's affair alone.
                reasons.append(f"its token could not be read ({type(error).__name__})")
        if claims is not None:
            demands: list[policy.Check] = [
                policy.BoundTo(binding),
                policy.from_terms(self._terms, role, run_config_digest, claims.platform),
            ]
            if self._own is not None:
                demands.append(self._own.check(role, claims.platform))
            reasons += policy.AllOf(tuple(demands)).reasons(claims, now=admitted or now)
        if reasons or claims is None:
            refused = EvidenceRefused(subject, dict.fromkeys(reasons))
            refused.answered = answered
            raise refused
        return _admitted(claims, binding, decoded.digest())

    def _binding_reasons(self, binding: KeyBinding, role: str, party: str) -> list[str]:
        reasons = []
        if binding.contract_digest != self._contract_digest:
            reasons.append("it is bound to another contract")
        if binding.run_id != self._run_id:
            reasons.append("it is bound to another run")
        if binding.role != role:
            reasons.append(f"its role is {binding.role}")
        if binding.party != party:
            reasons.append(f"it is the enclave of {binding.party}")
        if binding.kem != self._terms.kem:
            reasons.append(
                f"its key is of the KEM {binding.kem}, the contract names {self._terms.kem}"
            )
        return reasons

    def _purpose(self, role: str, party: str) -> str:
        return canonical.digest(
            ["fedark/challenge/1", self._contract_digest, self._run_id, role, party]
        ).hex()


def _admitted(claims: Claims, binding: KeyBinding, evidence_digest: bytes) -> AttestedPeer:
    peer = object.__new__(AttestedPeer)
    for name, value in (
        ("claims", claims),
        ("contract_digest", binding.contract_digest),
        ("evidence_digest", evidence_digest),
        ("hpke_public", binding.hpke_public),
        ("kem", binding.kem),
        ("nonce", binding.nonce),
        ("party", binding.party),
        ("role", binding.role),
        ("run_id", binding.run_id),
        ("signing_public", binding.signing_public),
    ):
        object.__setattr__(peer, name, value)
    return peer
