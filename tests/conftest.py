"""Shared fixtures: where the real data and the real attestation evidence are."""

from __future__ import annotations

import functools
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fedark.measurement import measure_enclave

TESTS = Path(__file__).parent
HELPERS = TESTS / "links" / "flower"
sys.path[:0] = [
    str(TESTS / part)
    for part in (".", "links/flower", "report", "stages", "attestation/platforms", "tuning")
]

from attacks import (  # noqa: E402
    pytest_runtest_call,  # noqa: F401
    pytest_runtest_logreport,  # noqa: F401
    pytest_terminal_summary,  # noqa: F401
    refusal,  # noqa: F401
)

# Of a machine that is busy with something else, time says nothing.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that starts the tests in the background has interrupts ignored, and every process that a
# test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with `data/` and `vectors/`; tests that need it skip where it
    is missing.
    """
    if not SHARED.is_dir():
        pytest.skip(f"no real data and vectors beside the checkout ({SHARED.name}/ is missing)")
    return SHARED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side a file stays with one worker, and files with slow tests begin: the short ones
    then fill the end.
    """
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


_measured = functools.cache(measure_enclave)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enclaves are measured once for all tests that are not about measuring; it takes most of a
    small job's time.
    """
    monkeypatch.setattr("fedark.operate.party.measure_enclave", _measured)


@pytest.fixture
def helpers_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes can import `echo_parties` too."""
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names proxies for everything, and nothing answers there."""
    set_dead_proxy(monkeypatch)


def set_dead_proxy(patch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        patch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("all_proxy", "ALL_PROXY"):
        patch.setenv(name, "socks5://127.0.0.1:9")


@pytest.fixture
def small_job(tmp_path: Path) -> Path:
    """The job file of `small.write_job`."""
    from small import write_job

    return write_job(tmp_path / "job")
