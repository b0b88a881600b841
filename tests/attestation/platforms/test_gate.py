"""Hardware evidence at the gate: quotes of vendors of our own over a launcher's statement, under a
contract and a policy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.binding import HOST_LABEL, KeyBinding
from fedark.attestation.claims import Claims, SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.guest import Guest, GuestAttester, GuestStatement, GuestVerifier
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.sev_snp import SevSnpVerifier
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.attestation.policy import ImageMeasured, from_terms
from fedark.attestation.terms import AttestationTerms, HardwareTerms, SandboxPolicies
from fedark.attestation.trust import SNP_CERTIFICATE, SNP_CRL, TDX_COLLATERAL, verifiers
from fedark.foundation import canonical
from fedark.foundation.errors import EvidenceRefused, ProtocolError
from fedark.foundation.keys import HpkeKey, SigningKey

CONTRACT = b"c" * 48
HPKE, SIGNING, HOST = HpkeKey().public, SigningKey().public, SigningKey()
MEASURED = {name: os.urandom(48) for name in ("launcher", "runtime", "application", "runconfig")}
SANDBOX = SandboxFacts("namespaces", b"s" * 48, b"l" * 48)
POLICIES = {"namespaces": SandboxPolicies(seccomp=("73" * 48,), landlock=("6c" * 48,))}
OWN = {name: value.hex() for name, value in MEASURED.items() if name != "runconfig"}
REGISTERS = ("mrtd", "rtmr0", "rtmr1", "rtmr2")


@pytest.fixture
def reference(maker: Any) -> dict[str, str]:
    claims = maker.verifier().verify(maker.quote(), now=maker.now)
    return {**OWN, **{f"tdx.{name}": claims.measurements[name].hex() for name in REGISTERS}}


@pytest.fixture
def terms(reference: dict[str, str]) -> Callable[..., AttestationTerms]:
    def make(**changes: Any) -> AttestationTerms:
        values: dict[str, Any] = {
            "platforms": ("tdx",),
            "hardware": HardwareTerms.model_validate({"tdx": changes.pop("tdx", {})}),
            "policies": POLICIES,
            "trainer": reference,
            "aggregator": {},
        }
        return AttestationTerms(**values | changes)

    return make


def machine(platform: str, quote: Callable[..., bytes], **quoted: Any) -> Guest:
    """A guest whose hardware is a vendor of our own; `quoted` bends its quotes."""
    return Guest(
        SimpleNamespace(
            platform=platform,
            quote=lambda report_data, nonce: quote(**{"report_data": report_data, **quoted}),
        )
    )


def admit(
    maker: Any,
    terms: AttestationTerms,
    *,
    verifier: Any = None,
    own: Any = None,
    facts: SandboxFacts = SANDBOX,
    measured: Mapping[str, bytes] = MEASURED,
    bend: Callable[[bytes], bytes] = lambda token: token,
    **quoted: Any,
) -> AttestedPeer:
    gate = Gate(
        terms=terms,
        contract_digest=CONTRACT,
        run_id="run-1",
        verifiers={"tdx": verifier or GuestVerifier(maker.verifier())},
        nonces=NonceBook(),
        hosts={"north": HOST.public},
        own=own,
    )
    nonce = gate.challenge("trainer", "north", now=maker.now)
    binding = KeyBinding(nonce, HPKE, SIGNING, CONTRACT, "run-1", "trainer", "north")
    attester = machine("tdx", maker.quote, **quoted).attester(measurements=measured, sandbox=facts)
    host = HOST.sign(HOST_LABEL, binding.host_statement())
    evidence = Evidence("tdx", bend(attester.quote(binding.report_data(), nonce)), binding, host)
    return gate.admit(
        evidence.encode(),
        role="trainer",
        party="north",
        run_config_digest=MEASURED["runconfig"],
        now=maker.now,
    )


def refused(maker: Any, terms: AttestationTerms, **options: Any) -> tuple[str, ...]:
    with pytest.raises(EvidenceRefused) as caught:
        admit(maker, terms, **options)
    return caught.value.reasons


def test_a_guest_whose_image_and_enclave_the_contract_names_is_admitted(
    maker: Any, terms: Any
) -> None:
    peer = admit(maker, terms())
    assert (peer.claims.hwmodel, peer.hpke_public, peer.claims.sandbox) == (
        "intel-tdx",
        HPKE,
        "namespaces",
    )
    assert {name: peer.claims.measurements[name] for name in MEASURED} == MEASURED


@pytest.mark.parametrize("register", REGISTERS)
def test_a_guest_that_differs_in_any_register_of_its_image_is_refused(
    maker: Any, terms: Any, reference: dict[str, str], register: str
) -> None:
    (reason,) = refused(maker, terms(trainer=reference | {f"tdx.{register}": "00" * 48}))
    assert reason.startswith(f"register tdx.{register} is ")
    short = {name: value for name, value in reference.items() if name != f"tdx.{register}"}
    assert refused(maker, terms(trainer=short)) == (
        f"there is no reference value for register tdx.{register}",
    )


@pytest.mark.parametrize("register", ["launcher", "runtime", "application"])
def test_a_known_guest_that_started_another_enclave_is_refused(
    maker: Any, terms: Any, register: str
) -> None:
    (reason,) = refused(maker, terms(), measured=MEASURED | {register: bytes(48)})
    assert reason.startswith(f"register {register} is 0000")


def test_a_known_guest_that_started_its_enclave_for_another_run_is_refused(
    maker: Any, terms: Any
) -> None:
    assert refused(maker, terms(), measured=MEASURED | {"runconfig": bytes(48)}) == (
        "it was started with another run configuration",
    )


def test_a_register_beyond_the_image_counts_where_the_contract_names_it(
    maker: Any, terms: Any, reference: dict[str, str]
) -> None:
    (reason,) = refused(maker, terms(trainer=reference | {"tdx.rtmr3": "00" * 48}))
    assert reason.startswith("register tdx.rtmr3 is ")
    assert refused(maker, terms(trainer=reference | {"tdx.rtmr9": "00" * 48})) == (
        "register tdx.rtmr9 is missing",
    )


def test_reference_values_of_an_enclave_alone_admit_no_guest(maker: Any, terms: Any) -> None:
    assert refused(maker, terms(trainer=OWN)) == tuple(
        f"there is no reference value for register tdx.{register}" for register in REGISTERS
    )


def test_reference_values_of_an_image_alone_admit_no_enclave(
    maker: Any, terms: Any, reference: dict[str, str]
) -> None:
    image = {name: value for name, value in reference.items() if name.startswith("tdx.")}
    assert "there are no reference values for this role" in refused(maker, terms(trainer=image))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (SandboxFacts("none"), "its sandbox mode 'none' is weaker than 'landlock'"),
        (
            SandboxFacts("landlock", b"s" * 48, b"l" * 48),
            "there are no reference values for the policies of sandbox mode 'landlock'",
        ),
        (
            SandboxFacts("namespaces", b"x" * 48, b"l" * 48),
            "its system call (seccomp) policy is 7878787878787878...",
        ),
        (
            SandboxFacts("namespaces", b"s" * 48, b"x" * 48),
            "its file (landlock) policy is 7878787878787878...",
        ),
        (SandboxFacts("namespaces", b"s" * 48), "its file (landlock) policy is missing"),
    ],
    ids=["none", "mode downgrade", "other filter", "other landlock policy", "no landlock"],
)  # fmt: skip
def test_a_guests_sandbox_is_appraised_like_any_other(
    maker: Any, terms: Any, facts: SandboxFacts, reason: str
) -> None:
    (said,) = set(refused(maker, terms(), facts=facts))
    assert said.startswith(reason)


def test_a_platforms_own_terms_may_ask_for_a_stronger_sandbox(maker: Any, terms: Any) -> None:
    both = dict.fromkeys(("namespaces", "landlock"), POLICIES["namespaces"])
    facts = SandboxFacts("landlock", b"s" * 48, b"l" * 48)
    admit(maker, terms(policies=both), facts=facts)
    (reason,) = refused(maker, terms(policies=both, tdx={"sandbox": "namespaces"}), facts=facts)
    assert reason == "its sandbox mode 'landlock' is weaker than 'namespaces'"


def test_a_statement_that_the_hardware_did_not_sign_is_refused(maker: Any, terms: Any) -> None:
    def bend(token: bytes) -> bytes:
        value = canonical.decode(token)
        statement = canonical.decode(value["statement"])
        statement["registers"]["application"] = bytes(48)
        return canonical.encode(value | {"statement": canonical.encode(statement)})

    assert refused(maker, terms(), bend=bend) == ("its quote is not over its launcher's statement",)


def test_a_bare_quote_over_an_enclaves_keys_is_no_evidence(maker: Any, terms: Any) -> None:
    reasons = refused(maker, terms(), bend=lambda token: canonical.decode(token)["quote"])
    assert len(reasons) == 1
    assert "CBOR" in reasons[0] or "quote with its guest's statement" in reasons[0]


@pytest.mark.parametrize(
    "change",
    [
        {"report_data": bytes(63)},
        {"registers": {**MEASURED, "extra": bytes(48)}},
        {"registers": {**MEASURED, "runtime": bytes(47)}},
        {"sandbox": "jail"},
        {"sandbox": "landlock", "landlock": b""},
        {"seccomp": b"short"},
        {"more": 1},
    ],
)
def test_a_malformed_statement_is_refused(change: dict[str, Any]) -> None:
    whole = {
        "report_data": bytes(64),
        "registers": MEASURED,
        "sandbox": "namespaces",
        "seccomp": b"s" * 48,
        "landlock": b"l" * 48,
    }
    assert GuestStatement.decode(canonical.encode(whole)).encode() == canonical.encode(whole)
    with pytest.raises(ProtocolError):
        GuestStatement.decode(canonical.encode(whole | change))


def test_an_attester_makes_no_statement_that_its_verifier_would_not_read() -> None:
    attester = GuestAttester(
        SimpleNamespace(platform="tdx"), measurements={"launcher": bytes(48)}, sandbox=SANDBOX
    )
    with pytest.raises(ProtocolError, match="exactly the four registers"):
        attester.quote(bytes(64), bytes(32))


@pytest.mark.attack("debug mode", mode="tdx")
def test_a_guest_in_debug_mode_is_refused(maker: Any, terms: Any) -> None:
    assert "it runs in debug mode" in refused(maker, terms(), attributes=maker.sept_ve_disable | 1)


def test_a_quote_over_other_report_data_is_refused(maker: Any, terms: Any) -> None:
    assert refused(maker, terms(), report_data=bytes(64)) == (
        "its quote is not over its launcher's statement",
    )


@pytest.mark.attack("low security version", mode="tdx")
def test_a_contracts_and_a_policys_oldest_tcb_date_count(
    maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path
) -> None:
    own = policy(tmp_path, maker, reference, {"tdx": {"minimum_svn": 20240101}})
    admit(maker, terms(), own=own)
    late = policy(tmp_path, maker, reference, {"tdx": {"minimum_svn": 20250101}})
    assert refused(maker, terms(), own=late) == ("its security version 20240313 is below 20250101",)
    assert refused(maker, terms(tdx={"minimum_svn": 20250101})) == (
        "its security version 20240313 is below 20250101",
    )


def test_a_policy_without_the_platform_refuses_it(
    maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path
) -> None:
    own = policy(tmp_path, maker, reference, {"nitro": {}})
    assert refused(maker, terms(), own=own) == ("evidence of platform 'tdx' is not admitted",)


def test_a_policy_with_other_sandbox_policies_refuses(
    maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path
) -> None:
    own = policy(
        tmp_path,
        maker,
        reference,
        {"tdx": {}},
        policies={"namespaces": {"seccomp": ["00" * 48], "landlock": [""]}},
    )
    reasons = refused(maker, terms(), own=own)
    assert len(reasons) == 2
    assert all("is no reference value of sandbox mode 'namespaces'" in reason for reason in reasons)


@pytest.fixture
def pinned(maker: Any, amd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendors' roots are those of our own; they are defaults of arguments, for nobody may
    choose them by configuration.
    """
    monkeypatch.setitem(TdxVerifier.__init__.__kwdefaults__, "root_key", maker.root.point)
    monkeypatch.setitem(SevSnpVerifier.__init__.__kwdefaults__, "roots", amd.roots)


@pytest.mark.usefixtures("pinned")
def test_the_accepted_tcb_states_of_a_contract_reach_the_verifier_and_a_policy_narrows_them(
    maker: Any, terms: Any, reference: dict[str, str], tmp_path: Path
) -> None:
    given = {TDX_COLLATERAL: maker.collateral()}
    old = maker.make_pck(extension=maker.sgx_extension(components=(2,) * 16))
    quoted = {"pck": old, "qe_key": old.key}
    strict = verifiers(terms(), given)["tdx"]
    assert any(
        "SWHardeningNeeded" in reason
        for reason in refused(maker, terms(), verifier=strict, **quoted)
    )
    wide = terms(tdx={"accepted": ("UpToDate", "SWHardeningNeeded")})
    admit(maker, wide, verifier=verifiers(wide, given)["tdx"], **quoted)
    own = policy(tmp_path, maker, reference, {"tdx": {}})
    narrowed = verifiers(wide, given, own)["tdx"]
    assert any(
        "SWHardeningNeeded" in reason
        for reason in refused(maker, wide, verifier=narrowed, own=own, **quoted)
    )


@pytest.mark.usefixtures("pinned")
def test_collateral_from_before_a_recovery_of_intels_is_refused_where_the_contract_asks_for_newer(
    maker: Any, terms: Any
) -> None:
    given = {TDX_COLLATERAL: maker.collateral()}
    newest = terms(tdx={"minimum_evaluation": 17})
    admit(maker, newest, verifier=verifiers(newest, given)["tdx"])
    newer = terms(tdx={"minimum_evaluation": 18})
    assert "The collateral is of Intel's evaluation 17, older than 18." in refused(
        maker, newer, verifier=verifiers(newer, given)["tdx"]
    )


def snp_terms(**changes: Any) -> AttestationTerms:
    tcb = {"bootloader": 4, "tee": 0, "snp": 22, "microcode": 213} | changes.pop("tcb", {})
    hardware = HardwareTerms.model_validate({"sev-snp": {"minimum_tcb": {"Milan": tcb}, **changes}})
    return AttestationTerms(
        platforms=("sev-snp",), hardware=hardware, policies=POLICIES, trainer={}, aggregator={}
    )


def snp_reasons(
    terms: AttestationTerms, amd: Any, given: dict[str, bytes], own: Any = None
) -> tuple[str, ...]:
    attester = machine("sev-snp", amd.quote).attester(measurements=MEASURED, sandbox=SANDBOX)
    verifier = verifiers(terms, given, own)["sev-snp"]
    try:
        claims = verifier.verify(attester.quote(bytes(64), bytes(32)), now=amd.now)
    except EvidenceRefused as error:
        return error.reasons
    assert claims.platform == "sev-snp"
    return ()


@pytest.mark.usefixtures("pinned")
def test_a_contracts_minimum_tcb_and_revocation_reach_the_snp_verifier(amd: Any) -> None:
    fresh = {SNP_CRL: amd.crl()}
    assert snp_reasons(snp_terms(), amd, fresh) == ()
    reasons = snp_reasons(snp_terms(tcb={"microcode": 255}), amd, fresh)
    assert len(reasons) == 4
    assert all("older than the minimum: microcode" in reason for reason in reasons)
    assert snp_reasons(snp_terms(), amd, {}) == (
        "There is no revocation list of the issuer of the ASK certificate, and one is required.",
    )
    assert snp_reasons(snp_terms(revocation="if-given"), amd, {}) == ()
    assert "The certificate SEV-Milan was revoked." in snp_reasons(
        snp_terms(), amd, {SNP_CRL: amd.crl(amd.ask.cert)}
    )


@pytest.mark.usefixtures("pinned")
def test_the_stricter_of_contract_and_policy_counts_part_by_part(
    amd: Any, maker: Any, tmp_path: Path
) -> None:
    tcb = {"bootloader": 0, "tee": 0, "snp": 0, "microcode": 255}
    own = policy(
        tmp_path,
        maker,
        {"sev-snp.measurement": "00" * 48},
        {"sev-snp": {"minimum_tcb": {"Milan": tcb}}},
    )
    assert all(
        "microcode" in reason for reason in snp_reasons(snp_terms(), amd, {SNP_CRL: amd.crl()}, own)
    )
    other = policy(
        tmp_path,
        maker,
        {"sev-snp.measurement": "00" * 48},
        {"sev-snp": {"minimum_tcb": {"Genoa": tcb}}},
    )
    assert snp_reasons(snp_terms(), amd, {SNP_CRL: amd.crl()}, other) == (
        "There is no minimum TCB for the product Milan, so it is not accepted.",
    )


@pytest.mark.usefixtures("pinned")
def test_what_contract_or_policy_requires_of_the_machine_reaches_the_snp_verifier(
    amd: Any, maker: Any, tmp_path: Path
) -> None:
    given = {SNP_CRL: amd.crl()}
    hidden = snp_terms(requires=("ciphertext-hiding",))
    own = policy(
        tmp_path,
        maker,
        {"sev-snp.measurement": "00" * 48},
        {"sev-snp": {"minimum_tcb": SNP["minimum_tcb"], "requires": ["alias-check", "no-smt"]}},
    )
    reasons = snp_reasons(hidden, amd, given, own)
    assert [reason.split(" ")[0] for reason in reasons] == ["alias-check", "ciphertext-hiding"]


def test_known_certificates_reach_the_snp_verifier(shared: Path) -> None:
    folder = shared / "vectors"
    chain = x509.load_pem_x509_certificates((folder / "sev_snp_chain_milan.pem").read_bytes())
    given = {
        f"{SNP_CERTIFICATE}.{index}": certificate.public_bytes(Encoding.DER)
        for index, certificate in enumerate(chain)
    } | {f"{SNP_CERTIFICATE}.vcek": (folder / "sev_snp_vcek_milan.der").read_bytes()}
    report = bytes.fromhex((folder / "sev_snp_report_milan.hex").read_text())
    now = datetime(2025, 1, 1, tzinfo=UTC)
    terms = snp_terms(tcb={"bootloader": 3, "snp": 8, "microcode": 115}, revocation="if-given")
    verifier = verifiers(terms, given)["sev-snp"]
    assert verifier._hardware.verify(report, now=now).platform == "sev-snp"


def test_a_contract_names_the_terms_of_each_hardware_platform_that_it_admits() -> None:
    for platform in ("tdx", "sev-snp", "nitro"):
        with pytest.raises(
            ValueError, match=f"platform '{platform}' is admitted without its terms"
        ):
            AttestationTerms(platforms=(platform,), policies=POLICIES, trainer={}, aggregator={})
    hardware = HardwareTerms.model_validate({"nitro": {}})
    with pytest.raises(ValueError, match="terms for platform 'nitro', which is not admitted"):
        AttestationTerms(
            platforms=("simulated",),
            hardware=hardware,
            policies=POLICIES,
            trainer={},
            aggregator={},
        )


def test_a_contract_that_asks_for_a_sandbox_names_what_its_policies_are() -> None:
    with pytest.raises(ValueError, match="no reference values for its policies"):
        AttestationTerms(platforms=("simulated",), trainer={}, aggregator={})


SNP = {"minimum_tcb": {"Milan": {"bootloader": 4, "tee": 0, "snp": 22, "microcode": 213}}}


@pytest.mark.parametrize(
    ("mine", "own", "line"),
    [
        ({"tdx": {}}, {}, "tdx is not admitted"),
        (
            {"tdx": {"accepted": ("UpToDate", "OutOfDate")}},
            {"tdx": {}},
            "tdx: TCB state OutOfDate is not accepted",
        ),
        ({"tdx": {}}, {"tdx": {"minimum_svn": 20250101}}, "tdx: minimum_svn 0 is below 20250101"),
        ({"tdx": {}}, {"tdx": {"minimum_evaluation": 17}}, "tdx: minimum_evaluation 0 is below 17"),
        (
            {"tdx": {"sandbox": "none"}},
            {"tdx": {}},
            "tdx: sandbox 'none' is weaker than 'landlock'",
        ),
        (
            {"nitro": {"sandbox": "none"}},
            {"nitro": {}},
            "nitro: sandbox 'none' is weaker than 'landlock'",
        ),
        (
            {"sev-snp": {**SNP, "revocation": "if-given"}},
            {"sev-snp": SNP},
            "sev-snp: it asks for no revocation list",
        ),
        (
            {"sev-snp": {**SNP, "requires": ("alias-check",)}},
            {"sev-snp": {**SNP, "requires": ("no-smt", "alias-check", "ciphertext-hiding")}},
            "sev-snp: it does not ask for ciphertext-hiding, no-smt",
        ),
        (
            {"sev-snp": {**SNP, "vmpls": (0, 2)}},
            {"sev-snp": SNP},
            "sev-snp: VMPL [2] is not admitted",
        ),
        (
            {"sev-snp": SNP},
            {"sev-snp": {**SNP, "minimum_svn": 3}},
            "sev-snp: minimum_svn 0 is below 3",
        ),
        (
            {
                "sev-snp": {
                    "minimum_tcb": {"Milan": {**SNP["minimum_tcb"]["Milan"], "microcode": 1}}
                }
            },
            {"sev-snp": SNP},
            "sev-snp: Milan's minimum microcode 1 is below 213",
        ),
        (
            {"sev-snp": {"minimum_tcb": {"Genoa": SNP["minimum_tcb"]["Milan"]}}},
            {"sev-snp": SNP},
            "sev-snp: Genoa is not admitted",
        ),
    ],
)
def test_terms_that_admit_what_a_policy_refuses_are_named(mine: Any, own: Any, line: str) -> None:
    mine, own = HardwareTerms.model_validate(mine), HardwareTerms.model_validate(own)
    assert mine.looser(own) == [line]
    assert mine.looser(mine) == []


def test_a_platform_of_which_nothing_is_known_is_refused() -> None:
    claims = Claims(
        "abacus",
        "",
        b"",
        b"",
        {"abacus.measurement": b"x" * 48},
        False,
        1,
        "",
        b"",
        b"",
        None,
        None,
    )
    (reason,) = ImageMeasured({"measurement": b"x" * 48}).reasons(claims, now=None)  # type: ignore[arg-type]
    assert reason == "nothing is known of what platform 'abacus' measures"


def test_nitros_lack_of_a_security_version_refuses_nothing(aws: Any) -> None:
    image = {f"nitro.pcr{index}" for index in range(3)}
    attester = Guest(
        SimpleNamespace(
            platform="nitro", quote=lambda data, nonce: aws.quote(report_data=data, nonce=nonce)
        )
    )
    token = attester.attester(measurements=MEASURED, sandbox=SANDBOX).quote(bytes(64), bytes(32))
    claims = GuestVerifier(aws.verifier()).verify(token, now=aws.now)
    reference = {**OWN, **{name: claims.measurements[name].hex() for name in image}}
    hardware = HardwareTerms.model_validate({"nitro": {}})
    terms = AttestationTerms(
        platforms=("nitro",), hardware=hardware, policies=POLICIES, trainer=reference, aggregator={}
    )
    check = from_terms(terms, "trainer", MEASURED["runconfig"], "nitro")
    assert list(check.reasons(claims, now=aws.now)) == []


def policy(
    folder: Path,
    maker: Any,
    reference: dict[str, str],
    platforms: dict[str, Any],
    policies: Any = None,
) -> AppraisalPolicy:
    path = folder / "policy.toml"
    named = (
        {mode: one.model_dump(mode="json") for mode, one in POLICIES.items()}
        if policies is None
        else policies
    )
    value = {"version": 1, "platforms": platforms, "policies": named, "trainer": reference}
    path.write_text(tomli_w.dumps(value), encoding="utf-8")
    return AppraisalPolicy.read(path, now=maker.now)
