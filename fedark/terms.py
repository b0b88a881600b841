"""The ground that contracts, policies and job files are written on: immutable, strict, nothing unknown accepted."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Finite", "Hex32", "Hex48", "Name", "Terms"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex48 = Annotated[str, Field(pattern=r"^[0-9a-f]{96}$")]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class Terms(BaseModel):
    """Base of all contract parts: immutable, strict, nothing unknown accepted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        ser_json_inf_nan="strings",
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
    )
