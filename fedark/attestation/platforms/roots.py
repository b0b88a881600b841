"""The vendors' roots of trust, pinned in code and by nothing that arrives with evidence.

Each figure was compared with the vendor's own publication and with at least two independent
verifiers that pin it. A verifier takes its root as an argument with these as the default, so that a
test can inject a root of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["AMD_ARK_SHA256", "AWS_NITRO_ROOT_SHA256", "INTEL_SGX_ROOT_PUBLIC_KEY"]

# SHA-256 of the DER form of "aws.nitro-enclaves", root G1, valid 2019-10-28 to 2049-10-28.
# Published by AWS: https://docs.aws.amazon.com/enclaves/latest/user/verify-root.html (fingerprint
# 64:1A:03:21:...:BB:5B); the certificate itself is in
# https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip.
AWS_NITRO_ROOT_SHA256 = bytes.fromhex(
    "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
)

# SHA-256 of the DER form of each self-signed AMD root key certificate, by product name.
# Published by AMD: https://kdsintf.amd.com/vcek/v1/{Milan,Genoa}/cert_chain, the second certificate
# ("VCEK Certificate and KDS Interface Specification", 57230). The Genoa figure is also that of
# verify/trust/ask_ark_genoa_vlek.pem in github.com/google/go-sev-guest; Bergamo and Siena chain to
# it too.
AMD_ARK_SHA256: Mapping[str, bytes] = MappingProxyType(
    {
        "Milan": bytes.fromhex("69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"),
        "Genoa": bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"),
    }
)

# The uncompressed P-256 point of "Intel SGX Root CA", valid 2018-05-21 to 2049-12-31. The key is
# pinned and not the certificate, because Intel has re-issued the certificate under the same key.
# Published by Intel:
# https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.pem;
# the same point is pinned by Automata's on-chain DCAP verifier (ROOTCA_PUBKEY_HASH) after Intel's
# quote verification library.
INTEL_SGX_ROOT_PUBLIC_KEY = bytes.fromhex(
    "040ba9c4c0c0c86193a3fe23d6b02cda10a8bbd4e88e48b4458561a36e705525f5"
    "67918e2edc88e40d860bd0cc4ee26aacc988e505a953558c453f6b0904ae7394"
)
