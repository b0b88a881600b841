"""Keys of a masked session: what every secret is derived from, and to what it is bound.

    sid        = SHA-256 [label, terms digest, directory]
                 (every announcement's key and nonce is in the directory)
    chain_0    = HKDF-SHA256(X25519(u, v), salt = sid, info = [label, lower name, higher name])
                 (once a session)
    chain_r+1  = HKDF-Expand(chain_r, "step")
                 (the old value is dropped: a round cannot be derived again)
    ctx        = SHA-256 [label, sid, round, layout, model digest, participants]
    pair_r     = HKDF-Expand(chain_r, ["round", ctx])
    s_uv       = HKDF-Expand(pair_r, "mask")
                 (AES-256 key of the pair's mask in this round alone)
    seal_u->v  = HKDF-Expand(pair_r, ["seal", sender, salt])
                 (AES-256-GCM key of one message)
    b_u        = 32 random bytes
                 (AES-256 key of the self-mask)

Agreeing keys once a session and deriving a fresh seed for each round follows Flamingo (Ma et al.
2023): a seed that recovery reveals is the output of a PRF at ctx and tells nothing about the pair's
other rounds. Two clients that were shown different models, cohorts or layouts hold different ctx,
so their masks do not cancel and their shares do not open: this stops model inconsistency (Pasquini
et al., "Eluding Secure Aggregation", 2022). HKDF: RFC 5869; X25519: RFC 7748.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedark.foundation import canonical
from fedark.foundation.errors import Refused

__all__ = [
    "Chain",
    "commitment",
    "context",
    "key_class",
    "mask_seed",
    "pair_root",
    "round_info",
    "seal_info",
    "seal_key",
    "session_id",
    "survivors_digest",
    "topology_seed",
]

_LABEL = "fedark/secagg/1/"


def _hash(kind: str, *parts: Any) -> bytes:
    return hashlib.sha256(canonical.encode([_LABEL + kind, *parts])).digest()


def _info(kind: str, *parts: Any) -> bytes:
    return canonical.encode([_LABEL + kind, *parts])


_STEP, _MASK, _TOPOLOGY = _info("step"), _info("mask"), _info("topology")


def _expand(key: bytes, info: bytes) -> bytes:
    return HKDFExpand(SHA256(), 32, info).derive(key)


def session_id(policy_digest: bytes, entries: Iterable[tuple[str, bytes, bytes, bytes]]) -> bytes:
    """sid, from the directory's (party, X25519 key, nonce, signing key) in order."""
    return _hash("session", policy_digest, [list(entry) for entry in entries])


_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))


def key_class(public: bytes, theirs: str) -> bytes:
    """The same 32 bytes for all keys that agree on the same secrets with everybody, and for no
    others.

    X25519 ignores the top bit of a key, takes the rest modulo p, and multiplies by 8: keys that
    differ by a point of small order agree too. A product with any fixed secret key has lost what
    sets such keys apart.

    Raises:
        Refused: `public` is a point of small order.
    """
    return _exchange(_PROBE, public, theirs)


def pair_root(secret: X25519PrivateKey, public: bytes, sid: bytes, mine: str, theirs: str) -> bytes:
    """chain_0 of two parties; the same on both sides.

    Raises:
        Refused: `public` is a point of small order.
    """
    return HKDF(SHA256(), 32, sid, _info("pair", *sorted((mine, theirs)))).derive(
        _exchange(secret, public, theirs)
    )


def _exchange(secret: X25519PrivateKey, public: bytes, theirs: str) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused(
            f"The key that {theirs} announced is not a usable X25519 key.",
            safe="No mask was made with it.",
        ) from None


class Chain:
    """The ratchet of one pair. It only moves forward."""

    __slots__ = ("_key", "_round")

    def __init__(self, root: bytes, number: int = 0) -> None:
        self._key = root
        self._round = number

    def state(self) -> tuple[bytes, int]:
        """What makes the same chain: its key and the first round that it still has."""
        return self._key, self._round

    def take(self, number: int, info: bytes) -> bytes:
        """pair_r for round `number`, which cannot be taken again afterwards. `info`:
        `round_info(ctx)`.
        """
        if number < self._round:
            raise Refused(f"Round {number} is over.", safe="Its keys no longer exist.")
        for _ in range(number - self._round):
            self._key = _expand(self._key, _STEP)
        secret = _expand(self._key, info)
        self._key = _expand(self._key, _STEP)
        self._round = number + 1
        return secret


def round_info(ctx: bytes) -> bytes:
    """The info string of pair_r."""
    return _info("round", ctx)


def context(
    sid: bytes, number: int, layout: str, model_digest: bytes, participants: list[int]
) -> bytes:
    """ctx: everything that makes a round what it is. `participants`: indices in the directory,
    ascending.
    """
    return _hash("context", sid, number, layout, model_digest, participants)


def mask_seed(pair: bytes) -> bytes:
    """s_uv."""
    return _expand(pair, _MASK)


def seal_info(sender: str, salt: bytes) -> bytes:
    """The info string of the messages that `sender` seals with this salt."""
    return _info("seal", sender, salt)


def seal_key(pair: bytes, info: bytes) -> bytes:
    """The key of the one message that goes from one of the pair to the other. `info`:
    `seal_info(sender, salt)`.
    """
    return _expand(pair, info)


def topology_seed(sid: bytes) -> bytes:
    """What graph and committee are drawn from."""
    return _expand(sid, _TOPOLOGY)


def commitment(ctx: bytes, owner: int, slot: int, secret: bytes) -> bytes:
    """32 bytes that tie a recovered secret to what `owner` shared as its `slot`-th."""
    return hashlib.sha256(
        b"fedark/secagg/1/commit"
        + ctx
        + owner.to_bytes(4, "big")
        + slot.to_bytes(4, "big")
        + secret
    ).digest()


def survivors_digest(ctx: bytes, survivors: list[int]) -> bytes:
    """What the committee signs before it reveals anything: H(ctx, U)."""
    return _hash("survivors", ctx, survivors)
