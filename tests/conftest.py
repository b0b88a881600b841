"""Shared fixtures: where the real data and the real attestation evidence are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attacks import pytest_runtest_call, pytest_terminal_summary, refusal  # noqa: F401

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with `data/` and `vectors/`; tests that need it skip where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data and vectors beside the checkout ({SHARED.name}/ is missing)")
    return SHARED
