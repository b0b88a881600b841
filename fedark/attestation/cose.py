"""COSE_Sign1 with ES384 (RFC 9052, section 4.2; RFC 9053, section 2.1), in one strict form.

    18([ bstr .cbor {1: -35, 33: x5chain}, {}, bstr payload, bstr .size 96 signature ])

Rules, so that two readers never read one token in two ways:
- The tag is there, once. The four-element array, the protected header and the payload are canonical
  CBOR.
- The protected header holds the algorithm and the certificate chain (RFC 9360) and nothing else;
  the unprotected one is empty.
- The algorithm is ES384, always: it is compared, never chosen by the token. The signature is r ||
  s, 48 bytes each.
- The payload is attached. Size and depth are capped before anything is parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError

__all__ = ["ES384", "MAX_TOKEN_BYTES", "Sign1", "es384_valid", "parse", "sign", "signed_bytes"]

MAX_TOKEN_BYTES = 16 << 10
MAX_CHAIN = 4
ES384 = -35
_ALG, _X5CHAIN = 1, 33
_TAG_18 = b"\xd2"
_HALF = 48
_DEPTH = 2


@dataclass(frozen=True)
class Sign1:
    """A parsed token. Nothing in it is verified yet.

    Attributes:
        protected: the protected header, encoded.
        chain: DER certificates, the signer's first; 1 to 4 of them.
        payload: what was signed.
        signature: r || s, 96 bytes.
    """

    protected: bytes
    chain: tuple[bytes, ...]
    payload: bytes
    signature: bytes

    def signed_by(self, key: ec.EllipticCurvePublicKey) -> bool:
        """Whether `key` signed exactly this header and this payload."""
        return es384_valid(key, signed_bytes(self.protected, self.payload), self.signature)


def sign(payload: bytes, chain: Sequence[bytes], key: ec.EllipticCurvePrivateKey) -> bytes:
    """The token over `payload` by `key` (P-384), whose certificate is `chain[0]`.

    Raises:
        ValueError: `key` is on another curve, or the chain is empty or longer than 4.
    """
    if key.curve.name != ec.SECP384R1.name:
        raise ValueError("ES384 needs a P-384 key")
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise ValueError(f"a chain has 1 to {MAX_CHAIN} certificates")
    # RFC 9360: one certificate stands alone, several stand in an array.
    x5chain = chain[0] if len(chain) == 1 else list(chain)
    protected = canonical.encode({_ALG: ES384, _X5CHAIN: x5chain})
    r, s = decode_dss_signature(
        key.sign(signed_bytes(protected, payload), ec.ECDSA(hashes.SHA384()))
    )
    signature = r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")
    return _TAG_18 + canonical.encode([protected, {}, payload, signature])


def parse(token: bytes) -> Sign1:
    """Read what `sign` gives.

    Raises:
        ProtocolError: any other form; the text says which rule is broken.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise ProtocolError(
            f"The token's {len(token)} bytes are over the limit of {MAX_TOKEN_BYTES}."
        )
    if token[:1] != _TAG_18:
        raise ProtocolError("The token is not tagged as COSE_Sign1.")
    parts = canonical.decode(token[1:], max_bytes=MAX_TOKEN_BYTES, max_depth=_DEPTH)
    if type(parts) is not list or len(parts) != 4:
        raise ProtocolError("The token is not a COSE_Sign1 array of four.")
    protected, unprotected, payload, signature = parts
    if type(unprotected) is not dict or unprotected:
        raise ProtocolError("The token has unprotected headers; the profile admits none.")
    if type(payload) is not bytes:
        raise ProtocolError("The token's payload is not attached.")
    if type(signature) is not bytes or len(signature) != 2 * _HALF:
        raise ProtocolError(f"The token's signature is not r || s of {2 * _HALF} bytes.")
    if type(protected) is not bytes:
        raise ProtocolError("The token's protected header is not a byte string.")
    header = canonical.decode(protected, max_bytes=MAX_TOKEN_BYTES, max_depth=_DEPTH)
    if type(header) is not dict or set(header) != {_ALG, _X5CHAIN}:
        raise ProtocolError("The token's protected header is not exactly alg and x5chain.")
    if type(header[_ALG]) is not int or header[_ALG] != ES384:
        raise ProtocolError("The token's algorithm is not ES384.")
    chain = header[_X5CHAIN]
    if type(chain) is list and len(chain) < 2:
        raise ProtocolError("The token's x5chain is an array of fewer than two certificates.")
    chain = chain if type(chain) is list else [chain]
    if len(chain) > MAX_CHAIN or any(type(item) is not bytes for item in chain):
        raise ProtocolError(f"The token's x5chain is not 1 to {MAX_CHAIN} certificates.")
    return Sign1(protected, tuple(chain), payload, signature)


def signed_bytes(protected: bytes, payload: bytes, external: bytes = b"") -> bytes:
    """The Sig_structure of RFC 9052, section 4.4: what the signature of a COSE_Sign1 covers."""
    return canonical.encode(["Signature1", protected, external, payload])


def es384_valid(key: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (r || s, 96 bytes) over `message` is by `key`, a P-384 key."""
    if not isinstance(key.curve, ec.SECP384R1) or len(signature) != 2 * _HALF:
        return False
    r, s = (int.from_bytes(half, "big") for half in (signature[:_HALF], signature[_HALF:]))
    try:
        key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True
