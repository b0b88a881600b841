"""Personal adapters as they leave a trainer enclave: for its own customer's node alone, and only
after the shared adapter that they were made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedark.attestation.gate import AttestedPeer
from fedark.enclave.protection import MAX_MESSAGE_BYTES, delivered_base, unpack_vector
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.keys import HpkeKey, hpke_seal, kem_of

__all__ = ["open_personal", "require_delivered", "seal_personal"]

_LABEL = "fedark/personal/1"

Vector = np.ndarray[Any, np.dtype[np.float32]]


def require_delivered(
    delivery: bytes, base: bytes, *, party: str, aggregator: AttestedPeer
) -> None:
    """Check that the aggregator enclave has closed the job with the very adapters that personal
    ones were made from.

    Without that a host who takes the aggregator enclave back to an earlier state would get
    something that was made of each of two sums of one round.

    Args:
        delivery: its delivery to `party`.
        base: SHA-384 of the global state that was measured last.

    Raises:
        Refused, ProtocolError: it has not.
    """
    if delivered_base(delivery, party=party, aggregator=aggregator) != base:
        raise Refused(
            "Another shared adapter was delivered than the one that was measured here.",
            safe="No personal adapter left.",
        )


def seal_personal(
    adapters: Mapping[str, bytes], public: bytes, *, contract: bytes, run_id: str
) -> bytes:
    """The adapters (model -> float32 values), encrypted to a key that the customer holds; as they
    are where `public` is empty.

    Raises:
        ProtocolError: `public` is no HPKE key.
    """
    plain = canonical.encode(dict(adapters))
    if not public:
        return plain
    return hpke_seal(plain, public, _context(contract, run_id), kem=kem_of(public))


def open_personal(
    data: bytes, key: HpkeKey | None, *, contract: bytes, run_id: str
) -> dict[str, Vector]:
    """Model -> vector, of what `seal_personal` gave.

    Args:
        key: None where it was not sealed.

    Raises:
        Refused: sealed to another key, or of another contract or run.
        ProtocolError: malformed.
    """
    plain = data if key is None else key.open(data, _context(contract, run_id))
    value = canonical.decode(plain, max_bytes=MAX_MESSAGE_BYTES)
    try:
        return {str(name): unpack_vector(vector) for name, vector in value.items()}
    except (AttributeError, ValueError):
        raise ProtocolError("Personal adapters are malformed.", safe="None was stored.") from None


def _context(contract: bytes, run_id: str) -> dict[str, Any]:
    return {"label": _LABEL, "contract": contract, "run_id": run_id}
