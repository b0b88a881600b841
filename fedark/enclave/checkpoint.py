"""An enclave's state, sealed by itself for itself: what lets it go on after its process was killed.

The platform derives the key for exactly this device, these measurement registers (the run
configuration among them) and this confinement; a simulated launcher does it by HKDF from its
device's secret, as processors do from a fused one. So the same enclave, started again for the same
run, opens a checkpoint, and no other does: not another build, party, run, machine or weaker
sandbox.
Form: "FDCP", one byte of version, a random 96-bit nonce, AES-256-GCM over canonical CBOR (NIST SP
800-38D allows 2^32 random nonces).

What is in it: keys, nonces, the evidence of admitted peers, rounds, adapters, optimiser state,
session secrets. What is not: weights and records, which are brought again, and compared with what
the state says of them.

Sealing cannot say which checkpoint is the newest; a host may bring an old one. What that is worth
to it:

- A trainer. Rounds only increase, and what it sends only the aggregator enclave reads, which takes
  one message a customer and round, made from the model that it gave out itself. So a trainer that
  runs a round twice tells nobody more. If the aggregator enclave lies too, a rolled-back trainer is
  one that colludes, and masks stand `protection.colluders` of those.
- The aggregator. From one state it could be made to close a round twice, over two cohorts, to
  subtract one result from the other. In mode "sealed" results are encrypted to trainer enclaves
  until the last measurements, which follow the last round, are closed. Each trainer trains one
  round once, from one model, and measures one final adapter: two histories need two cohorts of
  trainers for everything that follows the round. The original takes at least the contract's
  minimum, m of the n trainers that were admitted before the loading was closed (none is admitted
  later); an aggregator enclave that was restarted takes max(m, n - m + 1), as all of its
  later states say. Any two such cohorts share a trainer, so one of the histories ends there, with
  no adapter and no figure given out. Under masks the committee answers one survivor set a round,
  the last one included, so the adapter may be delivered without measurements.
- A global adapter that is measured for the learning curve between two rounds. Its figures come out
  as that is closed, but a trainer measures and trains one global adapter for each round, so the
  count above holds there as well; and they tell of the adapter alone, not of who measured it.
- The sums of the last measurements are given out as they are closed, which nothing later guards: in
  mode "sealed" an aggregator enclave that was restarted while they were collected gives none. The
  adapter is the same then, whoever measured it.
- Both together. In mode "sealed" a customer's host that rolls its own trainer back together with
  the aggregator's defeats the count above, as one that breaks its platform does: two sums of one
  round come out. Under masks it is one of `colluders`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.snapshot import Snapshot

__all__ = ["Sealer", "SealingKey"]

Kept = TypeVar("Kept", bound=Snapshot)

SealingKey = Callable[[], bytes]
"""Asks the platform for the 32-byte key of this enclave."""

_MAGIC = b"FDCP"
_VERSION = 2
_HEAD = _MAGIC + bytes([_VERSION])
_NONCE, _TAG = 12, 16


class Sealer:
    """Seals and opens one enclave's state. The key is asked for when it is first needed."""

    def __init__(self, key: SealingKey) -> None:
        self._ask = key
        self._aead: AESGCM | None = None

    def seal(self, state: Snapshot) -> bytes:
        """The checkpoint of `state`."""
        nonce = os.urandom(_NONCE)
        return _HEAD + nonce + self._cipher().encrypt(nonce, state.encode(), _HEAD)

    def open(self, checkpoint: bytes, kind: type[Kept]) -> Kept:
        """The state in a checkpoint.

        Raises:
            ProtocolError: of another version of fedark, no checkpoint at all, or of something else
                than `kind`.
            Refused: altered, or of another enclave, run, device or confinement.
        """
        if checkpoint[:4] != _MAGIC or len(checkpoint) < len(_HEAD) + _NONCE + _TAG:
            raise ProtocolError(
                "What was brought as a checkpoint is none.", safe="The enclave did not start."
            )
        if checkpoint[:5] != _HEAD:
            raise ProtocolError(
                f"A checkpoint is of version {checkpoint[4]}, this enclave writes version"
                f" {_VERSION}.",
                safe="The enclave did not start.",
                fix="End the job with the release that it began with.",
            )
        rest = checkpoint[len(_HEAD) :]
        try:
            state = self._cipher().decrypt(rest[:_NONCE], rest[_NONCE:], _HEAD)
        except InvalidTag:
            raise Refused(
                "A checkpoint does not open: it was altered, or is of another enclave, run, device"
                " or sandbox.",
                safe="Nothing of it was used, and the enclave did not start.",
                fix="Bring the checkpoint that this enclave wrote, or begin a new run.",
            ) from None
        return kind.decode(state)

    def _cipher(self) -> AESGCM:
        if self._aead is None:
            self._aead = AESGCM(self._ask())
        return self._aead
