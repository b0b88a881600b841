"""The key broker: a provider's node answers release requests directly over TLS, for enclaves
outside a Flower run.

The same gate, nonce book, release policy, `release` function and log as in a run
(`fedark.stages.provider`); only the way is another. As there, the one who brings a request is
trusted with nothing: TLS tells the caller whom it talks to, and hides from others who asks; what
lets a key go is evidence.

- keys: challenge and release, without transport
- server: gRPC around it: TLS, deadlines, limits, health; no reflection
- client: what an enclave's host calls
"""
