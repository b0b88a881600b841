"""Which verifiers a contract admits, built from the collateral at hand.

Collateral is named bytes that accompany evidence (RFC 9334's endorsements): it comes from the
untrusted host and is believed only as far as it chains to what the contract or the code pins.
Names, each but the first two once or with a suffix ("tdx.collateral.2"):

simulated.root, simulated.crl   DER; the manufacturer's root certificate and its revocation list
tdx.collateral                  JSON, for each kind of platform and PCK CA; TDX needs one
sev-snp.certificate             DER; a VCEK, ASK or ARK for tokens that come without
sev-snp.crl                     DER; AMD's list of revoked ASKs

Nitro needs none, and has no revocation: AWS asks that CRLs are not consulted for its chain, whose
certificates live for hours (`platforms.nitro`). What a platform's TCB must be is no matter of
collateral: the contract says it, and a party's own policy; where both speak, the stricter counts,
part by part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.guest import GuestVerifier
from fedark.attestation.platforms.base import Verifier
from fedark.attestation.platforms.nitro import NitroVerifier
from fedark.attestation.platforms.sev_snp import SevSnpVerifier, SnpTcb
from fedark.attestation.platforms.simulated import SimulatedVerifier
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.attestation.terms import AttestationTerms, SevSnpTerms, TcbTerms, TdxTerms
from fedark.foundation.errors import EvidenceRefused

__all__ = [
    "SIMULATED_CRL",
    "SIMULATED_ROOT",
    "SNP_CERTIFICATE",
    "SNP_CRL",
    "TDX_COLLATERAL",
    "unread",
    "verifiers",
]

SIMULATED_ROOT = "simulated.root"
SIMULATED_CRL = "simulated.crl"
TDX_COLLATERAL = "tdx.collateral"
SNP_CERTIFICATE = "sev-snp.certificate"
SNP_CRL = "sev-snp.crl"


def verifiers(
    terms: AttestationTerms, collateral: Mapping[str, bytes], own: AppraisalPolicy | None = None
) -> dict[str, Verifier]:
    """A verifier for each platform that the terms, and this party's own policy, admit and fedark
    can appraise.

    Args:
        terms: of the contract.
        collateral: see the module's docstring.
        own: of the party that verifies, if it has one.

    Raises:
        EvidenceRefused: the simulated root is not the one that contract and policy pin, or other
            collateral is malformed or not signed under the vendor's root.
    """
    found: dict[str, Verifier] = {}
    admitted = set(terms.platforms) if own is None else set(terms.platforms) & set(own.platforms)
    if "simulated" in admitted and SIMULATED_ROOT in collateral:
        root = collateral[SIMULATED_ROOT]
        fingerprint = hashlib.sha256(root).hexdigest()
        if fingerprint != terms.simulated_root:
            raise EvidenceRefused(
                "the simulated platform",
                ["its root certificate is not the one that the contract pins"],
            )
        pinned = None if own is None else own.rules.platforms.simulated
        if pinned is not None and fingerprint != pinned.root:
            raise EvidenceRefused(
                "the simulated platform",
                ["its root certificate is not the one that our own policy pins"],
            )
        found["simulated"] = SimulatedVerifier(root, collateral.get(SIMULATED_CRL))
    tables = [terms.hardware] if own is None else [terms.hardware, own.rules.platforms]
    if "nitro" in admitted:
        found["nitro"] = GuestVerifier(NitroVerifier())
    if "sev-snp" in admitted:
        found["sev-snp"] = GuestVerifier(
            _snp([table.sev_snp for table in tables if table.sev_snp is not None], collateral)
        )
    if "tdx" in admitted and (statements := _all(collateral, TDX_COLLATERAL)):
        found["tdx"] = GuestVerifier(
            _tdx([table.tdx for table in tables if table.tdx is not None], statements)
        )
    return found


def _snp(terms: Sequence[SevSnpTerms], collateral: Mapping[str, bytes]) -> SevSnpVerifier:
    """One that refuses whatever any of `terms` refuses."""
    products = set.intersection(*(set(one.minimum_tcb) for one in terms))
    floors = {name: [one.minimum_tcb[name] for one in terms] for name in products}
    return SevSnpVerifier(
        minimum_tcb={
            name: SnpTcb(
                **{
                    part: max(getattr(floor, part) for floor in found)
                    for part in TcbTerms.model_fields
                }
            )
            for name, found in floors.items()
        },
        certificates=_all(collateral, SNP_CERTIFICATE),
        crls=_all(collateral, SNP_CRL),
        require_crl=any(one.revocation == "required" for one in terms),
        vmpls=frozenset.intersection(*(frozenset(one.vmpls) for one in terms)),
        requires=frozenset[str]().union(*(one.requires for one in terms)),
    )


def _tdx(terms: Sequence[TdxTerms], statements: Sequence[bytes]) -> TdxVerifier:
    """One that refuses whatever any of `terms` refuses."""
    return TdxVerifier(
        statements,
        accepted=frozenset.intersection(*(frozenset(one.accepted) for one in terms)),
        minimum_evaluation=max(one.minimum_evaluation for one in terms),
    )


def _all(collateral: Mapping[str, bytes], name: str) -> list[bytes]:
    return [
        data
        for key, data in sorted(collateral.items())
        if key == name or key.startswith(f"{name}.")
    ]


def unread(collateral: Mapping[str, bytes], platforms: Sequence[str]) -> list[str]:
    """Names in `collateral` of which no verifier of these platforms makes anything: unknown ones,
    and those that repeat another's bytes.
    """
    once = {SIMULATED_ROOT, SIMULATED_CRL}
    many = (TDX_COLLATERAL, SNP_CERTIFICATE, SNP_CRL)
    seen = set[bytes]()
    found = []
    for name, data in sorted(collateral.items()):
        known = name in once or any(name == one or name.startswith(f"{one}.") for one in many)
        if not known or name.partition(".")[0] not in platforms or data in seen:
            found.append(name)
        seen.add(data)
    return found
