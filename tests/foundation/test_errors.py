"""Errors keep their class and their texts on the way from one process to another, and nothing that
the text could carry along.
"""

from __future__ import annotations

import pytest

from fedark.foundation import errors
from fedark.foundation.errors import (
    FedarkError,
    FederationError,
    LogForked,
    LogRefused,
    Refused,
    restore,
)


@pytest.mark.parametrize(
    "name", [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
)
def test_every_error_survives_the_wire_as_what_it_is(name: str) -> None:
    error = restore(name, "what", safe="safe", fix="fix", reasons=["one\x1b[0m"])
    assert type(error) is getattr(errors, name)
    assert (error.what, error.safe, error.fix) == ("what", "safe", "fix")
    assert error.reasons == ("one?[0m",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["printable", "restore", "object", "no such class", "__builtins__"]
)
def test_what_is_no_error_of_ours_comes_back_as_a_failed_deployment(name: str) -> None:
    assert type(restore(name, "what")) is FederationError


def test_a_forked_log_is_a_refusal_wherever_it_was_found() -> None:
    error = restore("LogForked", "The log of maker was forked.")
    assert isinstance(error, LogForked)
    assert isinstance(error, LogRefused)
    assert isinstance(error, Refused)
    assert (error.kept, error.logged, error.proof) == ((), None, b"")


def test_each_class_is_told_in_the_tree() -> None:
    for name in errors.__all__:
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, FedarkError):
            assert name in (errors.__doc__ or "")
