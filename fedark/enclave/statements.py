"""What enclaves say of a run under their own attested keys. The aggregator enclave, for everybody:
whose messages are in each sum and which figures came out of it, and which adapters it delivered.
A trainer enclave, for its own customer alone: what it measured there.

Without these a report is the word of the aggregator's host, who could write any figure into it. A
statement tells nothing of one customer: its figures are the sums that leave the enclave anyway. The
digest of an adapter lets whoever already has that adapter, bit for bit, recognise it.

Form: canonical CBOR of {"body", "signature"}; the body is a `Snapshot`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.snapshot import Bytes48, Snapshot

__all__ = ["Delivered", "Own", "Summed"]

_MAX_BYTES = 16 << 20


class _Statement(Snapshot):
    """Attributes:
    contract: digest of the contract.
    run_id: of the run.
    """

    called = "A statement of an enclave"
    label: ClassVar[str]
    by: ClassVar[str] = "the aggregator enclave"

    contract: Bytes48
    run_id: str

    def sign(self, key: SigningKey) -> bytes:
        """The signed form."""
        body = self.encode()
        return canonical.encode({"body": body, "signature": key.sign(self.label, body)})

    @classmethod
    def verify(cls, data: bytes, *, signing_public: bytes, contract: bytes, run_id: str) -> Self:
        """Read a statement of the enclave whose attested signing key is `signing_public`.

        Args:
            contract: digest of the contract, 48 bytes.

        Raises:
            ProtocolError: it is malformed, or of another contract or run.
            Refused: that enclave did not sign it.
        """
        outer: Any = canonical.decode(data, max_bytes=_MAX_BYTES, max_depth=1)
        if type(outer) is not dict or {name: type(value) for name, value in outer.items()} != {
            "body": bytes,
            "signature": bytes,
        }:
            raise ProtocolError(f"A statement of {cls.by} is malformed.")
        verify_signature(signing_public, cls.label, outer["body"], outer["signature"], by=cls.by)
        said = cls.decode(outer["body"])
        if (said.contract, said.run_id) != (contract, run_id):
            raise ProtocolError(f"A statement of {cls.by} is of another contract or run.")
        return said


class Summed(_Statement):
    """A round that was closed.

    Attributes:
        round: 0 for the loading, the one after the last round for the last measurements.
        customers: whose messages are in the sum; under masks the survivors.
        figures: canonical CBOR of the sums of counts that came out, as in `Closed.metrics`.
    """

    label = "fedark/summed/1"

    round: int
    customers: list[str]
    figures: bytes


class Delivered(_Statement):
    """The adapters that are delivered.

    Attributes:
        adapters: model -> SHA-384 of its travelling values, float32 little-endian.
        sums: how many rounds were closed before, each with its statement (`Summed`).
        curve: the learning curve, and of which rounds these are, as `fedark.enclave.curve` encodes
            it.
    """

    label = "fedark/delivered/1"

    adapters: dict[str, Bytes48]
    curve: bytes
    sums: int


class Own(_Statement):
    """What a trainer enclave measured for its own customer.

    Attributes:
        party: the customer.
        figures: SHA-384 of the figures, as the customer's node got them.
        personal: model -> SHA-384 of the personal adapter's values, float32 little-endian; {} until
            there is one.
    """

    label = "fedark/own/1"
    by = "the trainer enclave"

    party: str
    figures: Bytes48
    personal: dict[str, Bytes48]
