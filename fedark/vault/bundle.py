"""Seal a model directory, and read sealed bundles from a disk; both in the memory of a few chunks,
whatever the size.

A bundle is a directory NAME.fedark/ with `manifest` (see `fedark.vault.manifest`) and `payload`
(see `fedark.vault.opener`). It appears whole, by one rename, or not at all. Sealing draws a fresh
weight key for every bundle, so that no key ever opens two.

What is sealed: the files that make a model (`fedark.foundation.modelfolder`), and the provider's
own data sets (replay, acceptance) under `extra/`. Everything else in the folder is left out and
named; neither a pickle nor code is ever sealed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedark.foundation.errors import FedarkError, ModelError, SealBroken, printable
from fedark.foundation.files import disk_errors, new_directory, write_new
from fedark.foundation.keys import SigningKey
from fedark.foundation.modelfolder import read_folder
from fedark.vault.manifest import (
    EXTRA,
    MAX_MANIFEST_BYTES,
    TAG_BYTES,
    FileEntry,
    Manifest,
    ModelCard,
    ReleasePolicy,
    VerifiedManifest,
    name_problems,
)
from fedark.vault.opener import Opener, associated_data, nonce
from fedark.vault.weightkey import WeightKey

__all__ = [
    "CHUNK",
    "SealedBundle",
    "Selection",
    "find_bundle",
    "open_directory",
    "own_bundles",
    "read_manifest",
    "seal",
    "select",
]

CHUNK = 1 << 20
_MANIFEST, _PAYLOAD = "manifest", "payload"

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class Selection:
    """What of a directory is sealed.

    Attributes:
        files: name in the bundle -> file on the disk, sorted by name.
        sizes: name in the bundle -> bytes.
        left_out: names that are no part of a model.
    """

    files: Mapping[str, Path]
    sizes: Mapping[str, int]
    left_out: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def select(source: Path, extra: Mapping[str, Path] | None = None) -> Selection:
    """Choose what to seal from a model directory; `extra`: file name -> data file, sealed as
    `extra/NAME`.

    Raises:
        ModelError: with every problem: weights that are there only as pickles, an odd name, a
            broken safetensors file, no weights, no config.json.
    """
    folder = read_folder(source)
    found = dict(folder.files)
    for name, path in (extra or {}).items():
        found[f"{EXTRA}/{name}"] = path
    found = dict(sorted(found.items()))
    problems = [*folder.problems, *name_problems(found)]
    sizes = {name: _size(name, path, problems) for name, path in found.items()}
    if not problems:
        weights = [name for name in found if name.endswith(".safetensors")]
        problems += [
            problem for name in weights if (problem := _safetensors_problem(name, found[name]))
        ]
    if problems:
        lines = "\n".join(f"  - {printable(problem)}" for problem in sorted(problems))
        raise ModelError(f"{source} cannot be sealed:\n{lines}", safe="Nothing was written.")
    return Selection(found, sizes, folder.left_out)


def seal(
    source: Path,
    out: Path,
    *,
    provider: SigningKey,
    card: ModelCard,
    policy: ReleasePolicy,
    extra: Mapping[str, Path] | None = None,
    progress: OnBytes | None = None,
) -> tuple[VerifiedManifest, WeightKey]:
    """Seal a model directory into the new bundle `out`, under a fresh weight key.

    Args:
        extra: file name -> data file (CSV, JSONL), sealed as `extra/NAME`.
        progress: called with (plaintext bytes done, of total).

    Raises:
        ModelError: see `select`; or a file changed or vanished while it was sealed.
        InputError: `out` exists.
        StorageError: the disk is full or cannot be written; nothing is left behind.
    """
    selection = select(source, extra)
    key, bundle_id = WeightKey.generate(), secrets.token_bytes(32)
    commitment = key.commitment(bundle_id, CHUNK)
    cipher = key.cipher(bundle_id, CHUNK, commitment)
    entries: list[FileEntry] = []
    digest = hashlib.sha384()
    # Kept for the whole payload: encrypting into a fresh buffer each time is several times slower.
    sealed = memoryview(bytearray(CHUNK + TAG_BYTES))
    with new_directory(out) as work:
        done = 0
        with disk_errors(out), open(work / _PAYLOAD, "xb") as payload:
            for index, plain in enumerate(_plaintext(selection, entries)):
                done += len(plain)
                chunk = sealed[: len(plain) + TAG_BYTES]
                cipher.encrypt_into(
                    nonce(index),
                    plain,
                    associated_data(bundle_id, index, done == selection.total),
                    chunk,
                )
                digest.update(chunk)
                payload.write(chunk)
                if progress is not None:
                    progress(done, selection.total)
            payload.flush()
            os.fsync(payload.fileno())
        manifest = Manifest(
            provider.public,
            bundle_id,
            CHUNK,
            commitment,
            digest.digest(),
            tuple(entries),
            card,
            policy,
        ).sign(provider)
        write_new(work / _MANIFEST, lambda file: file.write(manifest.encode()))
    return manifest, key


@dataclass(frozen=True)
class SealedBundle:
    """A bundle on a disk whose manifest was verified. Made by `load`."""

    path: Path
    manifest: VerifiedManifest

    @classmethod
    def load(cls, path: Path, provider_public: bytes) -> SealedBundle:
        """Read the bundle at `path`, of the provider `provider_public`.

        Raises:
            ModelError: there is no bundle there, or it cannot be read.
            ProtocolError, Refused, SealBroken: see `Manifest.verify`; or the payload is shorter or
            longer than it says.
        """
        manifest = Manifest.verify(read_manifest(path), provider_public)
        with _reading(path / _PAYLOAD):
            size = (path / _PAYLOAD).stat().st_size
        if size != manifest.payload_size:
            raise SealBroken(
                f"The payload of {path} has {size} bytes, not the {manifest.payload_size} that its"
                " manifest says.",
                safe="Nothing of it was used.",
                fix="Fetch the bundle anew.",
            )
        return cls(path, manifest)

    def payload(self, size: int = CHUNK + TAG_BYTES) -> Iterator[memoryview]:
        """The sealed payload in pieces of up to `size` bytes; each is valid until the next is asked
        for.

        Raises:
            ModelError: it cannot be read.
        """
        buffer = memoryview(bytearray(size))
        with _reading(self.path / _PAYLOAD), open(self.path / _PAYLOAD, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    def check_payload(self, progress: OnBytes | None = None) -> None:
        """Check the whole payload against the signed manifest; this needs no key. `progress`:
        (bytes done, of total).

        Raises:
            ModelError: it cannot be read.
            SealBroken: it is not the payload that the provider sealed.
        """
        digest, done = hashlib.sha384(), 0
        for piece in self.payload():
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, self.manifest.payload_size)
        if digest.digest() != self.manifest.payload_sha384:
            raise SealBroken(
                f"The payload of {self.path} is not the one that its provider sealed.",
                safe="Nothing of it was used.",
                fix="Fetch the bundle anew.",
            )


def read_manifest(path: Path) -> bytes:
    """The manifest of the bundle at `path`, unverified.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    with _reading(path / _MANIFEST), open(path / _MANIFEST, "rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def open_directory(
    bundle: SealedBundle, key: WeightKey, out: Path, *, progress: OnBytes | None = None
) -> None:
    """Open a bundle into the new directory `out`, for its provider. `progress`: (sealed bytes done,
    of total).

    A disk is slower than a hash, so here every file is held against its own digest too.

    Raises:
        InputError: `out` exists.
        ModelError: the bundle cannot be read.
        SealBroken: it is not what was sealed, or the key is another bundle's.
        StorageError: the disk is full or cannot be written; nothing is left behind.
    """
    digests = {entry.name: hashlib.sha384() for entry in bundle.manifest.files}
    with new_directory(out) as work:

        def sink(name: str, part: memoryview) -> None:
            digests[name].update(part)
            with disk_errors(out), open(work / name, "ab") as file:
                file.write(part)

        with disk_errors(out):
            for name in digests:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).touch(mode=0o600)
        opener, done = Opener(bundle.manifest, key, sink), 0
        for piece in bundle.payload():
            opener.feed(piece)
            done += len(piece)
            if progress is not None:
                progress(done, bundle.manifest.payload_size)
        opener.finish()
        wrong = [
            entry.name
            for entry in bundle.manifest.files
            if digests[entry.name].digest() != entry.sha384
        ]
        if wrong:
            raise SealBroken(
                f"The payload of {bundle.path} opens, but not to the files of its manifest:"
                f" {', '.join(wrong)}.",
                safe="Nothing was written.",
            )
        with disk_errors(out):
            for name in digests:
                with open(work / name, "rb") as file:
                    os.fsync(file.fileno())


def _plaintext(selection: Selection, entries: list[FileEntry]) -> Iterator[memoryview]:
    """All files, one after the other, in chunks that are valid until the next is asked for; appends
    an entry for each file.
    """
    buffer, filled = memoryview(bytearray(CHUNK)), 0
    for name, path in selection.files.items():
        digest, size = hashlib.sha384(), 0
        with _reading(path), open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer[filled:]):
                digest.update(buffer[filled : filled + count])
                size += count
                filled += count
                if filled == CHUNK:
                    yield buffer
                    filled = 0
        if size != selection.sizes[name]:
            raise ModelError(
                f"{path} changed while it was sealed.",
                safe="Nothing was left behind.",
                fix="Seal it again.",
            )
        entries.append(FileEntry(name, size, digest.digest()))
    if filled:
        yield buffer[:filled]


def _size(name: str, path: Path, problems: list[str]) -> int:
    try:
        status = path.stat()
    except OSError as error:
        problems.append(f"{name}: cannot be read: {error.strerror}")
        return 0
    if not stat.S_ISREG(status.st_mode):
        problems.append(f"{name}: not a regular file")
    return status.st_size


def _safetensors_problem(name: str, path: Path) -> str:
    """Why a .safetensors file is not one (a renamed pickle, a broken download), or ""."""
    try:
        with safe_open(path, framework="np") as file:
            return "" if list(file.keys()) else f"{name}: holds no tensor"
    except (SafetensorError, OSError) as error:
        return f"{name}: not a safetensors file ({error})"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}.", safe="Nothing was left behind."
        ) from None


def own_bundles(catalogue: Path, provider_public: bytes) -> Iterator[SealedBundle]:
    """The bundles of one provider in a catalogue, manifests verified; broken and foreign ones are
    passed over.
    """
    for path in sorted(catalogue.glob("*.fedark")):
        with suppress(FedarkError):
            yield SealedBundle.load(path, provider_public)


def find_bundle(catalogue: Path, digest: str, provider_public: bytes) -> SealedBundle | None:
    """The provider's bundle of that digest (hex), if it is in the catalogue."""
    bundles = own_bundles(catalogue, provider_public)
    return next((bundle for bundle in bundles if bundle.manifest.digest().hex() == digest), None)
