"""Enclaves of the tests' own (`probe/main.py`): started, confined and measured like real ones, and
told what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot
from fedark.enclave import launcher
from fedark.enclave.host import EnclaveProcess
from fedark.measurement import Measurement, measure_enclave
from fedark.measurement.tree import TreeEntry
from fedark.sandbox import Support, survey
from fedark.v1 import enclave_pb2 as pb

PROBE = Path(__file__).resolve().parent / "probe"
MODES = ["namespaces", "landlock"]
MEMORY = 1 << 30


def measure_probe(role: str, folder: Path = PROBE) -> Measurement:
    """The measurement of a real enclave, with the test's own entry point in place of its own."""
    real = measure_enclave(role)
    script = folder / "main.py"
    entry = TreeEntry(
        "probe/main.py", "f", False, hashlib.sha384(script.read_bytes()).digest(), str(script)
    )
    return dataclasses.replace(
        real,
        entry_point=script,
        visible=(*real.visible, folder),
        entries={**real.entries, "application": (*real.entries["application"], entry)},
    )


@pytest.fixture(scope="session")
def manufacturer() -> SimulatedRoot:
    return SimulatedRoot(now=datetime.now(UTC))


@pytest.fixture(scope="session")
def device(manufacturer: SimulatedRoot) -> SimulatedDevice:
    return manufacturer.issue(now=datetime.now(UTC))


@contextlib.contextmanager
def offering_only(mode: str) -> Iterator[None]:
    """Pretend that this machine offers `mode` alone; skip where it does not offer it."""
    found = survey()
    if mode == "namespaces" and found.namespaces:
        pytest.skip(f"no namespaces here: {found.namespaces}")
    if mode == "landlock" and not found.landlock:
        pytest.skip("no landlock here")
    with pytest.MonkeyPatch.context() as patch:
        if mode == "landlock":
            patch.setattr(
                launcher, "survey", lambda: Support("blocked for this test", found.landlock, True)
            )
        yield


@pytest.fixture(scope="session", params=MODES)
def shared(
    request: pytest.FixtureRequest,
    device: SimulatedDevice,
    tmp_path_factory: pytest.TempPathFactory,
):
    """One enclave for each mode, for tests that leave it alive."""
    log = tmp_path_factory.mktemp("shared") / "log"
    with offering_only(request.param):
        enclave = EnclaveProcess.start(
            "aggregator",
            b"run",
            device=device,
            log=log,
            memory_bytes=MEMORY,
            measurement=measure_probe("aggregator"),
        )
    with enclave:
        enclave.log = log
        yield enclave


@pytest.fixture(params=MODES)
def start(request: pytest.FixtureRequest, device: SimulatedDevice, tmp_path: Path):
    """Starts enclaves of a test's own; they are ended with it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(offering_only(request.param))

        def make(run_config: bytes = b"run", **changes) -> EnclaveProcess:
            changes.setdefault("measurement", measure_probe("aggregator"))
            changes.setdefault("memory_bytes", MEMORY)
            enclave = EnclaveProcess.start(
                "aggregator", run_config, device=device, log=tmp_path / "log", **changes
            )
            return stack.enter_context(enclave)

        yield make


def tell(enclave: EnclaveProcess, command: str, argument: str = "", **options) -> bytes:
    call = pb.Call(records=pb.Records(records=[pb.Record(prompt=command, answer=argument)]))
    return enclave.call(call, **{"timeout": 60, **options}).measured.local


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="session")
def do() -> Callable[..., bytes]:
    """(enclave, command, argument) -> what the probe's session answers."""
    return tell


@pytest.fixture(scope="session")
def children() -> Callable[[int], list[int]]:
    """(process id) -> its children's."""
    return children_of


@pytest.fixture(scope="session")
def probing() -> Callable[..., Measurement]:
    """(role) -> the measurement of its probe."""
    return measure_probe


@pytest.fixture(scope="session")
def only() -> Callable[[str], Any]:
    """(mode) -> a context in which this machine offers that mode alone; skips where it does not."""
    return offering_only
