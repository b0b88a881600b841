"""Where a node may fetch sealed bundles besides its host: a folder (a share, a disk that was sent)
or a web server.

Bundles are ciphertext, so any way will do; what arrives is checked against the contract's digest
and the provider's signature.

    /mnt/share           holds folders *.fedark
    https://x.example/b  serves DIGEST.fedark/manifest and DIGEST.fedark/payload, the latter with
                         byte ranges (RFC 9110, 14)
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from fedark.foundation.errors import FedarkError, FederationError, InputError, printable
from fedark.foundation.proxies import proxy_for
from fedark.operate.host.catalogue import MAX_PIECE
from fedark.vault.bundle import read_manifest
from fedark.vault.manifest import MAX_MANIFEST_BYTES, Manifest

__all__ = ["FolderSource", "Source", "WebSource", "source_of"]


class Source(Protocol):
    """Where sealed bundles may be had; the host's client is one too."""

    def manifest(self, digest: str) -> bytes | None:
        """The manifest of a bundle, or None where it is not here."""
        ...

    def piece(self, digest: str, offset: int) -> bytes | None:
        """Part of its payload from `offset`, at most 4 MiB; None or nothing where there is none."""
        ...


class FolderSource:
    """A folder with bundles."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(self, digest: str) -> bytes | None:
        """See `Source.manifest`."""
        path = self._find(digest)
        return read_manifest(path) if path is not None else None

    def piece(self, digest: str, offset: int) -> bytes | None:
        """See `Source.piece`."""
        path = self._find(digest)
        if path is None:
            return None
        try:
            with (path / "payload").open("rb") as file:
                file.seek(offset)
                return file.read(MAX_PIECE)
        except OSError:
            return None

    def _find(self, digest: str) -> Path | None:
        for path in sorted(self._folder.glob("*.fedark")):
            try:
                data = read_manifest(path)
                if Manifest.verify(data, Manifest.claimed_provider(data)).digest().hex() == digest:
                    return path
            except FedarkError:
                continue
        return None


class WebSource:
    """A web server with bundles. Its certificate is checked as browsers do."""

    def __init__(self, base: str) -> None:
        self._base = base.rstrip("/")
        self._host = urlsplit(base).hostname or ""

    def manifest(self, digest: str) -> bytes | None:
        """See `Source.manifest`."""
        return self._get(digest, "manifest", 0, MAX_MANIFEST_BYTES)

    def piece(self, digest: str, offset: int) -> bytes | None:
        """See `Source.piece`."""
        return self._get(digest, "payload", offset, MAX_PIECE)

    def _get(self, digest: str, name: str, offset: int, most: int) -> bytes | None:
        url = f"{self._base}/{digest}.fedark/{name}"
        headers = {"range": f"bytes={offset}-{offset + most - 1}", "accept-encoding": "identity"}
        data = bytearray()
        try:
            client = httpx.Client(
                trust_env=False, proxy=proxy_for(self._host) or None, timeout=30.0
            )
            with client, client.stream("GET", url, headers=headers) as response:
                if response.status_code not in (200, 206):
                    return None
                skip = (
                    offset if response.status_code == 200 else 0
                )  # a server without ranges sends all of it
                for part in response.iter_raw():
                    data += part[skip:]
                    skip = max(0, skip - len(part))
                    if len(data) >= most:
                        return bytes(data[:most])
        except httpx.HTTPError as error:
            raise FederationError(
                f"{printable(self._base, 100)} cannot be reached ({type(error).__name__})."
            ) from None
        return bytes(data)


def source_of(where: str, folder: Path) -> Source:
    """The source that an entry of `bundle_sources` means; a relative folder is relative to the
    node's.

    Raises:
        InputError: it is neither a folder nor an https:// address.
    """
    if "://" in where:
        if not where.startswith("https://"):
            raise InputError(f"{printable(where, 100)} is not an https:// address.")
        return WebSource(where)
    return FolderSource(folder / where)
