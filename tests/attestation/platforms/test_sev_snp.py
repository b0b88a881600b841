"""AMD SEV-SNP: the real report verifies, and nothing else does."""

from __future__ import annotations

import os
import struct
import uuid
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vendors import CHIP, vcek_extensions
from vendors import SNP_TCB as TCB
from vendors import snp_report as report

from fedark.attestation.platforms.base import Verifier
from fedark.attestation.platforms.roots import AMD_ARK_SHA256
from fedark.attestation.platforms.sev_snp import SevSnpVerifier, SnpTcb, certificates_of_table
from fedark.attestation.platforms.sev_snp_report import REPORT_BYTES, parse_report
from fedark.attestation.policy import NotDebug
from fedark.foundation.errors import EvidenceRefused

REAL_NOW = datetime(2025, 6, 1, tzinfo=UTC)
REAL_TCB = SnpTcb(bootloader=3, tee=0, snp=8, microcode=115)
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
    ask, ark = x509.load_pem_x509_certificates((folder / "sev_snp_chain_milan.pem").read_bytes())
    return SimpleNamespace(
        report=bytes.fromhex((folder / "sev_snp_report_milan.hex").read_text()),
        vcek=(folder / "sev_snp_vcek_milan.der").read_bytes(),
        ask=ask.public_bytes(Encoding.DER),
        ark=ark.public_bytes(Encoding.DER),
    )


@pytest.fixture(scope="session")
def pki(authority):
    ark = authority.issue("ARK-Milan")
    ask = authority.issue("SEV-Milan", ark, path_length=0)
    vcek = authority.issue("SEV-VCEK", ask, ca=None, extensions=vcek_extensions())
    return SimpleNamespace(
        ark=ark, ask=ask, vcek=vcek, now=authority.now, roots={"Milan": ark.sha256}
    )


def verifier(pki, **options):
    return SevSnpVerifier(**{"minimum_tcb": {"Milan": TCB}, "roots": pki.roots, **options})


def chain(pki):
    return pki.vcek.der + pki.ask.der + pki.ark.der


def token(pki, **changed):
    return report(pki.vcek.key, **changed) + chain(pki)


def reasons(checker, data, now):
    with pytest.raises(EvidenceRefused) as refused:
        checker.verify(data, now=now)
    return " ".join(refused.value.reasons)


def test_the_real_milan_report_verifies_under_the_pinned_amd_root(real):
    checker: Verifier = SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB})
    claims = checker.verify(real.report + real.vcek + real.ask + real.ark, now=REAL_NOW)
    assert claims.platform == "sev-snp"
    assert claims.hwmodel == "amd-sev-snp-milan"
    assert claims.ueid == real.report[0x1A0:0x1E0]
    assert claims.report_data.hex().startswith("d447b55d197491bf")
    assert claims.measurements["measurement"].hex().startswith("7a1e5c266c0108db")
    assert claims.debug is False


def test_certificates_may_be_known_to_the_verifier_instead_of_in_the_token(real):
    whole = SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB}).verify(
        real.report + real.vcek + real.ask + real.ark, now=REAL_NOW
    )
    known = SevSnpVerifier(
        minimum_tcb={"Milan": REAL_TCB}, certificates=[real.ark, real.ask, real.vcek]
    )
    assert known.verify(real.report, now=REAL_NOW) == whole
    partly = SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB}, certificates=[real.ark, real.ask])
    assert partly.verify(real.report + real.vcek, now=REAL_NOW) == whole


def test_a_report_whose_key_certificate_nobody_has_is_refused(real):
    assert "VCEK certificate came with neither" in reasons(
        SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB}), real.report, REAL_NOW
    )
    assert "ASK certificate came with neither" in reasons(
        SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB}), real.report + real.vcek, REAL_NOW
    )


def test_the_pinned_milan_root_is_that_of_the_published_chain(real):
    assert (
        x509.load_der_x509_certificate(real.ark).fingerprint(hashes.SHA256())
        == AMD_ARK_SHA256["Milan"]
    )


def test_every_single_bit_flip_of_a_sample_of_the_real_report_is_refused(real, bit_flips):
    checker = SevSnpVerifier(
        minimum_tcb={"Milan": SnpTcb(0, 0, 0, 0)}, certificates=[real.ark, real.ask, real.vcek]
    )
    for flipped in bit_flips(real.report, 1184):
        with pytest.raises(EvidenceRefused):
            checker.verify(flipped, now=REAL_NOW)


def test_every_single_bit_flip_of_a_sample_of_the_real_certificates_is_refused(real, bit_flips):
    checker = SevSnpVerifier(
        minimum_tcb={"Milan": SnpTcb(0, 0, 0, 0)}, certificates=[real.ark, real.ask, real.vcek]
    )
    for flipped in bit_flips(real.vcek + real.ask + real.ark, 700):
        with pytest.raises(EvidenceRefused):
            checker.verify(real.report + flipped, now=REAL_NOW)


def test_a_platform_below_the_minimum_tcb_is_refused_part_by_part(real):
    data = real.report + real.vcek + real.ask + real.ark
    for part in ("bootloader", "tee", "snp", "microcode"):
        minimum = SnpTcb(**{**vars(REAL_TCB), part: getattr(REAL_TCB, part) + 1})
        said = reasons(SevSnpVerifier(minimum_tcb={"Milan": minimum}), data, REAL_NOW)
        assert "reported TCB is older" in said
        assert part in said


@pytest.mark.attack("low security version", mode="sev-snp")
@pytest.mark.parametrize("which", ["current", "committed", "launch"])
def test_every_tcb_of_the_report_must_reach_the_minimum(pki, which):
    old = SnpTcb(4, 0, 21, 213)
    assert f"{which} TCB is older than the minimum: snp 21 < 22" in reasons(
        verifier(pki), token(pki, **{which: old}), pki.now
    )


def test_a_product_without_a_minimum_tcb_is_refused(pki):
    assert "no minimum TCB for the product Milan" in reasons(
        verifier(pki, minimum_tcb={"Genoa": TCB}), token(pki), pki.now
    )


def test_a_genoa_chip_is_known_as_one(authority):
    ark = authority.issue("ARK-Genoa")
    ask = authority.issue("SEV-Genoa", ark, path_length=0)
    vcek = authority.issue("SEV-VCEK", ask, ca=None, extensions=vcek_extensions(product="Genoa"))
    genoa = SimpleNamespace(
        ark=ark, ask=ask, vcek=vcek, roots={"Milan": bytes(32), "Genoa": ark.sha256}
    )
    claims = verifier(genoa, minimum_tcb={"Genoa": TCB}).verify(token(genoa), now=authority.now)
    assert claims.hwmodel == "amd-sev-snp-genoa"


def test_an_expired_vcek_is_refused(real):
    late = datetime(2031, 1, 1, tzinfo=UTC)
    assert "valid from" in reasons(
        SevSnpVerifier(minimum_tcb={"Milan": REAL_TCB}),
        real.report + real.vcek + real.ask + real.ark,
        late,
    )


@pytest.mark.attack("expired certificate", mode="sev-snp")
def test_an_expired_vcek_of_our_own_is_refused(pki, authority):
    vcek = authority.issue(
        "SEV-VCEK", pki.ask, ca=None, extensions=vcek_extensions(), end=pki.now - authority.day
    )
    expired = SimpleNamespace(**{**vars(pki), "vcek": vcek})
    assert "The certificate SEV-VCEK is valid from" in reasons(
        verifier(pki), token(expired), pki.now
    )


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_reports_of_all_known_versions_verify(pki, version):
    claims = verifier(pki).verify(token(pki, version=version), now=pki.now)
    assert claims.report_data == bytes(range(100, 164))
    assert claims.measurements["host_data"] == b"\x22" * 32
    assert claims.ueid == CHIP
    assert claims.svn == 5


@pytest.mark.parametrize("version", [0, 1, 6, 1 << 31])
def test_a_report_of_an_unknown_version_is_refused(pki, version):
    assert "version" in reasons(verifier(pki), token(pki, version=version), pki.now)


@pytest.mark.attack("wrong root", mode="sev-snp")
def test_a_foreign_root_is_refused_however_well_the_path_holds(pki):
    assert "pinned AMD root key" in reasons(
        SevSnpVerifier(minimum_tcb={"Milan": TCB}), token(pki), pki.now
    )


@pytest.mark.attack("intermediate with CA:false", mode="sev-snp")
def test_an_ask_that_is_no_ca_is_refused(pki, authority):
    ask = authority.issue("SEV-Milan", pki.ark, ca=False)
    vcek = authority.issue("SEV-VCEK", ask, ca=None, extensions=vcek_extensions())
    forged = SimpleNamespace(**{**vars(pki), "ask": ask, "vcek": vcek})
    assert "CA:false" in reasons(verifier(pki), token(forged), pki.now)


def test_a_self_made_ask_of_the_right_name_is_refused(pki, authority):
    ask = authority.issue("SEV-Milan", path_length=0)
    vcek = authority.issue("SEV-VCEK", ask, ca=None, extensions=vcek_extensions())
    forged = SimpleNamespace(**{**vars(pki), "ask": ask, "vcek": vcek})
    assert "was not signed by ARK-Milan" in reasons(verifier(pki), token(forged), pki.now)


def test_an_ask_for_other_keys_of_the_same_root_is_refused(pki, authority):
    ask = authority.issue("SEV-VLEK-Milan", pki.ark, path_length=0)
    vcek = authority.issue("SEV-VCEK", ask, ca=None, extensions=vcek_extensions())
    forged = SimpleNamespace(**{**vars(pki), "ask": ask, "vcek": vcek})
    assert "not by SEV-Milan" in reasons(verifier(pki), token(forged), pki.now)


@pytest.mark.attack("revoked certificate", mode="sev-snp")
def test_a_revoked_ask_is_refused(pki, authority):
    crl = authority.revoke(pki.ark, [pki.ask.cert])
    assert "was revoked" in reasons(verifier(pki, crls=[crl]), token(pki), pki.now)


def test_an_ask_that_a_current_list_does_not_name_is_accepted(pki, authority):
    assert verifier(pki, crls=[authority.revoke(pki.ark)]).verify(token(pki), now=pki.now)


def test_a_stale_or_foreign_revocation_list_is_refused(pki, authority):
    stale = authority.revoke(pki.ark, end=authority.now - authority.day / 2)
    assert "is current from" in reasons(verifier(pki, crls=[stale]), token(pki), pki.now)
    foreign = authority.revoke(authority.issue("ARK-Milan"))
    assert "was not signed by ARK-Milan" in reasons(
        verifier(pki, crls=[foreign]), token(pki), pki.now
    )


def test_a_partial_revocation_list_is_refused(pki, authority):
    with pytest.raises(EvidenceRefused, match="critical extension"):
        verifier(pki, crls=[authority.revoke(pki.ark, critical=True)])


def test_the_vcek_of_another_chip_is_refused(pki):
    assert "of another chip" in reasons(verifier(pki), token(pki, chip=bytes(64)), pki.now)


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_the_vcek_of_another_tcb_is_refused(pki, part):
    newer = SnpTcb(**{**vars(TCB), part: getattr(TCB, part) + 1})
    assert f"The VCEK is of {part} version" in reasons(
        verifier(pki), token(pki, reported=newer), pki.now
    )


@pytest.mark.parametrize(
    "extensions",
    [
        vcek_extensions(product="Genoa-B1"),
        vcek_extensions(product=""),
        vcek_extensions(reserved=1),
        vcek_extensions()[:-1],
        vcek_extensions()[2:],
        [],
    ],
)
def test_a_vcek_with_other_or_missing_extensions_is_refused(pki, authority, extensions):
    vcek = authority.issue("SEV-VCEK", pki.ask, ca=None, extensions=extensions)
    assert "The VCEK" in reasons(
        verifier(pki), token(SimpleNamespace(**{**vars(pki), "vcek": vcek})), pki.now
    )


def test_a_vcek_on_another_curve_is_refused(pki, authority):
    vcek = authority.issue(
        "SEV-VCEK", pki.ask, ca=None, curve=ec.SECP256R1(), extensions=vcek_extensions()
    )
    assert "not a P-384 key" in reasons(
        verifier(pki), token(SimpleNamespace(**{**vars(pki), "vcek": vcek})), pki.now
    )


def test_another_signing_key_than_the_vcek_is_refused(pki):
    forged = report(ec.generate_private_key(ec.SECP384R1())) + chain(pki)
    assert "signature of the report" in reasons(verifier(pki), forged, pki.now)


def test_a_big_endian_signature_is_refused(pki):
    data = bytearray(report(pki.vcek.key))
    for at in (0x2A0, 0x2E8):
        data[at : at + 48] = data[at : at + 48][::-1]
    assert "signature of the report" in reasons(verifier(pki), bytes(data) + chain(pki), pki.now)


@pytest.mark.parametrize("at", [0x2A0, 0x2E8])
def test_a_zero_or_too_large_number_in_the_signature_is_refused(pki, at):
    good = report(pki.vcek.key)
    zero = good[:at] + bytes(72) + good[at + 72 :]
    assert "signature of the report" in reasons(verifier(pki), zero + chain(pki), pki.now)
    large = good[:at] + b"\xff" * 48 + bytes(24) + good[at + 72 :]
    assert "signature of the report" in reasons(verifier(pki), large + chain(pki), pki.now)
    longer = good[: at + 48] + b"\x01" + good[at + 49 :]
    assert "larger than P-384" in reasons(verifier(pki), longer + chain(pki), pki.now)


def test_other_report_data_than_was_signed_is_refused(pki):
    good = report(pki.vcek.key)
    swapped = good[:0x50] + bytes(64) + good[0x90:]
    assert "signature of the report" in reasons(verifier(pki), swapped + chain(pki), pki.now)


@pytest.mark.attack("debug mode", mode="sev-snp")
def test_a_debug_guest_is_known_as_one_and_refused_by_policy(pki, refusal):
    claims = verifier(pki).verify(token(pki, policy=1 << 17 | 1 << 19), now=pki.now)
    assert claims.debug is True
    (reason,) = NotDebug().reasons(claims, now=pki.now)
    refusal(f"policy: {reason}")


def test_a_guest_that_may_be_migrated_is_refused(pki):
    assert "migration agent" in reasons(
        verifier(pki), token(pki, policy=1 << 17 | 1 << 18), pki.now
    )


def test_a_policy_with_unknown_bits_is_refused(pki):
    assert "unknown bits" in reasons(verifier(pki), token(pki, policy=1 << 17 | 1 << 26), pki.now)
    assert "unknown bits" in reasons(verifier(pki), token(pki, policy=0), pki.now)


def test_a_report_from_another_privilege_level_is_refused_unless_it_is_allowed(pki):
    assert "VMPL 2" in reasons(verifier(pki), token(pki, vmpl=2), pki.now)
    assert verifier(pki, vmpls=frozenset({2})).verify(token(pki, vmpl=2), now=pki.now)


def test_a_report_that_the_host_asked_for_is_refused(pki):
    assert "guest itself" in reasons(verifier(pki), token(pki, vmpl=0xFFFFFFFF), pki.now)


def test_a_report_by_a_clouds_key_or_by_none_is_refused(pki):
    assert "a VLEK" in reasons(verifier(pki), token(pki, signer=1 << 2), pki.now)
    assert "no key" in reasons(verifier(pki), token(pki, signer=7 << 2), pki.now)
    assert "unknown key" in reasons(verifier(pki), token(pki, signer=1 << 5), pki.now)


def test_another_signature_algorithm_is_refused(pki):
    assert "algorithm" in reasons(verifier(pki), token(pki, algorithm=0), pki.now)
    assert "algorithm" in reasons(verifier(pki), token(pki, algorithm=2), pki.now)


@pytest.mark.parametrize(
    "at", [0x4C, 0x188, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x1F8, 0x207, 0x208, 0x29F]
)
def test_a_reserved_field_with_a_value_is_refused_even_when_signed(pki, at):
    assert "reserved field" in reasons(verifier(pki), token(pki, changes=[(at, b"\x01")]), pki.now)


@pytest.mark.parametrize("at", [0x330, 0x49F])
def test_the_unsigned_rest_of_the_signature_field_must_be_zero(pki, at):
    good = report(pki.vcek.key)
    assert "reserved field" in reasons(
        verifier(pki), good[:at] + b"\x01" + good[at + 1 :] + chain(pki), pki.now
    )


def test_reserved_parts_of_a_tcb_are_refused(pki):
    assert "reserved parts" in reasons(
        verifier(pki), token(pki, changes=[(0x3A, b"\x01")]), pki.now
    )


def test_trailing_bytes_are_refused(pki):
    assert reasons(verifier(pki), token(pki) + b"\x00", pki.now)
    assert reasons(verifier(pki), token(pki) + pki.ark.der, pki.now)


def test_every_truncation_is_refused(pki):
    whole = token(pki)
    for size in range(0, len(whole), 11):
        assert reasons(verifier(pki), whole[:size], pki.now)


def test_an_oversized_token_is_refused_before_it_is_parsed(pki):
    assert "over the limit" in reasons(verifier(pki), token(pki) + bytes(30000), pki.now)


@FUZZ
@given(st.binary(max_size=1400), st.integers(2, 5))
def test_arbitrary_bytes_are_refused_and_never_crash(data, version):
    checker = SevSnpVerifier(minimum_tcb={"Milan": TCB})
    padded = (
        struct.pack("<I", version)
        + (data * (REPORT_BYTES // max(1, len(data)) + 1))[: REPORT_BYTES - 4]
    )
    for candidate in (data, padded, padded + data):
        with pytest.raises(EvidenceRefused):
            checker.verify(candidate, now=REAL_NOW)


@FUZZ
@given(
    st.lists(
        st.tuples(st.integers(0, 3500), st.integers(0, 3), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_an_edited_token_is_refused_and_never_crashes(pki, edits):
    whole = token(pki)
    changed = whole
    for at, cut, put in edits:
        changed = changed[:at] + put + changed[at + cut :]
    assume(changed != whole)
    with pytest.raises(EvidenceRefused):
        verifier(pki).verify(changed, now=pki.now)


def test_a_hosts_certificate_table_is_read_in_either_byte_order():
    guids = (
        "63da758d-e664-4564-adc5-f4b93be8accd",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    )
    for order in ("bytes", "bytes_le"):
        blobs = [b"vcek", b"ask", b"ark!!"]
        header, body, at = b"", b"", 24 * 4
        for guid, blob in zip(guids, blobs, strict=True):
            header += getattr(uuid.UUID(guid), order) + struct.pack(
                "<II", at + len(body), len(blob)
            )
            body += blob
        assert certificates_of_table(header + bytes(24) + body + bytes(100)) == blobs
        assert (
            certificates_of_table(header[24:] + bytes(24) + body) == []
        )  # without a VCEK the rest is of no use


@FUZZ
@given(st.binary(max_size=200))
def test_a_garbled_certificate_table_never_crashes(table):
    assert isinstance(certificates_of_table(table), list)


def test_parsing_keeps_every_field_of_the_real_report(real):
    parsed = parse_report(real.report)
    assert parsed.reported == parsed.committed == parsed.launch == parsed.current == REAL_TCB
    assert (parsed.version, parsed.guest_svn, parsed.vmpl) == (2, 0, 0)


def test_a_report_is_verified_again_with_a_list_that_was_renewed_since(pki, authority):
    later = {"start": pki.now + 10 * authority.day, "end": pki.now + 40 * authority.day}
    now = pki.now + 31 * authority.day  # and the certificates have expired
    checker = verifier(pki, crls=[authority.revoke(pki.ark, **later)])
    assert checker.verify(token(pki), now=now, admitted=pki.now)
    assert "is current from" in reasons(checker, token(pki), pki.now)
    revoked = verifier(pki, crls=[authority.revoke(pki.ark, [pki.ask.cert], **later)])
    with pytest.raises(EvidenceRefused, match="was revoked"):
        revoked.verify(token(pki), now=now, admitted=pki.now)


@pytest.mark.parametrize(
    ("info", "holds"),
    [
        (0b000000, {"no-smt"}),
        (0b000001, set()),
        (0b010001, {"ciphertext-hiding"}),
        (0b100000, {"no-smt", "alias-check"}),
        (0b110000, {"no-smt", "ciphertext-hiding", "alias-check"}),
        (0b001110, {"no-smt"}),  # TSME, ECC, RAPL: nobody asks
    ],
)
def test_what_the_platform_says_of_itself_can_be_required(pki, info, holds):
    said = token(pki, changes=[(0x40, info.to_bytes(8, "little"))])
    every = {"no-smt", "ciphertext-hiding", "alias-check"}
    verifier(pki, requires=frozenset(holds)).verify(said, now=pki.now)
    for fact in every - holds:
        assert f"{fact} is asked for" in reasons(
            verifier(pki, requires=frozenset({fact})), said, pki.now
        )


def test_the_real_platform_has_neither_ciphertext_hiding_nor_an_alias_check(real):
    checker = SevSnpVerifier(
        minimum_tcb={"Milan": REAL_TCB},
        certificates=[real.ark, real.ask, real.vcek],
        requires=frozenset({"ciphertext-hiding", "alias-check"}),
    )
    assert len(reasons(checker, real.report, REAL_NOW).split("asked for")) == 3
