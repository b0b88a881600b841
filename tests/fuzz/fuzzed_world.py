"""What targets of whole parties share: a federation on the disk, and runs of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recorded import Recorded

from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.vouching import vouch
from fedark.v1 import broker_pb2, enclave_pb2

__all__ = ["World"]


class World:
    """A federation on the disk, with a broker, nodes and enclaves, and one honest grant and
    receipt.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from small import write_job

        from fedark.contract.contract import CONTRACT_LABEL, SignedContract, now
        from fedark.foundation.keys import PartyKeys
        from fedark.operate.broker.keys import load_broker
        from fedark.operate.party import KEYS, WEIGHT_KEYS, load_aggregator, reference_values
        from fedark.simulation import in_process_enclaves
        from fedark.simulation.local import prepare
        from fedark.vault.bundle import SealedBundle
        from fedark.vault.weightkey import KeyStore

        torch.set_num_threads(1)
        self.job_path = write_job(folder / "job", records=12)
        federation = prepare(Job.load(self.job_path), folder / "work", sandbox="none")
        self.contract, self.now = federation.contract, now()
        reference = reference_values()
        keys = {
            name: PartyKeys.load(federation.folder(name) / KEYS)
            for name in ("maker", "north", "east", "south")
        }
        signatures = {
            name: own.signing.sign(CONTRACT_LABEL, self.contract.digest())
            for name, own in keys.items()
        }
        self.provider_keys = keys["maker"]
        self.bundle = SealedBundle.load(
            federation.work / "catalogue" / "tiny.fedark", self.provider_keys.signing.public
        )
        self.weight_key = KeyStore(federation.folder("maker") / WEIGHT_KEYS).get(
            self.bundle.manifest
        )
        self.about = lambda: broker_pb2.BrokerCase(
            contract=self.contract.encode(),
            contract_signatures=signatures,
            run_id="run-1",
            party="north",
        )
        self.broker = load_broker(federation.folder("maker"))
        self.enclaves = {}
        for role, party in (("trainer", "north"), ("aggregator", "pool")):
            config = RunConfig(role=role, party=party, contract=self.contract, run_id="run-1")
            self.enclaves[party] = in_process_enclaves(federation.folder(party), reference)(
                role, config.encode()
            )
            vouch(
                self.enclaves[party].call,
                config,
                PartyKeys.load(federation.folder(party) / KEYS).signing,
            )
        trainer, pool = self.enclaves["north"], self.enclaves["pool"]

        def call(enclave: Any, **body: Any) -> Any:
            return enclave.call(enclave_pb2.Call(**body))

        collateral = {
            path.name: path.read_bytes()
            for path in (federation.folder("pool") / "collateral").iterdir()
        }
        group = b""
        for one, other, peer, me in (
            (trainer, pool, "pool", "north"),
            (pool, trainer, "north", "pool"),
        ):
            nonce = call(one, challenge=enclave_pb2.Challenge(peer=peer)).nonce.nonce
            evidence = call(
                other, attest=enclave_pb2.Attest(peer=me, nonce=nonce)
            ).evidence.evidence
            admit = enclave_pb2.AdmitPeer(
                peer=peer, evidence=evidence, contract_signatures=signatures, collateral=collateral
            )
            group = call(one, admit_peer=admit).admitted.group_grant or group
        nonce = self.broker.challenge(broker_pb2.BrokerChallengeRequest(about=self.about())).nonce
        self.evidence = call(
            trainer, attest=enclave_pb2.Attest(peer="maker", nonce=nonce)
        ).evidence.evidence
        grants = self.broker.release(
            broker_pb2.BrokerReleaseRequest(about=self.about(), evidence=self.evidence)
        )
        self.grants, self.grant = grants, grants.by_model["tiny"]
        manifest = self.bundle.manifest.encode()
        call(
            trainer,
            grant=enclave_pb2.Grant(
                model="tiny", manifest=manifest, grant=self.grant, group_grant=group
            ),
        )
        data = b"".join(bytes(piece) for piece in self.bundle.payload(1 << 20))
        self.receipt = call(
            trainer, sealed=enclave_pb2.Sealed(model="tiny", data=data, last=True)
        ).receipt.receipt
        SignedContract.verify(self.contract, signatures)
        said = enclave_pb2.Reply(nonce=enclave_pb2.Nonce(nonce=bytes(32)))
        shown = enclave_pb2.Reply(evidence=enclave_pb2.Evidence(evidence=self.evidence))
        fakes = lambda role, config, checkpoint=b"": SimpleNamespace(  # noqa: E731
            call=lambda call, **options: shown if call.HasField("attest") else said,
            close=lambda: None,
        )
        untouched = shutil.copytree(
            federation.folder("pool"), federation.folder("pool").with_name("pool-waiting")
        )
        # A contract is for one run, and that of `federation` gave its keys above.
        self.recorded = Recorded(
            prepare(Job.load(self.job_path), folder / "sealed", sandbox="none"), reference
        )
        masks = (
            'protection.mode="masked"',
            "protection.minimum_cohort=3",
            "protection.max_records=12",
        )
        self.recorded_masked = Recorded(
            prepare(Job.load(self.job_path, masks), folder / "masked", sandbox="none"), reference
        )
        self.host = load_aggregator(untouched, self.contract, fakes)
