"""What a sealed bundle says of itself: model card, release policy, files and their digests, signed
by the provider.

Form: canonical CBOR of {"body": bytes, "signature": bytes}; the body is canonical CBOR too, the
signature is Ed25519 over it with the label "fedark/bundle/1". The digest that contracts name is
SHA-384 of the body, so it does not depend on the signature.

Rules kept: only `Manifest.verify` and `Manifest.sign` make a `VerifiedManifest`, and whatever
opens, releases or accepts takes nothing else. File names are relative, of a small alphabet, sorted,
and differ in more than case: none climbs out of a directory, none stands for two files. Pickles and
code are no admissible files: to load either is to run what a stranger wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, ValidationError

from fedark.attestation.claims import SANDBOX_MODES, Claims
from fedark.attestation.terms import HARDWARE
from fedark.contract.contract import Contract, ProtectionMode
from fedark.foundation import canonical
from fedark.foundation.errors import Refused, SealBroken, printable
from fedark.foundation.keys import HYBRID, Kem, SigningKey, verify_signature
from fedark.foundation.terms import Name, Terms, explain, to_tuples
from fedark.privacy.kinds import NAMES, MechanismName

__all__ = [
    "BUNDLE_LABEL",
    "COMMITMENT_BYTES",
    "EXTRA",
    "MAX_MANIFEST_BYTES",
    "TAG_BYTES",
    "FileEntry",
    "Manifest",
    "ModelCard",
    "ReleasePolicy",
    "VerifiedManifest",
    "inadmissible",
    "name_problems",
    "weights_digest",
]

BUNDLE_LABEL = "fedark/bundle/1"
COMMITMENT_BYTES = 48
EXTRA = "extra"
MAX_MANIFEST_BYTES = 1 << 20
TAG_BYTES = 16
_MAX_FILES = 1024
_MAX_TOTAL = 1 << 42
_MAX_NAME = 200
_MIN_CHUNK, _MAX_CHUNK = 1 << 10, 16 << 20
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_EXTRA_SUFFIXES = (".csv", ".jsonl", ".json", ".txt", ".f32")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_CODE = (".py", ".pyc", ".so", ".sh")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,4}", re.ASCII)
_TermsT = TypeVar("_TermsT", bound=Terms)


def _time(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError("has no time zone")
    return value


Text = Annotated[str, Field(max_length=2000)]


class ModelCard(Terms):
    """What a provider says of its model, for people who choose.

    Attributes:
        name: the model's short name.
        title, description: for readers.
        licence: SPDX expression, or a short text.
        task: what its adapters are trained for.
        base: where the weights come from, such as a hub id.
    """

    name: Name
    title: Annotated[str, Field(min_length=1, max_length=120)]
    description: Text = ""
    licence: Annotated[str, Field(min_length=1, max_length=200)]
    task: Literal["classification", "instruction"]
    base: Annotated[str, Field(max_length=200)] = ""


class ReleasePolicy(Terms):
    """What a contract and an enclave must satisfy before the provider releases the weight key.

    Attributes:
        expires: ISO 8601 with time zone; no release after it, and no grant outlives it.
        platforms: admissible attestation platforms; "simulated" only if it stands here.
        sandbox: the weakest admissible sandbox mode.
        minimum_svn: security version number of the simulated platform; hardware's are terms of the
            contract.
        protection: admissible protection modes of updates.
        mechanisms: admissible privacy mechanisms.
        minimum_cohort: fewest customers whose updates may be summed:
            `fedark.contract.protection.fewest_in_a_sum`.
        roles: kinds of enclave that may get the key: "inference" answers with it, under a lease.
        kem: admissible KEMs of an enclave's key; plain X25519, which a quantum computer would
            break, only if it stands here.
    """

    expires: Annotated[str, AfterValidator(_time)]
    platforms: Annotated[tuple[str, ...], Field(min_length=1)]
    sandbox: Literal["none", "landlock", "namespaces"] = "landlock"
    minimum_svn: Annotated[int, Field(ge=0)] = 1
    protection: Annotated[tuple[ProtectionMode, ...], Field(min_length=1)] = get_args(
        ProtectionMode
    )
    mechanisms: Annotated[tuple[MechanismName, ...], Field(min_length=1)] = NAMES
    minimum_cohort: Annotated[int, Field(ge=2)] = 3
    roles: Annotated[tuple[Literal["trainer", "inference"], ...], Field(min_length=1)] = (
        "trainer",
    )
    kem: Annotated[tuple[Kem, ...], Field(min_length=1)] = (HYBRID,)

    def digest(self) -> bytes:
        """SHA-384 of the canonical form, 48 bytes."""
        return canonical.digest(["fedark/release-policy/1", self.model_dump(mode="python")])

    def expired(self, now: datetime) -> bool:
        return now >= datetime.fromisoformat(self.expires)

    def contract_problems(self, contract: Contract) -> list[str]:
        """Everything in `contract` that this policy does not allow."""
        from fedark.contract.protection import (
            fewest_in_a_sum,  # numpy: not for an enclave that opens a bundle
        )

        problems = []
        if contract.protection.mode not in self.protection:
            problems.append(
                f"the contract protects updates by {contract.protection.mode!r}, which the provider"
                " does not allow"
            )
        if contract.privacy.mechanism not in self.mechanisms:
            problems.append(
                f"the privacy mechanism {contract.privacy.mechanism!r} is not one that the provider"
                " allows"
            )
        if (fewest := fewest_in_a_sum(contract)) < self.minimum_cohort:
            problems.append(
                f"the contract sums {fewest} customers, the provider asks for {self.minimum_cohort}"
            )
        return problems + self.kem_problems(contract.attestation.kem)

    def role_problems(self, role: str) -> list[str]:
        """Why an enclave of `role` may not get the key."""
        if role in self.roles:
            return []
        named = ", ".join(self.roles)
        return [f"the provider's release policy names no {role} enclave (it names {named})"]

    def kem_problems(self, kem: Kem) -> list[str]:
        """Why a weight key may not be wrapped under `kem`."""
        return (
            []
            if kem in self.kem
            else [f"the KEM {kem} is not one that the provider allows ({', '.join(self.kem)})"]
        )

    def enclave_problems(self, claims: Claims) -> list[str]:
        """Everything in an enclave's claims that this policy does not allow."""
        problems = []
        if claims.platform not in self.platforms:
            problems.append(f"the platform {claims.platform!r} is not one that the provider allows")
        if claims.sandbox not in SANDBOX_MODES[SANDBOX_MODES.index(self.sandbox) :]:
            problems.append(f"the sandbox mode {claims.sandbox!r} is weaker than {self.sandbox!r}")
        if claims.platform not in HARDWARE and claims.svn < self.minimum_svn:
            problems.append(f"the security version {claims.svn} is below {self.minimum_svn}")
        if claims.debug:
            problems.append("the enclave runs in debug mode")
        return problems


def weights_digest(files: Mapping[str, bytes]) -> bytes:
    """What names a base's weights: SHA-384 over those of its weight files, by any name.

    Args:
        files: name -> SHA-384 of the content; files of other kinds have no part in it.
    """
    found = sorted(digest for name, digest in files.items() if name.endswith(".safetensors"))
    return canonical.digest(["fedark/weights/1", found])


@dataclass(frozen=True)
class FileEntry:
    """A sealed file: its name, its length in bytes, and SHA-384 of its plaintext."""

    name: str
    size: int
    sha384: bytes


@dataclass(frozen=True)
class Manifest:
    """The body of a manifest.

    Attributes:
        provider: the signer's 32-byte Ed25519 key.
        bundle_id: 32 random bytes, in the associated data of every chunk.
        chunk_size: plaintext bytes of every chunk but the last.
        commitment: to the weight key, see `fedark.vault.weightkey`.
        payload_sha384: of the whole sealed payload.
        files: in the order in which their plaintexts follow each other.
    """

    provider: bytes
    bundle_id: bytes
    chunk_size: int
    commitment: bytes
    payload_sha384: bytes
    files: tuple[FileEntry, ...]
    card: ModelCard
    policy: ReleasePolicy

    @property
    def total(self) -> int:
        """Plaintext bytes of all files."""
        return sum(entry.size for entry in self.files)

    def weights(self) -> bytes:
        """SHA-384 over the weight files' digests: the same however often they are sealed."""
        return weights_digest({one.name: one.sha384 for one in self.files})

    @property
    def chunks(self) -> int:
        return -(-self.total // self.chunk_size)

    @property
    def payload_size(self) -> int:
        """Bytes of the sealed payload."""
        return self.total + self.chunks * TAG_BYTES

    def sign(self, provider: SigningKey) -> VerifiedManifest:
        """Sign with the key that the manifest names; what `verify` would refuse is refused here.

        Raises:
            Refused, SealBroken: as `verify`.
        """
        body = canonical.encode(
            {
                "format": BUNDLE_LABEL,
                "provider": self.provider,
                "bundle_id": self.bundle_id,
                "chunk_size": self.chunk_size,
                "commitment": self.commitment,
                "payload_sha384": self.payload_sha384,
                "files": [[entry.name, entry.size, entry.sha384] for entry in self.files],
                "card": self.card.model_dump(mode="python"),
                "policy": self.policy.model_dump(mode="python"),
            }
        )
        signed = canonical.encode({"body": body, "signature": provider.sign(BUNDLE_LABEL, body)})
        return Manifest.verify(signed, provider.public)

    @staticmethod
    def verify(data: bytes, provider_public: bytes) -> VerifiedManifest:
        """Read a signed manifest of the provider `provider_public`.

        Raises:
            ProtocolError: not canonical CBOR.
            Refused: the signature is not this provider's.
            SealBroken: it is signed, but breaks a rule of this format.
        """
        outer = canonical.decode(data, max_bytes=MAX_MANIFEST_BYTES)
        if not isinstance(outer, dict) or outer.keys() != {"body", "signature"}:
            raise SealBroken(
                "A bundle's manifest is not a signed map.", safe="Nothing of the bundle was used."
            )
        body, signature = outer["body"], outer["signature"]
        if not isinstance(body, bytes) or not isinstance(signature, bytes):
            raise SealBroken(
                "A bundle's manifest is not a signed map.", safe="Nothing of the bundle was used."
            )
        verify_signature(
            provider_public, BUNDLE_LABEL, body, signature, by="the provider of this bundle"
        )
        manifest = _parsed(canonical.decode(body, max_bytes=MAX_MANIFEST_BYTES))
        if manifest.provider != provider_public:
            raise Refused(
                "A bundle's manifest names another provider than its signer.",
                safe="Nothing of it was used.",
            )
        return VerifiedManifest._of(manifest, data, body)

    @staticmethod
    def claimed_provider(data: bytes) -> bytes:
        """The key that a manifest names as its signer, unverified: for showing, and for `verify` to
        confirm that it signed.

        Raises:
            ProtocolError: not canonical CBOR.
            SealBroken: there is no such key in it.
        """
        outer = canonical.decode(data, max_bytes=MAX_MANIFEST_BYTES)
        body = outer.get("body") if isinstance(outer, dict) else None
        inner = (
            canonical.decode(body, max_bytes=MAX_MANIFEST_BYTES)
            if isinstance(body, bytes)
            else None
        )
        claimed = inner.get("provider") if isinstance(inner, dict) else None
        if not isinstance(claimed, bytes) or len(claimed) != 32:
            raise SealBroken(
                "A bundle's manifest names no provider.", safe="Nothing of it was used."
            )
        return claimed


class VerifiedManifest(Manifest):
    """A manifest whose signature and rules were checked."""

    def __init__(self) -> None:
        raise TypeError("use Manifest.verify")

    _encoded: bytes
    _digest: bytes

    @classmethod
    def _of(cls, manifest: Manifest, encoded: bytes, body: bytes) -> VerifiedManifest:
        verified = object.__new__(cls)
        verified.__dict__.update(
            {field.name: getattr(manifest, field.name) for field in fields(manifest)}
        )
        verified.__dict__.update(_encoded=encoded, _digest=hashlib.sha384(body).digest())
        return verified

    def encode(self) -> bytes:
        """The signed form, as `Manifest.verify` takes it."""
        return self._encoded

    def digest(self) -> bytes:
        """SHA-384 of the signed body, 48 bytes: what contracts name."""
        return self._digest


def inadmissible(name: str) -> str:
    """Why a file of this name is never sealed, or "" if it may be."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PICKLES:
        return (
            f"{name}: a {suffix} file can be a pickle, and loading a pickle runs code; convert the"
            " weights to safetensors"
        )
    if suffix in _CODE:
        return f"{name}: code is not sealed; a base model must load without code of its own"
    allowed = _EXTRA_SUFFIXES if name.startswith(f"{EXTRA}/") else _MODEL_SUFFIXES
    if suffix not in allowed:
        return f"{name}: not one of {', '.join(allowed)}"
    return ""


def name_problems(names: Iterable[str]) -> list[str]:
    """Everything wrong with these file names as the names of one bundle."""
    problems, seen = [], set[str]()
    for name in names:
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            problems.append(
                f"{name[:_MAX_NAME]!r}: not a plain relative name (letters, digits, '.', '_', '-')"
            )
        elif reason := inadmissible(name):
            problems.append(reason)
        if name.lower() in seen:
            problems.append(
                f"{name[:_MAX_NAME]!r}: stands twice, or differs from another name in case alone"
            )
        seen.add(name.lower())
    if len(seen) > _MAX_FILES:
        problems.append(f"{len(seen)} files are more than {_MAX_FILES}")
    folders = {str(parent) for name in seen for parent in PurePosixPath(name).parents}
    problems.extend(f"{name!r}: is a file and a folder" for name in sorted(seen & folders))
    return problems


def _parsed(value: Any) -> Manifest:
    keys = {"format", *(field.name for field in fields(Manifest))}
    if not isinstance(value, dict) or value.keys() != keys or value["format"] != BUNDLE_LABEL:
        raise SealBroken(
            "A bundle's manifest is not of a form that this version reads.",
            safe="Nothing of it was used.",
        )
    problems = []
    lengths = {
        "provider": 32,
        "bundle_id": 32,
        "commitment": COMMITMENT_BYTES,
        "payload_sha384": 48,
    }
    problems += [
        f"{key} is not {length} bytes"
        for key, length in lengths.items()
        if not _is_bytes(value[key], length)
    ]
    chunk_size = value["chunk_size"]
    if type(chunk_size) is not int or not _MIN_CHUNK <= chunk_size <= _MAX_CHUNK:
        problems.append("the chunk size is out of range")
    files: list[FileEntry] = []
    for item in value["files"] if isinstance(value["files"], list) else ():
        if (
            not isinstance(item, list)
            or [type(part) for part in item] != [str, int, bytes]
            or not _is_bytes(item[2], 48)
        ):
            problems.append("a file entry is malformed")
        elif item[1] < 0:
            problems.append("a file has a negative length")
        else:
            files.append(FileEntry(*item))
    names = [entry.name for entry in files]
    problems += name_problems(names)
    if names != sorted(names):
        problems.append("the files are not in order")
    if not 0 < sum(entry.size for entry in files) <= _MAX_TOTAL:
        problems.append("the files are empty, or too large together")
    card, policy = (
        _validated(ModelCard, value["card"], problems),
        _validated(ReleasePolicy, value["policy"], problems),
    )
    if problems or card is None or policy is None:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise SealBroken(
            f"A bundle's manifest breaks the rules:\n{lines}", safe="Nothing of it was used."
        )
    return Manifest(
        value["provider"],
        value["bundle_id"],
        chunk_size,
        value["commitment"],
        value["payload_sha384"],
        tuple(files),
        card,
        policy,
    )


def _validated(kind: type[_TermsT], value: Any, problems: list[str]) -> _TermsT | None:
    try:
        return kind.model_validate(to_tuples(value))
    except ValidationError as error:
        problems.extend(printable(line) for line in explain(error))
    return None


def _is_bytes(value: Any, length: int) -> bool:
    return type(value) is bytes and len(value) == length
