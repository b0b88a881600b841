"""What an inference enclave and its customer sign beside the grant: usage receipts, and which
adapters are the customer's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.keys import SigningKey, verify_signature

__all__ = ["ADAPTER_LABEL", "Usage", "adapter_statement"]

ADAPTER_LABEL = "fedark/leased-adapter/1"
_USAGE_LABEL = "fedark/usage/1"
_MAX_BYTES = 64 << 10


def adapter_statement(lease: bytes, run_id: str, name: str, flat: bytes) -> bytes:
    """What a customer signs of an adapter that it gives to one enclave under one lease."""
    return canonical.digest([ADAPTER_LABEL, lease, run_id, name, hashlib.sha384(flat).digest()])


@dataclass(frozen=True)
class Usage:
    """An enclave's signed word of what it has read and written under a lease, in all so far.

    Attributes:
        lease: digest of the lease.
        run_id: of this life of the enclave.
        party: the lease's customer.
        portions: grants that it took.
        left: tokens of them that are left.
        at: by the clock of its host, seconds since 1970, UTC.
        adapters: SHA-384 of an adapter's values -> tokens read and written with it.
    """

    lease: bytes
    run_id: str
    party: str
    portions: int
    left: int
    at: int
    adapters: Mapping[bytes, tuple[int, int]]

    def sign(self, signing: SigningKey) -> bytes:
        """The receipt."""
        value = asdict(self) | {"adapters": [[d, *n] for d, n in sorted(self.adapters.items())]}
        body = canonical.encode(value)
        return canonical.encode({"body": body, "signature": signing.sign(_USAGE_LABEL, body)})

    @classmethod
    def verify(cls, data: bytes, *, signing_public: bytes, lease: bytes, run_id: str) -> Usage:
        """Read a receipt of the enclave whose attested signing key is `signing_public`.

        Raises:
            Refused: it is malformed, not that enclave's, or of another lease or life.
        """
        usage = cls.claimed(data)
        outer = canonical.decode(data, max_bytes=_MAX_BYTES)
        try:
            verify_signature(
                signing_public, _USAGE_LABEL, outer["body"], outer["signature"], by="the enclave"
            )
        except Refused:
            raise _refused() from None
        if (usage.lease, usage.run_id) != (lease, run_id):
            raise _refused()
        return usage

    @classmethod
    def claimed(cls, data: bytes) -> Usage:
        """What a receipt says, whoever signed it.

        Raises:
            Refused: it is malformed.
        """
        try:
            outer = canonical.decode(data, max_bytes=_MAX_BYTES)
            if not all(type(outer[name]) is bytes for name in ("body", "signature")):
                raise _refused()
            body = canonical.decode(outer["body"], max_bytes=_MAX_BYTES)
            body["adapters"] = {
                bytes(digest): (int(read), int(written))
                for digest, read, written in body["adapters"]
            }
            return cls(**body)
        except (ProtocolError, KeyError, TypeError, ValueError):
            raise _refused() from None


def _refused() -> Refused:
    return Refused(
        "A usage receipt is malformed, or not of this enclave and lease.",
        safe="Nothing was concluded from it.",
    )
