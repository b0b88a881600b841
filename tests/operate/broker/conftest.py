"""A provider's folder as `fedark` makes it, its broker behind TLS on loopback, and sessions of
trainers that ask it for keys.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot
from fedark.contract.contract import CONTRACT_LABEL, Contract, SignedContract
from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.vouching import vouch
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.operate.broker.client import BrokerClient
from fedark.operate.broker.keys import KeyBroker, load_broker
from fedark.operate.broker.server import BrokerServer
from fedark.operate.party import DEVICE, reference_values
from fedark.simulation import InProcessEnclave
from fedark.simulation.local import Federation, prepare
from fedark.translog.memory import HeadMemory
from fedark.v1 import broker_pb2 as pb
from fedark.v1 import enclave_pb2

sys.path[:0] = [str(Path(__file__).parents[2] / "stages")]


@dataclass
class World:
    """One provider and its customers, on the disk; everything a caller needs to be honest, or not
    to be.
    """

    federation: Federation
    reference: dict[str, Any]
    certificate: Path
    key: Path
    stack: contextlib.ExitStack
    root: Path
    enclaves: list[InProcessEnclave] = field(default_factory=list)

    @property
    def contract(self) -> Contract:
        return self.federation.contract

    @property
    def manufacturer(self) -> SimulatedRoot:
        """Of the devices, with its key."""
        return SimulatedRoot.load(self.root)

    @property
    def provider(self) -> Path:
        return self.federation.folder("maker")

    def signatures(self, contract: Contract, *but: str) -> dict[str, bytes]:
        names = {contract.provider.name, *(party.name for party in contract.customers)} - set(but)
        return {
            name: (
                PartyKeys.load(self.federation.folder(name) / "party.keys").signing.sign(
                    CONTRACT_LABEL, contract.digest()
                )
            )
            for name in names
        }

    def signed(self, contract: Contract | None = None) -> SignedContract:
        contract = contract or self.contract
        return SignedContract.verify(contract, self.signatures(contract))

    def changed(self, **changes: Any) -> Contract:
        return Contract.build(self.contract.to_map() | changes)

    def enclave(
        self, role: str, party: str, run_id: str = "run-1", contract: Contract | None = None
    ) -> InProcessEnclave:
        config = RunConfig(
            role=role, party=party, contract=contract or self.contract, run_id=run_id
        )
        device = SimulatedDevice.load(self.federation.folder(party) / DEVICE)
        enclave = InProcessEnclave(role, config.encode(), device, self.reference[role])
        vouch(enclave.call, config, self.signing(party))
        return enclave

    def trainer(self, party: str = "north", run_id: str = "run-1") -> InProcessEnclave:
        return self.enclave("trainer", party, run_id)

    def signing(self, party: str = "north") -> SigningKey:
        return PartyKeys.load(self.federation.folder(party) / "party.keys").signing

    def broker(self) -> KeyBroker:
        return load_broker(self.provider)

    def serve(self, broker: KeyBroker | None = None, **options: Any) -> BrokerServer:
        server = BrokerServer(
            broker or self.broker(),
            listen="127.0.0.1:0",
            certificate=self.certificate,
            key=self.key,
            **options,
        )
        return self.stack.enter_context(server)

    def client(self, server: BrokerServer | int, **options: Any) -> BrokerClient:
        port = server if isinstance(server, int) else server.port
        client = BrokerClient(f"127.0.0.1:{port}", roots=self.certificate.read_bytes(), **options)
        return self.stack.enter_context(client)

    def heads(self, party: str = "north") -> HeadMemory:
        return HeadMemory(self.federation.folder(party) / "seen-logs.sqlite")

    def about(self, **changes: Any) -> pb.BrokerCase:
        values: dict[str, Any] = {
            "contract": self.contract.encode(),
            "contract_signatures": self.signatures(self.contract),
            "run_id": "run-1",
            "party": "north",
        }
        return pb.BrokerCase(**values | changes)

    def ask(self, about: pb.BrokerCase | None = None) -> pb.BrokerChallengeRequest:
        return pb.BrokerChallengeRequest(about=about or self.about())

    def evidence(self, enclave: InProcessEnclave, nonce: bytes) -> bytes:
        attest = enclave_pb2.Attest(peer="maker", nonce=nonce)
        return bytes(enclave.call(enclave_pb2.Call(attest=attest)).evidence.evidence)

    def claim(self, evidence: bytes, **changes: Any) -> pb.BrokerReleaseRequest:
        return pb.BrokerReleaseRequest(about=self.about(**changes), evidence=evidence)

    def entries(self) -> list[tuple[str, str]]:
        """Kind and party of what stands in the provider's log."""
        contents = self.broker()._log.verify()
        return [
            (logged.entry.kind, str(logged.entry.facts["party"])) for logged in contents.entries
        ]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contract, dict[str, Any]]:
    from small import write_job

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("broker")
    (folder / "manufacturer").mkdir()

    def root(*, now: datetime) -> SimulatedRoot:
        made = SimulatedRoot(now=now)
        made.save(folder / "manufacturer")
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedark.simulation.local.SimulatedRoot", root)
        federation = prepare(
            Job.load(write_job(folder / "job")),
            folder / "work",
            sandbox="none",
            say=lambda text: None,
        )
    return federation.work, federation.contract, reference_values()


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def certify(tmp_path: Path) -> Callable[[], tuple[Path, Path]]:
    """Makes another server's certificate and key."""
    return lambda: make_certificate(tmp_path)


@pytest.fixture
def world(
    prepared: Any, tls: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    work, contract, reference = prepared
    shutil.copytree(work, tmp_path / "work")
    # What is installed does not change during a test, and measuring it takes a second.
    monkeypatch.setattr("fedark.operate.party.reference_values", lambda: reference)
    with contextlib.ExitStack() as stack:
        yield World(
            Federation(tmp_path / "work", contract, {}),
            reference,
            *tls,
            stack,
            work.parent / "manufacturer",
        )


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    )
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(
        now + timedelta(days=1)
    )
    names = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    )
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    paths = folder / "broker.pem", folder / "broker.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].touch(mode=0o600)
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths
