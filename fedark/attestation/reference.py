"""Signed reference values (RFC 9334's reference value provider): what an enclave of a release
measures, vouched for by its publisher.

Who builds an enclave measures it and signs the registers; who must trust one then needs the
publisher's key and no build of its own. Form: canonical CBOR of {"body": bytes, "signature":
bytes}, at most 64 KiB; the body is canonical CBOR too; Ed25519 with the label
"fedark/reference-values/1". Only `VerifiedReference.verify` makes a `VerifiedReference`, and an
appraisal takes no other. An expiry bounds for how long a release that was found wanting can still
be passed off as good.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Annotated, Any, Literal, Never, NoReturn, final

from pydantic import AfterValidator, Field, ValidationError

from fedark.attestation.terms import Policies, Registers
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, ProtocolError, Refused, printable
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.terms import Terms, explain, to_tuples

__all__ = ["ReferenceValues", "VerifiedReference", "sign_reference"]

REFERENCE_LABEL = "fedark/reference-values/1"
_MAX_BYTES = 64 << 10


def _time(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError("has no time zone")
    return value


Time = Annotated[str, AfterValidator(_time)]


class ReferenceValues(Terms):
    """What a publisher says.

    Attributes:
        role: of the enclave.
        release: the publisher's name for what was measured, such as "fedark 0.1.0".
        issued, expires: ISO 8601 with time zone; it counts from `issued` until, not including,
        `expires`.
        registers: register -> SHA-384 in hex, as contracts name them ("runtime", "tdx.mrtd").
        policies: sandbox mode -> the policies that this release may install in it.
    """

    role: Literal["trainer", "aggregator", "inference"]
    release: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}$")]
    issued: Time
    expires: Time
    registers: Annotated[Registers, Field(min_length=1, max_length=64)]
    policies: Policies = Field(default_factory=dict)


def sign_reference(values: ReferenceValues, publisher: SigningKey) -> bytes:
    """The signed file."""
    body = canonical.encode({"publisher": publisher.public, **values.model_dump(mode="python")})
    return canonical.encode({"body": body, "signature": publisher.sign(REFERENCE_LABEL, body)})


@final
class VerifiedReference:
    """Reference values whose publisher's signature was checked. Only `verify` makes one.

    Attributes:
        publisher: the 32-byte Ed25519 key that signed.
        values: what it says.
    """

    __slots__ = ("publisher", "values")

    publisher: bytes
    values: ReferenceValues

    def __init__(self, _only_verify_makes_one: Never, /) -> None:
        raise TypeError("use VerifiedReference.verify")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a VerifiedReference is immutable: {name}")

    @classmethod
    def verify(
        cls, data: bytes, publishers: Collection[bytes], *, now: datetime, source: str
    ) -> VerifiedReference:
        """Read a signed file of one of `publishers` (Ed25519 keys).

        Args:
            now: aware.
            source: names the file in errors.

        Raises:
            ProtocolError: it is malformed.
            ContractError: it is signed, and breaks a rule of its form.
            Refused: another publisher's, altered, or not valid now.
        """
        outer = _map(data, {"body", "signature"}, source)
        if not isinstance(outer["body"], bytes) or not isinstance(outer["signature"], bytes):
            raise _malformed(source)
        body = _map(outer["body"], {"publisher", *ReferenceValues.model_fields}, source)
        publisher = body.pop("publisher")
        if not isinstance(publisher, bytes) or publisher not in publishers:
            raise Refused(
                f"{printable(source)}: its publisher is not one that is trusted here.",
                safe="Its values were not used.",
                fix="Compare the publisher's key with what you know by another way, then name it.",
            )
        verify_signature(
            publisher,
            REFERENCE_LABEL,
            outer["body"],
            outer["signature"],
            by=f"the publisher of {source}",
        )
        try:
            values = ReferenceValues.model_validate(to_tuples(body))
        except ValidationError as error:
            raise ContractError(
                source,
                [printable(line) for line in explain(error)],
                safe="Its values were not used.",
            ) from None
        if (
            not datetime.fromisoformat(values.issued)
            <= now
            < datetime.fromisoformat(values.expires)
        ):
            raise Refused(
                f"{printable(source)}: its reference values count from {values.issued} until"
                f" {values.expires} alone.",
                safe="Its values were not used.",
                fix="Ask the publisher for current ones.",
            )
        reference = object.__new__(cls)
        object.__setattr__(reference, "publisher", publisher)
        object.__setattr__(reference, "values", values)
        return reference

    def __repr__(self) -> str:
        return (
            f"VerifiedReference({self.values.role}, {self.values.release!r},"
            f" {self.publisher.hex()[:16]}...)"
        )


def _map(data: bytes, keys: set[str], source: str) -> dict[str, Any]:
    try:
        value = canonical.decode(data, max_bytes=_MAX_BYTES, max_depth=4)
    except ProtocolError as error:
        raise ProtocolError(
            f"{printable(source)}: {error.what}", safe="Its values were not used."
        ) from None
    if not isinstance(value, dict) or value.keys() != keys:
        raise _malformed(source)
    return value


def _malformed(source: str) -> ProtocolError:
    return ProtocolError(
        f"{printable(source)} is not a file of signed reference values.",
        safe="Its values were not used.",
    )
