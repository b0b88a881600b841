"""What the broker decides: a nonce for a trainer enclave, and keys for its evidence. No transport,
no state but the node's own.

The order of every call:
1. this provider's signature over exactly these contract bytes, before anything of them is parsed:
   to a stranger the broker is two hash computations and a refusal, and no stranger makes an entry
   in nonce book or log;
2. the contract agrees with what this node knows itself (`NodeBase`), no key of it went to another
   run, and every customer signed it;
3. the party is one of its customers.
Whoever has the signed contract gets this far, the relay too. Nobody can fill the log by it: only
evidence that answers a nonce of this book that waits for an answer makes an entry, and of a party
under a contract at most `MOST_REFUSALS` refusals are logged. What is refused beyond that is counted
and told to the people of this node. Release goes on as in a run: appraise, log, wrap, sign
(`fedark.vault.release`), for every model of the contract or for none.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import CONTRACT_LABEL, Contract, SignedContract, now
from fedark.contract.lease import INFERENCE, LEASE_LABEL, Lease, SignedLease
from fedark.foundation.errors import (
    EvidenceRefused,
    FedarkError,
    FederationError,
    InputError,
    ProtocolError,
    Refused,
    ReleaseRefused,
)
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import verify_signature
from fedark.operate.party import load_node
from fedark.stages.provider import ProviderNode
from fedark.stages.settings import NodeSettings
from fedark.v1 import broker_pb2 as pb
from fedark.v1 import stage_pb2
from fedark.vault.lease import Usage
from fedark.vault.release import release
from fedark.vault.weightkey import WeightKey

__all__ = ["LEASES", "MOST_REFUSALS", "KeyBroker", "load_broker"]

MOST_REFUSALS = 1000
"""Of one party under one contract that the log takes from a broker."""
LEASES = "leases"
"""Folder of a provider: revoked/DIGEST for a lease that gets no further portion, and usage/, what
enclaves signed of their use.
"""


class KeyBroker(ProviderNode):
    """A provider's node that also answers directly. Safe for threads; processes may share one
    folder.

    Attributes:
        unlogged: how many refusals of this process are not in the log.
    """

    def __init__(self, settings: NodeSettings, weight_keys: Mapping[str, WeightKey]) -> None:
        super().__init__(settings, weight_keys)
        self._refusing = threading.Lock()
        self._leasing = threading.Lock()
        self.unlogged = 0

    def challenge(self, request: pb.BrokerChallengeRequest) -> pb.BrokerChallengeReply:
        """A nonce for the trainer enclave of the party.

        Raises:
            FedarkError: why not.
        """
        signed = self._case(request.about)
        gate = self._gate(signed.contract, request.about.run_id)
        role = INFERENCE if request.about.lease else "trainer"
        return pb.BrokerChallengeReply(nonce=gate.challenge(role, request.about.party, now=now()))

    def release(
        self, request: pb.BrokerReleaseRequest, *, waiting: Callable[[], bool] = lambda: True
    ) -> stage_pb2.Grants:
        """A grant for each model of the contract, and the word of the log about them.

        Args:
            waiting: whether the caller still is; asked before each key, for nothing is released to
                one who has gone.

        Raises:
            FedarkError: why not; where the refusal of an enclave is in the log, the error carries
                the log's word of it, and else it says why not.
        """
        signed, run_id, party = (
            self._case(request.about),
            request.about.run_id,
            request.about.party,
        )
        since = self._remembered(request.log_head) if request.log_head else None
        try:
            grants, indexes = self._release_to(signed, request, waiting)
        except Refused as error:
            self._prove(error, party, run_id, since)
            raise
        grants.log = self._shown(party, run_id, self._log.head(), since, indexes)
        self.settings.on_progress(
            f"released {len(grants.by_model)} keys to the attested enclave of {party}, asked"
            " directly"
        )
        return grants

    def _release_to(
        self,
        signed: SignedContract | SignedLease,
        request: pb.BrokerReleaseRequest,
        waiting: Callable[[], bool],
    ) -> tuple[stage_pb2.Grants, list[int]]:
        contract, run_id, party = signed.contract, request.about.run_id, request.about.party
        role = INFERENCE if request.about.lease else "trainer"
        peer = self._admit(contract, run_id, request.evidence, role=role, party=party)
        try:
            if isinstance(signed, SignedLease):
                grants = self._lease_key(signed, peer, request.usage)
            else:
                grants = self._release_keys(signed, peer, waiting)
            return grants, self._entries(grants, peer)
        except FederationError as error:
            self._log_refusal(
                contract, run_id, request.evidence, error, party=party, asked="release"
            )
            raise
        finally:  # nobody is readmitted here
            self._admissions.pop(peer.evidence_digest, None)
            self._proofs.pop(peer.evidence_digest, None)

    def _log_refusal(
        self,
        contract: Contract | Lease,
        run_id: str,
        evidence: bytes,
        error: FedarkError,
        *,
        party: str,
        asked: str,
    ) -> int | None:
        """Log it, if whoever asks cannot fill the log so; the index of its entry."""
        with self._refusing:
            if isinstance(error, EvidenceRefused) and not error.answered:
                why = "it answers no nonce that waits for an answer"
            elif self._log.refusals(contract=contract.digest(), party=party) >= MOST_REFUSALS:
                why = (
                    f"{MOST_REFUSALS} refusals of {party} under this contract are, which is the"
                    " most"
                )
            else:
                return super()._log_refusal(
                    contract, run_id, evidence, error, party=party, asked=asked
                )
            self.unlogged += 1
        error.safe = f"{error.safe} This refusal is not in the log: {why}.".lstrip()
        return None

    def tell(self, party: str, error: Exception) -> None:
        """Tell the people of this node of a refusal; `party` is the caller's own word."""
        kind = (
            "refused"
            if isinstance(error, EvidenceRefused | ReleaseRefused)
            else type(error).__name__
        )
        count = f" ({self.unlogged} refusals are not in the log)" if self.unlogged else ""
        self.settings.on_progress(
            f"{kind}, asked directly by {party or 'somebody'}: {str(error).splitlines()[0]}{count}"
        )

    def _lease_key(self, signed: SignedLease, peer: AttestedPeer, usage: bytes) -> stage_pb2.Grants:
        """One portion of a lease, for an attested inference enclave.

        Raises:
            FederationError, Refused: why not.
        """
        lease, folder = signed.contract, self.settings.state / LEASES
        with self._leasing:  # what the log says is given out, and the next entry
            if peer.run_id in self._log.leased(signed.digest):
                if not usage:
                    raise Refused(
                        "The enclave's usage receipt did not come along.",
                        safe="No further portion was given out.",
                        fix="Bring what it signed with its last answer.",
                    )
                Usage.verify(
                    usage,
                    signing_public=peer.signing_public,
                    lease=signed.digest,
                    run_id=peer.run_id,
                )
                name = hashlib.sha256(peer.run_id.encode()).hexdigest()
                write_atomic(folder / "usage" / f"{name}.cbor", usage, mode=0o600)
            manifest = self._manifest(lease.terms.bundle)
            key = self._weight_keys.get(lease.terms.bundle)
            if manifest is None or key is None:
                raise FederationError(
                    f"The bundle of model {lease.terms.name} was not sealed by {self.party}.",
                    safe="No key was released.",
                )
            grants = stage_pb2.Grants()
            grants.by_model[lease.terms.name] = release(
                key,
                manifest,
                peer,
                contract=signed,
                model=lease.terms.name,
                provider=self.settings.keys.signing,
                log=self._log,
                now=now(),
            )
            grants.manifests[lease.terms.name] = manifest.encode()
            return grants

    def _leased(self, about: pb.BrokerCase) -> SignedLease:
        lease = Lease.decode(about.contract)
        signed = SignedLease.verify(lease, dict(about.contract_signatures))
        if about.party != lease.customer.name:
            raise ProtocolError("The lease is another customer's.", safe="No key was released.")
        if (self.settings.state / LEASES / "revoked" / signed.digest.hex()).exists():
            raise Refused(
                f"{self.party} has revoked this lease.",
                safe="No further portion is given out.",
                fix="Ask the provider.",
            )
        return signed

    def _case(self, about: pb.BrokerCase) -> SignedContract | SignedLease:
        me = self.settings.keys.signing.public
        digest = hashlib.sha384(about.contract).digest()
        try:
            verify_signature(
                me,
                LEASE_LABEL if about.lease else CONTRACT_LABEL,
                digest,
                about.contract_signatures.get(self.party, b""),
                by=self.party,
            )
        except Refused:
            raise Refused(
                f"{self.party} has not signed this contract.",
                safe="Nothing of it was looked at, and no key was released.",
                fix="Bring the contract and its signatures as they were agreed on.",
            ) from None
        if about.lease:
            return self._leased(about)
        signed = SignedContract.verify(
            self._agree(about.contract, about.run_id), dict(about.contract_signatures)
        )
        if about.party not in {customer.name for customer in signed.contract.customers}:
            raise ProtocolError(
                "The contract has no customer of that name.", safe="No key was released."
            )
        return signed


def load_broker(folder: Path, on_progress: Callable[[str], None] = lambda text: None) -> KeyBroker:
    """The broker of the provider whose folder this is.

    Raises:
        InputError, ContractError: it is not a provider's, or something of it is missing or
        malformed.
    """
    node = load_node(folder, None, on_progress, provider=KeyBroker)
    if not isinstance(node, KeyBroker):
        node.close()
        raise InputError(
            f"{folder} is not a provider's folder.",
            safe="Nothing was served.",
            fix="Give the provider's.",
        )
    return node
