"""The provider's node: it owns the base weights and lets a key go only to an enclave that it has
appraised itself.

Weights never pass through here while a job runs: sealed bundles lie in the catalogue, and what the
node releases is their key, wrapped for one attested trainer enclave, for one run; an enclave takes
it within the hour or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, Party, SignedContract, now
from fedark.foundation.errors import (
    EvidenceRefused,
    FedarkError,
    FederationError,
    LogRefused,
    ProtocolError,
    Refused,
    StorageError,
)
from fedark.links.faults import fault_of
from fedark.stages.budget import read_head
from fedark.stages.node import NodeBase, NodeRun, Proof
from fedark.stages.settings import NodeSettings
from fedark.translog.head import TreeHead
from fedark.translog.log import Logged
from fedark.translog.update import make_update
from fedark.v1 import stage_pb2
from fedark.vault.bundle import find_bundle
from fedark.vault.manifest import VerifiedManifest
from fedark.vault.release import Receipt, logged_as, release
from fedark.vault.weightkey import WeightKey

__all__ = ["ProviderNode"]


@dataclass(kw_only=True)
class _Run(NodeRun):
    trainers: dict[str, AttestedPeer] = field(default_factory=dict)
    grants: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def state(self, proof: Proof) -> dict[str, Any]:
        return super().state(proof) | {
            "trainers": {name: proof(peer) for name, peer in self.trainers.items()},
            "grants": [[name, model, grant] for (name, model), grant in self.grants.items()],
        }


class ProviderNode(NodeBase[_Run]):
    """See the module's docstring.

    Args:
        settings: as for every node.
        weight_keys: bundle digest (hex) -> its key.
    """

    role = "provider"

    def __init__(self, settings: NodeSettings, weight_keys: Mapping[str, WeightKey]) -> None:
        super().__init__(settings)
        self._weight_keys = weight_keys

    def _answers(self) -> dict[str, Callable[[_Run, Any], Any]]:
        return {"release": self._release, "deliver": self._deliver, "abort": self._abort}

    def _begin(self, run_id: str, contract: Contract) -> _Run:
        gate = self._gate(contract, run_id)
        nonces = {
            f"trainer:{party.name}": gate.challenge("trainer", party.name, now=now())
            for party in contract.customers
        }
        nonces["node"] = gate.challenge("aggregator", contract.aggregator.name, now=now())
        self.settings.on_progress(f"signed the contract of job {contract.job}")
        return _Run(run_id=run_id, contract=contract, nonces=nonces)

    def _recall(self, run_id: str, contract: Contract, state: dict[str, Any]) -> _Run:
        run = _Run(run_id=run_id, contract=contract, nonces=state["nonces"])
        if state["signatures"] is not None:
            run.signed = SignedContract.verify(contract, state["signatures"])
        name = contract.aggregator.name
        run.aggregator = self._readmit(
            contract, run_id, state["aggregator"], role="aggregator", party=name
        )
        for name, proof in state["trainers"].items():
            peer = self._readmit(contract, run_id, proof, role="trainer", party=name)
            if peer is not None:
                run.trainers[name] = peer
        run.grants = {(name, model): grant for name, model, grant in state["grants"]}
        return run

    def close(self) -> None:
        """Forget the runs; a provider has no enclave."""
        self._runs.clear()

    def _own_problems(self, contract: Contract) -> list[str]:
        problems = []
        for terms in contract.models:
            manifest = self._manifest(terms.bundle)
            if manifest is None or terms.bundle not in self._weight_keys:
                problems.append(f"the bundle of model {terms.name} was not sealed by {self.party}")
            else:
                if manifest.weights().hex() != terms.weights:
                    problems.append(f"the bundle of model {terms.name} holds other weights")
                problems += [
                    f"model {terms.name}: {problem}"
                    for problem in manifest.policy.contract_problems(contract)
                ]
        return problems

    def _manifest(self, digest: str) -> VerifiedManifest | None:
        bundle = find_bundle(self.settings.catalogue, digest, self.settings.keys.signing.public)
        return bundle.manifest if bundle is not None else None

    def _release(self, run: _Run, request: stage_pb2.ReleaseRequest) -> stage_pb2.ReleaseReply:
        contract, run_id = run.contract, run.run_id
        run.signed = SignedContract.verify(contract, dict(request.contract_signatures))
        remembered = {name: self._remembered(data) for name, data in request.log_heads.items()}
        name = contract.aggregator.name
        try:
            run.aggregator = self._admit(
                contract, run_id, request.aggregator_evidence, role="aggregator", party=name
            )
        except EvidenceRefused as error:
            self._prove(error, name, run_id, remembered.get(name))
            raise
        reply = stage_pb2.ReleaseReply()
        for party in contract.customers:
            if party.name not in request.trainer_evidence:
                continue
            try:
                peer = self._admit(
                    contract,
                    run_id,
                    request.trainer_evidence[party.name],
                    role="trainer",
                    party=party.name,
                )
                grants = self._release_keys(run.signed, peer)
                reply.grants[party.name].CopyFrom(grants)
                run.grants |= {
                    (party.name, model): grant for model, grant in grants.by_model.items()
                }
                run.trainers[party.name] = peer
                self.settings.on_progress(
                    f"released {len(contract.models)} keys to the attested enclave of {party.name}"
                )
            except (LogRefused, StorageError):  # without a log nothing is released to anybody
                raise
            except FedarkError as error:
                if not isinstance(error, Refused):
                    error = Refused(error.what, safe=error.safe, fix=error.fix)
                if error.logged is None:
                    evidence = request.trainer_evidence[party.name]
                    error.logged = self._log_refusal(
                        contract, run_id, evidence, error, party=party.name, asked="release"
                    )
                self._prove(error, party.name, run_id, remembered.get(party.name))
                reply.refused[party.name].CopyFrom(fault_of(error))
                self.settings.on_progress(f"refused {party.name}: {error.what}")
        self._show_log(run_id, run, reply, remembered)
        return reply

    def _release_keys(
        self, signed: SignedContract, peer: AttestedPeer, waiting: Callable[[], bool] = lambda: True
    ) -> stage_pb2.Grants:
        """A grant for each model of the contract, wrapped for one attested trainer enclave.

        Args:
            waiting: whether who asked still is; asked before each key, for nothing is released to
                one who has gone.

        Raises:
            FederationError, Refused: why not. The keys before that are logged as released.
        """
        self._consent.use(signed.contract, peer.run_id)
        grants = stage_pb2.Grants()
        for terms in signed.contract.models:
            manifest = self._manifest(terms.bundle)
            if manifest is None:
                raise FederationError(
                    f"The bundle of model {terms.name} is gone from the catalogue.",
                    safe="No further key was released.",
                )
            if not waiting():
                raise FederationError(
                    "The caller has gone.", safe="No further key was released.", fix="Ask again."
                )
            grants.by_model[terms.name] = release(
                self._weight_keys[terms.bundle],
                manifest,
                peer,
                contract=signed,
                model=terms.name,
                provider=self.settings.keys.signing,
                log=self._log,
                now=now(),
            )
            grants.manifests[terms.name] = manifest.encode()
        return grants

    def _remembered(self, data: bytes) -> TreeHead | None:
        """The head of this node's log that a customer remembers. What this node did not sign counts
        as none.

        Raises:
            LogForked: this node signed it, and its log was rewound or rewritten since.
        """
        try:
            head = TreeHead.verify(data, self.settings.keys.signing.public, by=self.party)
        except LogRefused:
            return None
        self._log.check(head)
        return head

    def _prove(self, error: Refused, party: str, run_id: str, since: TreeHead | None) -> None:
        """Let `error` carry the log's word to `party` that it was refused."""
        if error.logged is not None:
            error.proof = self._shown(party, run_id, self._log.head(), since, [error.logged])

    def _shown(
        self, party: str, run_id: str, head: TreeHead, since: TreeHead | None, indexes: list[int]
    ) -> bytes:
        """What the log shows to `party`: these entries are under `head`, which goes on from
        `since`.
        """
        key = self.settings.keys.signing
        return make_update(
            self._log, key, party=party, run_id=run_id, head=head, since=since, indexes=indexes
        )

    def _show_log(
        self,
        run_id: str,
        run: _Run,
        reply: stage_pb2.ReleaseReply,
        remembered: Mapping[str, TreeHead | None],
    ) -> None:
        """Prove to the aggregator, and to every customer that got a key, what the log says of its
        enclave; all see one head.
        """
        head = self._log.head()
        if run.aggregator is not None:
            name, index = run.aggregator.party, self._admissions[run.aggregator.evidence_digest]
            reply.log = self._shown(name, run_id, head, remembered.get(name), [index])
        for name, grants in reply.grants.items():
            indexes = self._entries(grants, run.trainers[name])
            grants.log = self._shown(name, run_id, head, remembered.get(name), indexes)

    def _entries(self, grants: stage_pb2.Grants, peer: AttestedPeer) -> list[int]:
        """Where the log says what these grants and the admission before them are."""
        public = self.settings.keys.signing.public
        return [
            self._admissions[peer.evidence_digest],
            *(logged_as(grant, public)[0] for grant in grants.by_model.values()),
        ]

    def _deliver(self, run: _Run, request: stage_pb2.DeliverRequest) -> stage_pb2.DeliverReply:
        if run.signed is None or run.aggregator is None:
            raise ProtocolError(
                "The aggregator enclave is not proven yet.", safe="Nothing was stored."
            )
        run_id, folder = run.run_id, self._store(run.signed, run.aggregator, request)
        receipts = []
        for (name, model), grant in run.grants.items():
            try:
                receipts.append(
                    self._receipt(
                        run.trainers[name], model, grant, request.receipts[name].by_model[model]
                    )
                )
            except FedarkError as error:
                self.settings.on_progress(f"no receipt of {name} for {model}: {error.what}")
        # A receipt carries the index and digest of its log entry: a log that was cut or rewritten
        # shows here.
        logged = self._log.verify(
            [(receipt.log_index, receipt.log_entry) for receipt in receipts]
        ).entries
        for party in run.signed.contract.customers:
            self._witness(
                run.signed.contract, run_id, party, request.receipts[party.name].ledger_head, logged
            )
        self.settings.on_progress(
            f"{len(receipts)} of {len(run.grants)} receipts hold; adapter and report are in"
            f" {folder}"
        )
        self._end(run_id)
        return stage_pb2.DeliverReply(stored=True)

    def _witness(
        self, contract: Contract, run_id: str, party: Party, shown: bytes, logged: Iterable[Logged]
    ) -> None:
        """Log the head of a customer's privacy ledger; one that contradicts an earlier entry is
        told to the people here.
        """
        if not shown:
            return
        try:
            entry = read_head(shown, contract, run_id, party, now=now())
        except FedarkError as error:
            self.settings.on_progress(
                f"the ledger head of {party.name} was not logged: {error.what}"
            )
            return
        for one in logged:
            facts = one.entry.facts
            if one.entry.kind != "charge" or any(
                facts[name] != entry.facts[name] for name in ("party", "ledger")
            ):
                continue
            if facts["run_id"] == run_id:
                return  # this node was interrupted after it had logged it
            if facts["sequence"] >= entry.facts["sequence"]:  # type: ignore[operator]
                said = (
                    f"the privacy ledger of {party.name} was rolled back: see entry {one.index} of"
                    " the log"
                )
                self.settings.on_progress(said)
        self._log.append(entry)

    def _receipt(self, peer: AttestedPeer, model: str, grant: bytes, data: bytes) -> Receipt:
        receipt = Receipt.verify(
            data,
            signing_public=peer.signing_public,
            contract=peer.contract_digest,
            run_id=peer.run_id,
            party=peer.party,
        )
        if not receipt.answers(grant):
            raise Refused(
                f"The receipt of {peer.party} for model {model} does not answer the grant that was"
                " given."
            )
        return receipt
