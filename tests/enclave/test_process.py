"""Enclave processes: what goes in and out, how they fail, and that neither edits nor a dead host
leave anything behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedVerifier
from fedark.enclave import bytecode, launcher
from fedark.enclave.channel import MAX_FRAME
from fedark.enclave.host import EnclaveProcess
from fedark.foundation.errors import (
    EnclaveFailed,
    EvidenceRefused,
    InputError,
    ProtocolError,
    SandboxUnavailable,
)
from fedark.measurement import measure_enclave
from fedark.sandbox import Support, policy_digests, survey
from fedark.v1 import enclave_pb2 as pb

MODES = ["namespaces", "landlock"]


def test_a_call_gets_its_reply(do, shared) -> None:
    assert shared.hello == pb.Hello(hpke_public=b"hpke", signing_public=b"signing")
    assert do(shared, "echo", "grüße") == "grüße".encode()


def test_progress_arrives_in_order_before_the_reply(do, shared) -> None:
    seen: list[pb.Progress] = []
    assert do(shared, "count", "50", on_progress=seen.append) == b"counted"
    assert [report.done for report in seen] == list(range(50))
    assert {report.stage for report in seen} == {"counting"}


def test_a_refusal_keeps_its_class_and_its_reasons_and_the_enclave_goes_on(do, shared) -> None:
    with pytest.raises(EvidenceRefused) as caught:
        do(shared, "refuse")
    assert caught.value.reasons == ("wrong nonce", "debug mode")
    assert do(shared, "echo", "still here") == b"still here"


def test_a_call_that_is_too_large_is_not_sent_and_the_enclave_goes_on(do, shared) -> None:
    with pytest.raises(ProtocolError, match="too large"):
        do(shared, "echo", "x" * MAX_FRAME)
    assert do(shared, "echo", "small") == b"small"


def test_a_reply_that_is_too_large_is_a_refusal_and_the_enclave_goes_on(do, shared) -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        do(shared, "large", str(MAX_FRAME))
    assert len(do(shared, "large", str(MAX_FRAME - 100))) == MAX_FRAME - 100


def test_evidence_names_registers_sandbox_and_report_data_and_the_key_is_the_devices(
    do, shared, manufacturer
) -> None:
    now = datetime.now(UTC)
    platform, token = do(shared, "quote").split(b"\0", 1)
    assert platform == b"simulated"
    claims = SimulatedVerifier(manufacturer.certificate, manufacturer.crl(now=now)).verify(
        token, now=datetime.now(UTC)
    )
    assert claims.report_data == b"\x05" * 64
    assert claims.nonce == b"\x06" * 32
    assert dict(claims.measurements) == dict(shared.registers)
    assert claims.measurements["runconfig"] == hashlib.sha384(b"run").digest()
    assert (claims.seccomp_digest, claims.landlock_digest) == policy_digests(
        claims.sandbox, survey().landlock
    )
    assert claims.sandbox == shared.sandbox.mode


def test_what_an_enclave_prints_reaches_nobody(do, shared) -> None:
    assert do(shared, "print", "a customer's record") == b"printed"
    assert "record" not in shared.log.read_text()


def test_the_interpreter_is_isolated_and_takes_only_the_launchers_bytecode(do, shared) -> None:
    facts = json.loads(do(shared, "facts"))
    assert (facts["isolated"], facts["no_site"], facts["dont_write_bytecode"]) == (1, 1, 1)
    assert facts["pycache_prefix"].startswith(str(bytecode.cache_folder()))
    assert facts["cached"].startswith(facts["pycache_prefix"])
    assert Path(facts["cached"]).is_file()
    assert facts["path"] == [str(path) for path in measure_enclave("aggregator").search_path]
    assert not {name for name in facts["environment"] if name.startswith(("PYTHON", "LD_"))}


def test_a_small_role_loads_neither_torch_nor_grpc(do, shared) -> None:
    loaded = set(json.loads(do(shared, "modules")))
    assert not loaded & {"torch", "transformers", "grpc", "flwr", "socket", "subprocess"}
    assert {"numpy", "cbor2"} <= loaded


def test_what_was_not_measured_cannot_be_imported_though_it_is_installed(do, shared) -> None:
    for name in ("pytest", "typer", "grpc", "torch"):
        assert do(shared, "import", name).startswith(b"ModuleNotFoundError")
    assert do(shared, "import", "fractions") == b"imported"


# -- how they fail


def test_a_refused_run_configuration_leaves_no_process(children, start) -> None:
    before = set(children(os.getpid()))
    with pytest.raises(InputError, match="This run configuration is refused"):
        start(b"refuse")
    assert set(children(os.getpid())) == before


def test_an_unexpected_error_names_its_type_and_none_of_its_text_and_ends_the_enclave(
    do, start
) -> None:
    enclave = start()
    with pytest.raises(EnclaveFailed) as caught:
        do(enclave, "fail", "a customer's record")
    assert "KeyError" in str(caught.value)
    assert "record" not in str(caught.value)
    with pytest.raises(EnclaveFailed, match="KeyError"):
        do(enclave, "echo")


def test_running_out_of_memory_is_said_as_that(do, start) -> None:
    enclave = start(memory_bytes=768 << 20)
    with pytest.raises(EnclaveFailed, match="ran out of memory"):
        do(enclave, "hoard")


def test_a_silent_enclave_is_ended_at_the_deadline(do, start) -> None:
    enclave = start()
    with pytest.raises(EnclaveFailed, match="did not answer in time"):
        do(enclave, "hang", timeout=0.3)
    assert enclave._launch.process.returncode is not None


@pytest.mark.parametrize(
    ("command", "argument", "text"),
    [
        ("exit", "3", "exit code 3"),
        ("forbidden", "", "forbidden system call"),
        ("abort", "", "killed by signal"),
        ("garbage", "00000003ffffff", "broke the protocol"),
        ("garbage", "ffffffff", "broke the protocol"),
        ("garbage", "00000004aa0100", "broke the protocol"),
    ],
)
def test_each_death_is_told_apart(do, start, command: str, argument: str, text: str) -> None:
    enclave = start()
    with pytest.raises(EnclaveFailed, match=text):
        do(enclave, command, argument)
    with pytest.raises(EnclaveFailed, match=text):
        do(enclave, "echo")


def test_a_kill_from_outside_is_said_as_that(do, children, start) -> None:
    enclave = start()
    (pid,) = children(enclave._launch.process.pid)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnclaveFailed, match="SIGKILL"):
        do(enclave, "echo")


def test_closing_from_another_thread_ends_a_call_in_progress(do, start) -> None:
    enclave = start()
    closer = threading.Timer(0.2, enclave.close)
    closer.start()
    with pytest.raises(EnclaveFailed, match="ended by its host"):
        do(enclave, "hang")
    closer.join()


def test_a_failing_progress_handler_ends_the_enclave_because_replies_would_be_out_of_step(
    do, start
) -> None:
    enclave = start()

    def fail(report: pb.Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        do(enclave, "count", "3", on_progress=fail)
    with pytest.raises(EnclaveFailed):
        do(enclave, "echo")


def test_an_end_leaves_no_process_no_zombie_no_mount_and_no_descriptor(children, start) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    descriptors = len(os.listdir("/proc/self/fd"))
    enclave = start()
    monitor = enclave._launch.process.pid
    (pid,) = children(monitor)
    enclave.close()
    enclave.close()
    for number in (monitor, pid):
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_machine_that_cannot_confine_starts_nothing(
    probing, device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "survey", lambda: Support("blocked", 0, True))
    with pytest.raises(SandboxUnavailable):
        EnclaveProcess.start(
            "aggregator",
            b"run",
            device=device,
            log=tmp_path / "log",
            measurement=probing("aggregator"),
        )
    assert not (tmp_path / "log").exists()


HOST = """
import sys, pathlib
sys.path[:0] = [{tests!r}, {checkout!r}]
import conftest as t
from datetime import UTC, datetime
device = t.SimulatedRoot(now=datetime.now(UTC)).issue(now=datetime.now(UTC))
with t.offering_only({mode!r}):
    enclave = t.EnclaveProcess.start(
        "aggregator", b"run", device=device, log=pathlib.Path({log!r}), memory_bytes=t.MEMORY,
        measurement=t.measure_probe("aggregator"),
    )
monitor = enclave._launch.process.pid
print(monitor, *t.children_of(monitor), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_host_leaves_no_enclave_behind(only, mode: str, tmp_path: Path) -> None:
    with only(mode):
        pass
    here = Path(__file__).resolve()
    script = HOST.format(
        tests=str(here.parent), checkout=str(here.parents[2]), mode=mode, log=str(tmp_path / "log")
    )
    host = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert host.stdout is not None
    pids = [int(number) for number in host.stdout.readline().split()]
    assert len(pids) == 2
    descriptors = [os.pidfd_open(pid) for pid in pids]
    host.kill()
    host.communicate()
    deadline = time.monotonic() + 30
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]
        os.close(descriptor)


# -- other machines

ELSEWHERE = """
import sys, pathlib, json
sys.path[:0] = json.loads(sys.argv[1])
if sys.argv[2] == "container":
    from fedark.sandbox.bpf import ALLOW, SyscallPolicy, SyscallRule, errno
    from fedark.sandbox.seccomp import install
    denied = ("unshare", "setns", "mount", "pivot_root", "open_tree", "move_mount")
    install(SyscallPolicy("container", ALLOW, (SyscallRule(errno(1), denied),)))
import conftest as t
from datetime import UTC, datetime
device = t.SimulatedRoot(now=datetime.now(UTC)).issue(now=datetime.now(UTC))
with t.EnclaveProcess.start(
    "aggregator", b"run", device=device, log=pathlib.Path(sys.argv[3]), memory_bytes=t.MEMORY,
    measurement=t.measure_probe("aggregator"),
) as enclave:
    heard, quoted = t.tell(enclave, "echo", "hello").decode(), t.tell(enclave, "quote")[:9].decode()
    print(enclave.sandbox.mode, heard, quoted)
"""


def elsewhere(
    kind: str, folder: Path, *prefix: str, python: str = sys.executable, **environment: str
) -> list[str]:
    here = Path(__file__).resolve()
    path = [
        str(here.parent),
        str(here.parents[2]),
        *(entry for entry in sys.path if entry.endswith("site-packages")),
    ]
    done = subprocess.run(
        [*prefix, python, "-c", ELSEWHERE, json.dumps(path), kind, str(folder / "log")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_container_that_forbids_namespaces_runs_enclaves_in_landlock(
    only, tmp_path: Path
) -> None:
    with only("landlock"):
        assert elsewhere("container", tmp_path) == ["landlock", "hello", "simulated"]


def test_an_ordinary_user_runs_enclaves_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user takes root and setpriv")
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    needed = [
        Path(python),
        Path(__file__),
        *(Path(entry) for entry in sys.path if entry.endswith("site-packages")),
    ]
    if not all(
        os.path.exists(path) and all(parent.stat().st_mode & 0o001 for parent in path.parents)
        for path in needed
    ):
        pytest.skip("no Python, or not this checkout, is within reach of another user")
    with tempfile.TemporaryDirectory(prefix="fedark-nobody-") as folder:
        os.chown(folder, 65534, 65534)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        answer = elsewhere(
            "plain", Path(folder), *nobody, python=python, HOME=folder, XDG_CACHE_HOME=folder
        )
    assert answer == [survey().mode(), "hello", "simulated"]


# -- the trainer


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_trains_behind_the_final_filter_with_the_hosts_vector_instructions(
    do, probing, only, mode: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    with (
        only(mode),
        EnclaveProcess.start(
            "trainer",
            b"run",
            device=device,
            log=tmp_path / "log",
            measurement=probing("trainer"),
            memory_bytes=4 << 30,
        ) as enclave,
    ):
        report = json.loads(do(enclave, "train", timeout=300))
        assert report["losses"][-1] < report["losses"][0]
        assert report["capability"] == torch.backends.cpu.get_cpu_capability()
        assert do(enclave, "quote").startswith(b"simulated")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ["aggregator", "trainer"])
def test_the_shipped_enclaves_start_and_refuse_nonsense(
    only, mode: str, role: str, device: SimulatedDevice, tmp_path: Path
) -> None:
    with only(mode), pytest.raises(ProtocolError, match="run configuration is malformed"):
        EnclaveProcess.start(role, b"\xa0", device=device, log=tmp_path / "log")
