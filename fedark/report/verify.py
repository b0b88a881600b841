"""What a dossier proves, to somebody who trusts none of the parties and asks none of them.

The order, which comments in the code name. A step that fails ends the check where the next would
rest on it; otherwise every step is taken, so that all reasons come at once.

 1. the file: its form, and that the aggregator named in its contract signed it;
 2. the contract: that the provider and every customer signed it;
 3. the collateral: nothing in it that no platform of the contract uses;
 4. the provider's log: each enclave's entries are under one head, and are what the log must say;
 5. evidence: every enclave is appraised again, at the time at which the provider logged it;
 6. releases: bundle, release policy and recipient of each key, against the signed manifests;
 7. receipts: which enclave loaded which weights, under which log entry;
 8. views: every customer was shown the same head of that log;
 9. privacy ledgers: the signed heads, and that there is one wherever the contract is charged;
10. sums: the aggregator enclave's word on each round, none missing, of large enough cohorts;
11. the report: everything in it that follows from the contract and from those figures, once more;
12. the adapters: their digests, and the folders that are held against them;
13. a customer's own dossier: that the customer signed it, that its trainer enclave measured the
    figures in it, and that its privacy ledger has the charge of this job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.trust import unread, verifiers
from fedark.contract.contract import Contract, SignedContract
from fedark.enclave.session import RunConfig
from fedark.enclave.statements import Delivered, Summed
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, InputError, Refused
from fedark.foundation.terms import to_tuples
from fedark.report.own import OwnCheck
from fedark.stages.budget import read_head
from fedark.stages.dossier import MAX_DOSSIER, Dossier, OwnDossier
from fedark.stages.report import (
    HostsWord,
    curve_of,
    models_of,
    privacy_of,
    protection_of,
    read_report,
)
from fedark.translog.entry import Entry
from fedark.translog.merkle import verify_inclusion
from fedark.translog.update import LogUpdate, Shown
from fedark.translog.view import head_in_view
from fedark.vault.manifest import Manifest, VerifiedManifest
from fedark.vault.release import Receipt

__all__ = ["DossierRefused", "Proven", "Verified", "read_dossier", "verify_dossier"]

_MAX_METRICS = 8 << 20


class DossierRefused(Refused):
    """A dossier does not prove what it must.

    Attributes:
        reasons: all that were found.
    """

    def __init__(self, reasons: list[str]) -> None:
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(
            f"The dossier does not hold:\n{lines}",
            safe="Nothing was concluded from it.",
            fix="Ask the aggregator, or another party of the job, for the file again.",
        )
        self.reasons = reasons


@dataclass(frozen=True)
class Proven:
    """One thing that is proven: what, and on whose signature it stands."""

    what: str
    by: str


@dataclass(frozen=True)
class Verified:
    """A dossier that holds.

    Attributes:
        contract: what the parties agreed on.
        report: as the aggregator signed it; its figures are the aggregator enclave's.
        proven: in the order of the module's docstring.
        trusted: what nothing in the file proves.
        adapters: model -> SHA-384 of its travelling values.
        own: of a customer's own dossier: customer -> its figures by model; else {}.
    """

    contract: Contract
    report: Mapping[str, Any]
    proven: tuple[Proven, ...]
    trusted: tuple[str, ...]
    adapters: Mapping[str, bytes]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_dossier(path: Path) -> bytes:
    """The file at `path`, or as much of it as shows that it is too large.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_DOSSIER + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def verify_dossier(
    data: bytes,
    *,
    root: str = "",
    installed: Mapping[str, Mapping[str, str]] | None = None,
    adapters: Mapping[str, bytes] | None = None,
) -> Verified:
    """Check a dossier, offline and without any key.

    Args:
        data: the file.
        root: SHA-256 (hex) of the simulated platform's root certificate, as you know it; empty
            believes the one that the parties signed. The vendors' roots are pinned in fedark.
        installed: role -> register -> SHA-384 (hex) of an installation that you trust.
        adapters: model -> SHA-384 of travelling values, of folders that shall be this job's.

    Raises:
        DossierRefused: with every reason.
    """
    check = _Check(root, installed or {}, adapters or {})
    try:
        return check.run(data)
    except FedarkError as error:
        found = [*check.reasons, f"{check.at}: {error.what}"]
        found = error.reasons if isinstance(error, DossierRefused) else found
        raise DossierRefused(found) from None
    except Exception as error:
        # A dossier is a stranger's bytes, all the way down.
        unread = f"{check.at} could not be read ({type(error).__name__})"
        raise DossierRefused([*check.reasons, unread]) from None


@dataclass
class _Check:
    root: str
    installed: Mapping[str, Mapping[str, str]]
    adapters: Mapping[str, bytes]
    reasons: list[str] = field(default_factory=list)
    proven: list[Proven] = field(default_factory=list)
    at: str = "the file or its contract"

    def run(self, data: bytes) -> Verified:
        # 1. and 2.
        if len(data) > MAX_DOSSIER:
            raise InputError(f"A dossier of {len(data)} bytes is over the limit of {MAX_DOSSIER}.")
        own = OwnDossier.of(data)
        if own:
            self.at = "the shared dossier in it"
        self.dossier = dossier = Dossier.read(own[0].dossier if own else data)
        self.at = "the contract"
        self.contract = contract = Contract.decode(dossier.contract)
        self.signed = SignedContract.verify(contract, dossier.proofs.signatures)
        self._exactly("signatures", dossier.proofs.signatures, self.signed.signatures)
        self.provider = contract.provider
        self.owner = bytes.fromhex(self.provider.signing_key)
        signers = len(self.signed.signatures)
        self._holds(
            f"the contract of job {contract.job}", f"the provider and {signers - 1} customers"
        )
        # 3., 4. and 5.
        self._collateral()
        shown = self._shown()
        peers = self._peers(shown)
        # 6. and 7.
        self._releases(shown, peers, self._manifests())
        self._receipts(shown, peers)
        # 8. and 9.
        self._views(shown)
        self._ledgers()
        # 10., 11. and 12.
        enclave = peers[contract.aggregator.name].signing_public
        self.at = "the statement of the adapters"
        said = Delivered.verify(
            dossier.delivered,
            signing_public=enclave,
            contract=self.signed.digest,
            run_id=dossier.run_id,
        )
        curve = curve_of(said.curve)
        sums = self._sums(enclave, curve.get("rounds", -1))
        if len(sums) != said.sums:
            self.reasons.append("the sums are not as many as the aggregator enclave closed")
        self._report(sums, curve)
        # 13., whose personal adapters 12. may be asked for
        figures, personal = self._own(*own, peers) if own else ({}, {})
        delivered = self._delivered(said, personal)
        self._measurements()
        if self.reasons:
            raise DossierRefused(self.reasons)
        report = read_report(dossier.report, dossier.report_signature, contract, dossier.run_id)
        trusted = self._trusted(peers)
        return Verified(contract, report, tuple(self.proven), trusted, delivered, figures)

    # -- the steps

    def _collateral(self) -> None:
        self.at, platforms = "the collateral", self.contract.attestation.platforms
        for name in unread(self.dossier.collateral, platforms):
            self.reasons.append(f"nothing of the contract's platforms needs collateral {name!r}")
        if self.root and self.root != self.contract.attestation.simulated_root:
            self.reasons.append("the contract pins another simulated root than the one you name")

    def _shown(self) -> dict[str, LogUpdate]:
        """What the provider's log says of each enclave, its proofs verified."""
        self.at, proofs = "the provider's log", self.dossier.proofs
        self._exactly("words of the provider's log", proofs.log, proofs.evidence)
        found = {}
        for party, data in (proofs.log | proofs.refused).items():
            self.at = f"the provider's log of {party}"
            update = LogUpdate.verify(data, self.owner, by=self.provider.name)
            if (update.party, update.run_id) != (party, self.dossier.run_id):
                self._no(party, "the provider's log's word is for another party or run")
            for shown in update.entries:
                verify_inclusion(
                    shown.entry.leaf(), shown.index, update.head.size, shown.path, update.head.root
                )
            found[party] = update
        heads = {found[party].head.encoded for party in proofs.log}
        if len(heads) > 1:
            self.reasons.append("the provider's log was shown with more than one head")
        for party in proofs.refused:
            self._refused(party, found.pop(party))
        self._holds(
            f"{len(found)} admissions, and"
            f" {sum(len(u.entries) for u in found.values()) - len(found)}"
            " key releases, are in the provider's transparency log",
            self.provider.name,
        )
        return found

    def _refused(self, party: str, update: LogUpdate) -> None:
        facts = {"party": party, "run_id": self.dossier.run_id, "contract": self.signed.digest}
        kinds = [
            shown.entry.kind
            for shown in update.entries
            if facts.items() <= shown.entry.facts.items()
        ]
        if party in self.dossier.proofs.evidence or "refusal" not in kinds:
            self._no(party, "the provider's log does not say that it was refused")
        else:
            self._holds(f"the enclave of {party} was refused", self.provider.name)

    def _peers(self, shown: Mapping[str, LogUpdate]) -> dict[str, AttestedPeer]:
        """Every enclave, appraised as the provider appraised it, at the time that it logged."""
        contract, dossier = self.contract, self.dossier
        self.at = "the collateral"
        gate = Gate(
            terms=contract.attestation,
            contract_digest=self.signed.digest,
            run_id=dossier.run_id,
            verifiers=verifiers(contract.attestation, dossier.collateral),
            nonces=NonceBook(),
            hosts=contract.signing_keys,
        )
        roles = {party.name: "trainer" for party in contract.customers}
        roles[contract.aggregator.name] = "aggregator"
        if contract.aggregator.name not in dossier.proofs.evidence:
            raise Refused("There is no evidence of the aggregator enclave.")
        peers = {}
        for party, evidence in dossier.proofs.evidence.items():
            self.at = f"the evidence of {party}"
            if party not in roles:
                raise Refused(f"There is evidence of {party!r}, who has no enclave in this job.")
            entries = [s.entry for s in shown[party].entries if s.entry.kind == "attestation"]
            if len(entries) != 1:
                raise Refused(f"{party}: the provider's log does not show one admission.")
            at = datetime.fromtimestamp(entries[0].time, UTC)
            config = RunConfig(
                role=roles[party], party=party, contract=contract, run_id=dossier.run_id
            )
            peer = gate.readmit(
                evidence,
                role=roles[party],
                party=party,
                run_config_digest=config.register(),
                admitted=at,
                now=at,
            )
            self._entry(party, entries[0], _admission(peer))
            peers[party] = peer
        platforms = ", ".join(sorted({peer.claims.platform for peer in peers.values()}))
        modes = ", ".join(sorted({peer.claims.sandbox for peer in peers.values()}))
        self._holds(
            f"{len(peers)} enclaves ran what the contract names, sandbox {modes}",
            f"their platforms ({platforms})",
        )
        return peers

    def _manifests(self) -> dict[str, VerifiedManifest]:
        found = {}
        self.at = "the manifests"
        self._exactly(
            "manifests", self.dossier.proofs.manifests, [m.name for m in self.contract.models]
        )
        for terms in self.contract.models:
            self.at = f"the manifest of {terms.name}"
            manifest = Manifest.verify(self.dossier.proofs.manifests[terms.name], self.owner)
            digests = manifest.digest().hex(), manifest.weights().hex()
            if digests != (terms.bundle, terms.weights):
                self._no(terms.name, "its manifest is not the one that the contract names")
            for problem in manifest.policy.contract_problems(self.contract):
                self._no(terms.name, problem)
            found[terms.name] = manifest
        return found

    def _releases(
        self,
        shown: Mapping[str, LogUpdate],
        peers: Mapping[str, AttestedPeer],
        manifests: Mapping[str, VerifiedManifest],
    ) -> None:
        for party, peer in peers.items():
            self.at = f"the key releases to {party}"
            wanted = manifests if peer.role == "trainer" else {}
            released = _releases_in(shown[party])
            self._exactly(f"keys released to {party}", released, wanted)
            if len(shown[party].entries) != 1 + len(wanted):
                self._no(party, "the provider's log shows other entries than its own")
            for model, manifest in wanted.items():
                entry = released[model].entry
                facts = _released(peer, model, manifest) | {"expires": entry.facts["expires"]}
                self._entry(party, entry, facts)
                for problem in manifest.policy.enclave_problems(peer.claims):
                    self._no(party, problem)
        count = len(manifests) * (len(peers) - 1)
        self._holds(
            f"{count} weight keys went to attested trainer enclaves, as the release policies allow",
            self.provider.name,
        )

    def _receipts(self, shown: Mapping[str, LogUpdate], peers: Mapping[str, AttestedPeer]) -> None:
        names = {terms.name for terms in self.contract.models}
        for party, by_model in self.dossier.proofs.receipts.items():
            self.at = f"the receipts of {party}"
            if party not in peers or peers[party].role != "trainer":
                raise Refused(f"There are receipts of {party!r}, whose enclave is not proven.")
            self._exactly(f"receipts of {party}", by_model, names)
            released = _releases_in(shown[party])
            for model, data in by_model.items():
                receipt = Receipt.verify(
                    data,
                    signing_public=peers[party].signing_public,
                    contract=self.signed.digest,
                    run_id=self.dossier.run_id,
                    party=party,
                )
                entry = released[model]
                said = receipt.model, receipt.log_index, receipt.log_entry, receipt.bundle
                facts = entry.entry.facts
                if said != (model, entry.index, entry.entry.leaf(), facts["bundle"]):
                    self._no(party, f"its receipt for {model} answers another release")
        self._holds(
            f"{len(self.dossier.proofs.receipts)} trainer enclaves loaded those weights",
            "the trainer enclaves",
        )

    def _views(self, shown: Mapping[str, LogUpdate]) -> None:
        views, receipts = self.dossier.proofs.views, self.dossier.proofs.receipts
        self.at = "the views of the provider's log"
        self._exactly("views of the provider's log", views, receipts)
        keys = self.contract.signing_keys
        for party, data in views.items():
            head = head_in_view(
                data,
                keys.get(party, b""),
                party=party,
                run_id=self.dossier.run_id,
                contract=self.signed.digest,
                owner=self.owner,
                by=self.provider.name,
            )
            if party not in shown or head is None or head.encoded != shown[party].head.encoded:
                self._no(party, "its view of the provider's log is not its own, or of another head")
        self._holds(f"{len(views)} customers were shown one and the same log", "the customers")

    def _ledgers(self) -> None:
        heads = self.dossier.proofs.ledger_heads
        self.at = "the heads of privacy ledgers"
        private = self.contract.privacy.mechanism != "none"
        self._exactly(
            "heads of privacy ledgers", heads, self.dossier.proofs.receipts if private else ()
        )
        for party, data in heads.items():
            self.at = f"the head of the privacy ledger of {party}"
            known = self.contract.party(party)
            if known is None:
                raise Refused(f"There is a ledger's head of {party!r}, a stranger.")
            read_head(data, self.contract, self.dossier.run_id, known, now=datetime.now(UTC))
        if heads:
            self._holds(f"{len(heads)} customers charged their privacy ledgers", "the customers")

    def _sums(self, enclave: bytes, rounds: int) -> list[Summed]:
        contract, self.at = self.contract, "the sums"
        sums = [
            Summed.verify(
                data,
                signing_public=enclave,
                contract=self.signed.digest,
                run_id=self.dossier.run_id,
            )
            for data in self.dossier.proofs.sums
        ]
        numbers = [said.round for said in sums]
        if numbers not in (list(range(rounds + 1)), list(range(rounds + 2))):
            raise Refused(
                "The aggregator enclave's statements are not one of each round, in order."
            )
        for said in sums:
            unknown = set(said.customers) - self.dossier.proofs.receipts.keys()
            few = len(set(said.customers)) < contract.protection.minimum_cohort
            if unknown or (few and (said.customers or canonical.decode(said.figures))):
                self._no(
                    f"round {said.round}", "its sum is not over a cohort that the contract admits"
                )
        self._holds(
            f"{len(sums)} sums over {min(len(s.customers) for s in sums)} to"
            f" {max(len(s.customers) for s in sums)} customers",
            "the aggregator enclave",
        )
        return sums

    def _report(self, sums: list[Summed], curve: Mapping[str, Any]) -> None:
        contract, run_id, self.at = self.contract, self.dossier.run_id, "the report"
        report = read_report(self.dossier.report, self.dossier.report_signature, contract, run_id)
        metrics: list[Any] = []
        for said in sums:
            metrics += canonical.decode(said.figures, max_bytes=_MAX_METRICS)
        privacy = privacy_of(contract)
        expected = {
            "job": contract.job,
            "run_id": run_id,
            "contract": self.signed.digest.hex(),
            "rounds": contract.rounds,
            "curve": curve,
            "protection": protection_of(contract, run_id),
            "privacy": privacy,
            "models": models_of(contract, metrics),
        }
        for name, value in expected.items():
            if report.get(name) != json.loads(json.dumps(value)):
                self.reasons.append(f"the report's {name!r} is not what follows from the proofs")
        self._hosts_word({name: report[name] for name in report if name not in expected})
        self._holds("every figure of the report", "the aggregator enclave")
        for guarantee in privacy.get("guarantees", ()):
            self._holds(
                f"epsilon {guarantee['epsilon']:.3g} at delta {guarantee['delta']:g} for one"
                f" {guarantee['unit']}, against {guarantee['view']}",
                "the contract's terms, accounted again",
            )

    def _hosts_word(self, said: Mapping[str, Any]) -> None:
        """What the aggregator's host adds to a report has its form, and accounts for every customer
        once.
        """
        try:
            word = HostsWord.model_validate(to_tuples(said))
        except ValidationError:
            self.reasons.append("what the aggregator's host adds to the report is malformed")
            return
        everyone = {party.name for party in self.contract.customers}
        known = {*everyone, self.provider.name}
        left = everyone - word.passed_over.keys()
        if sorted(word.customers) != sorted(left) or not word.passed_over.keys() <= known:
            self.reasons.append("the report does not account for every customer once")
        if not set(word.customers) <= self.dossier.proofs.receipts.keys():
            self.reasons.append("the report names customers who loaded no weights")
        refused = {name for name, why in word.passed_over.items() if why.startswith("release: ")}
        if refused != self.dossier.proofs.refused.keys():
            self.reasons.append("the report's refusals are not those of the provider's log")

    def _own(
        self, own: OwnDossier, signature: bytes, peers: Mapping[str, AttestedPeer]
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The customer's figures, and the digests of its personal adapters."""
        self.at = f"the own part of {own.party}"
        check = OwnCheck(own, self.contract, self.dossier, peers)
        figures, personal = check.run(signature)
        self.reasons += check.reasons
        self.proven += [Proven(*one) for one in check.proven]
        return {own.party: figures}, personal

    def _delivered(self, said: Delivered, personal: Mapping[str, bytes]) -> dict[str, bytes]:
        self.at = "the adapters"
        self._exactly("adapters", said.adapters, [terms.name for terms in self.contract.models])
        for model, digest in self.adapters.items():
            if personal.get(model) == digest:
                self._holds(
                    f"the personal adapter for {model} is this job's", "the trainer enclave"
                )
            elif said.adapters.get(model) != digest:
                self._no(model, "the adapter is not the one that was delivered")
            else:
                self._holds(f"the adapter for {model} is this job's", "the aggregator enclave")
        return dict(said.adapters)

    def _measurements(self) -> None:
        for role, registers in self.installed.items():
            named = getattr(self.contract.attestation, role)
            wrong = sorted(name for name in registers if named.get(name) != registers[name])
            if wrong:
                self._no(role, f"this installation measures otherwise: {', '.join(wrong)}")
            else:
                self._holds(f"the {role} enclaves ran what is installed here", "this installation")

    def _trusted(self, peers: Mapping[str, AttestedPeer]) -> tuple[str, ...]:
        simulated = [p.party for p in peers.values() if p.claims.platform == "simulated"]
        lines = []
        if simulated:
            lines.append(
                "Simulated enclaves keep nothing from the root user of their own host. They stand"
                f" at: {', '.join(sorted(simulated))}."
            )
        vendors = {p.claims.platform for p in peers.values()} - {"simulated"}
        if vendors:
            lines.append(f"The platforms keep what they promise: {', '.join(sorted(vendors))}.")
        if not self.installed:
            lines.append(
                "That the measured code is fedark: compare with an installation of your own"
                " (--installed)."
            )
        lines += [
            "Times of the log are by the provider's clock.",
            "Seconds, bytes, memory, and who was passed over and why, are the word of the"
            " aggregator's host.",
            "What a customer's records are, and that its privacy ledger is its only one, is the"
            " customer's own word.",
        ]
        return tuple(lines)

    # -- helpers

    def _holds(self, what: str, by: str) -> None:
        self.proven.append(Proven(what, by))

    def _no(self, subject: str, why: str) -> None:
        self.reasons.append(f"{subject}: {why}")

    def _exactly(self, what: str, found: Any, wanted: Any) -> None:
        missing, more = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        if missing or more:
            parts = [f"missing {', '.join(missing)}"] * bool(missing)
            parts += [f"too many: {', '.join(more)}"] * bool(more)
            raise Refused(f"The dossier's {what} are not those of the job ({'; '.join(parts)}).")

    def _entry(self, party: str, entry: Entry, facts: Mapping[str, Any]) -> None:
        wrong = sorted(name for name in facts if entry.facts[name] != facts[name])
        if wrong:
            self._no(
                party, f"the provider's log says otherwise of its {entry.kind}: {', '.join(wrong)}"
            )


def _admission(peer: AttestedPeer) -> dict[str, Any]:
    return {
        "party": peer.party,
        "run_id": peer.run_id,
        "contract": peer.contract_digest,
        "role": peer.role,
        "platform": peer.claims.platform,
        "evidence": peer.evidence_digest,
        "measurements": canonical.digest(dict(peer.claims.measurements)),
        "signing": peer.signing_public,
    }


def _released(peer: AttestedPeer, model: str, manifest: VerifiedManifest) -> dict[str, Any]:
    return {
        "party": peer.party,
        "run_id": peer.run_id,
        "contract": peer.contract_digest,
        "model": model,
        "bundle": manifest.digest(),
        "policy": manifest.policy.digest(),
        "nonce": peer.nonce,
        "evidence": peer.evidence_digest,
        "kem": peer.kem,
        "recipient": hashlib.sha384(peer.hpke_public).digest(),
    }


def _releases_in(update: LogUpdate) -> dict[str, Shown]:
    return {
        str(shown.entry.facts["model"]): shown
        for shown in update.entries
        if shown.entry.kind == "release"
    }
