"""What a checkpoint holds, as typed records: the one way in which state is written and read back.

A `Snapshot` declares its fields; none has a default, so whoever adds a field must fill it in, and
whoever makes a snapshot without it fails at once. On the way back everything is checked against
the declaration: a missing or unknown field, another type (no conversions, a bool is no number), a
wrong length, a number that is not finite. The bytes are canonical CBOR.

    >>> class Kept(Snapshot):
    ...     key: Bytes32
    ...     round: int
    >>> Kept.decode(Kept(key=bytes(32), round=3).encode()).round
    3
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError

__all__ = ["Bytes32", "Bytes48", "Real", "Row", "Snapshot"]

_MAX_BYTES = 1 << 30


def _real(value: Any) -> Any:
    if type(value) is not float:
        raise ValueError("not a float")
    return value


Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Bytes48 = Annotated[bytes, Field(min_length=48, max_length=48)]
Real = Annotated[float, BeforeValidator(_real)]
"""A finite float; an integer in its place is refused."""
Row = Strict(False)
"""For `Annotated[tuple[...], Row]`: CBOR has lists alone. What is in the tuple stays strict."""


class Snapshot(BaseModel):
    """One record of a checkpoint. Its text shows no field: most are secrets.

    Attributes:
        called: what errors call it.
    """

    called: ClassVar[str] = "A checkpoint"

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        validate_assignment=True,
    )

    def encode(self) -> bytes:
        return canonical.encode(self.model_dump())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a record.

        Raises:
            ProtocolError: `data` is not exactly one such record.
        """
        try:
            return cls.model_validate(canonical.decode(data, max_bytes=_MAX_BYTES))
        except ValidationError as error:
            fields = {".".join(map(str, problem["loc"][:1])) for problem in error.errors()}
            raise ProtocolError(
                f"{cls.called} does not hold what it must: {', '.join(sorted(fields))}.",
                safe="Nothing of it was used.",
            ) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    __str__ = __repr__
