"""Hardware evidence at the gate: TDX quotes of an Intel of our own, bound to an enclave's keys, under a contract and a policy."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.binding import KeyBinding
from fedark.attestation.claims import Claims
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.attestation.policy import ImageMeasured
from fedark.attestation.trust import SNP_CERTIFICATE, TDX_COLLATERAL, verifiers
from fedark.contract import AttestationTerms
from fedark.errors import EvidenceRefused
from fedark.keys import HpkeKey, SigningKey

CONTRACT = b"c" * 48
HPKE, SIGNING = HpkeKey().public, SigningKey().public


@pytest.fixture
def reference(maker: Any) -> dict[str, str]:
    claims = maker.verifier().verify(maker.quote(), now=maker.now)
    return {f"tdx.{name}": claims.measurements[name].hex() for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2")}


@pytest.fixture
def terms(reference: dict[str, str]) -> Callable[..., AttestationTerms]:
    def make(**changes: Any) -> AttestationTerms:
        values: dict[str, Any] = {"platforms": ("tdx",), "sandbox": "none", "trainer": reference, "aggregator": {}}
        return AttestationTerms(**values | changes)

    return make


def admit(maker: Any, terms: AttestationTerms, *, verifier: Any = None, own: Any = None, **quoted: Any) -> AttestedPeer:
    gate = Gate(
        terms=terms,
        contract_digest=CONTRACT,
        run_id="run-1",
        verifiers={"tdx": verifier or maker.verifier()},
        nonces=NonceBook(),
        own=own,
    )
    nonce = gate.challenge("trainer", "north", now=maker.now)
    binding = KeyBinding(nonce, HPKE, SIGNING, CONTRACT, "run-1", "trainer", "north")
    token = maker.quote(**{"report_data": binding.report_data()} | quoted)
    evidence = Evidence("tdx", token, binding).encode()
    return gate.admit(evidence, role="trainer", party="north", run_config_digest=os.urandom(48), now=maker.now)


def refused(maker: Any, terms: AttestationTerms, **options: Any) -> tuple[str, ...]:
    with pytest.raises(EvidenceRefused) as caught:
        admit(maker, terms, **options)
    return caught.value.reasons


def test_a_guest_whose_image_the_contract_names_is_admitted(maker: Any, terms: Any) -> None:
    peer = admit(maker, terms())
    assert (peer.claims.hwmodel, peer.hpke_public) == ("intel-tdx", HPKE)


@pytest.mark.parametrize("register", ["mrtd", "rtmr0", "rtmr1", "rtmr2"])
def test_a_guest_that_differs_in_any_register_of_its_image_is_refused(
    maker: Any, terms: Any, reference: dict[str, str], register: str
) -> None:
    (reason,) = refused(maker, terms(trainer=reference | {f"tdx.{register}": "00" * 48}))
    assert reason.startswith(f"register tdx.{register} is ")
    short = {name: value for name, value in reference.items() if name != f"tdx.{register}"}
    assert refused(maker, terms(trainer=short)) == (f"there is no reference value for register tdx.{register}",)


def test_a_register_beyond_the_image_counts_where_the_contract_names_it(
    maker: Any, terms: Any, reference: dict[str, str]
) -> None:
    (reason,) = refused(maker, terms(trainer=reference | {"tdx.rtmr3": "00" * 48}))
    assert reason.startswith("register tdx.rtmr3 is ")
    assert refused(maker, terms(trainer=reference | {"tdx.rtmr9": "00" * 48})) == ("register tdx.rtmr9 is missing",)


def test_reference_values_of_the_simulated_platform_admit_no_guest(maker: Any, terms: Any) -> None:
    plain = {"launcher": "00" * 48, "runtime": "00" * 48, "application": "00" * 48}
    assert len(refused(maker, terms(trainer=plain))) == 4


def test_a_contract_that_demands_a_sandbox_refuses_evidence_that_attests_none(maker: Any, terms: Any) -> None:
    assert refused(maker, terms(sandbox="landlock")) == ("platform 'tdx' attests no sandbox, 'landlock' is asked for",)


def test_a_guest_in_debug_mode_is_refused(maker: Any, terms: Any) -> None:
    assert "it runs in debug mode" in refused(maker, terms(), attributes=maker.sept_ve_disable | 1)


def test_a_quote_over_other_report_data_is_refused(maker: Any, terms: Any) -> None:
    (reason,) = refused(maker, terms(), report_data=bytes(64))
    assert reason.startswith("its report data stands for other keys")


def test_a_policys_oldest_tcb_date_counts(maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path) -> None:
    own = policy(tmp_path, maker, reference, {"tdx": {"minimum_svn": 20240101}})
    admit(maker, terms(), own=own)
    late = policy(tmp_path, maker, reference, {"tdx": {"minimum_svn": 20250101}})
    assert refused(maker, terms(), own=late) == ("its security version 20240313 is below 20250101",)


def test_a_policy_without_the_platform_refuses_it(maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path) -> None:
    own = policy(tmp_path, maker, reference, {"nitro": {}})
    assert refused(maker, terms(), own=own) == ("evidence of platform 'tdx' is not admitted",)


def test_the_accepted_tcb_states_of_a_policy_reach_the_verifier(
    maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pinned root is the default of an argument.
    monkeypatch.setitem(TdxVerifier.__init__.__kwdefaults__, "root_key", maker.root.point)
    old = maker.make_pck(extension=maker.sgx_extension(components=(2,) * 16))
    given = {TDX_COLLATERAL: maker.collateral()}
    quoted = {"pck": old, "qe_key": old.key}
    strict = verifiers(terms(), given)["tdx"]
    assert any("SWHardeningNeeded" in reason for reason in refused(maker, terms(), verifier=strict, **quoted))
    rules = {"tdx": {"accepted": ["UpToDate", "SWHardeningNeeded"]}}
    own = policy(tmp_path, maker, reference, rules)
    admit(maker, terms(), verifier=verifiers(terms(), given, own)["tdx"], own=own, **quoted)


def test_a_policys_minimum_tcb_and_known_certificates_reach_the_snp_verifier(shared: Path, maker: Any, tmp_path: Path) -> None:
    folder = shared / "vectors"
    chain = x509.load_pem_x509_certificates((folder / "sev_snp_chain_milan.pem").read_bytes())
    given = {
        f"{SNP_CERTIFICATE}.{index}": certificate.public_bytes(Encoding.DER) for index, certificate in enumerate(chain)
    } | {f"{SNP_CERTIFICATE}.vcek": (folder / "sev_snp_vcek_milan.der").read_bytes()}
    report = bytes.fromhex((folder / "sev_snp_report_milan.hex").read_text())
    terms = AttestationTerms(platforms=("sev-snp",), trainer={}, aggregator={})
    now = datetime(2025, 1, 1, tzinfo=UTC)
    with pytest.raises(EvidenceRefused) as caught:
        verifiers(terms, given)["sev-snp"].verify(report, now=now)
    assert caught.value.reasons == ("There is no minimum TCB for the product Milan, so it is not accepted.",)

    def verifier(**minimum: int) -> Any:
        tcb = {"bootloader": 0, "tee": 0, "snp": 0, "microcode": 0} | minimum
        rules = {"sev-snp": {"minimum_tcb": {"Milan": tcb}}}
        return verifiers(terms, given, policy(tmp_path, maker, {"sev-snp.measurement": "00" * 48}, rules))["sev-snp"]

    assert verifier().verify(report, now=now).platform == "sev-snp"
    with pytest.raises(EvidenceRefused) as caught:
        verifier(microcode=255).verify(report, now=now)
    assert all("older than the minimum: microcode" in reason for reason in caught.value.reasons)


def test_a_platform_of_which_nothing_is_known_is_refused() -> None:
    claims = Claims("abacus", "", b"", b"", {"measurement": b"x" * 48}, False, 1, "", b"", b"", None, None)
    (reason,) = ImageMeasured({"measurement": b"x" * 48}).reasons(claims, now=None)  # type: ignore[arg-type]
    assert reason == "nothing is known of what platform 'abacus' measures"


def policy(folder: Path, maker: Any, reference: dict[str, str], platforms: dict[str, Any]) -> AppraisalPolicy:
    path = folder / "policy.toml"
    path.write_text(tomli_w.dumps({"version": 1, "platforms": platforms, "trainer": reference}), encoding="utf-8")
    return AppraisalPolicy.read(path, now=maker.now)
