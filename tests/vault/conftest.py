"""One provider, one small sealed model, and real attested trainers of two customers under one
signed contract.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fedark.vault.bundle as bundle_module
from fedark.attestation.binding import HOST_LABEL, KeyBinding
from fedark.attestation.claims import SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.simulated import (
    SimulatedAttester,
    SimulatedRoot,
    SimulatedVerifier,
)
from fedark.contract.contract import CONTRACT_LABEL, Contract, SignedContract
from fedark.foundation.keys import HYBRID, HpkeKey, Kem, PartyKeys, SigningKey
from fedark.translog.log import TransparencyLog
from fedark.vault.bundle import SealedBundle, seal
from fedark.vault.manifest import ModelCard, ReleasePolicy, VerifiedManifest
from fedark.vault.release import Accepted, accept, release
from fedark.vault.weightkey import WeightKey

NOW = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)
CARD = ModelCard(name="grid-base", title="Grid base", licence="Apache-2.0", task="classification")
POLICY = ReleasePolicy(
    expires=(NOW + timedelta(days=300)).isoformat(), platforms=("simulated",), minimum_cohort=2
)


def write_model(folder: Path, *, weights: int = 20_000) -> Path:
    """A model directory as `transformers` lays it out, with random weights."""
    folder.mkdir(parents=True)
    save_file(
        {"encoder.weight": np.frombuffer(os.urandom(weights), dtype=np.uint8)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\nload\n", encoding="utf-8")
    (folder / "merges.txt").touch()  # a file of no bytes
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "README.md").write_text("about", encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, **options: write_model(tmp_path / name, **options)


@pytest.fixture
def terms() -> dict[str, Any]:
    """Card and policy, as `seal` takes them."""
    return {"card": CARD, "policy": POLICY}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of 1 KiB, so that a small model has many."""
    monkeypatch.setattr(bundle_module, "CHUNK", 1024)
    return 1024


@dataclass
class Trainer:
    """An enclave's secrets, and what a gate made of its evidence."""

    hpke: HpkeKey
    signing: SigningKey
    peer: AttestedPeer


@dataclass
class World:
    """Everything that one release needs; every part can be replaced."""

    folder: Path
    keys: PartyKeys
    bundle: SealedBundle
    key: WeightKey
    signed: SignedContract
    root: SimulatedRoot
    registers: dict[str, bytes]
    log: TransparencyLog
    customers: dict[str, PartyKeys] = field(default_factory=dict)
    now: datetime = NOW

    @property
    def manifest(self) -> VerifiedManifest:
        return self.bundle.manifest

    def sign(self, contract: Contract) -> SignedContract:
        everyone = self.customers | {"provider": self.keys}
        signers = {
            name: keys.signing.sign(CONTRACT_LABEL, contract.digest())
            for name, keys in everyone.items()
        }
        return SignedContract.verify(contract, signers)

    def changed_contract(self, **changes: Any) -> SignedContract:
        return self.sign(Contract.build(self.signed.contract.to_map() | changes))

    def trainer(
        self,
        party: str = "north",
        *,
        run_id: str = "run-1",
        role: str = "trainer",
        sandbox: str = "namespaces",
        svn: int = 1,
        contract: SignedContract | None = None,
        kem: Kem = HYBRID,
    ) -> Trainer:
        """A real enclave key pair that went through a real gate."""
        contract = contract or self.signed
        hpke, signing = HpkeKey(kem=kem), SigningKey()
        gate = Gate(
            terms=contract.contract.attestation.model_copy(
                update={"sandbox": "none", "minimum_svn": 0}
            ),
            contract_digest=contract.digest,
            run_id=run_id,
            verifiers={
                "simulated": SimulatedVerifier(self.root.certificate, self.root.crl(now=NOW))
            },
            nonces=NonceBook(),
            hosts={party: signing.public},
        )
        nonce = gate.challenge(role, party, now=NOW)
        binding = KeyBinding(
            nonce, hpke.public, signing.public, contract.digest, run_id, role, party
        )
        facts = (
            SandboxFacts(sandbox)
            if sandbox == "none"
            else SandboxFacts(sandbox, b"s" * 48, b"l" * 48)
        )
        attester = SimulatedAttester(
            self.root.issue(now=NOW),
            measurements=self.registers,
            sandbox=facts,
            svn=svn,
            clock=lambda: NOW,
        )
        host = signing.sign(HOST_LABEL, binding.host_statement())
        evidence = Evidence(
            "simulated", attester.quote(binding.report_data(), nonce), binding, host
        ).encode()
        peer = gate.admit(
            evidence, role=role, party=party, run_config_digest=self.registers["runconfig"], now=NOW
        )
        return Trainer(hpke, signing, peer)

    def release(self, trainer: Trainer, **changes: Any) -> bytes:
        values: dict[str, Any] = {
            "contract": self.signed,
            "model": "grid",
            "provider": self.keys.signing,
            "log": self.log,
            "now": NOW,
        }
        key, manifest = changes.pop("key", self.key), changes.pop("manifest", self.manifest)
        return release(key, manifest, trainer.peer, **values | changes)

    def accept(self, grant: bytes, trainer: Trainer, **changes: Any) -> Accepted:
        values: dict[str, Any] = {
            "hpke": trainer.hpke,
            "manifest": self.manifest,
            "contract": self.signed.contract,
            "model": "grid",
            "run_id": "run-1",
            "party": trainer.peer.party,
            "nonce": trainer.peer.nonce,
            "evidence": trainer.peer.evidence_digest,
            "now": NOW,
        }
        return accept(grant, **values | changes)


@pytest.fixture
def make_bundle(tmp_path: Path, small_chunks: int) -> Callable[..., tuple[SealedBundle, WeightKey]]:
    """Seals a fresh small model under a given provider."""

    def make(name: str, provider: SigningKey, **options: Any) -> tuple[SealedBundle, WeightKey]:
        model = write_model(tmp_path / f"{name}-model", weights=options.pop("weights", 20_000))
        _, key = seal(
            model,
            tmp_path / f"{name}.fedark",
            provider=provider,
            **{"card": CARD, "policy": POLICY} | options,
        )
        return SealedBundle.load(tmp_path / f"{name}.fedark", provider.public), key

    return make


@pytest.fixture
def world(tmp_path: Path, make_bundle: Callable[..., tuple[SealedBundle, WeightKey]]) -> World:
    keys, customers = PartyKeys(), {name: PartyKeys() for name in ("north", "south")}
    bundle, key = make_bundle("first", keys.signing)
    root = SimulatedRoot(now=NOW)
    registers = {
        name: os.urandom(48) for name in ("launcher", "runtime", "application", "runconfig")
    }
    reference = {name: value.hex() for name, value in registers.items() if name != "runconfig"}
    parties = [("provider", "provider", keys), ("host", "aggregator", PartyKeys())]
    parties += [(name, "customer", own) for name, own in customers.items()]
    contract = Contract.build(
        {
            "job": "grid",
            "created": (NOW - timedelta(hours=1)).isoformat(),
            "expires": (NOW + timedelta(days=7)).isoformat(),
            "rounds": 3,
            "parties": [
                {
                    "name": name,
                    "role": role,
                    "signing_key": own.signing.public.hex(),
                    "hpke_key": own.hpke.public.hex(),
                }
                for name, role, own in parties
            ],
            "models": [
                {
                    "name": name,
                    "task": "classification",
                    "bundle": digest,
                    "weights": bundle.manifest.weights().hex(),
                    "prompt": "{text}",
                    "labels": ["load", "trip"],
                    "adapter": {},
                    "training": {},
                    "server": {},
                    "layout": [{"name": "head.bias", "shape": [2], "travels": True}],
                }
                for name, digest in (("grid", bundle.manifest.digest().hex()), ("other", "00" * 48))
            ],
            "attestation": {
                "platforms": ["simulated"],
                "simulated_root": root.sha256,
                "policies": {
                    mode: {"seccomp": [(b"s" * 48).hex()], "landlock": [(b"l" * 48).hex()]}
                    for mode in ("namespaces", "landlock")
                },
                "trainer": reference,
                "aggregator": reference,
            },
            "protection": {"minimum_cohort": 2},
            "privacy": {},
            "evaluation": {},
            "deliver_to": ["north"],
        }
    )
    signers = {
        name: own.signing.sign(CONTRACT_LABEL, contract.digest())
        for name, own in (customers | {"provider": keys}).items()
    }
    signed = SignedContract.verify(contract, signers)
    log = TransparencyLog(tmp_path / "log.sqlite", keys.signing)
    return World(tmp_path, keys, bundle, key, signed, root, registers, log, customers)
