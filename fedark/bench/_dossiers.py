"""Dossiers of any number of customers, at the cost of their signatures alone.

Terms, model, bundle, sums and figures are those of a real run of three customers. Every customer,
its keys, its enclave's evidence, log entries, grant, receipt and view are made anew, by the
functions that a run uses: whoever verifies has all of it to check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fedark.attestation.binding import HOST_LABEL, NONCE_BYTES, KeyBinding
from fedark.attestation.claims import RUN_CONFIG, SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT, verifiers
from fedark.bench._small import small_job
from fedark.contract.contract import CONTRACT_LABEL, Contract, Party, SignedContract, now
from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.statements import Delivered, Summed
from fedark.foundation import canonical
from fedark.foundation.keys import HpkeKey, PartyKeys, SigningKey
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER, Dossier, Proofs, sign_dossier
from fedark.stages.report import models_of, protection_of, sign_report
from fedark.translog.entry import Entry, Fact
from fedark.translog.log import TransparencyLog
from fedark.translog.update import make_update
from fedark.translog.view import sign_view
from fedark.vault.bundle import SealedBundle, find_bundle
from fedark.vault.opener import open_to_memory
from fedark.vault.release import Receipt, accept, logged_as, release
from fedark.vault.weightkey import KeyStore, WeightKey

__all__ = ["MODES", "Run", "enlarged", "run"]

MODES = MappingProxyType(
    {
        "sealed": (),
        "masked": (),
        "private": (
            'privacy.mechanism="example-distributed"',
            "privacy.epsilon=8.0",
            "privacy.records=90",
            "privacy.sampling_rate=0.5",
            "privacy.accept_noise=true",
        ),
    }
)


@dataclass(frozen=True)
class Run:
    """A run that ended well on this machine, whose keys are all at hand.

    Attributes:
        dossier: the file.
        bundle, weight_key: of its model.
    """

    dossier: bytes
    provider: PartyKeys
    aggregator: PartyKeys
    bundle: SealedBundle
    weight_key: WeightKey


def run(folder: Path, mode: str) -> Run:
    """Run a small job of three customers in `folder`."""
    path = small_job(folder / "job", rounds=2, mode="sealed" if mode == "sealed" else "masked")
    with simulate(Job.load(path, MODES[mode]), folder / "work") as running:
        running.run()
        parties = running.federation.folder("maker"), running.federation.folder("pool")
        contract, run_id = running.federation.contract, running.run_id
    keys = [PartyKeys.load(party / "party.keys") for party in parties]
    public = keys[0].signing.public
    bundle = find_bundle(folder / "work" / "catalogue", contract.models[0].bundle, public)
    assert bundle is not None
    weights = KeyStore(parties[0] / "weight-keys").get(bundle.manifest)
    data = (parties[0] / "runs" / run_id / DOSSIER).read_bytes()
    return Run(data, keys[0], keys[1], bundle, weights)


def enlarged(of: Run, customers: int, log: Path) -> bytes:
    """A dossier of as many customers, with the terms and figures of `of`, without a privacy ledger.

    Args:
        log: a new file, for the provider's log.
    """
    return _Larger(of, customers, log).dossier()


class _Larger:
    def __init__(self, of: Run, customers: int, log: Path) -> None:
        self._of, self._real = of, Dossier.read(of.dossier)
        root = SimulatedRoot(now=now())
        self._keys = {f"c{number:04d}": PartyKeys() for number in range(customers)}
        former = Contract.decode(self._real.contract)
        both = (former.provider, former.aggregator)
        terms = former.attestation.model_copy(update={"simulated_root": root.sha256})
        larger = former.model_copy(
            update={
                "parties": (*both, *(_party(name, own) for name, own in self._keys.items())),
                "attestation": terms,
                "deliver_to": (former.provider.name,),
            }
        )
        self._contract = contract = Contract.decode(larger.encode())
        self._keys |= {former.provider.name: of.provider, former.aggregator.name: of.aggregator}
        self._signed = SignedContract.verify(
            contract,
            {
                name: own.signing.sign(CONTRACT_LABEL, contract.digest())
                for name, own in self._keys.items()
                if name != former.aggregator.name
            },
        )
        self._collateral = {SIMULATED_ROOT: root.certificate, SIMULATED_CRL: root.crl(now=now())}
        self._device = root.issue(now=now())
        self._log = TransparencyLog(log, of.provider.signing)
        self._gate = Gate(
            terms=terms,
            contract_digest=contract.digest(),
            run_id=self._real.run_id,
            verifiers=verifiers(terms, self._collateral),
            nonces=NonceBook(),
            hosts=contract.signing_keys,
        )

    def dossier(self) -> bytes:
        contract, run_id = self._contract, self._real.run_id
        names = [party.name for party in contract.customers]
        places: dict[str, list[int]] = {}
        evidence, receipts = {}, {}
        signing = SigningKey()
        evidence[contract.aggregator.name], _ = self._admitted(
            contract.aggregator.name, "aggregator", signing, HpkeKey(), places
        )
        for name in names:
            own, hpke = SigningKey(), HpkeKey()
            evidence[name], peer = self._admitted(name, "trainer", own, hpke, places)
            receipts[name] = {contract.models[0].name: self._receipt(peer, own, hpke, places[name])}
        head, owner = self._log.head(), self._of.provider.signing
        shown = {
            name: make_update(
                self._log, owner, party=name, run_id=run_id, head=head, since=None, indexes=found
            )
            for name, found in places.items()
        }
        views = {
            name: sign_view(
                self._keys[name].signing,
                party=name,
                run_id=run_id,
                contract=contract.digest(),
                head=head,
            )
            for name in names
        }
        report = self._report(names)
        whole = Dossier(
            contract=contract.encode(),
            run_id=run_id,
            collateral=self._collateral,
            proofs=Proofs.none().model_copy(
                update={
                    "signatures": dict(self._signed.signatures),
                    "evidence": evidence,
                    "log": shown,
                    "manifests": self._real.proofs.manifests,
                    "receipts": receipts,
                    "views": views,
                    "sums": [
                        said.model_copy(
                            update={"contract": contract.digest(), "customers": names}
                        ).sign(signing)
                        for said in self._sums()
                    ],
                }
            ),
            delivered=self._delivered()
            .model_copy(update={"contract": contract.digest()})
            .sign(signing),
            report=report,
            report_signature=sign_report(
                self._of.aggregator.signing, report, contract.digest(), run_id
            ),
        )
        return sign_dossier(self._of.aggregator.signing, whole.encode(), contract.encode(), run_id)

    def _admitted(
        self, name: str, role: str, signing: SigningKey, hpke: HpkeKey, places: dict[str, list[int]]
    ) -> tuple[bytes, AttestedPeer]:
        """Evidence of an enclave, appraised and logged as a provider does."""
        contract, run_id = self._contract, self._real.run_id
        config = RunConfig(role=role, party=name, contract=contract, run_id=run_id)
        named: dict[str, str] = getattr(contract.attestation, role)
        registers = {key: bytes.fromhex(value) for key, value in named.items()}
        attester = self._device.attester(
            measurements={**registers, RUN_CONFIG: config.register()}, sandbox=SandboxFacts.none()
        )
        nonce = self._gate.challenge(role, name, now=now())
        assert len(nonce) == NONCE_BYTES
        binding = KeyBinding(
            nonce, hpke.public, signing.public, contract.digest(), run_id, role, name
        )
        host = self._keys[name].signing.sign(HOST_LABEL, binding.host_statement())
        token = attester.quote(binding.report_data(), nonce)
        data = Evidence(attester.platform, token, binding, host).encode()
        peer = self._gate.admit(
            data, role=role, party=name, run_config_digest=config.register(), now=now()
        )
        facts: dict[str, Fact] = {
            "party": name,
            "run_id": run_id,
            "contract": contract.digest(),
            "role": role,
            "platform": peer.claims.platform,
            "evidence": peer.evidence_digest,
            "measurements": canonical.digest(dict(peer.claims.measurements)),
            "signing": peer.signing_public,
        }
        entry = Entry("attestation", int(now().timestamp()), facts)
        places[name] = [self._log.append(entry).index]
        return data, peer

    def _receipt(
        self, peer: AttestedPeer, signing: SigningKey, hpke: HpkeKey, places: list[int]
    ) -> bytes:
        """A key released, accepted, and used to open the bundle."""
        model, manifest = self._contract.models[0].name, self._of.bundle.manifest
        grant = release(
            self._of.weight_key,
            manifest,
            peer,
            contract=self._signed,
            model=model,
            provider=self._of.provider.signing,
            log=self._log,
            now=now(),
        )
        places.append(logged_as(grant, self._of.provider.signing.public)[0])
        accepted = accept(
            grant,
            hpke=hpke,
            manifest=manifest,
            contract=self._contract,
            model=model,
            run_id=peer.run_id,
            party=peer.party,
            nonce=peer.nonce,
            evidence=peer.evidence_digest,
            now=now(),
        )
        _, opened = open_to_memory(manifest, accepted.key, self._of.bundle.payload())
        return Receipt.make(accepted, opened, signing, now=now())

    def _sums(self) -> Iterator[Summed]:
        for data in self._real.proofs.sums:
            yield Summed.decode(canonical.decode(data)["body"])

    def _delivered(self) -> Delivered:
        return Delivered.decode(canonical.decode(self._real.delivered)["body"])

    def _report(self, names: list[str]) -> bytes:
        contract, metrics = self._contract, []
        for said in self._sums():
            metrics += canonical.decode(said.figures)
        report = json.loads(self._real.report) | {
            "contract": contract.digest().hex(),
            "customers": names,
            "protection": protection_of(contract, self._real.run_id),
            "models": models_of(contract, metrics),
        }
        return json.dumps(report).encode()


def _party(name: str, keys: PartyKeys) -> Party:
    return Party(
        name=name,
        role="customer",
        signing_key=keys.signing.public.hex(),
        hpke_key=keys.hpke.public.hex(),
    )
