"""The ground that contracts, policies and job files are written on: immutable, strict, nothing
unknown accepted.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

__all__ = ["Finite", "Hex32", "Hex48", "Name", "Terms", "explain", "explain_at", "to_tuples"]

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


def explain_at(error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """Where and what, for each problem that pydantic found."""
    found: list[tuple[tuple[int | str, ...], str]] = []
    items = error.errors(include_url=False, include_input=False)
    for item in items:
        # A tuple whose items are wrong also counts as too short: one problem, said once, where it
        # is.
        if item["type"] == "too_short" and any(
            o["loc"][: len(item["loc"])] == item["loc"] != o["loc"] for o in items
        ):
            continue
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] == "missing":
            message = "missing"
        found.extend((item["loc"], part) for part in message.split("; "))
    return found


def explain(error: ValidationError) -> list[str]:
    """One readable line for each problem that pydantic found: `rounds: must be >= 1`."""
    return [
        f"{'.'.join(map(str, where))}: {what}" if where else what
        for where, what in explain_at(error)
    ]


def to_tuples(value: Any) -> Any:
    """`value` with every list made a tuple: strict terms hold tuples, TOML and CBOR give lists."""
    if isinstance(value, dict):
        return {key: to_tuples(item) for key, item in value.items()}
    return tuple(to_tuples(item) for item in value) if isinstance(value, list | tuple) else value
