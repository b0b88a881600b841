"""Intel TDX: what Intel's signed statements say of a platform, and which of them count."""

from __future__ import annotations

import copy
import json
import os
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.foundation.errors import EvidenceRefused, InputError

# `FEDARK_FUZZ` sets the number of inputs for each parser; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "200")),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)


def reasons(checker, token, now):
    with pytest.raises(EvidenceRefused) as refused:
        checker.verify(token, now=now)
    return " ".join(refused.value.reasons)


def refused_collateral(maker, data):
    with pytest.raises(EvidenceRefused) as refused:
        maker.verifier(data)
    return " ".join(refused.value.reasons)


# Choice and TCB


def test_collateral_is_chosen_by_kind_of_platform(maker):
    other = maker.tcb_info() | {"fmspc": "FF" * 6}
    both = TdxVerifier(
        [maker.collateral(info=other), maker.collateral()], root_key=maker.root.point
    )
    assert both.verify(maker.quote(), now=maker.now)
    assert "No collateral is at hand" in reasons(
        maker.verifier(maker.collateral(info=other)), maker.quote(), maker.now
    )


def test_newer_collateral_counts_and_not_older(maker):
    older = maker.tcb_info() | {"issueDate": f"{maker.now - timedelta(days=9):%Y-%m-%dT%H:%M:%SZ}"}
    newer = copy.deepcopy(maker.tcb_info())
    newer["tcbLevels"][0]["tcbStatus"] = "OutOfDate"
    both = [maker.collateral(info=older), maker.collateral(info=newer)]
    for collateral in (both, both[::-1]):
        assert "TCB is OutOfDate" in reasons(
            TdxVerifier(collateral, root_key=maker.root.point), maker.quote(), maker.now
        )


def test_module_version_zero_is_measured_by_the_platforms_levels_alone(maker):
    assert maker.verifier().verify(
        maker.quote(tee_tcb_svn=bytes((5, 0, 3)) + bytes(13)), now=maker.now
    )
    assert "OutOfDate" in reasons(
        maker.verifier(), maker.quote(tee_tcb_svn=bytes((3, 0, 3)) + bytes(13)), maker.now
    )


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"tee": (5, 1, 2)}, "SWHardeningNeeded"),
        ({"pcesvn": 10}, "ConfigurationNeeded"),
        ({"components": (1,) * 16}, "OutOfDate"),
        ({"components": (3,) * 15 + (2,)}, "SWHardeningNeeded"),
        ({"components": (0,) * 16}, "Revoked"),
        ({"tee": (2, 1, 3)}, "OutOfDate"),  # the module
        ({"tee": (1, 1, 3)}, "Revoked"),
        ({"isvsvn": 3}, "OutOfDate"),  # the quoting enclave
        ({"isvsvn": 2}, "Revoked"),
        ({"isvsvn": 3, "tee": (5, 1, 2)}, "OutOfDate"),
        ({"isvsvn": 3, "pcesvn": 10}, "OutOfDateConfigurationNeeded"),
        ({"tee": (2, 1, 3), "pcesvn": 10}, "OutOfDateConfigurationNeeded"),
        ({"isvsvn": 2, "pcesvn": 10}, "Revoked"),
    ],
)
def test_a_state_below_up_to_date_is_refused_unless_the_policy_names_it(maker, changed, status):
    extension = maker.sgx_extension(
        **{name: changed[name] for name in ("components", "pcesvn") if name in changed}
    )
    token = maker.quote(
        pck=maker.make_pck(extension=extension),
        tee_tcb_svn=bytes(changed.get("tee", (5, 1, 3))) + bytes(13),
        isvsvn=changed.get("isvsvn", 4),
    )
    said = reasons(maker.verifier(), token, maker.now)
    assert f"TCB is {status} (Intel's advisories: INTEL-SA-" in said
    if status == "Revoked":
        return
    lenient = maker.verifier(accepted=frozenset({"UpToDate", status}))
    assert lenient.verify(token, now=maker.now).svn < 20240313
    stricter = maker.verifier(
        accepted=frozenset({"UpToDate", "OutOfDate", "SWHardeningNeeded"} - {status})
    )
    assert status in reasons(stricter, token, maker.now)


@pytest.mark.parametrize(
    "changed",
    [
        {"tee_tcb_svn": bytes((0, 1, 3)) + bytes(13)},
        {"isvsvn": 1},
        {"tee_tcb_svn": bytes((9, 2, 3)) + bytes(13)},
    ],
)
def test_a_part_that_intel_does_not_list_is_refused_whatever_is_accepted(maker, changed):
    everything = frozenset(
        {
            "UpToDate",
            "OutOfDate",
            "SWHardeningNeeded",
            "ConfigurationNeeded",
            "OutOfDateConfigurationNeeded",
        }
    )
    said = reasons(maker.verifier(accepted=everything), maker.quote(**changed), maker.now)
    assert "below every TCB level" in said or "does not know version 2" in said


@pytest.mark.parametrize("state", ["Revoked", "uptodate", ""])
def test_a_policy_cannot_accept_revoked_or_unknown_states(maker, state):
    with pytest.raises(InputError, match="no policy can accept"):
        maker.verifier(accepted=frozenset({"UpToDate", state}))


def test_a_module_of_another_signer_or_with_attributes_is_refused(maker):
    assert "TDX module is not one" in reasons(
        maker.verifier(), maker.quote(mrsignerseam=b"\x01" * 48), maker.now
    )
    assert "TDX module is not one" in reasons(
        maker.verifier(), maker.quote(seamattributes=b"\x01" + bytes(7)), maker.now
    )


def test_another_fmspc_or_pce_id_is_refused(maker):
    pck = maker.make_pck(extension=maker.sgx_extension(pceid=b"\x00\x01"))
    assert "another kind of platform" in reasons(maker.verifier(), maker.quote(pck=pck), maker.now)
    pck = maker.make_pck(extension=maker.sgx_extension(fmspc=b"\xff" * 6))
    assert "No collateral is at hand" in reasons(maker.verifier(), maker.quote(pck=pck), maker.now)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (16, b"\x01", "miscselect"),
        (48, b"\x13", "attributes"),  # SGX debug
        (128, b"\x00", "not Intel's TD quoting enclave"),
        (256, b"\x01", "not Intel's TD quoting enclave"),
    ],
)
def test_another_quoting_enclave_than_intels_is_refused(maker, at, value, said):
    assert said in reasons(maker.verifier(), maker.quote(qe=[(at, value)]), maker.now)


# Collateral


def test_collateral_signed_by_another_certificate_of_intels_is_refused(maker, authority):
    pck_like = authority.issue(
        "Intel SGX PCK Certificate", maker.root, ca=False, curve=ec.SECP256R1()
    )
    assert "TCB Signing" in refused_collateral(maker, maker.collateral(signer=pck_like))


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_an_edited_statement_is_refused(maker, name):
    text = json.loads(maker.collateral())[name]
    edited = maker.collateral(**{name: text.replace("OutOfDate", "UpToDate")})
    assert f"signature of the {name} does not verify" in refused_collateral(maker, edited)


def test_statements_swapped_for_each_other_are_refused(maker):
    fields = json.loads(maker.collateral())
    swapped = maker.collateral(
        tcb_info=fields["qe_identity"], tcb_info_signature=fields["qe_identity_signature"]
    )
    assert refused_collateral(maker, swapped)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "SGX"},
        {"version": 2},
        {"tcbType": 1},
        {"fmspc": "00"},
        {"pceId": None},
        {"issueDate": "yesterday"},
        {"tcbLevels": None},
        {"tcbLevels": [{}]},
        {"tdxModule": {}},
        {"tdxModuleIdentities": [{"id": 1}]},
    ],
    ids=str,
)
def test_a_signed_tcb_info_of_another_kind_or_form_is_refused(maker, change):
    assert refused_collateral(maker, maker.collateral(info=maker.tcb_info() | change))


def test_a_signed_tcb_info_with_an_unknown_state_is_refused(maker):
    info = copy.deepcopy(maker.tcb_info())
    info["tcbLevels"][0]["tcbStatus"] = "Fine"
    assert refused_collateral(maker, maker.collateral(info=info))


@pytest.mark.parametrize(
    "change",
    [{"id": "QE"}, {"version": 1}, {"mrsigner": "00"}, {"tcbLevels": 5}, {"miscselect": 0}],
    ids=str,
)
def test_a_signed_qe_identity_of_another_kind_or_form_is_refused(maker, change):
    assert refused_collateral(maker, maker.collateral(identity=maker.qe_identity() | change))


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_a_statement_that_is_not_current_is_refused(maker, name):
    early = maker.now - timedelta(days=3)
    period = {
        "issueDate": f"{early:%Y-%m-%dT%H:%M:%SZ}",
        "nextUpdate": f"{early + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}",
    }
    if name == "tcb_info":
        data = maker.collateral(info=maker.tcb_info() | period)
    else:
        data = maker.collateral(identity=maker.qe_identity() | period)
    assert "is current from" in reasons(maker.verifier(data), maker.quote(), maker.now)


@pytest.mark.parametrize(
    "change",
    [
        {"tcb_info": None},
        {"more": "text"},
        {"pck_crl": "zz"},
        {"pck_crl": ""},
        {"pck_crl": "00"},
        {"tcb_info_signature": "00" * 63},
        {"tcb_info": 5},
        {"tcb_info": "\ud800"},
        {"root_ca_crl": "AB"},
        {"pck_crl_issuer_chain": ""},
    ],
    ids=str,
)
def test_malformed_collateral_is_refused(maker, change):
    assert refused_collateral(maker, maker.collateral(**change))


def test_duplicate_keys_in_collateral_are_refused(maker):
    data = maker.collateral()
    assert refused_collateral(maker, data[:-1] + b', "tcb_info": "{}"}')


def test_oversized_and_deep_collateral_is_refused(maker):
    assert "too large" in refused_collateral(maker, maker.collateral() + b" " * (1 << 20))
    assert refused_collateral(maker, b"[" * 100_000)


# Fuzzing, and another verifier


@FUZZ
@given(
    st.binary(max_size=300),
    st.recursive(
        st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
)
def test_arbitrary_collateral_is_refused_and_never_crashes(maker, data, value):
    for candidate in (
        data,
        json.dumps(value).encode(),
        maker.collateral(tcb_info=json.dumps(value), pck_crl=data.hex()),
    ):
        with pytest.raises(EvidenceRefused):
            maker.verifier(candidate)


_JSON = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.none(), max_size=2)
    | st.just({})
)


@FUZZ
@given(st.sampled_from(["info", "identity"]), st.data())
def test_signed_statements_with_arbitrary_values_are_refused_or_read_and_never_crash(
    maker, which, data
):
    statement = maker.tcb_info() if which == "info" else maker.qe_identity()
    statement[data.draw(st.sampled_from(sorted(statement)))] = data.draw(_JSON)
    try:
        checker = maker.verifier(maker.collateral(**{which: statement}))
        checker.verify(maker.quote(), now=maker.now)
    except EvidenceRefused:
        pass


@FUZZ
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 4)), max_size=2),
    st.sampled_from([4, 5, 10, 11, 12]),
    st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 1, 1, 2, 3]), st.integers(0, 4)),
    st.integers(1, 5),
)
def test_another_verifier_finds_the_same_state_of_any_platform(
    maker, common, single, pcesvn, tee, isvsvn
):
    oracle = pytest.importorskip(
        "dcap_qvl", reason="dcap-qvl, the other verifier, is not installed"
    )
    components = [common] * 16
    for index, svn in single:
        components[index] = svn
    collateral = maker.collateral()
    pck = maker.make_pck(extension=maker.sgx_extension(components=components, pcesvn=pcesvn))
    token = maker.quote(pck=pck, tee_tcb_svn=bytes(tee) + bytes(13), isvsvn=isvsvn)
    theirs = oracle.QuoteCollateralV3.from_json(collateral.decode())
    try:
        status = oracle.verify_with_root_ca(
            token, theirs, maker.root.der, int(maker.now.timestamp())
        ).status
    except ValueError:
        status = "Revoked"  # it refuses the whole quote
    if status == "UpToDate":
        assert maker.verifier(collateral).verify(token, now=maker.now)
        return
    said = reasons(maker.verifier(collateral), token, maker.now)
    if status == "Revoked":
        assert (
            "Revoked" in said or "below every TCB level" in said or "does not know version" in said
        )
    else:
        assert f"TCB is {status} " in said
        assert maker.verifier(collateral, accepted=frozenset({status})).verify(token, now=maker.now)
