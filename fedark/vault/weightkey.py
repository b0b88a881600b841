"""The key of one sealed bundle, as a type that does not show itself, and its files on the
provider's node.

Rules kept: a key never prints, formats, pickles or copies; no error text holds it, and no frame
that an error leaves through holds its bytes in a local variable. Its bytes leave this module only
inside an HPKE ciphertext (`wrap`) or a key file of mode 0600 (`KeyStore`).

What encrypts is not the key but HKDF-SHA384 of it (RFC 5869) with the bundle's random id as salt;
the same derivation gives the key commitment that stands in the signed manifest. AES-GCM alone
commits to no key: one ciphertext can be made to open under two (Grubbs, Lu and Ristenpart, CRYPTO
2017). With the commitment, whoever opens knows that it is the provider's one key.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, InputError, ReleaseRefused, SealBroken
from fedark.foundation.files import disk_errors, write_new
from fedark.foundation.keys import HYBRID, HpkeKey, Kem, hpke_seal
from fedark.vault.manifest import BUNDLE_LABEL, COMMITMENT_BYTES, VerifiedManifest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KeyStore", "WeightKey"]

_KEY_BYTES = 32
_FILE_HEAD = "fedark-weight-key-1"


class WeightKey:
    """A 256-bit weight key. Made by `generate`, `unwrap` or `KeyStore.get`; best effort: `wipe`
    overwrites it in memory.
    """

    __slots__ = ("_secret",)

    def __init__(self) -> None:
        raise TypeError("use WeightKey.generate, WeightKey.unwrap or KeyStore.get")

    _secret: bytearray

    @classmethod
    def _of(cls, secret: bytes | bytearray) -> WeightKey:
        key = object.__new__(cls)
        key._secret = bytearray(secret)
        return key

    @classmethod
    def generate(cls) -> WeightKey:
        """A fresh random key."""
        return cls._of(secrets.token_bytes(_KEY_BYTES))

    def wrap(self, public: bytes, context: Mapping[str, Any], *, kem: Kem = HYBRID) -> bytes:
        """The key, encrypted to an `HpkeKey.public` and bound to `context`.

        Raises:
            ReleaseRefused: `public` is not a public key of `kem`.
        """
        self._alive()
        try:
            return hpke_seal(bytes(self._secret), public, context, kem=kem)
        except FedarkError as error:
            problem = error.what
        # Raised out here, because the frame that failed holds the key: neither traceback nor
        # context may reach it.
        raise ReleaseRefused(
            f"A weight key cannot be wrapped: {problem}", safe="It was not released."
        )

    @classmethod
    def unwrap(cls, ciphertext: bytes, hpke: HpkeKey, context: Mapping[str, Any]) -> WeightKey:
        """Undo `wrap`.

        Raises:
            Refused: it was made for another key or another context, or was altered.
            ReleaseRefused: what was inside is not a weight key.
        """
        key = cls._of(hpke.open(ciphertext, context))
        if len(key._secret) != _KEY_BYTES:
            key.wipe()
            raise ReleaseRefused(
                "A grant opens, but holds no weight key.", safe="Nothing of it was used."
            )
        return key

    def commitment(self, bundle_id: bytes, chunk_size: int) -> bytes:
        """What the manifest of bundle `bundle_id` says of its key: 48 bytes that name the key and
        do not reveal it.
        """
        return self._derive(bundle_id, chunk_size)[_KEY_BYTES:]

    def cipher(self, bundle_id: bytes, chunk_size: int, commitment: bytes) -> AESGCM:
        """The AEAD of bundle `bundle_id`, if this is its key.

        Raises:
            SealBroken: it is another bundle's key.
        """
        material = self._derive(bundle_id, chunk_size)
        cipher = AESGCM(material[:_KEY_BYTES])
        right = hmac.compare_digest(material[_KEY_BYTES:], commitment)
        del material
        if not right:
            raise SealBroken(
                "This weight key is not the one that the bundle's manifest commits to.",
                safe="Nothing was decrypted.",
            )
        return cipher

    def wipe(self) -> None:
        """Overwrite the key in memory; copies that libraries made of it are out of reach."""
        self._secret[:] = bytes(len(self._secret))
        self._secret = bytearray()

    def _derive(self, bundle_id: bytes, chunk_size: int) -> bytes:
        self._alive()
        info = canonical.encode([BUNDLE_LABEL, chunk_size])
        return HKDF(SHA384(), _KEY_BYTES + COMMITMENT_BYTES, bundle_id, info).derive(self._secret)

    def _alive(self) -> None:
        if not self._secret:
            raise SealBroken("This weight key was wiped and opens nothing any more.")

    def __repr__(self) -> str:
        return "WeightKey(hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a weight key is not copied or pickled")


class KeyStore:
    """The weight keys of a provider's node: a directory of mode 0700, one file of mode 0600 for
    each bundle.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, manifest: VerifiedManifest, key: WeightKey) -> Path:
        """Store the key of a bundle, durably, and return its file.

        Raises:
            InputError: there is one already; a key is never overwritten.
            StorageError: it cannot be written.
        """
        with disk_errors(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(manifest)
        write_new(path, lambda file: file.write(_encoded(key)))
        return path

    def get(self, manifest: VerifiedManifest) -> WeightKey:
        """The key of a bundle.

        Raises:
            InputError: there is none, it is malformed, or other users can read it.
            SealBroken: the file holds another bundle's key.
        """
        path = self._path(manifest)
        try:
            with open(
                path,
                "rb",
                opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC),
            ) as file:
                mode = os.fstat(file.fileno()).st_mode
                if mode & 0o077:
                    raise InputError(
                        f"{path} is open to other users (mode {mode & 0o777:o}).",
                        fix=f"Run: chmod 600 {path}",
                    )
                key = _decoded(file.read(256))
        except FileNotFoundError:
            raise InputError(
                f"No weight key is stored for the bundle {manifest.card.name!r} in"
                f" {self.directory}.",
                fix="Give the directory of the node that sealed it.",
            ) from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        if key is None:
            raise InputError(f"{path} is not a weight key file.")
        key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
        return key

    def _path(self, manifest: VerifiedManifest) -> Path:
        return self.directory / f"{manifest.digest().hex()}.key"


def _encoded(key: WeightKey) -> bytes:
    return f"{_FILE_HEAD}\n{key._secret.hex()}\n".encode("ascii")


def _decoded(text: bytes) -> WeightKey | None:
    lines = text.split(b"\n")
    if (
        len(lines) != 3
        or lines[0] != _FILE_HEAD.encode("ascii")
        or lines[2]
        or len(lines[1]) != 2 * _KEY_BYTES
    ):
        return None
    try:
        return WeightKey._of(bytes.fromhex(lines[1].decode("ascii")))
    except ValueError:
        return None
