"""What leaves an enclave: updates, measurements, global states and deliveries, each encrypted,
signed and bound.

Rules kept here:

- There is no type for a plain update. A `ProtectedUpdate` comes only from `protect`, which needs
  the `AttestedPeer` that it is encrypted to, or from `ProtectedUpdate.verify`, which needs the
  `AttestedPeer` that signed it.
- Everything is bound to (contract, run, kind, round, party, base): a message of another job, run,
  round or sender, or one that was trained from another global state, does not verify.
- Customers' messages use HPKE to the aggregator enclave (`fedark.foundation.keys`). The global
  state goes to the whole cohort once, under a group key: AES-256-GCM with a random 96-bit nonce
  (NIST SP 800-38D allows 2^32 of them for a key; a run uses one a round), signed by the aggregator
  enclave, so that no trainer can forge it.

Encoding: canonical CBOR; vectors are float32, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedark.contract.protection import Figure
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.keys import HpkeKey, Kem, SigningKey, hpke_seal, verify_signature

if TYPE_CHECKING:
    from fedark.attestation.gate import AttestedPeer

__all__ = [
    "FINAL",
    "GLOBAL",
    "LOADED",
    "Context",
    "Delivery",
    "GroupKey",
    "Payload",
    "ProtectedUpdate",
    "delivered_base",
    "open_delivery",
    "protect",
    "seal_delivery",
]

LOADED = "loaded"
"""The kind of a customer's first message, which brings the initial adapters; the others' kinds are
in `fedark.contract.protection`.
"""
GLOBAL, FINAL = "global", "final"
"""Kinds of a global state: what a round begins with, and what is measured last and delivered."""
MAX_MESSAGE_BYTES = 1 << 30
_UPDATE, _GLOBAL, _GROUP, _DELIVERY = (
    f"fedark/{name}/1" for name in ("update", "global", "group-key", "delivery")
)

_DIGEST = 48
_COUNTS = struct.Struct("<QQd")


@dataclass(frozen=True)
class Context:
    """What a message belongs to.

    Attributes:
        contract: the contract's digest, 48 bytes.
        run_id: of this run of the job.
        kind: "loaded", "update", "tasted", "curve", "evaluated", "global" or "final"; under
            masks "endorsement" and "shares" of a round too.
        round: 0 for "loaded", the round of an "update", the one after the last for "evaluated" and
            "final".
        party: the customer that sends it; for "global" and "final" the aggregator.
        base: SHA-384 of the global message that it was made from; empty for "loaded".
    """

    contract: bytes
    run_id: str
    kind: str
    round: int
    party: str
    base: bytes = b""

    def to_map(self, label: str) -> dict[str, Any]:
        return {"label": label, **self.__dict__}


@dataclass(frozen=True)
class Payload:
    """The plaintext of a customer's message; it exists in enclaves only.

    Attributes:
        weight: number of records that the vectors speak for.
        vectors: model name -> flat float32 vector, 1-D.
        metrics: model name -> metric name -> (correct, total, loss sum).
        masked: under masks, a message of `fedark.secagg`, with nothing beside it: what is counted
            or trained is inside the mask. When loading, the initial vectors and nothing else: they
            tell nothing of a customer. In the enclave that masked it a view, so that it is not
            copied before it is encoded.
        noised: in mode "sealed" under a mechanism whose noise is shared, the update's integers
            (`fedark.contract.privacy.noised_words`), little-endian, and no vector.
    """

    weight: int
    vectors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
    metrics: Mapping[str, Mapping[str, Figure]]
    masked: bytes | memoryview = b""
    noised: bytes = b""

    def encode(self) -> bytes:
        return canonical.encode(
            {
                "weight": self.weight,
                "vectors": {name: pack_vector(vector) for name, vector in self.vectors.items()},
                "metrics": {
                    model: {key: _COUNTS.pack(*value) for key, value in items.items()}
                    for model, items in self.metrics.items()
                },
                "masked": bytes(self.masked),
                "noised": self.noised,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        """Read a payload.

        Raises:
            ProtocolError: it is malformed, or a number in it is not finite.
        """
        value = canonical.decode(data, max_bytes=MAX_MESSAGE_BYTES)
        try:
            weight = value["weight"]
            vectors = {
                _text(name): unpack_vector(vector) for name, vector in value["vectors"].items()
            }
            metrics = {
                _text(model): {_text(key): _metric(item) for key, item in items.items()}
                for model, items in value["metrics"].items()
            }
            masked, noised = value["masked"], value["noised"]
            if len(value) != 5 or type(masked) is not bytes or type(noised) is not bytes:
                raise ValueError
            if len(noised) % 8:
                raise ValueError
            if type(weight) is not int or not 0 <= weight < 1 << 40:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ProtocolError("An update's payload is malformed.") from None
        return cls(weight, vectors, metrics, masked, noised)


def _text(name: Any) -> str:
    if type(name) is not str:
        raise ValueError
    return name


def _metric(item: Any) -> Figure:
    """Of 24 bytes whatever the counts are: a message's length tells nothing of them."""
    if type(item) is not bytes or len(item) != _COUNTS.size:
        raise ValueError
    correct, total, loss = _COUNTS.unpack(item)
    if not correct <= total or not math.isfinite(loss):
        raise ValueError
    return correct, total, loss


def pack_vector(vector: np.ndarray[Any, Any]) -> bytes:
    """float32, little-endian bytes of a 1-D vector."""
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()


def unpack_vector(data: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The 1-D float32 vector of `pack_vector`.

    Raises:
        ValueError: not whole floats, or one that is not finite.
    """
    if not isinstance(data, bytes) or len(data) % 4:
        raise ValueError("not a float32 vector")
    vector = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("not finite")
    return vector


class ProtectedUpdate:
    """A customer's message to the aggregator enclave: HPKE ciphertext and the trainer enclave's
    signature over it.
    """

    __slots__ = ("context", "wire")

    context: Context
    wire: bytes

    def __init__(self) -> None:
        raise TypeError("a ProtectedUpdate comes from protect() or ProtectedUpdate.verify()")

    @classmethod
    def _make(cls, context: Context, wire: bytes) -> ProtectedUpdate:
        update = object.__new__(cls)
        update.context, update.wire = context, wire
        return update

    @classmethod
    def verify(cls, wire: bytes, *, sender: AttestedPeer, context: Context) -> ProtectedUpdate:
        """Check that the attested `sender` made `wire` for exactly `context`.

        Raises:
            ProtocolError: malformed.
            Refused: another context, or the signature is not the sender's.
        """
        ciphertext, signature = _split(wire)
        if context.party != sender.party:
            raise Refused(
                f"A message of {context.party} was brought by {sender.party}.",
                safe="It was dropped.",
            )
        covered = _covered(context.to_map(_UPDATE), ciphertext)
        verify_signature(
            sender.signing_public,
            _UPDATE,
            covered,
            signature,
            by=f"the trainer enclave of {sender.party}",
        )
        return cls._make(context, wire)

    def open(self, hpke: HpkeKey) -> Payload:
        """The payload; only the aggregator enclave has the key.

        Raises:
            Refused: encrypted to another key.
            ProtocolError: the payload is malformed.
        """
        ciphertext, _ = _split(self.wire)
        return Payload.decode(hpke.open(ciphertext, self.context.to_map(_UPDATE)))


def protect(
    payload: Payload, context: Context, *, recipient: AttestedPeer, signer: SigningKey
) -> ProtectedUpdate:
    """Encrypt `payload` to the attested aggregator enclave and sign it, bound to `context`.

    Raises:
        Refused: `recipient` is not an aggregator of this contract and run.
    """
    if (recipient.role, recipient.contract_digest, recipient.run_id) != (
        "aggregator",
        context.contract,
        context.run_id,
    ):
        raise Refused(
            "The recipient of an update is not this run's aggregator enclave.",
            safe="The update was not sent.",
        )
    ciphertext = hpke_seal(
        payload.encode(), recipient.hpke_public, context.to_map(_UPDATE), kem=recipient.kem
    )
    signature = signer.sign(_UPDATE, _covered(context.to_map(_UPDATE), ciphertext))
    return ProtectedUpdate._make(context, _join(ciphertext, signature))


class GroupKey:
    """The key of one run's cohort: the aggregator enclave makes it, every admitted trainer enclave
    gets it.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secret if secret is not None else AESGCM.generate_key(256)
        self._aead = AESGCM(self._secret)

    def __repr__(self) -> str:
        return "GroupKey(...)"

    def secret_bytes(self) -> bytes:
        """The raw key, for the checkpoint that the aggregator enclave seals to itself."""
        return self._secret

    def grant(self, trainer: AttestedPeer, signer: SigningKey) -> bytes:
        """The key, wrapped for an attested trainer enclave and signed."""
        context = _group_context(
            trainer.contract_digest, trainer.run_id, trainer.party, trainer.signing_public
        )
        ciphertext = hpke_seal(self._secret, trainer.hpke_public, context, kem=trainer.kem)
        return _join(ciphertext, signer.sign(_GROUP, _covered(context, ciphertext)))

    @classmethod
    def accept(
        cls,
        grant: bytes,
        *,
        hpke: HpkeKey,
        signing_public: bytes,
        party: str,
        aggregator: AttestedPeer,
    ) -> GroupKey:
        """The trainer's side of `grant`; `signing_public` is the trainer's own.

        Raises:
            Refused: not from the attested aggregator, or not for this enclave.
        """
        ciphertext, signature = _split(grant)
        context = _group_context(
            aggregator.contract_digest, aggregator.run_id, party, signing_public
        )
        verify_signature(
            aggregator.signing_public,
            _GROUP,
            _covered(context, ciphertext),
            signature,
            by="the aggregator enclave",
        )
        secret = hpke.open(ciphertext, context)
        if len(secret) != 32:
            raise ProtocolError("A group key has the wrong length.")
        return cls(secret)

    def seal_global(
        self,
        vectors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]],
        context: Context,
        signer: SigningKey,
    ) -> bytes:
        """The global adapters of all models, for the whole cohort."""
        nonce = os.urandom(12)
        plaintext = canonical.encode(
            {name: pack_vector(vector) for name, vector in vectors.items()}
        )
        ciphertext = nonce + self._aead.encrypt(
            nonce, plaintext, canonical.encode(context.to_map(_GLOBAL))
        )
        return _join(
            ciphertext, signer.sign(_GLOBAL, _covered(context.to_map(_GLOBAL), ciphertext))
        )

    def open_global(
        self, wire: bytes, context: Context, aggregator: AttestedPeer
    ) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The trainer's side of `seal_global`.

        Raises:
            Refused: altered, of another run or round, or not from the attested aggregator.
            ProtocolError: malformed.
        """
        ciphertext, signature = _split(wire)
        covered = _covered(context.to_map(_GLOBAL), ciphertext)
        verify_signature(
            aggregator.signing_public, _GLOBAL, covered, signature, by="the aggregator enclave"
        )
        try:
            plaintext = self._aead.decrypt(
                ciphertext[:12], ciphertext[12:], canonical.encode(context.to_map(_GLOBAL))
            )
        except InvalidTag:
            raise Refused(
                "A global adapter does not open under this run's group key.",
                safe="It was not used.",
            ) from None
        return _vectors(canonical.decode(plaintext, max_bytes=MAX_MESSAGE_BYTES))


@dataclass(frozen=True)
class Delivery:
    """What a recipient of the contract gets.

    Attributes:
        vectors: model name -> the finished adapter, flat float32.
        curve: the learning curve, as `fedark.enclave.curve` encodes it: what the report says of it
            can be held against this.
    """

    vectors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
    curve: bytes


def seal_delivery(
    delivery: Delivery,
    *,
    contract: bytes,
    run_id: str,
    party: str,
    hpke_public: bytes,
    kem: Kem,
    signer: SigningKey,
    base: bytes,
) -> bytes:
    """The final adapters, encrypted to one recipient of the contract and signed by the aggregator
    enclave.

    Args:
        kem: that the contract names.
        base: SHA-384 of the global message that brought the same adapters to the trainers, 48
            bytes. It stands in the open, under the signature: see `delivered_base`.

    Raises:
        ProtocolError: `hpke_public` is not a key of it.
    """
    context = _delivery_context(contract, run_id, party, base)
    vectors = {name: pack_vector(vector) for name, vector in delivery.vectors.items()}
    plaintext = canonical.encode({"vectors": vectors, "curve": delivery.curve})
    ciphertext = hpke_seal(plaintext, hpke_public, context, kem=kem)
    return base + _join(ciphertext, signer.sign(_DELIVERY, _covered(context, ciphertext)))


def open_delivery(wire: bytes, *, hpke: HpkeKey, party: str, aggregator: AttestedPeer) -> Delivery:
    """The recipient's side of `seal_delivery`.

    Raises:
        Refused: altered, for another party or run, or not from the attested aggregator.
        ProtocolError: malformed.
    """
    context, ciphertext = _delivered(wire, party, aggregator)
    value = canonical.decode(hpke.open(ciphertext, context), max_bytes=MAX_MESSAGE_BYTES)
    match value:
        case {"vectors": dict(vectors), "curve": bytes(curve)} if len(value) == 2:
            return Delivery(_vectors(vectors), curve)
    raise ProtocolError("A delivery is malformed.")


def delivered_base(wire: bytes, *, party: str, aggregator: AttestedPeer) -> bytes:
    """SHA-384 of the global message whose adapters the attested aggregator enclave has delivered to
    `party`, which proves that it has closed the job with them. Whoever cannot open the delivery can
    check this too.

    Raises:
        Refused: altered, for another party or run, or not from the attested aggregator.
        ProtocolError: malformed.
    """
    context, _ = _delivered(wire, party, aggregator)
    return bytes(context["base"])


def _delivered(wire: bytes, party: str, aggregator: AttestedPeer) -> tuple[dict[str, Any], bytes]:
    """The context and the ciphertext of a delivery, whose signature is verified."""
    base = wire[:_DIGEST]
    ciphertext, signature = _split(wire[_DIGEST:])
    context = _delivery_context(aggregator.contract_digest, aggregator.run_id, party, base)
    verify_signature(
        aggregator.signing_public,
        _DELIVERY,
        _covered(context, ciphertext),
        signature,
        by="the aggregator enclave",
    )
    return context, ciphertext


def _vectors(value: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    try:
        return {_text(name): unpack_vector(vector) for name, vector in value.items()}
    except (AttributeError, ValueError):
        raise ProtocolError("A message's vectors are malformed.") from None


def _group_context(
    contract: bytes, run_id: str, party: str, signing_public: bytes
) -> dict[str, Any]:
    return {
        "label": _GROUP,
        "contract": contract,
        "run_id": run_id,
        "party": party,
        "signing": signing_public,
    }


def _delivery_context(contract: bytes, run_id: str, party: str, base: bytes) -> dict[str, Any]:
    return {
        "label": _DELIVERY,
        "contract": contract,
        "run_id": run_id,
        "party": party,
        "base": base,
    }


def _covered(context: Mapping[str, Any], ciphertext: bytes) -> bytes:
    """What a signature covers: the context and the hash of the ciphertext."""
    return canonical.encode(
        {"context": dict(context), "sha384": hashlib.sha384(ciphertext).digest()}
    )


def _join(ciphertext: bytes, signature: bytes) -> bytes:
    return signature + ciphertext


def _split(wire: bytes) -> tuple[bytes, bytes]:
    if not 64 + 16 < len(wire) <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"A protected message of {len(wire)} bytes is malformed.")
    return wire[64:], wire[:64]
