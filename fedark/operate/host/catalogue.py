"""Sealed bundles on their way from the provider to the customers: ciphertext, in pieces, resumable
at either end.

What makes an upload admissible is the manifest: signed by an approved provider, and the payload
must have exactly its length and digest, or it is dropped. A reader compares the same with the
contract, so the host can withhold a bundle and nothing else.

    CATALOGUE/DIGEST.fedark/{manifest,payload}   whole
    CATALOGUE/DIGEST.part/{manifest,payload}     growing
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import InputError, ProtocolError, StorageError
from fedark.foundation.files import disk_errors, sync_directory, write_atomic
from fedark.vault.manifest import Manifest

__all__ = ["MAX_PIECE", "Catalogue", "BundleProgress"]

MAX_PIECE = 4 << 20
_DIGEST = re.compile(r"^[0-9a-f]{96}$")


@dataclass(frozen=True)
class BundleProgress:
    """How much of a bundle is here: payload bytes, of how many, and whether it is whole."""

    size: int
    total: int
    whole: bool


class Catalogue:
    """A folder of bundles by digest.

    Args:
        folder: where; made if missing.
        limit: bytes that all payloads together may have.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._writing: dict[
            str, threading.Lock
        ] = {}  # by digest, of what an approved provider has signed

    def path(self, digest: str) -> Path:
        """Where the whole bundle is, or would be."""
        if not _DIGEST.match(digest):
            raise ProtocolError("A bundle is named by 96 hex digits.")
        return self._folder / f"{digest}.fedark"

    def held(self, digest: str) -> BundleProgress | None:
        """What is here of a bundle, or None for nothing."""
        whole = self.path(digest)
        for folder in (whole, whole.with_suffix(".part")):
            if (folder / "manifest").is_file():
                data = (folder / "manifest").read_bytes()
                total = Manifest.verify(data, Manifest.claimed_provider(data)).payload_size
                payload = folder / "payload"
                return BundleProgress(
                    payload.stat().st_size if payload.exists() else 0, total, folder == whole
                )
        return None

    def manifest(self, digest: str) -> bytes | None:
        """The manifest of a whole bundle."""
        path = self.path(digest) / "manifest"
        return path.read_bytes() if path.is_file() else None

    def piece(self, digest: str, offset: int) -> bytes | None:
        """At most 4 MiB of the payload of a whole bundle, from `offset`."""
        path = self.path(digest) / "payload"
        if offset < 0 or not path.is_file():
            return None
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(MAX_PIECE)

    def begin(self, digest: str, manifest: bytes, provider: bytes) -> None:
        """Take a manifest; what was uploaded of this bundle before is kept.

        Raises:
            Refused: the provider did not sign it.
            ProtocolError: it is another bundle's.
            StorageError: there is no room.
        """
        part = self.path(digest).with_suffix(".part")
        verified = Manifest.verify(manifest, provider)
        if verified.digest().hex() != digest:
            raise ProtocolError("A manifest came under another digest.", safe="It was dropped.")
        with self._writing.setdefault(digest, threading.Lock()):
            self._begin(digest, part, manifest, verified)

    def _begin(self, digest: str, part: Path, manifest: bytes, verified: Manifest) -> None:
        if (held := self.held(digest)) is not None:
            if held.size == held.total and not held.whole:  # ended before it was found to be whole
                self._finish(digest, part, held)
            return
        used = sum(path.stat().st_size for path in self._folder.glob("*/payload"))
        if used + verified.payload_size > self._limit:
            raise StorageError(
                f"The catalogue has no room for {verified.payload_size} bytes.",
                safe="Nothing was stored.",
                fix="Remove bundles of past jobs, or raise catalogue_bytes in host.toml.",
            )
        write_atomic(part / "manifest", manifest, mode=0o600)

    def add(self, digest: str, offset: int, data: bytes) -> BundleProgress:
        """Append a piece that follows what is here; another offset changes nothing and tells where
        to go on.

        The last piece makes the bundle whole, or an empty one after it where its process ended
        before that.

        Raises:
            InputError: the manifest has not come.
            ProtocolError: the payload is not what the manifest says; it is dropped.
            StorageError: the disk is full.
        """
        if self.held(digest) is None:
            raise InputError("The manifest of this bundle has not come yet.")
        with self._writing.setdefault(digest, threading.Lock()):
            if (held := self.held(digest)) is None:
                raise InputError(
                    "This bundle was dropped meanwhile.", fix="Send its manifest again."
                )
            return held if held.whole or offset != held.size else self._add(digest, held, data)

    def _add(self, digest: str, held: BundleProgress, data: bytes) -> BundleProgress:
        part = self.path(digest).with_suffix(".part")
        if held.size == held.total and not data:
            return self._finish(digest, part, held)
        if held.size + len(data) > held.total or not data:
            shutil.rmtree(part)
            raise ProtocolError(
                "A sealed payload is longer than its manifest says.", safe="It was dropped."
            )
        with disk_errors(part), open(part / "payload", "ab", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        held = BundleProgress(held.size + len(data), held.total, False)
        return self._finish(digest, part, held) if held.size == held.total else held

    def _finish(self, digest: str, part: Path, held: BundleProgress) -> BundleProgress:
        data = (part / "manifest").read_bytes()
        verified = Manifest.verify(data, Manifest.claimed_provider(data))
        with (part / "payload").open("rb") as file:
            found = hashlib.file_digest(file, "sha384").digest()
        if found != verified.payload_sha384:
            shutil.rmtree(part)
            raise ProtocolError(
                "A sealed payload is not what its manifest says.", safe="It was dropped."
            )
        with disk_errors(part):
            part.rename(self.path(digest))
            sync_directory(self._folder)
        return BundleProgress(held.size, held.total, True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
