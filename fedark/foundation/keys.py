"""Long-lived and enclave keys: Ed25519 to sign (RFC 8032), HPKE to encrypt (RFC 9180), one label
for each purpose.

Nothing here is a primitive: all of it composes `cryptography`. Two rules are kept for the whole
project:

- A signature covers `label || 0x00 || message`: one that was made for one purpose never verifies
  for another.
- HPKE `info` is always a canonical map with a label, so a ciphertext opens only in the context that
  it was made for.

The KEM is the hybrid of ML-KEM-768 and X25519: it stays confidential if either of the two is broken
(FIPS 203; the suite that `cryptography` names MLKEM768_X25519), with HKDF-SHA256 and AES-256-GCM.
Plain X25519 exists for whoever asks for it by
name: it is never inferred from what a key looks like, and the name of the suite is part of every
`info`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedark.foundation import canonical
from fedark.foundation.errors import InputError, ProtocolError, Refused

__all__ = [
    "HYBRID",
    "KEMS",
    "PUBLIC_HPKE_BYTES",
    "HpkeKey",
    "Kem",
    "PartyKeys",
    "SigningKey",
    "hpke_seal",
    "kem_of",
    "public_bytes",
    "verify_signature",
]

Kem = Literal["mlkem768-x25519", "x25519"]
KEMS: tuple[Kem, ...] = get_args(Kem)
HYBRID: Kem = "mlkem768-x25519"
_SUITES: Mapping[Kem, Suite] = {
    "mlkem768-x25519": Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    "x25519": Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}
PUBLIC_HPKE_BYTES = 1184 + 32
_PUBLIC_BYTES: Mapping[Kem, int] = {"mlkem768-x25519": PUBLIC_HPKE_BYTES, "x25519": 32}
_FILE_HEAD = "fedark-party-keys-1"
_SECRET_BYTES: Mapping[Kem, int] = {"mlkem768-x25519": 96, "x25519": 32}
_FIELD = 2**255 - 19
_ORDER_EIGHT = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y of the eight points of edwards25519 whose order is small; x is +x or -x.
_SMALL_ORDER = frozenset({0, 1, _FIELD - 1, _ORDER_EIGHT, _FIELD - _ORDER_EIGHT})


def _framed(label: str, message: bytes) -> bytes:
    return label.encode("ascii") + b"\x00" + message


class SigningKey:
    """An Ed25519 signing key. `public` is the raw 32-byte public key."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._key = (
            Ed25519PrivateKey.from_private_bytes(secret)
            if secret is not None
            else Ed25519PrivateKey.generate()
        )
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def sign(self, label: str, message: bytes) -> bytes:
        """The 64-byte signature over `label || 0x00 || message`."""
        return self._key.sign(_framed(label, message))

    def secret_bytes(self) -> bytes:
        """The raw 32-byte secret, for storage by `PartyKeys` alone."""
        return self._key.private_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()[:16]}...)"


def verify_signature(
    public: bytes, label: str, message: bytes, signature: bytes, *, by: str
) -> None:
    """Return if `signature` is `public`'s over `label || 0x00 || message`.

    RFC 8032 leaves public keys of small order to the verifier, and OpenSSL takes them. Under such a
    key one signature holds for many messages, or for all, and nobody needs a secret for it: it
    signs nothing here, and neither does a key in a form that is not its only one.

    Raises:
        Refused: it is not. `by` names the claimed signer in the text.
    """
    try:
        _require_strong(public)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _framed(label, message))
    except (InvalidSignature, ValueError):
        raise Refused(
            f"A signature of {by} ({label}) does not verify.", safe="The message was dropped."
        ) from None


def _require_strong(public: bytes) -> None:
    y = int.from_bytes(public, "little") & ((1 << 255) - 1)
    if y >= _FIELD or y in _SMALL_ORDER:
        raise ValueError("a public key of small order, or in a second form")


class HpkeKey:
    """An HPKE key pair.

    Args:
        secret: what `secret_bytes` gave; None makes a new key.
        kem: the hybrid unless a policy names plain X25519. One key is of one KEM: no half of a
            hybrid key is used alone.

    Attributes:
        public: hybrid: the ML-KEM key (1184 bytes) followed by the X25519 key (32); else the X25519
            key.
        kem: its KEM.
    """

    def __init__(self, secret: bytes | None = None, *, kem: Kem = HYBRID) -> None:
        self.kem = kem
        if secret is not None and len(secret) != _SECRET_BYTES[kem]:
            raise ValueError(f"a secret of {kem} has {_SECRET_BYTES[kem]} bytes")
        self._dh = (
            X25519PrivateKey.generate()
            if secret is None
            else X25519PrivateKey.from_private_bytes(secret[-32:])
        )
        self._pq: MLKEM768PrivateKey | None = None
        self._key: MLKEM768X25519PrivateKey | X25519PrivateKey = self._dh
        self.public: bytes = self._dh.public_key().public_bytes_raw()
        if kem == HYBRID:
            self._pq = (
                MLKEM768PrivateKey.generate()
                if secret is None
                else MLKEM768PrivateKey.from_seed_bytes(secret[:-32])
            )
            self._key = MLKEM768X25519PrivateKey(self._pq, self._dh)
            self.public = self._pq.public_key().public_bytes_raw() + self.public

    def open(self, ciphertext: bytes, context: Mapping[str, Any]) -> bytes:
        """The plaintext of `hpke_seal(plaintext, self.public, context, kem=self.kem)`.

        Raises:
            Refused: it was made for another key, KEM or context, or was altered.
        """
        try:
            return _SUITES[self.kem].decrypt(ciphertext, self._key, info=_info(context, self.kem))
        except (InvalidTag, ValueError):
            label = context.get("label", "?")
            raise Refused(
                f"A sealed message ({label}) does not open: it was altered, or was made for another"
                " key or context.",
                safe="Nothing of it was used.",
            ) from None

    def secret_bytes(self) -> bytes:
        """The 64-byte ML-KEM seed, if it is a hybrid key, and the 32-byte X25519 secret, for
        storage by `PartyKeys` alone.
        """
        seed = b"" if self._pq is None else self._pq.private_bytes_raw()
        return seed + self._dh.private_bytes_raw()

    def __repr__(self) -> str:
        return f"HpkeKey({self.kem}, public={self.public.hex()[:16]}...)"


def public_bytes(kem: Kem) -> int:
    """Length of a public key of `kem`."""
    return _PUBLIC_BYTES[kem]


def kem_of(public: bytes) -> Kem:
    """The KEM of a public key: their lengths differ.

    Raises:
        ProtocolError: it is of none.
    """
    for kem, length in _PUBLIC_BYTES.items():
        if len(public) == length:
            return kem
    raise ProtocolError(f"An HPKE public key has {len(public)} bytes, which is that of no KEM.")


def hpke_seal(
    plaintext: bytes, public: bytes, context: Mapping[str, Any], *, kem: Kem = HYBRID
) -> bytes:
    """Encrypt to an `HpkeKey.public`, bound to `context`, a map with a "label" (RFC 9180
    single-shot, base mode).

    Raises:
        ProtocolError: `public` is not a public key of `kem`.
    """
    if len(public) != _PUBLIC_BYTES[kem]:
        raise ProtocolError(
            f"An HPKE public key has {len(public)} bytes, not the {_PUBLIC_BYTES[kem]} of {kem}."
        )
    try:
        dh = X25519PublicKey.from_public_bytes(public[-32:])
        key: MLKEM768X25519PublicKey | X25519PublicKey = dh
        if kem == HYBRID:
            key = MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(public[:-32]), dh)
        return _SUITES[kem].encrypt(plaintext, key, info=_info(context, kem))
    except ValueError:
        raise ProtocolError("An HPKE public key is malformed.") from None


def _info(context: Mapping[str, Any], kem: Kem) -> bytes:
    if "suite" in context:
        raise TypeError("the suite of a context is the key's")
    return canonical.encode({**context, "suite": f"{kem}/hkdf-sha256/aes-256-gcm"})


class PartyKeys:
    """The two long-lived keys of a party, and their file (mode 0600, PKCS#8 is not used: both are
    raw seeds in hex).

    The file's first line names the KEM, unless it is the hybrid: `fedark-party-keys-1 x25519`.

    Attributes:
        signing: signs contracts, policies, nonces and receipts.
        hpke: receives the adapter at the end.
    """

    def __init__(self, signing: SigningKey | None = None, hpke: HpkeKey | None = None) -> None:
        self.signing = signing or SigningKey()
        self.hpke = hpke or HpkeKey()

    def save(self, path: Path) -> None:
        """Write a new key file.

        Raises:
            InputError: the file exists; a key is never overwritten.
        """
        head = _head(self.hpke.kem)
        text = f"{head}\n{self.signing.secret_bytes().hex()}\n{self.hpke.secret_bytes().hex()}\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise InputError(
                f"{path} exists already.", safe="The keys in it were left as they are."
            ) from None
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> PartyKeys:
        """Read a key file.

        Raises:
            InputError: it is missing, malformed, or readable by other users.
        """
        try:
            mode = path.stat().st_mode
            lines = path.read_text(encoding="ascii").split("\n")
            if mode & 0o077:
                raise InputError(
                    f"{path} is open to other users (mode {mode & 0o777:o}).",
                    fix=f"Run: chmod 600 {path}",
                )
            if len(lines) != 4 or lines[3]:
                raise ValueError
            (kem,) = (kem for kem in KEMS if _head(kem) == lines[0])
            return cls(
                SigningKey(bytes.fromhex(lines[1])), HpkeKey(bytes.fromhex(lines[2]), kem=kem)
            )
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise InputError(f"{path} is not a fedark key file.") from None


def _head(kem: Kem) -> str:
    return _FILE_HEAD if kem == HYBRID else f"{_FILE_HEAD} {kem}"
