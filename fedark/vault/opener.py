"""Open a sealed payload: a push parser without I/O, in the memory of a few chunks, made for the
inside of an enclave.

The payload is the files' plaintexts one after the other, cut into chunks of one size, each sealed
with AES-256-GCM (the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizar, CRYPTO 2015):
nonce = chunk index, associated data = (bundle id, index, final flag). A chunk that was moved,
repeated, dropped or brought from another bundle does not open, nothing can follow the final chunk,
and nothing is complete without it. Plaintext is handed on only after its own chunk's tag was
verified.

Why no file digest is computed here, at a tenth of the speed of AES-GCM: the manifest is signed and
commits to the key, and without the key no other bytes open. Who has the key, the provider itself
above all, could still give two parties two payloads; against that the manifest holds SHA-384 of the
sealed payload, and key and payload together leave one plaintext. The check needs no key and no
enclave: each party makes it on its own copy, once, before it signs a contract
(`SealedBundle.check_payload`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

from cryptography.exceptions import InvalidTag

from fedark.foundation.errors import ModelError, SealBroken
from fedark.vault.manifest import TAG_BYTES, VerifiedManifest
from fedark.vault.weightkey import WeightKey

__all__ = ["Collector", "OpenedBundle", "Opener", "associated_data", "nonce", "open_to_memory"]

Sink = Callable[[str, memoryview], None]


def nonce(index: int) -> bytes:
    """The 12-byte counter nonce of chunk `index`; unique: a content key seals one bundle."""
    return index.to_bytes(12, "big")


def associated_data(bundle_id: bytes, index: int, final: bool) -> bytes:
    """What a chunk's tag covers besides its bytes: which bundle, where in it, and whether it ends
    there.
    """
    return bundle_id + index.to_bytes(8, "big") + bytes([final])


class OpenedBundle:
    """Proof that a bundle was opened to its end. Only `Opener.finish` makes one; a receipt cannot
    be made without it.
    """

    __slots__ = ("bundle",)

    bundle: bytes

    def __init__(self) -> None:
        raise TypeError("an Opened is made by Opener.finish alone")

    @classmethod
    def _of(cls, bundle: bytes) -> OpenedBundle:
        opened = object.__new__(cls)
        opened.bundle = bundle
        return opened


class Opener:
    """Opens one payload, fed in pieces of any size.

    Args:
        manifest: of the bundle.
        key: its weight key; not needed any more once this is made.
        sink: gets (file name, plaintext) in order; the view is valid during the call only. An empty
            file brings no call.

    Raises:
        SealBroken: the key is not the one that the manifest commits to.
    """

    def __init__(self, manifest: VerifiedManifest, key: WeightKey, sink: Sink) -> None:
        if not isinstance(manifest, VerifiedManifest):
            raise TypeError("a payload is opened under a VerifiedManifest alone")
        self._cipher = key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
        self._manifest = manifest
        self._sink = sink
        self._files = ((entry.name, entry.size) for entry in manifest.files if entry.size)
        self._name, self._left = next(self._files)
        self._index = self._held = 0
        self._sealed = memoryview(bytearray(manifest.chunk_size + TAG_BYTES))
        self._plain = memoryview(bytearray(manifest.chunk_size))
        self._broken = self._finished = False

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the payload.

        Raises:
            SealBroken: they are not what was sealed. The opener is of no use afterwards, and what
                the sink already got is genuine but incomplete.
        """
        if self._broken or self._finished:
            raise SealBroken(
                "Sealed bytes came after the end of their payload, or after it was found broken."
            )
        rest = memoryview(data).cast("B")
        try:
            while len(rest):
                size = self._chunk() + TAG_BYTES
                if self._held == 0 and len(rest) >= size:
                    self._open(rest[:size])
                    rest = rest[size:]
                    continue
                part = rest[: size - self._held]
                self._sealed[self._held : self._held + len(part)] = part
                self._held += len(part)
                rest = rest[len(part) :]
                if self._held == size:
                    self._open(self._sealed[:size])
                    self._held = 0
        except BaseException:
            self._end(broken=True)
            raise

    def finish(self) -> OpenedBundle:
        """Say that no bytes follow.

        Raises:
            SealBroken: the payload is incomplete.
        """
        if self._broken or self._finished:
            raise SealBroken(
                "A sealed payload was found broken, or was finished before.",
                safe="Nothing of it was used.",
            )
        if self._index != self._manifest.chunks:
            self._end(broken=True)
            raise SealBroken(
                f"A sealed payload ends after {self._index} of {self._manifest.chunks} chunks.",
                safe="Nothing of it was used.",
                fix="Fetch the bundle anew, and run: fedark model verify",
            )
        self._end(broken=False)
        return OpenedBundle._of(self._manifest.digest())

    def _chunk(self) -> int:
        """Plaintext bytes of the next chunk."""
        left = self._manifest.total - self._index * self._manifest.chunk_size
        if left <= 0:
            self._refuse("A sealed payload goes on after its final chunk.")
        return min(left, self._manifest.chunk_size)

    def _open(self, sealed: memoryview) -> None:
        plain = self._plain[: len(sealed) - TAG_BYTES]
        final = self._index == self._manifest.chunks - 1
        try:
            self._cipher.decrypt_into(
                nonce(self._index),
                sealed,
                associated_data(self._manifest.bundle_id, self._index, final),
                plain,
            )
        except InvalidTag:
            self._refuse(f"Chunk {self._index} of a sealed payload is not what was sealed there.")
        self._index += 1
        while len(plain):
            part = plain[: self._left]
            self._sink(self._name, part)
            plain = plain[len(part) :]
            self._left -= len(part)
            if self._left == 0:
                self._name, self._left = next(self._files, ("", 0))

    def _refuse(self, what: str) -> NoReturn:
        raise SealBroken(
            what,
            safe="No byte of it was used.",
            fix="Fetch the bundle anew, and run: fedark model verify",
        ) from None

    def _end(self, *, broken: bool) -> None:
        self._broken, self._finished = broken, not broken
        self._held = 0
        self._plain[:] = bytes(len(self._plain))


class Collector:
    """A sink that keeps every file in memory, for models that are loaded from there and never touch
    a disk.

    Raises:
        ModelError: there is not enough memory for the manifest's files.
    """

    def __init__(self, manifest: VerifiedManifest) -> None:
        try:
            self.files = {entry.name: bytearray(entry.size) for entry in manifest.files}
        except MemoryError:
            raise ModelError(
                f"The model {manifest.card.name!r} needs {manifest.total} bytes of memory."
            ) from None
        self._name, self._at = "", 0
        self._view = memoryview(b"")

    def __call__(self, name: str, part: memoryview) -> None:
        if name != self._name:
            self._name, self._at, self._view = name, 0, memoryview(self.files[name])
        self._view[self._at : self._at + len(part)] = part
        self._at += len(part)


def open_to_memory(
    manifest: VerifiedManifest, key: WeightKey, payload: Iterable[bytes | bytearray | memoryview]
) -> tuple[dict[str, bytearray], OpenedBundle]:
    """Open a whole payload: file name -> plaintext, and the proof that it was complete.

    Raises:
        SealBroken: it is not what was sealed, or the key is another bundle's.
    """
    collector = Collector(manifest)
    opener = Opener(manifest, key, collector)
    for piece in payload:
        opener.feed(piece)
    return collector.files, opener.finish()
