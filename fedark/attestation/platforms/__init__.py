"""Platforms that can attest: one module each, with an attester, a verifier, or both, behind `base`."""
