"""A party's own policy narrows what a contract admits, never widens it, and a wrong policy file
tells all that is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.claims import SandboxFacts
from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.reference import ReferenceValues, sign_reference
from fedark.attestation.terms import AttestationTerms, HardwareTerms, SandboxPolicies
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT, TDX_COLLATERAL, verifiers
from fedark.foundation.errors import ContractError, EvidenceRefused, InputError
from fedark.foundation.keys import SigningKey

Read = Callable[..., AppraisalPolicy]
PUBLISHER = SigningKey(b"p" * 32)


def registers(lab: Any) -> dict[str, str]:
    return {name: value.hex() for name, value in lab.measurements.items() if name != "runconfig"}


def policies(lab: Any) -> dict[str, Any]:
    return {mode: one.model_dump(mode="json") for mode, one in lab.terms().policies.items()}


def form(lab: Any, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "version": 1,
        "platforms": {"simulated": {"root": lab.root.sha256}},
        "policies": policies(lab),
        "trainer": registers(lab),
    } | changes
    return {key: item for key, item in value.items() if item is not None}


@pytest.fixture
def read(lab: Any, tmp_path: Path) -> Read:
    """Writes a policy file and reads it."""

    def make(**changes: Any) -> AppraisalPolicy:
        path = tmp_path / "policy.toml"
        path.write_text(tomli_w.dumps(form(lab, **changes)), encoding="utf-8")
        return AppraisalPolicy.read(path, now=lab.now)

    return make


@pytest.fixture
def publish(lab: Any, tmp_path: Path) -> Callable[..., str]:
    """Writes a signed file of reference values beside the policy; returns its name."""

    def make(name: str, *, key: SigningKey = PUBLISHER, **changes: Any) -> str:
        fields: dict[str, Any] = {
            "role": "trainer",
            "release": name,
            "issued": lab.now.isoformat(),
            "expires": (lab.now + timedelta(days=1)).isoformat(),
            "registers": registers(lab),
            "policies": lab.terms().policies,
        }
        data = sign_reference(ReferenceValues.model_validate(fields | changes), key)
        (tmp_path / f"{name}.reference").write_bytes(data)
        return f"{name}.reference"

    return make


def refused(lab: Any, own: AppraisalPolicy, **changes: Any) -> tuple[str, ...]:
    gate = lab.gate(own=own)
    with pytest.raises(EvidenceRefused) as caught:
        lab.admit(gate, lab.evidence(gate, **changes))
    return caught.value.reasons


# -- appraisal


def test_evidence_that_meets_contract_and_policy_is_admitted(lab: Any, read: Read) -> None:
    gate = lab.gate(own=read())
    assert lab.admit(gate, lab.evidence(gate)).party == "north"


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"minimum_svn": 2}, "its security version 1 is below 2"),
        ({"sandbox": "namespaces"}, "its sandbox mode 'landlock' is weaker than 'namespaces'"),
    ],
)
def test_what_the_contract_admits_and_the_policy_does_not_is_refused(
    lab: Any, read: Read, rules: dict[str, Any], reason: str
) -> None:
    own = read(platforms={"simulated": {"root": lab.root.sha256} | rules})
    facts = SandboxFacts("landlock", b"s" * 48, b"l" * 48)
    assert refused(lab, own, attester=lab.attester(sandbox=facts)) == (reason,)


def test_simulated_evidence_is_refused_unless_the_policy_names_it(lab: Any, read: Read) -> None:
    reasons = refused(lab, read(platforms={"nitro": {}}))
    assert "evidence of platform 'simulated' is not admitted" in reasons


def test_a_policy_cannot_widen_the_contract(lab: Any, read: Read) -> None:
    own = read(
        platforms={"simulated": {"root": lab.root.sha256, "minimum_svn": 0, "sandbox": "none"}}
    )
    facts = SandboxFacts("none")
    reasons = refused(lab, own, attester=lab.attester(sandbox=facts, svn=0, debug=True))
    assert len(reasons) == 3
    assert "it runs in debug mode" in reasons


def test_other_reference_values_than_the_policys_are_refused_though_the_contract_names_them(
    lab: Any, read: Read
) -> None:
    (reason,) = refused(lab, read(trainer=registers(lab) | {"runtime": "00" * 48}))
    assert reason.startswith("register runtime is ")


def test_a_role_without_reference_values_is_refused(lab: Any, read: Read) -> None:
    reasons = refused(lab, read(trainer=None, aggregator=registers(lab)))
    assert "there are no reference values for this role" in reasons


def test_the_reasons_of_contract_and_policy_are_given_together(lab: Any, read: Read) -> None:
    own = read(
        platforms={"simulated": {"root": lab.root.sha256, "minimum_svn": 9}},
        trainer={"runtime": "00" * 48},
    )
    reasons = refused(lab, own, attester=lab.attester(debug=True, svn=0))
    assert {
        "its security version 0 is below 1",
        "its security version 0 is below 9",
        "it runs in debug mode",
    } <= set(reasons)
    assert "register launcher has no reference value" in reasons


@pytest.mark.parametrize("how", ["written out", "signed"])
def test_a_sandbox_policy_that_is_no_reference_value_is_refused_by_name(
    lab: Any, read: Read, publish: Callable[..., str], how: str
) -> None:
    if how == "signed":
        own = read(
            trainer=None,
            policies=None,
            publishers=[PUBLISHER.public.hex()],
            signed=[publish("release-1")],
        )
    else:
        own = read()
    other = lab.attester(sandbox=SandboxFacts("namespaces", b"x" * 48, b"l" * 48))
    gate = lab.gate(own=own, terms=lab.terms(sandbox="none", policies=known(b"x" * 48)))
    with pytest.raises(EvidenceRefused) as caught:
        lab.admit(gate, lab.evidence(gate, attester=other))
    assert caught.value.reasons == (
        (
            "its system call (seccomp) policy is 7878787878787878..., which is no reference value"
            " of sandbox mode 'namespaces'"
        ),
    )


def known(seccomp: bytes) -> dict[str, Any]:
    return {"namespaces": SandboxPolicies(seccomp=(seccomp.hex(),), landlock=((b"l" * 48).hex(),))}


def test_a_policy_without_reference_values_for_a_sandbox_mode_refuses_the_mode(
    lab: Any, read: Read
) -> None:
    own = read(policies={"namespaces": policies(lab)["namespaces"]})
    facts = SandboxFacts("landlock", b"s" * 48, b"l" * 48)
    assert refused(lab, own, attester=lab.attester(sandbox=facts)) == (
        "there are no reference values for the policies of sandbox mode 'landlock'",
    )


# -- signed reference values


def test_signed_reference_values_of_a_trusted_publisher_count(
    lab: Any, read: Read, publish: Callable[..., str]
) -> None:
    own = read(trainer=None, publishers=[PUBLISHER.public.hex()], signed=[publish("release-1")])
    gate = lab.gate(own=own)
    lab.admit(gate, lab.evidence(gate))


def test_one_of_several_releases_is_enough_and_none_gives_every_reason(
    lab: Any, read: Read, publish: Callable[..., str]
) -> None:
    other = {name: os.urandom(48).hex() for name in registers(lab)}
    names = [publish("release-1", registers=other), publish("release-2")]
    own = read(trainer=None, publishers=[PUBLISHER.public.hex()], signed=names)
    gate = lab.gate(own=own)
    lab.admit(gate, lab.evidence(gate))
    strange = {name: os.urandom(48) for name in lab.measurements}
    reasons = refused(lab, own, attester=lab.attester(measurements=strange))
    for release in ("release-1", "release-2"):
        assert sum(reason.startswith(f"{release} of ") for reason in reasons) == 3


def test_an_enclave_that_mixes_two_releases_is_refused(
    lab: Any, read: Read, publish: Callable[..., str]
) -> None:
    mine, other = registers(lab), {name: os.urandom(48).hex() for name in registers(lab)}
    mixed = [mine | {"runtime": other["runtime"]}, other | {"runtime": mine["runtime"]}]
    names = [publish(f"release-{index}", registers=values) for index, values in enumerate(mixed)]
    assert (
        len(refused(lab, read(trainer=None, publishers=[PUBLISHER.public.hex()], signed=names)))
        == 3
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"key": SigningKey(b"x" * 32)}, "its publisher is not one that is trusted here"),
        ({"expires": "2027-03-01T12:00:00+00:00"}, "its reference values count from"),
    ],
)
def test_a_policy_with_a_bad_signed_file_is_refused_as_a_whole(
    read: Read, publish: Callable[..., str], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ContractError, match=problem):
        read(
            publishers=[PUBLISHER.public.hex()], signed=[publish("good"), publish("bad", **changes)]
        )


def test_signed_reference_values_that_expire_while_a_node_runs_count_no_more(
    lab: Any, read: Read, publish: Callable[..., str]
) -> None:
    own = read(trainer=None, publishers=[PUBLISHER.public.hex()], signed=[publish("release-1")])
    lab.now += timedelta(days=1)
    (reason,) = refused(lab, own)
    assert reason.startswith("the reference values release-1 of ")


def test_two_signed_files_of_one_release_and_role_are_refused(
    read: Read, publish: Callable[..., str]
) -> None:
    names = [
        publish("one", release="same"),
        publish("two", release="same", registers={"launcher": "ab" * 48}),
    ]
    with pytest.raises(ContractError, match="two signed files speak of the trainer of same"):
        read(publishers=[PUBLISHER.public.hex()], signed=names)


# -- the file


def test_every_problem_of_a_policy_file_is_told_at_once(
    lab: Any, read: Read, publish: Callable[..., str]
) -> None:
    with pytest.raises(ContractError) as caught:
        read(
            version=2,
            colour="red",
            platforms={
                "simulated": {"root": "ab"},
                "tdx": {"accepted": ["Revoked"]},
                "sgx": {},
                "sev-snp": {},
            },
            trainer={"launcher": "ab"},
            signed=["../elsewhere"],
        )
    places = [problem.split(":")[0] for problem in caught.value.problems]
    for place in (
        "version",
        "colour",
        "platforms.simulated.root",
        "platforms.tdx.accepted.0",
        "platforms.sgx",
        "platforms.sev-snp.minimum_tcb",
        "trainer.launcher",
        "signed.0",
    ):
        assert place in places
    with pytest.raises(ContractError) as caught:
        read(
            platforms={},
            publishers=[PUBLISHER.public.hex()],
            signed=["none.reference", publish("x", key=SigningKey())],
        )
    assert len(caught.value.problems) == 3


def test_a_policy_that_would_admit_nobody_is_refused(read: Read) -> None:
    with pytest.raises(ContractError, match="no reference values"):
        read(trainer=None)


def test_there_is_no_key_for_debug_mode(lab: Any, read: Read) -> None:
    with pytest.raises(ContractError, match="debug: unknown key"):
        read(platforms={"simulated": {"root": lab.root.sha256, "debug": True}})


def test_a_missing_oversized_or_broken_file_is_told(lab: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(InputError, match="cannot be read"):
        AppraisalPolicy.read(path, now=lab.now)
    path.write_bytes(b"#" * (1 << 20) + b"##")
    with pytest.raises(InputError, match="larger than"):
        AppraisalPolicy.read(path, now=lab.now)
    for content in (b"a = ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ContractError):
            AppraisalPolicy.read(path, now=lab.now)


# -- verifiers


def collateral(lab: Any) -> dict[str, bytes]:
    return {SIMULATED_ROOT: lab.root.certificate, SIMULATED_CRL: lab.root.crl(now=lab.now)}


def with_tdx(lab: Any) -> AttestationTerms:
    return lab.terms(
        platforms=("simulated", "tdx"), hardware=HardwareTerms.model_validate({"tdx": {}})
    )


def test_a_verifier_is_made_for_what_contract_and_policy_both_admit(lab: Any, read: Read) -> None:
    snp = {"minimum_tcb": {"Milan": {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}}}
    hardware = HardwareTerms.model_validate({"nitro": {}, "tdx": {}, "sev-snp": snp})
    terms = lab.terms(platforms=("simulated", "nitro", "sev-snp", "tdx"), hardware=hardware)
    assert set(verifiers(terms, collateral(lab))) == {"simulated", "nitro", "sev-snp"}
    assert set(verifiers(terms, {})) == {"nitro", "sev-snp"}
    assert set(verifiers(terms, collateral(lab), read())) == {"simulated"}
    assert set(verifiers(lab.terms(), collateral(lab), read(platforms={"nitro": {}}))) == set()


def test_a_root_that_the_contract_pins_and_the_policy_does_not_is_refused(
    lab: Any, read: Read
) -> None:
    own = read(platforms={"simulated": {"root": SimulatedRoot(now=lab.now).sha256}})
    with pytest.raises(EvidenceRefused, match="our own policy pins"):
        verifiers(lab.terms(), collateral(lab), own)


def test_tdx_collateral_that_is_not_intels_is_refused(lab: Any) -> None:
    with pytest.raises(EvidenceRefused):
        verifiers(with_tdx(lab), collateral(lab) | {TDX_COLLATERAL: b"{}"})


def test_the_vendors_own_tdx_collateral_makes_a_verifier(lab: Any, shared: Path) -> None:
    data = (shared / "vectors" / "tdx_collateral.json").read_bytes()
    found = verifiers(with_tdx(lab), collateral(lab) | {f"{TDX_COLLATERAL}.milan": data})
    assert found["tdx"].platform == "tdx"
