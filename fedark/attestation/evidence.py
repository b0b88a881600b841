"""Evidence as it crosses the wire: a platform's token, the binding that the token's report data
stands for, and whose enclave it is.

Form: canonical CBOR map {"platform": text, "token": bytes, "binding": map of `KeyBinding`'s fields,
"host": bytes}, at most 64 KiB. Nothing in it is believed before the gate has verified the token,
recomputed the report data and verified the host's signature.

Hardware says what an enclave is, not who started it. Without the party's own signature whoever has
a machine that the contract admits could start the right enclave under a customer's name, and fill a
cohort with customers of its own.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from fedark.attestation.binding import KeyBinding
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError

__all__ = ["MAX_EVIDENCE_BYTES", "Evidence"]

MAX_EVIDENCE_BYTES = 64 << 10
_MAX_DEPTH = 2
_PLATFORM = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Evidence:
    """A token and what it is about.

    Attributes:
        platform: which verifier can read `token`.
        token: the platform's own format.
        binding: the statement behind the token's report data.
        host: the party's signature that the enclave is its own (`KeyBinding.host_statement`); empty
            until it has signed.

    Raises:
        ProtocolError: a field is malformed.
    """

    platform: str
    token: bytes
    binding: KeyBinding
    host: bytes = b""

    def __post_init__(self) -> None:
        if type(self.platform) is not str or not _PLATFORM.fullmatch(self.platform):
            raise ProtocolError("Evidence names no well-formed platform.", safe="It was not used.")
        if type(self.token) is not bytes or not self.token:
            raise ProtocolError("Evidence holds no token.", safe="It was not used.")
        if type(self.host) is not bytes or len(self.host) not in (0, 64):
            raise ProtocolError(
                "Evidence holds no well-formed signature of its host.", safe="It was not used."
            )

    def encode(self) -> bytes:
        """The canonical form.

        Raises:
            ProtocolError: it would be larger than `MAX_EVIDENCE_BYTES`.
        """
        value = {
            "platform": self.platform,
            "token": self.token,
            "binding": self.binding.to_map(),
            "host": self.host,
        }
        data = canonical.encode(value)
        if len(data) > MAX_EVIDENCE_BYTES:
            raise ProtocolError(
                f"Evidence of {len(data)} bytes is over the limit of {MAX_EVIDENCE_BYTES}."
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """Read exactly what `encode` gives.

        Raises:
            ProtocolError: anything else.
        """
        value = canonical.decode(data, max_bytes=MAX_EVIDENCE_BYTES, max_depth=_MAX_DEPTH)
        if type(value) is not dict or set(value) != {"platform", "token", "binding", "host"}:
            raise ProtocolError(
                "Evidence is not a map of platform, token, binding and host.",
                safe="It was not used.",
            )
        return cls(
            value["platform"], value["token"], KeyBinding.from_map(value["binding"]), value["host"]
        )

    def digest(self) -> bytes:
        """SHA-384 of the canonical form, 48 bytes."""
        return hashlib.sha384(self.encode()).digest()
