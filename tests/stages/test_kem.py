"""The contract names one KEM for every key of a run; whoever brings another is refused by name, on
both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from small import HostileRelay, why, write_job

from fedark.attestation.evidence import Evidence
from fedark.contract.job import Job
from fedark.enclave.protection import Delivery, seal_delivery
from fedark.foundation.errors import ContractError, FedarkError, ProtocolError
from fedark.foundation.keys import HYBRID, HpkeKey, PartyKeys, SigningKey
from fedark.operate.party import CONFIG, PartyConfig
from fedark.simulation import Simulation
from fedark.simulation.local import prepare
from fedark.stages.coordinator import coordinate
from fedark.v1 import stage_pb2
from fedark.vault.manifest import ReleasePolicy

PLAIN = '[attestation]\nkem = "x25519"\n'


@pytest.fixture(autouse=True)
def _one_thread(measured_once: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    made: list[Simulation] = []

    def make(extra: str = "", edit: Any = lambda federation: None, rounds: int = 1) -> Simulation:
        job = Job.load(write_job(tmp_path / "job", rounds=rounds, minimum=3, extra=extra))
        federation = prepare(job, tmp_path / "work", sandbox="none")
        edit(federation)
        made.append(Simulation(federation))
        return made[-1]

    yield make
    for simulation in made:
        simulation.close()


@pytest.mark.parametrize(("extra", "kem", "length"), [("", HYBRID, 1216), (PLAIN, "x25519", 32)])
@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_every_key_of_a_run_is_of_the_contracts_kem(
    run: Any, extra: str, kem: str, length: int, mode: str
) -> None:
    simulation = run(f'mode = "{mode}"\n{extra}')
    seen: dict[str, set[int]] = {}

    def alter(party: str, data: bytes, is_reply: bool) -> bytes:
        message = stage_pb2.StageReply() if is_reply else stage_pb2.StageRequest()
        message.ParseFromString(data)
        attest = message.attest if message.HasField("attest") else None
        if attest is not None:
            found = (
                [attest.provider_evidence, attest.aggregator_evidence]
                if is_reply
                else attest.aggregator_evidence.values()
            )
            for evidence in found:
                seen.setdefault(party, set()).add(
                    len(Evidence.decode(evidence).binding.hpke_public)
                )
        return data

    coordinate(HostileRelay(simulation, alter), simulation.host.handle)
    assert seen == {name: {length} for name in ("north", "east", "south")}
    for name in ("maker", "north", "east", "south"):
        folder = simulation.federation.folder(name)
        assert PartyKeys.load(folder / "party.keys").hpke.kem == kem
        assert list(folder.glob("runs/*/adapter-tiny/adapter_model.safetensors")), name


@pytest.mark.attack({"x25519": "KEM downgrade"}, param="offered", mode="in a whole job")
@pytest.mark.parametrize(("role", "party"), [("trainer", "east"), ("aggregator", "pool")])
@pytest.mark.parametrize(("extra", "offered"), [("", "x25519"), (PLAIN, HYBRID)])
def test_an_enclave_that_offers_a_key_of_another_kem_is_refused_by_name(
    run: Any, role: str, party: str, extra: str, offered: Any
) -> None:
    simulation = run(extra)
    host = simulation.host if role == "aggregator" else simulation.nodes[party].settings
    start = simulation.host._start_enclave if role == "aggregator" else host.start_enclave

    def impostor(role: str, config: bytes, checkpoint: bytes = b"") -> Any:
        enclave = start(role, config, checkpoint)
        enclave._session._hpke = HpkeKey(kem=offered)
        return enclave

    if role == "aggregator":
        simulation.host._start_enclave = impostor
    else:
        object.__setattr__(host, "start_enclave", impostor)
    said = outcome(simulation)
    assert (
        f"its key is of the KEM {offered}, the contract names {'x25519' if extra else HYBRID}"
        in said
    )


def test_a_party_that_does_not_accept_plain_x25519_does_not_sign_for_it(run: Any) -> None:
    def edit(federation: Any) -> None:
        folder = federation.folder("north")
        config = PartyConfig.read(folder).model_dump(mode="json", exclude_none=True) | {
            "kem": [HYBRID]
        }
        (folder / CONFIG).write_text(tomli_w.dumps(config))

    said = outcome(run(PLAIN, edit))
    assert (
        "north: contract of job small: 1 problem\n  - its KEM x25519 is not accepted here"
        f" ({HYBRID})" in said
    )


def test_a_provider_does_not_sign_a_contract_whose_kem_its_release_policy_does_not_name(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*, kem: Any, **terms: Any) -> ReleasePolicy:
        return ReleasePolicy(**terms)

    monkeypatch.setattr("fedark.operate.offer.ReleasePolicy", silent)
    said = outcome(run(PLAIN))
    assert f"model tiny: the KEM x25519 is not one that the provider allows ({HYBRID})" in said


def test_no_delivery_is_sealed_to_a_key_of_another_kem() -> None:
    with pytest.raises(ProtocolError, match="not the 1216 of mlkem768-x25519"):
        seal_delivery(
            Delivery({}, b""),
            contract=bytes(48),
            run_id="run-1",
            party="north",
            hpke_public=HpkeKey(kem="x25519").public,
            kem=HYBRID,
            signer=SigningKey(),
            base=bytes(48),
        )


def test_a_job_file_names_no_other_kem(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"attestation\.kem"):
        Job.load(write_job(tmp_path / "job", extra='[attestation]\nkem = "p256"\n'))


def outcome(simulation: Simulation) -> str:
    try:
        report = simulation.run()
    except FedarkError as error:
        return why(error)
    return str(report["passed_over"])
