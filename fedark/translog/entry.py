"""What is logged, and its one canonical form: the leaf of the tree.

Each kind has fixed facts, and a fact is a name, a digest or a number: there is no field that could
hold a secret, a record or free text. Why something was refused is in the entry as a digest only;
the text itself stays beside the entry in its owner's file.

Form: canonical CBOR of {"label", "kind", "time", "facts"}.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import LogRefused, ProtocolError
from fedark.translog import merkle

__all__ = ["KINDS", "MAX_ENTRY_BYTES", "Entry", "Fact", "log_name", "note_digest"]

MAX_ENTRY_BYTES = 4096
_LABEL = "fedark/log-entry/1"
_NAME = re.compile(r"[\x21-\x7e]{1,128}")
_TIME_LIMIT = 1 << 40

Fact = str | bytes | int

KINDS: Mapping[str, Mapping[str, str]] = {
    # An enclave was admitted: its evidence answered a challenge of the log's owner and was
    # appraised as good.
    "attestation": {
        "party": "name",
        "run_id": "name",
        "contract": "sha384",
        "role": "name",
        "platform": "name",
        "evidence": "sha384",
        "measurements": "sha384",
        "signing": "32 bytes",
    },
    # A weight key was released to an enclave that was admitted.
    "release": {
        "party": "name",
        "run_id": "name",
        "contract": "sha384",
        "model": "name",
        "bundle": "sha384",
        "policy": "sha384",
        "nonce": "32 bytes",
        "evidence": "sha384",
        "kem": "name",
        "recipient": "sha384",
        "expires": "number",
    },
    # A weight key was released to an inference enclave, for so many tokens; `contract` is a lease.
    "lease": {
        "party": "name",
        "run_id": "name",
        "contract": "sha384",
        "model": "name",
        "bundle": "sha384",
        "policy": "sha384",
        "nonce": "32 bytes",
        "evidence": "sha384",
        "kem": "name",
        "recipient": "sha384",
        "expires": "number",
        "tokens": "number",
    },
    # An admission ("admission") or a release ("release:MODEL") was refused. `reasons`: digest of
    # the text.
    "refusal": {
        "party": "name",
        "run_id": "name",
        "contract": "sha384",
        "asked": "name",
        "evidence": "sha384",
        "reasons": "sha384",
    },
    # A customer charged its privacy ledger and showed its head: a ledger without that head in its
    # past was rolled back.
    "charge": {
        "party": "name",
        "run_id": "name",
        "contract": "sha384",
        "ledger": "32 bytes",
        "sequence": "number",
        "head": "sha384",
    },
}
"""kind -> fact -> form."""


def log_name(text: str) -> str:
    """`text` as a fact of form "name": whatever is not printable ASCII replaced, at most 128
    characters, not empty.
    """
    return re.sub(r"[^\x21-\x7e]", "?", text[:128]) or "?"


def note_digest(note: str) -> bytes:
    """SHA-384 of a text that stays beside its entry."""
    return hashlib.sha384(note.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        kind: a key of `KINDS`.
        time: when it was decided, seconds since 1970, UTC, by the owner's clock.
        facts: exactly those of its kind.

    Raises:
        LogRefused: it is anything else.
    """

    kind: str
    time: int
    facts: Mapping[str, Fact]

    def __post_init__(self) -> None:
        if (
            not _fits("name", self.kind)
            or self.kind not in KINDS
            or not _fits("number", self.time)
            or self.time >= _TIME_LIMIT
            or not _fits("map", self.facts)
            or self.facts.keys() != KINDS[self.kind].keys()
            or not all(_fits(form, self.facts[name]) for name, form in KINDS[self.kind].items())
        ):
            raise LogRefused("A log entry is malformed.", safe="It was neither logged nor used.")
        object.__setattr__(self, "facts", dict(self.facts))

    def encode(self) -> bytes:
        """The canonical form."""
        return canonical.encode(
            {"label": _LABEL, "kind": self.kind, "time": self.time, "facts": dict(self.facts)}
        )

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """Read exactly what `encode` gives.

        Raises:
            LogRefused: anything else.
        """
        try:
            value: Any = canonical.decode(data, max_bytes=MAX_ENTRY_BYTES, max_depth=2)
        except ProtocolError as error:
            raise LogRefused(
                f"A log entry is malformed: {error.what}", safe="It was not used."
            ) from None
        if (
            type(value) is not dict
            or value.keys() != {"label", "kind", "time", "facts"}
            or value["label"] != _LABEL
        ):
            raise LogRefused("A log entry is malformed.", safe="It was not used.")
        return cls(value["kind"], value["time"], value["facts"])

    def leaf(self) -> bytes:
        """Its leaf hash, 32 bytes."""
        return merkle.leaf_hash(self.encode())


def _fits(form: str, value: object) -> bool:
    match form:
        case "name":
            return type(value) is str and _NAME.fullmatch(value) is not None
        case "sha384":
            return type(value) is bytes and len(value) == 48
        case "32 bytes":
            return type(value) is bytes and len(value) == 32
        case "number":
            return type(value) is int and 0 <= value < 1 << 63
        case "map":
            return isinstance(value, Mapping)
    raise ValueError(form)
