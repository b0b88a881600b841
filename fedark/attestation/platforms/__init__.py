"""Platforms that can attest: one module each, with attester, verifier or both, behind `base`."""
