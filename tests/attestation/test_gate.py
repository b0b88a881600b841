"""The gate: what it admits, and that each attack is refused for its own reason."""

from __future__ import annotations

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from attacks import refusing

from fedark.attestation.binding import HOST_LABEL
from fedark.attestation.claims import Claims, SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer
from fedark.attestation.platforms.simulated import SimulatedRoot, SimulatedVerifier
from fedark.attestation.terms import HardwareTerms, SandboxPolicies
from fedark.foundation.errors import EvidenceRefused, ProtocolError
from fedark.foundation.keys import HpkeKey, SigningKey
from fedark.measurement import reference_policies
from fedark.sandbox import policy_digests
from fedark.sandbox.seccomp import loading_policy


def refusal(lab: Any, gate: Any, evidence: bytes, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(EvidenceRefused) as caught:
        lab.admit(gate, evidence, **changes)
    return caught.value.reasons


def test_evidence_of_the_right_enclave_is_admitted_with_its_keys(lab: Any) -> None:
    gate = lab.gate()
    evidence = lab.evidence(gate)
    peer = lab.admit(gate, evidence)
    assert (peer.party, peer.role, peer.run_id, peer.contract_digest) == (
        "north",
        "trainer",
        "run-1",
        lab.contract,
    )
    assert (peer.hpke_public, peer.signing_public) == (lab.hpke, lab.signing)
    assert peer.evidence_digest == Evidence.decode(evidence).digest()
    assert peer.claims.hwmodel == "fedark-sim"


@pytest.mark.parametrize("register", ["launcher", "runtime", "application"])
def test_an_enclave_with_a_changed_file_is_refused(lab: Any, register: str) -> None:
    gate = lab.gate()
    attester = lab.attester(measurements=lab.measurements | {register: os.urandom(48)})
    (reason,) = refusal(lab, gate, lab.evidence(gate, attester=attester))
    assert reason.startswith(f"register {register} is ")


def test_an_enclave_started_with_another_run_configuration_is_refused(lab: Any) -> None:
    gate = lab.gate()
    attester = lab.attester(measurements=lab.measurements | {"runconfig": os.urandom(48)})
    assert refusal(lab, gate, lab.evidence(gate, attester=attester)) == (
        "it was started with another run configuration",
    )


@pytest.mark.attack("wrong nonce")
def test_a_wrong_nonce_is_refused(lab: Any) -> None:
    gate = lab.gate()
    reasons = refusal(lab, gate, lab.evidence(gate, nonce=os.urandom(32)))
    assert reasons == ("its nonce was not issued here, for this peer, or has long expired",)


@pytest.mark.attack("replayed nonce")
def test_replayed_evidence_is_refused(lab: Any) -> None:
    gate = lab.gate()
    evidence = lab.evidence(gate)
    lab.admit(gate, evidence)
    assert refusal(lab, gate, evidence) == ("its nonce was used before: this is a replay",)


def test_a_nonce_is_spent_by_refused_evidence_too(lab: Any) -> None:
    gate = lab.gate()
    nonce = gate.challenge("trainer", "north", now=lab.now)
    refusal(lab, gate, lab.evidence(gate, attester=lab.attester(debug=True), nonce=nonce))
    assert refusal(lab, gate, lab.evidence(gate, nonce=nonce)) == (
        "its nonce was used before: this is a replay",
    )


@pytest.mark.attack("expired nonce")
def test_an_expired_nonce_is_refused(lab: Any) -> None:
    gate = lab.gate()
    evidence = lab.evidence(
        gate, attester=lab.attester(clock=lambda: lab.now + timedelta(minutes=11))
    )
    assert refusal(lab, gate, evidence, now=lab.now + timedelta(minutes=11)) == (
        "its nonce has expired",
    )


def test_expired_evidence_is_refused_as_stale(lab: Any) -> None:
    gate = lab.gate()
    evidence = lab.evidence(
        gate, attester=lab.attester(clock=lambda: lab.now - timedelta(minutes=13))
    )
    (reason,) = refusal(lab, gate, evidence)
    assert reason.startswith("it was issued 0:13:00 ago")


@pytest.mark.parametrize(("role", "party"), [("aggregator", "north"), ("trainer", "south")])
def test_a_nonce_for_another_role_or_party_is_refused(lab: Any, role: str, party: str) -> None:
    gate = lab.gate()
    nonce = gate.challenge(role, party, now=lab.now)
    reasons = refusal(lab, gate, lab.evidence(gate, nonce=nonce))
    assert reasons == ("its nonce was not issued here, for this peer, or has long expired",)
    lab.nonces.spend(nonce, gate._purpose(role, party), now=lab.now)


def test_a_nonce_of_another_run_or_contract_is_refused_by_a_gate_on_the_same_book(lab: Any) -> None:
    for other in (lab.gate(run_id="run-2"), lab.gate(contract_digest=b"d" * 48)):
        nonce = other.challenge("trainer", "north", now=lab.now)
        assert len(refusal(lab, lab.gate(), lab.evidence(lab.gate(), nonce=nonce))) == 1


@pytest.mark.attack("swapped keys")
@pytest.mark.parametrize(
    "swap",
    [
        {"hpke_public": HpkeKey().public},
        {"signing_public": SigningKey().public},
        {"contract_digest": b"d" * 48},
        {"run_id": "run-2"},
        {"role": "aggregator"},
        {"party": "south"},
        {"nonce": b"n" * 32},
    ],
)
def test_a_relay_that_swaps_a_field_of_the_binding_is_refused(
    lab: Any, swap: dict[str, Any]
) -> None:
    gate = lab.gate()
    honest = Evidence.decode(lab.evidence(gate))
    forged = replace(honest, binding=replace(honest.binding, **swap)).encode()
    reasons = refusal(lab, gate, forged)
    assert (
        "its report data stands for other keys, or another nonce, contract, run, role or party"
        in reasons
    )


@pytest.mark.attack({"its role is aggregator": "wrong role"}, param="reason")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"contract_digest": b"d" * 48}, "it is bound to another contract"),
        ({"run_id": "run-2"}, "it is bound to another run"),
        ({"role": "aggregator"}, "its role is aggregator"),
        ({"party": "south"}, "it is the enclave of south"),
    ],
)
def test_genuine_evidence_for_another_contract_run_role_or_party_is_refused(
    lab: Any, change: dict[str, Any], reason: str
) -> None:
    gate = lab.gate()
    assert refusal(lab, gate, lab.evidence(gate, **change)) == (reason,)


def test_a_token_made_for_another_nonce_is_refused(lab: Any) -> None:
    gate = lab.gate()
    binding = lab.binding(gate.challenge("trainer", "north", now=lab.now))
    token = lab.attester().quote(binding.report_data(), os.urandom(32))
    evidence = Evidence(
        "simulated", token, binding, lab.host.sign(HOST_LABEL, binding.host_statement())
    ).encode()
    assert refusal(lab, gate, evidence) == ("its token was made for another nonce",)


@pytest.mark.attack("an enclave that its party did not start", mode="simulated")
@pytest.mark.parametrize(
    "signed", ["nobody", "a stranger", "another run", "another enclave", "as another message"]
)
def test_a_genuine_enclave_that_its_party_has_not_signed_for_is_refused(
    lab: Any, signed: str
) -> None:
    gate = lab.gate()
    binding = lab.binding(gate.challenge("trainer", "north", now=lab.now))
    key = SigningKey() if signed == "a stranger" else lab.host
    statement = {
        "another run": replace(binding, run_id="run-2"),
        "another enclave": replace(binding, signing_public=os.urandom(32)),
    }.get(signed, binding).host_statement()
    host = (
        b""
        if signed == "nobody"
        else key.sign("fedark/x/1" if signed == "as another message" else HOST_LABEL, statement)
    )
    token = lab.attester().quote(binding.report_data(), binding.nonce)
    evidence = Evidence("simulated", token, binding, host).encode()
    assert refusal(lab, gate, evidence) == ("north has not signed that this enclave is its own",)


def test_a_party_whose_key_the_gate_does_not_know_hosts_nothing(lab: Any) -> None:
    gate = lab.gate(hosts={})
    assert refusal(lab, gate, lab.evidence(gate)) == (
        "north has not signed that this enclave is its own",
    )


@pytest.mark.attack("debug mode", mode="simulated")
def test_debug_mode_is_refused_and_no_policy_admits_it(lab: Any) -> None:
    gate = lab.gate()
    assert refusal(lab, gate, lab.evidence(gate, attester=lab.attester(debug=True))) == (
        "it runs in debug mode",
    )
    with pytest.raises(ValueError, match="debug"):
        lab.terms(debug=True)


@pytest.mark.attack("low security version", mode="simulated")
def test_a_low_security_version_is_refused(lab: Any) -> None:
    gate = lab.gate(terms=lab.terms(minimum_svn=3))
    assert refusal(lab, gate, lab.evidence(gate, attester=lab.attester(svn=2))) == (
        "its security version 2 is below 3",
    )
    lab.admit(gate, lab.evidence(gate, attester=lab.attester(svn=3)))


@pytest.mark.parametrize(
    ("minimum", "mode", "admitted"),
    [
        ("namespaces", "namespaces", True),
        ("namespaces", "landlock", False),
        ("namespaces", "none", False),
        ("landlock", "namespaces", True),
        ("landlock", "landlock", True),
        ("landlock", "none", False),
        ("none", "none", True),
    ],
)
def test_a_sandbox_below_the_minimum_is_refused(
    lab: Any, minimum: str, mode: str, admitted: bool
) -> None:
    gate = lab.gate(terms=lab.terms(sandbox=minimum))
    facts = SandboxFacts("none") if mode == "none" else SandboxFacts(mode, b"s" * 48, b"l" * 48)
    evidence = lab.evidence(gate, attester=lab.attester(sandbox=facts))
    if admitted:
        assert lab.admit(gate, evidence).claims.sandbox == mode
    else:
        assert refusal(lab, gate, evidence) == (
            f"its sandbox mode {mode!r} is weaker than {minimum!r}",
        )


MODES = ["namespaces", "landlock"]


def installed(mode: str, **changes: bytes) -> SandboxFacts:
    """What a launcher that really confines in `mode` attests."""
    seccomp, files = policy_digests(mode, 6)
    return SandboxFacts(mode, changes.get("seccomp", seccomp), changes.get("landlock", files))


@pytest.mark.parametrize("mode", MODES)
def test_what_a_launcher_installs_is_what_the_reference_values_say(lab: Any, mode: str) -> None:
    gate = lab.gate(terms=lab.terms(policies=reference_policies()))
    assert (
        lab.admit(
            gate, lab.evidence(gate, attester=lab.attester(sandbox=installed(mode)))
        ).claims.sandbox
        == mode
    )


@pytest.mark.attack("another filter")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["seccomp", "landlock"])
def test_another_filter_than_the_contracts_is_refused_by_name(
    lab: Any, mode: str, which: str
) -> None:
    gate = lab.gate(terms=lab.terms(policies=reference_policies()))
    weaker = {"seccomp": loading_policy(0).digest(), "landlock": b"x" * 48}[which]
    evidence = lab.evidence(gate, attester=lab.attester(sandbox=installed(mode, **{which: weaker})))
    (said,) = refusal(lab, gate, evidence)
    named = {
        "seccomp": "its system call (seccomp) policy",
        "landlock": "its file (landlock) policy",
    }[which]
    assert (
        said == f"{named} is {weaker.hex()[:16]}..., which is no reference value of sandbox mode"
        f" {mode!r}"
    )


def test_a_missing_policy_is_refused_by_name(lab: Any) -> None:
    gate = lab.gate()
    (said,) = refusal(
        lab,
        gate,
        lab.evidence(gate, attester=lab.attester(sandbox=SandboxFacts("namespaces", b"s" * 48))),
    )
    assert (
        said == "its file (landlock) policy is missing, which is no reference value of sandbox mode"
        " 'namespaces'"
    )


@pytest.mark.attack("mode downgrade")
@pytest.mark.parametrize("mode", MODES)
def test_a_downgrade_of_the_sandbox_mode_is_refused_by_name(lab: Any, mode: str) -> None:
    weaker = {"namespaces": installed("landlock"), "landlock": SandboxFacts("none")}[mode]
    gate = lab.gate(terms=lab.terms(sandbox=mode, policies=reference_policies(mode)))
    reasons = refusal(lab, gate, lab.evidence(gate, attester=lab.attester(sandbox=weaker)))
    assert reasons[0] == f"its sandbox mode {weaker.mode!r} is weaker than {mode!r}"


def test_a_mode_that_the_contract_has_no_reference_for_is_refused_by_name(lab: Any) -> None:
    gate = lab.gate(terms=lab.terms(policies={"namespaces": lab.terms().policies["namespaces"]}))
    facts = SandboxFacts("landlock", b"s" * 48, b"l" * 48)
    assert refusal(lab, gate, lab.evidence(gate, attester=lab.attester(sandbox=facts))) == (
        "there are no reference values for the policies of sandbox mode 'landlock'",
    )


def test_a_kernel_without_landlock_is_admitted_where_the_contract_says_so(lab: Any) -> None:
    either = SandboxPolicies(seccomp=((b"s" * 48).hex(),), landlock=("", (b"l" * 48).hex()))
    gate = lab.gate(terms=lab.terms(policies={"namespaces": either}))
    lab.admit(
        gate,
        lab.evidence(gate, attester=lab.attester(sandbox=SandboxFacts("namespaces", b"s" * 48))),
    )


@pytest.mark.attack("KEM downgrade", mode="at the gate")
def test_a_key_of_another_kem_than_the_contracts_is_refused_by_name(lab: Any) -> None:
    gate = lab.gate()
    with refusing():
        reasons = refusal(lab, gate, lab.evidence(gate, hpke_public=HpkeKey(kem="x25519").public))
    assert reasons == ("its key is of the KEM x25519, the contract names mlkem768-x25519",)
    plain = lab.gate(terms=lab.terms(kem="x25519"))
    assert refusal(lab, plain, lab.evidence(plain)) == (
        "its key is of the KEM mlkem768-x25519, the contract names x25519",
    )
    assert (
        lab.admit(plain, lab.evidence(plain, hpke_public=HpkeKey(kem="x25519").public)).kem
        == "x25519"
    )


@pytest.mark.attack("clock skew")
def test_clock_skew_is_tolerated_up_to_two_minutes_and_not_beyond(lab: Any) -> None:
    gate = lab.gate()
    lab.admit(
        gate,
        lab.evidence(gate, attester=lab.attester(clock=lambda: lab.now + timedelta(seconds=119))),
    )
    late = lab.attester(clock=lambda: lab.now + timedelta(seconds=121))
    (reason,) = refusal(lab, gate, lab.evidence(gate, attester=late))
    assert "in the future" in reason


def test_simulated_evidence_is_refused_unless_the_contract_names_it(lab: Any) -> None:
    gate = lab.gate(
        terms=lab.terms(platforms=("tdx",), hardware=HardwareTerms.model_validate({"tdx": {}}))
    )
    reasons = refusal(lab, gate, lab.evidence(gate))
    assert "the contract does not admit evidence of platform 'simulated'" in reasons


def test_an_admitted_platform_without_a_verifier_is_refused(lab: Any) -> None:
    gate = lab.gate(verifiers={})
    assert refusal(lab, gate, lab.evidence(gate)) == (
        "evidence of platform 'simulated' cannot be verified here",
    )


@pytest.mark.attack("wrong root", mode="simulated")
def test_a_foreign_root_is_refused(lab: Any) -> None:
    gate = lab.gate()
    stranger = SimulatedRoot(now=lab.now).issue(now=lab.now)
    reasons = refusal(lab, gate, lab.evidence(gate, attester=lab.attester(device=stranger)))
    assert "the device certificate names another issuer than the certificate above it" in reasons


def test_a_gate_without_reference_values_admits_nobody(lab: Any) -> None:
    gate = lab.gate(terms=lab.terms(trainer={}))
    assert "there are no reference values for this role" in refusal(lab, gate, lab.evidence(gate))


def test_a_register_without_a_reference_value_and_a_missing_register_are_refused(lab: Any) -> None:
    reference = {
        "launcher": lab.measurements["launcher"].hex(),
        "application": lab.measurements["application"].hex(),
    }
    gate = lab.gate(terms=lab.terms(trainer=reference | {"firmware": "ab" * 48}))
    assert refusal(lab, gate, lab.evidence(gate)) == (
        "register firmware is missing",
        "register runtime has no reference value",
    )


def test_every_reason_is_given_at_once(lab: Any) -> None:
    gate = lab.gate(terms=lab.terms(minimum_svn=5, sandbox="namespaces"))
    attester = lab.attester(
        debug=True,
        svn=1,
        sandbox=SandboxFacts("none"),
        measurements={name: os.urandom(48) for name in lab.measurements},
        clock=lambda: lab.now + timedelta(hours=1),
    )
    evidence = lab.evidence(gate, attester=attester, nonce=b"n" * 32, run_id="run-2", party="south")
    reasons = refusal(lab, gate, evidence)
    for part in (
        "nonce",
        "run",
        "south",
        "launcher",
        "runtime",
        "application",
        "configuration",
        "debug",
        "version",
        "sandbox",
    ):
        assert any(part in reason for reason in reasons), part
    assert any("future" in reason for reason in reasons)


def test_claims_of_a_token_that_does_not_verify_are_not_looked_at(lab: Any) -> None:
    class Liar:
        platform = "simulated"

        def verify(self, token: bytes, *, now: Any, admitted: Any = None) -> Claims:
            raise EvidenceRefused("it", ["the token is not signed by its device"])

    gate = lab.gate(verifiers={"simulated": Liar()})
    assert refusal(lab, gate, lab.evidence(gate)) == ("the token is not signed by its device",)


@pytest.mark.attack("concurrent use of a nonce")
def test_one_of_many_concurrent_uses_of_a_nonce_is_admitted(lab: Any, tmp_path: Any) -> None:
    from fedark.attestation.nonces import NonceBook

    books = [NonceBook(tmp_path / "nonces") for _ in range(4)]
    gates = [lab.gate(nonces=book) for book in books]
    evidence = lab.evidence(gates[0])

    def attempt(index: int) -> bool:
        try:
            lab.admit(gates[index % 4], evidence)
        except EvidenceRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


def test_there_is_no_challenge_for_an_unknown_role(lab: Any) -> None:
    with pytest.raises(ProtocolError):
        lab.gate().challenge("janitor", "north", now=lab.now)


def test_an_attested_peer_cannot_be_made_changed_copied_pickled_or_derived(lab: Any) -> None:
    gate = lab.gate()
    peer = lab.admit(gate, lab.evidence(gate))
    with pytest.raises(TypeError):
        AttestedPeer()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        AttestedPeer(peer)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        peer.party = "south"
    with pytest.raises(AttributeError):
        del peer.party
    with pytest.raises(TypeError):
        copy.copy(peer)
    with pytest.raises(TypeError):
        pickle.dumps(peer)
    with pytest.raises(TypeError):
        type("Fake", (AttestedPeer,), {})
    with pytest.raises(TypeError):
        replace(peer, party="south")


@pytest.mark.slow
def test_the_type_checker_refuses_a_hand_made_attested_peer(tmp_path: Path) -> None:
    from mypy import api

    code = tmp_path / "forger.py"
    code.write_text(
        "from fedark.attestation.gate import AttestedPeer\nAttestedPeer()\nAttestedPeer(1)\n"
    )
    config = Path(__file__).parents[2] / "pyproject.toml"
    out, err, status = api.run(["--config-file", str(config), "--follow-imports=silent", str(code)])
    assert status == 1, err
    assert "[call-arg]" in out
    assert "[arg-type]" in out


def test_a_root_other_than_the_issuer_is_refused_by_the_verifier(lab: Any) -> None:
    other = SimulatedRoot(now=lab.now)
    verifier = SimulatedVerifier(other.certificate, other.crl(now=lab.now))
    token = lab.attester().quote(b"r" * 64, b"n" * 32)
    with pytest.raises(EvidenceRefused) as caught:
        verifier.verify(token, now=lab.now)
    assert "the token names another manufacturer" in caught.value.reasons


def readmit(lab: Any, evidence: bytes, crl: bytes, days: float) -> AttestedPeer:
    """By an owner who was restarted `days` after the admission, and has `crl` then."""
    return lab.gate(verifiers={"simulated": SimulatedVerifier(lab.root.certificate, crl)}).readmit(
        evidence,
        role="trainer",
        party="north",
        run_config_digest=lab.measurements["runconfig"],
        admitted=lab.now,
        now=lab.now + timedelta(days=days),
    )


def test_a_peer_is_readmitted_after_the_revocation_list_was_renewed(lab: Any) -> None:
    evidence = lab.evidence(lab.gate())
    signing = lab.admit(lab.gate(), evidence).signing_public
    old, new = lab.root.crl(now=lab.now), lab.root.crl(now=lab.now + timedelta(days=10))
    assert readmit(lab, evidence, new, 11).signing_public == signing
    assert readmit(lab, evidence, old, 11).signing_public == signing
    assert readmit(lab, evidence, new, 91).signing_public == signing, (
        "its device's certificate was valid when it was admitted"
    )


def test_a_peer_is_not_readmitted_by_a_list_from_before_it_or_from_the_future(lab: Any) -> None:
    evidence = lab.evidence(lab.gate())
    lab.admit(lab.gate(), evidence)
    before = lab.root.crl(now=lab.now - timedelta(days=31))
    future = lab.root.crl(now=lab.now + timedelta(days=10))
    for crl, days in ((before, 1), (future, 1)):
        with pytest.raises(
            EvidenceRefused, match="the revocation list for the device certificate is out of date"
        ):
            readmit(lab, evidence, crl, days)


def test_a_device_that_was_revoked_since_is_not_readmitted(lab: Any) -> None:
    evidence = lab.evidence(lab.gate())
    lab.admit(lab.gate(), evidence)
    later = lab.now + timedelta(days=10)
    lab.root.revoke(lab.device, now=later)
    with pytest.raises(EvidenceRefused, match="the device certificate is revoked"):
        readmit(lab, evidence, lab.root.crl(now=later), 11)


def test_a_renewed_list_that_begins_later_counts_for_no_first_admission(lab: Any) -> None:
    future = SimulatedVerifier(lab.root.certificate, lab.root.crl(now=lab.now + timedelta(days=10)))
    gate = lab.gate(verifiers={"simulated": future})
    (reason,) = refusal(lab, gate, lab.evidence(gate))
    assert reason == "the revocation list for the device certificate is out of date"
