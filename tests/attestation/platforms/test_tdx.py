"""Intel TDX: the real quote and collateral hold, quotes of a platform made for the tests verify,
and nothing else does.
"""

from __future__ import annotations

import os
import struct
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedark.attestation.platforms.base import Verifier
from fedark.attestation.platforms.tdx import TdxAttester, TdxVerifier
from fedark.attestation.platforms.tdx_quote import exact_quote
from fedark.attestation.policy import NotDebug
from fedark.foundation.errors import EvidenceRefused

REAL_NOW = datetime(2025, 6, 20, 12, 0, tzinfo=UTC)
# The real platform's PCK certificate is of an older TCB than the lowest level of the collateral
# that is at hand for it, so that Intel's rules refuse it for this one reason (another verifier,
# dcap-qvl 0.7, says the same of the same files).
REAL_REASON = "The platform is below every TCB level that Intel lists."
SEPT_VE_DISABLE = 1 << 28
# `FEDARK_FUZZ` sets the number of inputs for each parser; the default keeps the suite short.
FUZZ = settings(
    max_examples=int(os.environ.get("FEDARK_FUZZ", "200")),
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)


@pytest.fixture(scope="session")
def real(shared):
    folder = shared / "vectors"
    return SimpleNamespace(
        quote=exact_quote(
            bytes.fromhex((folder / "tdx_quote_v4.hex").read_text().strip().removeprefix("0x"))
        ),
        collateral=(folder / "tdx_collateral.json").read_bytes(),
    )


def reasons(checker, token, now):
    with pytest.raises(EvidenceRefused) as refused:
        checker.verify(token, now=now)
    return " ".join(refused.value.reasons)


# The real quote and collateral


def test_everything_about_the_real_quote_holds_but_its_level(real):
    assert reasons(TdxVerifier([real.collateral]), real.quote, REAL_NOW) == REAL_REASON


def test_every_single_bit_flip_of_a_sample_of_the_real_quote_is_refused_for_itself(real, bit_flips):
    checker = TdxVerifier([real.collateral])
    for flipped in bit_flips(real.quote, 1500):
        assert reasons(checker, flipped, REAL_NOW) != REAL_REASON


def test_every_single_bit_flip_of_a_sample_of_the_real_collateral_is_refused_for_itself(
    real, bit_flips
):
    for flipped in bit_flips(real.collateral, 1500):
        with pytest.raises(EvidenceRefused) as refused:
            TdxVerifier([flipped]).verify(real.quote, now=REAL_NOW)
        assert list(refused.value.reasons) != [REAL_REASON]


def test_the_real_quote_with_its_padding_is_refused_for_trailing_bytes(real):
    assert "belong to no field" in reasons(
        TdxVerifier([real.collateral]), real.quote + bytes(70), REAL_NOW
    )


def test_the_real_collateral_is_refused_when_it_has_expired(real):
    said = reasons(TdxVerifier([real.collateral]), real.quote, REAL_NOW + timedelta(days=60))
    assert "TCB info is current" in said
    assert "QE identity is current" in said
    assert "PCK revocation list is current" in said


# Acceptance


def test_a_quote_of_an_up_to_date_platform_verifies(maker):
    checker: Verifier = maker.verifier()
    claims = checker.verify(maker.quote(), now=maker.now)
    assert (claims.platform, claims.hwmodel, claims.debug) == ("tdx", "intel-tdx", False)
    assert claims.report_data == bytes(range(64))
    assert claims.ueid == bytes(range(16))
    assert claims.svn == 20240313
    assert claims.measurements["mrtd"] == b"\x01" * 48
    assert [claims.measurements[f"rtmr{index}"] for index in range(4)] == [
        bytes((index + 5,)) * 48 for index in range(4)
    ]
    assert claims.measurements["mrseam"] == b"\x5e" * 48
    assert {len(value) for value in claims.measurements.values()} == {48}


# Signatures and paths


def test_a_foreign_root_is_refused_however_well_the_path_holds(maker):
    with pytest.raises(EvidenceRefused, match="pinned Intel SGX root key"):
        TdxVerifier([maker.collateral()])


@pytest.mark.attack("wrong root", mode="tdx")
def test_a_quote_under_a_root_of_the_same_name_is_refused(maker, authority):
    other = type(maker)(authority)
    assert "pinned Intel SGX root key" in reasons(maker.verifier(), other.quote(), maker.now)


@pytest.mark.attack("intermediate with CA:false", mode="tdx")
def test_a_pck_ca_that_is_no_ca_is_refused(maker, authority):
    pck_ca = authority.issue(
        "Intel SGX PCK Platform CA", maker.root, ca=False, curve=ec.SECP256R1()
    )
    token = maker.quote(pck=maker.make_pck(pck_ca), pck_ca=pck_ca)
    assert "CA:false" in reasons(maker.verifier(), token, maker.now)


@pytest.mark.attack("expired certificate", mode="tdx")
def test_an_expired_pck_certificate_is_refused(maker):
    pck = maker.make_pck(end=maker.now - timedelta(days=1))
    assert "valid from" in reasons(maker.verifier(), maker.quote(pck=pck), maker.now)


@pytest.mark.attack("revoked certificate", mode="tdx")
def test_a_revoked_pck_certificate_is_refused(maker, authority):
    data = maker.collateral(pck_crl=authority.revoke(maker.pck_ca, [maker.pck.cert]).hex())
    assert "PCK Certificate was revoked" in reasons(maker.verifier(data), maker.quote(), maker.now)


@pytest.mark.attack("revoked certificate", mode="tdx")
def test_a_revoked_pck_ca_is_refused(maker, authority):
    data = maker.collateral(root_ca_crl=authority.revoke(maker.root, [maker.pck_ca.cert]).hex())
    assert "Platform CA was revoked" in reasons(maker.verifier(data), maker.quote(), maker.now)


@pytest.mark.attack("revoked certificate", mode="tdx")
def test_a_revoked_tcb_signer_is_refused(maker, authority):
    data = maker.collateral(root_ca_crl=authority.revoke(maker.root, [maker.signer.cert]).hex())
    assert "TCB Signing was revoked" in reasons(maker.verifier(data), maker.quote(), maker.now)


@pytest.mark.parametrize("name", ["root_ca_crl", "pck_crl"])
def test_a_stale_revocation_list_is_refused(maker, authority, name):
    issuer = maker.root if name == "root_ca_crl" else maker.pck_ca
    data = maker.collateral(
        **{name: authority.revoke(issuer, end=maker.now - timedelta(hours=1)).hex()}
    )
    assert "revocation list is current" in reasons(maker.verifier(data), maker.quote(), maker.now)


@pytest.mark.parametrize("name", ["root_ca_crl", "pck_crl"])
def test_a_revocation_list_that_another_key_signed_is_refused(maker, authority, name):
    issuer = maker.root if name == "root_ca_crl" else maker.pck_ca
    forged = SimpleNamespace(cert=issuer.cert, key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(EvidenceRefused, match="was not signed by"):
        maker.verifier(maker.collateral(**{name: authority.revoke(forged).hex()}))


def test_a_pck_certificate_of_another_name_is_refused(maker):
    token = maker.quote(pck=maker.make_pck(name="Intel SGX Something Else"))
    assert "not a PCK certificate" in reasons(maker.verifier(), token, maker.now)


@pytest.mark.parametrize("part", ["qe_key", "quote_key"])
def test_a_signature_by_another_key_is_refused(maker, part):
    token = maker.quote(**{part: ec.generate_private_key(ec.SECP256R1())})
    assert "does not verify" in reasons(maker.verifier(), token, maker.now)


def test_an_attestation_key_that_the_quoting_enclave_did_not_vouch_for_is_refused(maker):
    assert "did not vouch" in reasons(
        maker.verifier(), maker.quote(vouched=bytes(range(32))), maker.now
    )
    assert "did not vouch" in reasons(maker.verifier(), maker.quote(qe=[(352, b"\x01")]), maker.now)


def test_an_attestation_key_that_is_no_point_is_refused(maker):
    token = bytearray(maker.quote())
    token[636 + 64 : 636 + 128] = b"\xff" * 64
    assert "signature of the quote" in reasons(maker.verifier(), bytes(token), maker.now)


@pytest.mark.parametrize("at", [636, 636 + 32])
def test_a_signature_with_a_zero_or_too_large_number_is_refused(maker, at):
    for value in (bytes(32), b"\xff" * 32):
        token = maker.quote()
        assert "signature of the quote" in reasons(
            maker.verifier(), token[:at] + value + token[at + 32 :], maker.now
        )


def test_other_report_data_than_was_signed_is_refused(maker):
    token = maker.quote()
    assert "signature of the quote" in reasons(
        maker.verifier(), token[:568] + bytes(64) + token[632:], maker.now
    )


def test_a_pck_key_on_another_curve_is_refused(maker):
    pck = maker.make_pck(curve=ec.SECP384R1())
    assert "under the PCK" in reasons(maker.verifier(), maker.quote(pck=pck), maker.now)


# The guest


def test_a_debug_guest_is_known_as_one_and_refused_by_policy(maker):
    claims = maker.verifier().verify(maker.quote(attributes=SEPT_VE_DISABLE | 1), now=maker.now)
    assert claims.debug is True
    assert list(NotDebug().reasons(claims, now=maker.now))


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        (0, "page faults"),
        (SEPT_VE_DISABLE | 1 << 29, "moved to another machine"),
        (SEPT_VE_DISABLE | 1 << 1, "does not know"),
        (SEPT_VE_DISABLE | 1 << 40, "does not know"),
    ],
)
def test_a_guest_with_dangerous_or_unknown_attributes_is_refused(maker, attributes, said):
    assert said in reasons(maker.verifier(), maker.quote(attributes=attributes), maker.now)


# Form


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((3, 2, 0x81, 0), "version 3"),
        ((5, 2, 0x81, 0), "version 5"),
        ((4, 3, 0x81, 0), "of type 3"),
        ((4, 2, 0, 0), "another kind of enclave"),
        ((4, 2, 0x81, 1), "reserved"),
    ],
)
def test_a_signed_header_of_another_kind_is_refused(maker, fields, said):
    header = struct.pack("<HHII", *fields) + maker.intel_qe + bytes(20)
    assert said in reasons(maker.verifier(), maker.quote(header=header), maker.now)


def test_a_quoting_enclave_of_another_vendor_is_refused(maker):
    header = struct.pack("<HHII", 4, 2, 0x81, 0) + bytes(36)
    assert "not Intel's" in reasons(maker.verifier(), maker.quote(header=header), maker.now)


@pytest.mark.parametrize("kinds", [(5, 5), (6, 6), (6, 4), (1, 5)])
def test_other_certification_data_is_refused(maker, kinds):
    assert "certification data" in reasons(maker.verifier(), maker.quote(kinds=kinds), maker.now)


def test_a_pck_path_in_any_other_form_than_its_canonical_one_is_refused(maker):
    good = maker.pck.pem + maker.pck_ca.pem + maker.root.pem
    assert maker.verifier().verify(maker.quote(pem=good), now=maker.now)
    for pem in (
        good + b"\n",
        b" " + good,
        good + b"\x00\x00",
        good.replace(b"\n", b"\r\n"),
        b"# a comment\n" + good,
        maker.pck.pem + maker.pck_ca.pem,
        good + maker.root.pem,
        maker.root.pem + maker.pck_ca.pem + maker.pck.pem,
        b"",
    ):
        assert reasons(maker.verifier(), maker.quote(pem=pem), maker.now)


def test_trailing_bytes_are_refused_wherever_they_stand(maker):
    token = maker.quote()
    assert "belong to no field" in reasons(maker.verifier(), token + b"\x00", maker.now)
    size = struct.unpack_from("<I", token, 632)[0]
    longer = token[:632] + struct.pack("<I", size + 1) + token[636:] + b"\x00"
    assert "belong to no field" in reasons(maker.verifier(), longer, maker.now)


def test_every_truncation_is_refused(maker):
    token = maker.quote()
    checker = maker.verifier()
    for size in range(0, len(token), 13):
        assert reasons(checker, token[:size], maker.now)


def test_an_oversized_quote_is_refused_before_it_is_parsed(maker):
    assert "over the limit" in reasons(maker.verifier(), maker.quote() + bytes(1 << 14), maker.now)


@pytest.mark.parametrize(
    "malformed",
    [
        lambda maker: b"",
        lambda maker: b"\x30\x00",
        lambda maker: maker.sgx_extension(ppid=bytes(15)),
        lambda maker: maker.sgx_extension(fmspc=bytes(5)),
        lambda maker: maker.sgx_extension(pceid=bytes(3)),
        lambda maker: maker.sgx_extension(components=(3,) * 15),
        lambda maker: maker.sgx_extension(components=(0x80,) + (3,) * 15),
        lambda maker: maker.sgx_extension() + b"\x00",
        lambda maker: maker.sgx_extension()[:-1],
        lambda maker: maker.tlv(0x31, maker.sgx_extension()[4:]),
    ],
)
def test_a_malformed_sgx_extension_is_refused(maker, malformed):
    token = maker.quote(pck=maker.make_pck(extension=malformed(maker)))
    assert "SGX extension" in reasons(maker.verifier(), token, maker.now)


def test_a_pck_certificate_without_an_sgx_extension_is_refused(maker):
    token = maker.quote(pck=maker.make_pck(extensions=[]))
    assert "SGX extension" in reasons(maker.verifier(), token, maker.now)


# Fuzzing, and the attester


@FUZZ
@given(st.binary(max_size=6000), st.integers(0, 5500))
def test_arbitrary_bytes_are_refused_and_never_crash(maker, data, at):
    token = maker.quote()
    checker = maker.verifier()
    for candidate in (
        data,
        token[: min(at, len(token) - 1)] + data,
        token[:at] + data[:8] + token[at + 8 :] + b"\x01",
    ):
        assume(candidate != token)
        with pytest.raises(EvidenceRefused):
            checker.verify(candidate, now=maker.now)


def test_the_attester_takes_the_padding_off_and_its_quote_verifies(maker, tmp_path):
    class Kernel:
        def make(self, entry):
            entry.mkdir()

        def remove(self, entry):
            entry.rmdir()

        def write(self, attribute, data):
            self.data = data

        def read(self, attribute):
            written = hasattr(self, "data")
            return {
                "provider": b"tdx_guest\n",
                "generation": b"1\n" if written else b"0\n",
                "outblob": maker.quote(report_data=self.data) + bytes(3000) if written else b"",
                "auxblob": b"",
            }[attribute.name]

    token = TdxAttester(folder=tmp_path, files=Kernel()).quote(b"\x2a" * 64, bytes(32))
    assert maker.verifier().verify(token, now=maker.now).report_data == b"\x2a" * 64


# Readmission: a token that was verified before, and collateral that was renewed since


def renewed(maker, days, *revoked):
    """Collateral that Intel has signed `days` later."""
    later = maker.now + timedelta(days=days)
    period = {
        "issueDate": f"{later:%Y-%m-%dT%H:%M:%SZ}",
        "nextUpdate": f"{later + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}",
    }
    return maker.collateral(
        info=maker.tcb_info() | period,
        identity=maker.qe_identity() | period,
        root_ca_crl=maker.authority.revoke(
            maker.root, start=later, end=later + timedelta(days=30)
        ).hex(),
        pck_crl=maker.authority.revoke(
            maker.pck_ca, revoked, start=later, end=later + timedelta(days=30)
        ).hex(),
    )


def test_a_quote_is_verified_again_with_collateral_that_was_renewed_since(maker):
    token, now = maker.quote(), maker.now + timedelta(days=11)
    checker = maker.verifier(renewed(maker, 10))
    assert checker.verify(token, now=now, admitted=maker.now)
    assert "is current from" in reasons(checker, token, maker.now), (
        "a first admission asks for what is current now"
    )
    with pytest.raises(EvidenceRefused, match="is current from"):
        maker.verifier(renewed(maker, -60)).verify(token, now=now, admitted=maker.now)


def test_a_platform_that_was_revoked_since_is_not_verified_again(maker):
    checker = maker.verifier(renewed(maker, 10, maker.pck.cert))
    with pytest.raises(EvidenceRefused, match="was revoked"):
        checker.verify(maker.quote(), now=maker.now + timedelta(days=11), admitted=maker.now)
