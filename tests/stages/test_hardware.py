"""A whole job whose enclaves run in confidential guests, one of each vendor (of our own), and every
party appraises them in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from attacks import refusing
from small import why, write_job
from vendors import SNP_TCB, Authority, NitroMaker, SnpMaker, TdxMaker

from fedark.attestation.guest import Guest
from fedark.attestation.platforms.nitro import NitroVerifier
from fedark.attestation.platforms.sev_snp import SevSnpVerifier, SnpTcb
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.attestation.trust import SNP_CRL, TDX_COLLATERAL
from fedark.bench._lies import lies, signed
from fedark.contract.contract import CONTRACT_LABEL, now
from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.vouching import vouch
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, FedarkError, Refused
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import PartyKeys
from fedark.operate.party import COLLATERAL, KEYS, POLICY, reference_values
from fedark.report.verify import DossierRefused, verify_dossier
from fedark.simulation import InProcessEnclave, Simulation
from fedark.simulation.local import prepare
from fedark.stages.dossier import DOSSIER
from fedark.stages.node import LOG
from fedark.translog.log import read_log
from fedark.v1 import enclave_pb2 as pb

MACHINES = {"pool": "tdx", "north": "sev-snp", "east": "nitro", "south": "tdx"}
REGISTERS = {
    "nitro": ("pcr0", "pcr1", "pcr2"),
    "sev-snp": ("measurement",),
    "tdx": ("mrtd", "rtmr0", "rtmr1", "rtmr2"),
}


class World:
    """Vendors, a prepared federation, and how each party's machine answers."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(now())
        self.intel, self.amd, self.aws = (
            TdxMaker(authority),
            SnpMaker(authority),
            NitroMaker(authority),
        )
        self.quoted: dict[str, dict[str, Any]] = {}
        self.collateral = {TDX_COLLATERAL: self.intel.collateral(), SNP_CRL: self.amd.crl()}
        self.folder = folder

    def job(self, **hardware: Any) -> Job:
        makers = {"nitro": self.aws, "sev-snp": self.amd, "tdx": self.intel}
        image = {}
        for platform, maker in makers.items():
            claims = maker.verifier().verify(
                self.quote(platform, "", bytes(64), bytes(32)), now=now()
            )
            image |= {
                f"{platform}.{name}": claims.measurements[name].hex()
                for name in REGISTERS[platform]
            }
        tcb = {part: getattr(SNP_TCB, part) for part in ("bootloader", "tee", "snp", "microcode")}
        tables: dict[str, Any] = {
            "nitro": {},
            "sev-snp": {"minimum_tcb": {"Milan": tcb}},
            "tdx": {},
        }
        tables = {
            name: {"sandbox": "none", **table, **hardware.get(name, {})}
            for name, table in tables.items()
        }
        spec = {
            "platforms": sorted(makers),
            "hardware": tables,
            "trainer": image,
            "aggregator": image,
        }
        return Job.load(
            write_job(self.folder / "job", rounds=1, extra=tomli_w.dumps({"attestation": spec}))
        )

    def quote(self, platform: str, party: str, report_data: bytes, nonce: bytes) -> bytes:
        bent = {"report_data": report_data, **self.quoted.get(party, {})}
        match platform:
            case "nitro":
                return self.aws.quote(**{"nonce": nonce, **bent})
            case "sev-snp":
                return self.amd.quote(**bent)
        return self.intel.quote(**bent)

    def machine(self, party: str) -> Guest:
        platform = MACHINES[party]
        answer = SimpleNamespace(
            platform=platform, quote=lambda data, nonce: self.quote(platform, party, data, nonce)
        )
        return Guest(answer)

    def prepare(self, **hardware: Any) -> Any:
        federation = prepare(self.job(**hardware), self.folder / "work", sandbox="none")
        for party in ("maker", *MACHINES):
            for name, data in self.collateral.items():
                write_atomic(federation.folder(party) / COLLATERAL / name, data)
        return federation


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured_once: None) -> World:
    torch.set_num_threads(1)
    made = World(tmp_path)
    monkeypatch.setitem(TdxVerifier.__init__.__kwdefaults__, "root_key", made.intel.root.point)
    monkeypatch.setitem(SevSnpVerifier.__init__.__kwdefaults__, "roots", made.amd.roots)
    monkeypatch.setitem(NitroVerifier.__init__.__kwdefaults__, "root_sha256", made.aws.root.sha256)
    monkeypatch.setattr("fedark.simulation.load_machine", lambda folder: made.machine(folder.name))
    return made


@pytest.fixture
def run(world: World) -> Iterator[Callable[..., str]]:
    """Runs the job; all that is said about its end."""
    made: list[Simulation] = []

    def go(federation: Any = None) -> str:
        made.append(Simulation(federation or world.prepare()))
        try:
            report = made[-1].run()
        except FedarkError as error:
            return why(error)
        return str(report["passed_over"]) if report["passed_over"] else "done"

    yield go
    for simulation in made:
        simulation.close()


def test_enclaves_on_three_vendors_hardware_are_admitted_by_all_who_must_and_the_job_is_done(
    world: World, run: Any
) -> None:
    federation = world.prepare()
    assert run(federation) == "done"
    log = read_log(
        federation.folder("maker") / LOG, bytes.fromhex(federation.contract.provider.signing_key)
    )
    admitted = [one.entry.facts for one in log.entries if one.entry.kind == "attestation"]
    assert {facts["party"]: facts["platform"] for facts in admitted} == MACHINES
    for party in ("maker", "north", "east", "south"):
        assert list(
            federation.folder(party).glob("runs/*/adapter-tiny/adapter_model.safetensors")
        ), party


def test_a_dossier_of_hardware_enclaves_is_appraised_again_by_the_vendors_roots(
    world: World, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = world.prepare()
    assert run(federation) == "done"
    (path,) = (federation.folder("maker") / "runs").glob(f"*/{DOSSIER}")
    data = path.read_bytes()
    verified = verify_dossier(data)
    said = [f"{proven.what} ({proven.by})" for proven in verified.proven]
    assert any("4 enclaves" in one and "(nitro, sev-snp, tdx)" in one for one in said)
    assert "The platforms keep what they promise: nitro, sev-snp, tdx." in verified.trusted
    assert not any("Simulated" in line for line in verified.trusted)
    key = PartyKeys.load(federation.folder("pool") / KEYS).signing
    for lie in lies(canonical.decode(data, max_bytes=1 << 28)["body"]):
        if lie.path[0] == "collateral" or lie.path[:2] == ("proofs", "evidence"):
            with pytest.raises(DossierRefused):
                verify_dossier(signed(key, lie.body))
    monkeypatch.undo()  # the roots that fedark pins
    with pytest.raises(DossierRefused, match=r"evidence of|collateral"):
        verify_dossier(data)


def test_keys_between_hardware_enclaves_are_agreed_under_masks_too(world: World, run: Any) -> None:
    job = world.job()
    text = job.path.read_text().replace("minimum_cohort = 2", 'minimum_cohort = 3\nmode = "masked"')
    job.path.write_text(text)
    federation = prepare(Job.load(job.path), world.folder / "work", sandbox="none")
    for party in ("maker", *MACHINES):
        for name, data in world.collateral.items():
            write_atomic(federation.folder(party) / COLLATERAL / name, data)
    assert run(federation) == "done"


OLD = SnpTcb(bootloader=4, tee=0, snp=21, microcode=213)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "an SNP guest launched at an old TCB": (
        "north",
        {"launch": OLD},
        "The launch TCB is older than the minimum: snp",
    ),
    "an SNP guest in debug mode": (
        "north",
        {"policy": 1 << 19 | 1 << 17 | 1 << 16},
        "it runs in debug mode",
    ),
    "an SNP report from another VMPL": ("north", {"vmpl": 2}, "asked for at VMPL 2"),
    "a Nitro enclave of another image": (
        "east",
        {"pcrs": dict.fromkeys(range(4), b"x" * 48)},
        "register nitro.pcr0 is 7878",
    ),
    "a Nitro enclave in debug mode": (
        "east",
        {"pcrs": {index: bytes(48) for index in range(4)}},
        "it runs in debug mode",
    ),
    "a Nitro document for another nonce": (
        "east",
        {"nonce": bytes(32)},
        "its token was made for another nonce",
    ),
    "a TDX guest in debug mode": ("south", {"attributes": 1 << 28 | 1}, "it runs in debug mode"),
    "a TDX quoting enclave out of date": (
        "south",
        {"isvsvn": 3},
        "The platform's TCB is OutOfDate",
    ),
    "a TDX aggregator out of date": ("pool", {"isvsvn": 3}, "The platform's TCB is OutOfDate"),
}


@pytest.mark.attack("hardware below the contract's terms", mode="in a whole job")
@pytest.mark.parametrize("case", CASES)
def test_gets_neither_key_nor_record(case: str, world: World, run: Any, refusal: Any) -> None:
    party, bent, reason = CASES[case]
    federation = world.prepare()
    world.quoted[party] = bent
    said = run(federation)
    assert (
        f"Evidence of the {'aggregator' if party == 'pool' else 'trainer'} of {party} was refused"
        in said
    )
    assert reason in said
    refusal(f"EvidenceRefused: {reason}")


def test_a_revoked_amd_certificate_refuses_the_trainer_and_so_does_a_list_that_is_kept_back(
    world: World, run: Any
) -> None:
    world.collateral[SNP_CRL] = world.amd.crl(world.amd.ask.cert)
    assert "The certificate SEV-Milan was revoked." in run()
    del world.collateral[SNP_CRL]
    federation = world.prepare()
    for kept in federation.work.rglob(SNP_CRL):
        kept.unlink()
    assert "There is no revocation list of the issuer of the ASK certificate" in run(federation)


def test_a_node_whose_own_policy_is_stricter_does_not_sign(world: World, run: Any) -> None:
    federation = world.prepare()
    path = federation.folder("north") / POLICY
    path.write_text(path.read_text().replace("minimum_evaluation = 0", "minimum_evaluation = 18"))
    assert "beside the policy of north, tdx: minimum_evaluation 0 is below 18" in run(federation)


def test_a_contract_with_a_sandbox_policy_that_a_node_does_not_know_is_not_signed(
    world: World, run: Any
) -> None:
    federation = world.prepare()
    path = federation.folder("east") / POLICY
    text = path.read_text()
    known = federation.contract.attestation.policies["namespaces"].seccomp[0]
    path.write_text(text.replace(known, "00" * 48))
    assert (
        f"its seccomp policy {known[:16]}... of sandbox mode 'namespaces' is not one that east has"
        in run(federation)
    )


class Pair:
    """A trainer and an aggregator enclave of one run, with nobody between them who could refuse
    first.
    """

    def __init__(self, world: World, **hardware: Any) -> None:
        self.federation, measured = world.prepare(**hardware), reference_values()
        contract = self.federation.contract
        self.signatures = {
            name: (
                PartyKeys.load(self.federation.folder(name) / KEYS).signing.sign(
                    CONTRACT_LABEL, contract.digest()
                )
            )
            for name in ("maker", "north", "east", "south")
        }
        self.enclaves: dict[str, InProcessEnclave] = {}
        for role, party in (("trainer", "north"), ("aggregator", "pool")):
            config = RunConfig(role=role, party=party, contract=contract, run_id="run-1")
            self.enclaves[party] = InProcessEnclave(
                role, config.encode(), world.machine(party), measured[role]
            )
            vouch(
                self.enclaves[party].call,
                config,
                PartyKeys.load(self.federation.folder(party) / KEYS).signing,
            )

    def admit(self, verifier: str, peer: str, collateral: dict[str, bytes]) -> pb.Reply:
        """`verifier`'s enclave appraises `peer`'s by the contract and this collateral."""
        nonce = self.enclaves[verifier].call(pb.Call(challenge=pb.Challenge(peer=peer))).nonce.nonce
        attest = pb.Call(attest=pb.Attest(peer=verifier, nonce=nonce))
        evidence = self.enclaves[peer].call(attest).evidence.evidence
        admit = pb.AdmitPeer(
            peer=peer, evidence=evidence, contract_signatures=self.signatures, collateral=collateral
        )
        return self.enclaves[verifier].call(pb.Call(admit_peer=admit))


def test_each_enclave_appraises_the_others_hardware_by_the_contract_alone(world: World) -> None:
    pair = Pair(world)
    assert pair.admit("north", "pool", world.collateral).HasField("admitted")
    assert pair.admit("pool", "north", world.collateral).admitted.group_grant


@pytest.mark.attack("hardware below the contract's terms", mode="inside an enclave")
def test_an_enclave_refuses_hardware_below_the_contracts_terms_though_its_host_does_not(
    world: World,
) -> None:
    floor = {"bootloader": 4, "tee": 0, "snp": 23, "microcode": 213}
    pair = Pair(
        world, **{"sev-snp": {"minimum_tcb": {"Milan": floor}}, "tdx": {"minimum_evaluation": 18}}
    )
    with refusing(), pytest.raises(Refused, match="evaluation 17, older than 18"):
        pair.admit("north", "pool", world.collateral)
    with refusing(), pytest.raises(Refused, match="TCB is older than the minimum: snp"):
        pair.admit("pool", "north", world.collateral)


def test_an_enclave_whose_host_brings_no_collateral_admits_nobody_who_needs_it(
    world: World,
) -> None:
    pair = Pair(world)
    with pytest.raises(Refused, match="evidence of platform 'tdx' cannot be verified here"):
        pair.admit("north", "pool", {})
    with pytest.raises(Refused, match="no revocation list"):
        pair.admit("pool", "north", {})


def test_a_hardware_platform_without_terms_makes_no_contract(world: World) -> None:
    job = world.job()
    text = job.path.read_text().replace(
        'platforms = [\n    "nitro"', 'platforms = [\n    "simulated",\n    "nitro"'
    )
    start = text.index("[attestation.hardware.tdx]")
    job.path.write_text(text[:start] + text[text.index("[attestation.trainer]") :])
    with pytest.raises(ContractError, match="platform 'tdx' is admitted without its terms"):
        prepare(Job.load(job.path), world.folder / "work", sandbox="none")
