"""Which verifiers a contract admits, built from the collateral at hand.

Collateral is named bytes that accompany evidence (RFC 9334's endorsements): it comes from the untrusted host and is believed only
as far as it chains to what the contract or the code pins. Names, each but the first two once or with a suffix ("tdx.collateral.2"):

simulated.root, simulated.crl   DER; the manufacturer's root certificate and its revocation list
tdx.collateral                  JSON, one for each kind of platform and PCK CA; without any, TDX is not verified
sev-snp.certificate             DER; a VCEK, ASK or ARK for tokens that come without
sev-snp.crl                     DER; AMD's list of revoked ASKs

Nitro needs none. What a platform's TCB must be is no matter of collateral: a party says so in its own appraisal policy. Without
one, TDX must be "UpToDate", and SEV-SNP is refused, because no minimum TCB holds for all of its products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.platforms.base import Verifier
from fedark.attestation.platforms.nitro import NitroVerifier
from fedark.attestation.platforms.sev_snp import SevSnpVerifier
from fedark.attestation.platforms.simulated import SimulatedVerifier
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.contract import AttestationTerms
from fedark.errors import EvidenceRefused

__all__ = ["SIMULATED_CRL", "SIMULATED_ROOT", "SNP_CERTIFICATE", "SNP_CRL", "TDX_COLLATERAL", "verifiers"]

SIMULATED_ROOT = "simulated.root"
SIMULATED_CRL = "simulated.crl"
TDX_COLLATERAL = "tdx.collateral"
SNP_CERTIFICATE = "sev-snp.certificate"
SNP_CRL = "sev-snp.crl"


def verifiers(
    terms: AttestationTerms, collateral: Mapping[str, bytes], own: AppraisalPolicy | None = None
) -> dict[str, Verifier]:
    """A verifier for each platform that the terms, and this party's own policy, admit and fedark can appraise.

    Args:
        terms: of the contract.
        collateral: see the module's docstring.
        own: of the party that verifies, if it has one.

    Raises:
        EvidenceRefused: the simulated root is not the one that contract and policy pin, or other collateral is malformed or not
            signed under the vendor's root.
    """
    found: dict[str, Verifier] = {}
    admitted = set(terms.platforms) if own is None else set(terms.platforms) & set(own.platforms)
    rules = None if own is None else own.rules.platforms
    if "simulated" in admitted:
        root = collateral.get(SIMULATED_ROOT, b"")
        fingerprint = hashlib.sha256(root).hexdigest()
        if fingerprint != terms.simulated_root:
            raise EvidenceRefused("the simulated platform", ["its root certificate is not the one that the contract pins"])
        if rules is not None and rules.simulated is not None and fingerprint != rules.simulated.root:
            raise EvidenceRefused("the simulated platform", ["its root certificate is not the one that our own policy pins"])
        found["simulated"] = SimulatedVerifier(root, collateral.get(SIMULATED_CRL))
    if "nitro" in admitted:
        found["nitro"] = NitroVerifier()
    if "sev-snp" in admitted:
        snp = rules.sev_snp if rules is not None else None
        found["sev-snp"] = SevSnpVerifier(
            minimum_tcb={} if snp is None else {product: tcb.tcb() for product, tcb in snp.minimum_tcb.items()},
            certificates=_all(collateral, SNP_CERTIFICATE),
            crls=_all(collateral, SNP_CRL),
            vmpls=frozenset({0} if snp is None else snp.vmpls),
        )
    if "tdx" in admitted and (statements := _all(collateral, TDX_COLLATERAL)):
        tdx = rules.tdx if rules is not None else None
        found["tdx"] = TdxVerifier(statements, accepted=frozenset({"UpToDate"} if tdx is None else tdx.accepted))
    return found


def _all(collateral: Mapping[str, bytes], name: str) -> list[bytes]:
    return [data for key, data in sorted(collateral.items()) if key == name or key.startswith(f"{name}.")]
