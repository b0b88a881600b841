"""The same job with real processes: Flower's SuperLink over TLS, node daemons, and enclaves in
their sandboxes.
"""

from __future__ import annotations

import csv
import socket
from pathlib import Path

import numpy as np
import pytest
from captured import CAPTURE
from safetensors.numpy import load_file
from small import CUSTOMERS, SECRET_WORDS, write_job

from fedark.contract.job import Job
from fedark.foundation.errors import FederationError
from fedark.operate.pages import PAGE
from fedark.operate.processes import module
from fedark.sandbox import survey
from fedark.simulation import simulate
from fedark.simulation.machine import Machine

pytestmark = pytest.mark.slow


def _weights(base: Path) -> set[bytes]:
    """Every aligned 64-byte run of every tensor; zeros and ones, which are in every file of the
    world, are left out.
    """
    runs = set()
    for tensor in load_file(base / "model.safetensors").values():
        raw = tensor.tobytes()
        runs |= {raw[start : start + 64] for start in range(0, len(raw) - 63, 4)}
    return {run for run in runs if len(set(run)) >= 24}


def test_processes_and_simulation_agree_and_nothing_secret_is_anywhere_outside_the_enclaves(
    small_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    job = Job.load(small_job)
    with Machine(
        tmp_path / "machine", host_up=module("captured", "host"), node_up=module("captured", "node")
    ) as machine:
        report = machine.finish(machine.begin(job, sandbox=survey().mode()), timeout=240)
        run = Path("runs") / report["run_id"]
        pages = {name: machine.folder(name) / run / PAGE for name in ("maker", "pool", *CUSTOMERS)}
        machine.until(lambda: all(page.exists() for page in pages.values()), "pages are there", 300)
    for name, page in pages.items():
        own = {other for other in CUSTOMERS if f"own records of {other}" in page.read_text("utf-8")}
        assert own == {name} & set(CUSTOMERS)
    adapter = load_file(
        machine.folder("north") / run / "adapter-tiny" / "adapter_model.safetensors"
    )

    # Every message, the SuperLink's SQLite state, logs, configuration, reports, adapters: all files
    # but a party's own secrets.
    own = {"party.keys", "device.key", "transport.key"}
    files = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in own and job.path.parent not in path.parents
    ]
    names = {path.name for path in files}
    assert {"superlink.log", "payload", "manifest", "report.json", "0000.request"} <= names
    assert any(path.suffix in (".db", ".sqlite") or "state" in path.name for path in files), (
        "SuperLink's state is searched"
    )
    assert len(list(tmp_path.rglob(f"{CAPTURE}/*.reply"))) >= 3 * len(CUSTOMERS)
    secrets = [word.encode() for word in SECRET_WORDS]
    for customer in CUSTOMERS:
        secrets += [
            row["message"].encode()
            for row in csv.DictReader((small_job.parent / f"{customer}.csv").open())
        ]
    weights = _weights(small_job.parent / "base")
    for path in files:
        data = path.read_bytes()
        assert not any(secret in data for secret in secrets), path
        for shift in range(4):
            windows = {data[start : start + 64] for start in range(shift, len(data) - 63, 4)}
            assert not windows & weights, path

    with simulate(job, tmp_path / "simulated") as running:
        running.run()
        folder = running.federation.folder("north") / "runs" / running.run_id / "adapter-tiny"
    simulated = load_file(folder / "adapter_model.safetensors")
    assert all(np.allclose(value, adapter[name], atol=1e-5) for name, value in simulated.items())


def test_a_port_in_use_is_named_and_nothing_is_left_behind(small_job: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            Machine(tmp_path / "machine") as machine,
            pytest.raises(FederationError, match=f"cannot listen on 127.0.0.1:{port}"),
        ):
            machine.begin(Job.load(small_job), sandbox=survey().mode(), port=port)
    assert machine.processes() == ()


def test_a_masked_job_in_processes_gives_the_sealed_adapter_within_the_rounding(
    tmp_path: Path,
) -> None:
    """An adapter of 65,000 values: masking starts threads, which the sandbox must let it."""
    path = write_job(tmp_path / "job", rounds=1, minimum=3)
    path.write_text(path.read_text().replace("rank = 2", "rank = 512"))
    masked = Job.load(path, ('protection.mode="masked"', "protection.max_records=40"))
    with Machine(tmp_path / "machine") as machine:
        report = machine.finish(machine.begin(masked, sandbox=survey().mode()), timeout=240)
    assert report["protection"]["mode"] == "masked"
    assert {"endorse 1", "unmask 1"} <= {stage["stage"] for stage in report["stages"]}
    assert report["models"]["tiny"]["values"] > 65_000
    adapter = load_file(
        machine.folder("north")
        / "runs"
        / report["run_id"]
        / "adapter-tiny"
        / "adapter_model.safetensors"
    )
    with simulate(Job.load(path), tmp_path / "sealed") as running:
        running.run()
        folder = running.federation.folder("north") / "runs" / running.run_id / "adapter-tiny"
    step = 8.0 / (2**15 - 1) * 40 / 100
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        assert np.abs(value - adapter[name]).max() < len(CUSTOMERS) * step + 1e-5, name
