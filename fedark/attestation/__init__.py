"""Remote attestation (RFC 9334): who is at the other end, and does it run what the contract names.

- binding: what an enclave wants to have confirmed: its keys, for one nonce, contract, run, role and
  party
- evidence: a platform's signed token plus that binding: what crosses the wire
- claims: what a token says once its signature and its chain were verified
- platforms: one attester and one verifier for each platform
- nonces: challenges: single use, durable
- policy: small checks of claims, each of which gives its reasons
- gate: all of it in order; the only maker of an `AttestedPeer`
"""
