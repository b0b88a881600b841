"""How a node comes to know a host, and a host a node: three files, none of which holds a secret
that opens anything.

    invitation  host -> node   address, certificate authority, the aggregator's public keys, a token
                               that files one request
    request     node -> host   the public keys that the node made itself, signed with each of them
    admission   host -> node   what the host approved: certificates, the platform's root; signed
                               with the aggregator's key

Private keys never leave the machine that made them. The token admits nobody: it lets one request be
filed, which a person at the host approves after comparing its fingerprint with the node's operator.
The node does the same with the aggregator's.

Between host and node, requests are signed with the node's transport key over method, path, time and
body (ECDSA on P-384).
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import Field, ValidationError

from fedark.contract.contract import Party
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, InputError, Refused
from fedark.foundation.jsontext import read_json
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.terms import Name, Terms, explain, to_tuples

__all__ = [
    "CLOCK_SECONDS",
    "Admission",
    "Invitation",
    "JoinRequest",
    "load_transport_public",
    "parse",
    "request_headers",
    "transport_pem",
    "unauthenticated",
    "verify_request",
]

REQUEST_LABEL, ADMISSION_LABEL, CALL_LABEL = (
    "fedark/join-request/1",
    "fedark/admission/1",
    "fedark/node-call/1",
)
CLOCK_SECONDS = 120
"""How far the clocks of a node and its host may be apart."""
MAX_FILE = 64 << 10

Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$")]
Role = Literal["provider", "customer"]
HexBytes = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=32 << 10)]
Pem = Annotated[str, Field(max_length=32 << 10)]


class Invitation(Terms):
    """What a host gives to a party that shall join.

    Attributes:
        address: host:port of the host's front.
        ca: PEM of the authority that the front's certificate is signed by.
        aggregator: its name and public keys; compare the fingerprint.
        token: lets the request be filed over the network, once.
    """

    kind: Literal["fedark-invitation"] = "fedark-invitation"
    version: Literal[1] = 1
    name: Name
    role: Role
    address: Address
    ca: Pem
    aggregator: Party
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: str


class JoinRequest(Terms):
    """What a node asks to be known by.

    Attributes:
        transport_key: PEM; authenticates the node's connection and nothing more.
        device_key: PEM of the simulated platform's quoting key, or "" for a provider, who runs no
            enclave.
        signature: by the party's signing key.
        transport_signature: by the transport key.
    """

    kind: Literal["fedark-join-request"] = "fedark-join-request"
    version: Literal[1] = 1
    party: Party
    transport_key: Pem
    device_key: Pem = ""
    token: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signature: HexBytes = ""
    transport_signature: HexBytes = ""

    def signed(self, signing: SigningKey, transport: ec.EllipticCurvePrivateKey) -> JoinRequest:
        """This request with both signatures."""
        body = self._body()
        transport_signature = transport.sign(
            REQUEST_LABEL.encode() + b"\0" + body, ec.ECDSA(hashes.SHA384())
        )
        update = {
            "signature": signing.sign(REQUEST_LABEL, body).hex(),
            "transport_signature": transport_signature.hex(),
        }
        return self.model_copy(update=update)

    def verify(self) -> None:
        """Check that whoever made it holds both private keys.

        Raises:
            Refused: a signature is not right.
        """
        body = self._body()
        key = bytes.fromhex(self.party.signing_key)
        verify_signature(
            key, REQUEST_LABEL, body, bytes.fromhex(self.signature), by=self.party.name
        )
        _verify_ecdsa(
            load_transport_public(self.transport_key),
            bytes.fromhex(self.transport_signature),
            REQUEST_LABEL.encode() + b"\0" + body,
            self.party.name,
        )
        if (self.party.role == "customer") != bool(self.device_key):
            raise Refused(
                f"The request of {self.party.name} does not fit a {self.party.role}: see its device"
                " key."
            )
        if self.device_key:
            load_transport_public(self.device_key)

    def _body(self) -> bytes:
        return canonical.encode(self.model_dump(exclude={"signature", "transport_signature"}))


class Admission(Terms):
    """What the host gives back to a node that it approved.

    Attributes:
        party: the node as the host knows it from now on.
        root, crl: DER (hex) of the simulated platform's root and its revocation list.
        device_chain: DER (hex) of the certificates for the node's quoting key.
        signature: by the aggregator's signing key.
    """

    kind: Literal["fedark-admission"] = "fedark-admission"
    version: Literal[1] = 1
    party: Party
    address: Address
    ca: Pem
    aggregator: Party
    root: HexBytes
    crl: HexBytes
    device_chain: tuple[HexBytes, ...] = ()
    signature: HexBytes = ""

    def signed(self, signing: SigningKey) -> Admission:
        """This admission with its signature."""
        return self.model_copy(
            update={"signature": signing.sign(ADMISSION_LABEL, self._body()).hex()}
        )

    def verify(self, aggregator: Party) -> None:
        """Check that it was made by the aggregator that the node was invited by.

        Raises:
            Refused: it was not.
        """
        if self.aggregator != aggregator:
            raise Refused(
                "The admission is of another aggregator than the invitation.",
                safe="Nothing was installed.",
            )
        key, signature = bytes.fromhex(aggregator.signing_key), bytes.fromhex(self.signature)
        verify_signature(key, ADMISSION_LABEL, self._body(), signature, by=aggregator.name)

    def _body(self) -> bytes:
        return canonical.encode(self.model_dump(exclude={"signature"}))


FileT = TypeVar("FileT", Invitation, JoinRequest, Admission)


def parse(data: bytes, kind: type[FileT], source: str) -> FileT:
    """Read one of the three.

    Raises:
        InputError: it is not JSON, or too large.
        ContractError: with every problem.
    """
    if len(data) > MAX_FILE:
        raise InputError(f"{source} has {len(data)} bytes, over the limit of {MAX_FILE}.")
    try:
        value = to_tuples(read_json(data))
    except ValueError:
        raise InputError(f"{source} is not JSON.") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ContractError(source, explain(error)) from None


def transport_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half, as Flower knows it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def load_transport_public(pem: str) -> ec.EllipticCurvePublicKey:
    """A public key on P-384.

    Raises:
        Refused: it is anything else.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, TypeError):
        raise Refused("A public key in a join request is malformed.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refused("A public key in a join request is not on P-384.")
    return key


def _verify_ecdsa(
    key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes, by: str
) -> None:
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Refused(
            f"A signature of {by} does not verify.", safe="The message was dropped."
        ) from None


def _call(name: str, method: str, path: str, when: int, body_digest: bytes) -> bytes:
    return canonical.encode([CALL_LABEL, name, method, path, when, body_digest])


def request_headers(
    key: ec.EllipticCurvePrivateKey,
    name: str,
    method: str,
    path: str,
    body: bytes,
    *,
    now: float | None = None,
) -> dict[str, str]:
    """The headers that authenticate one request of a node to the host's own service.

    The body's digest is among them, so that the host knows who is speaking before it takes a body.
    """
    when = int(time.time() if now is None else now)
    digest = hashlib.sha256(body).digest()
    signature = key.sign(_call(name, method, path, when, digest), ec.ECDSA(hashes.SHA384()))
    return {
        "fedark-node": name,
        "fedark-time": str(when),
        "fedark-body": digest.hex(),
        "fedark-signature": base64.b64encode(signature).decode(),
        "fedark-version": "1",
    }


def verify_request(
    public: str, headers: Mapping[str, str], method: str, path: str, *, now: float | None = None
) -> bytes:
    """Return the SHA-256 that the request's body must have, if the request's head is `public`'s
    (PEM), made within `CLOCK_SECONDS` of now by this clock, either way.

    What it raises depends on the headers and the clock alone, never on whose key is asked for.

    Raises:
        Refused: it is not.
    """
    try:
        name, when = headers["fedark-node"], int(headers["fedark-time"])
        signature = base64.b64decode(headers["fedark-signature"], validate=True)
        digest = bytes.fromhex(headers["fedark-body"])
    except (KeyError, ValueError):
        raise unauthenticated() from None
    skew = (time.time() if now is None else now) - when
    if abs(skew) > CLOCK_SECONDS:
        raise Refused(
            f"The clocks of the node and its host are {abs(skew):.0f} s apart.",
            fix="Set both by NTP: timedatectl set-ntp true",
        )
    try:
        _verify_ecdsa(
            load_transport_public(public), signature, _call(name, method, path, when, digest), name
        )
    except Refused:
        raise unauthenticated() from None
    return digest


def unauthenticated() -> Refused:
    """The one answer to whoever does not prove to be a node of this host: it tells nobody which
    names are known.
    """
    return Refused(
        "The host does not know this node by this key, or the request was altered.",
        safe="Nothing was done.",
        fix="Has the host approved this node, or forgotten it? Ask its operator.",
    )


def dump(value: Any) -> bytes:
    """One of the three files as it is written."""
    return (json.dumps(value.model_dump(), indent=1) + "\n").encode()
