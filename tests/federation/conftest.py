"""What the transport's tests share: the echo parties, importable here and in child processes."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from fedark.measurement import measure_enclave

HELPERS = Path(__file__).parent / "flower"
VENDORS = Path(__file__).parents[1] / "attestation" / "platforms"
sys.path[:0] = [str(HELPERS), str(Path(__file__).parent), str(VENDORS)]


_measured = functools.cache(measure_enclave)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enclaves are measured once for all tests that are not about measuring; it takes most of a small job's time."""
    monkeypatch.setattr("fedark.federation.party.measure_enclave", _measured)


@pytest.fixture
def helpers_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes can import `echo_parties` too."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))


@pytest.fixture
def small_job(tmp_path: Path) -> Path:
    """The job file of `small.write_job`."""
    from small import write_job

    return write_job(tmp_path / "job")
