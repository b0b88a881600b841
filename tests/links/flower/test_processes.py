"""Child processes: none outlives its parent, none dies unnoticed, no log tells a secret."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedark.foundation.errors import FederationError
from fedark.foundation.redact import redact
from fedark.operate import processes
from fedark.operate.processes import Child, bound_log, child_environment, session_members, stop

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up',"
        " flush=True); time.sleep(600)"
    ),
]


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def start(tmp_path: Path, command: list[str], name: str = "child") -> Child:
    return Child(name, command, environment=child_environment({}), log=tmp_path / f"{name}.log")


def up(child: Child) -> None:
    until(lambda: b"up" in child.log.read_bytes())


def test_a_child_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = start(
        tmp_path, [sys.executable, "-c", "print('first'); print('token=abc'); raise SystemExit(3)"]
    )
    assert child.wait(60)
    with pytest.raises(FederationError) as caught:
        child.require_alive()
    assert "child ended with code 3" in str(caught.value)
    assert "first" in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_child_that_is_killed_is_reported_with_the_signal(tmp_path: Path) -> None:
    child = start(tmp_path, SLEEP)
    up(child)
    child.require_alive()
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(60)
    with pytest.raises(FederationError, match="signal 9"):
        child.require_alive()


def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    child = start(tmp_path, ["/no/such/command"])
    assert child.wait(60)
    with pytest.raises(FederationError, match="FileNotFoundError"):
        child.require_alive()


def test_stop_ends_a_child_that_ignores_the_request(tmp_path: Path) -> None:
    child = start(tmp_path, STUBBORN)
    up(child)
    stop([child], grace=0.2)
    assert child.exit_code == -signal.SIGKILL
    assert session_members([child.pid]) == []


def test_stop_ends_grandchildren_in_their_own_sessions_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);p ="
        " subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True);print('up', p.pid, flush=True); time.sleep(600)"
    )
    child = start(tmp_path, [sys.executable, "-c", code])
    up(child)
    grandchild = int(child.log.read_text().split()[1])
    stop([child], grace=0.2)
    assert session_members([child.pid, grandchild]) == []


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fedark.operate.processes import Child,"
        f" child_environment;c = Child('c', {STUBBORN!r}, environment=child_environment({{}}),"
        f" log=Path({str(tmp_path)!r}) / 'c.log');print(c.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=child_environment({})
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: b"up" in (tmp_path / "c.log").read_bytes())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: session_members([pid]) == [])


def test_a_child_whose_parent_died_before_it_could_ask_for_it_does_not_start(
    tmp_path: Path,
) -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        processes._spawn.__file__,
        "1",
        sys.executable,
        "-c",
        "print('ran')",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ran" not in result.stdout
    assert "the parent is gone" in result.stderr


def test_what_a_child_writes_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        child = start(tmp_path, [sys.executable, "-c", f"open({str(tmp_path / 'made')!r}, 'w')"])
        assert child.wait(60)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o600
    assert stat.S_IMODE(child.log.stat().st_mode) == 0o600


def test_a_child_runs_this_package_whatever_its_directory_and_the_users_flower_settings_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    (tmp_path / "fedark.py").write_text("raise SystemExit('shadowed')")
    code = (
        "import fedark, os; print(fedark.__file__, [n for n in os.environ if"
        " n.startswith('FLWR_')])"
    )
    child = start(tmp_path, [sys.executable, "-P", "-c", code])
    assert child.wait(60)
    assert (
        child.log.read_text().strip()
        == f"{Path(processes.__file__).resolve().parents[1] / '__init__.py'} []"
    )


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("--token 0123abc next", "0123abc"),
        ("Authorization: Bearer xyz.123", "xyz.123"),
        ('"secret": "hunter2"', "hunter2"),
        ("key " + "ab12" * 16, "ab12" * 3),
        ("b64 " + "Zm9v/YmFy+" * 6, "YmFy+Zm9v"),
        ("-----BEGIN PRIVATE KEY-----\nMIIB\nxyz\n-----END PRIVATE KEY-----", "MIIB"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nMIIB\ncut off", "MIIB"),
    ],
)
def test_redaction_hides_what_may_be_a_secret(text: str, hidden: str) -> None:
    assert hidden in text
    assert hidden not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "Port 9092 on 127.0.0.1 is in use",
        "/usr/lib/python3.11/site-packages/flwr/superlink/servicer/control/control_handlers",
        "2026-01-01 12:00:00 INFO [Fleet.ActivateNode] Activated node_id=1340883048671188429",
    ],
)
def test_redaction_leaves_plain_words_alone(text: str) -> None:
    assert redact(text) == text


def test_a_log_over_its_bound_begins_anew_and_its_writer_goes_on_in_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=descriptor, text=True
    )
    os.close(descriptor)
    assert writer.stdin is not None
    writer.stdin.write("a" * 2000 + "\n")
    writer.stdin.flush()
    while log.stat().st_size < 2001:
        pass
    bound_log(log, 3000)
    assert log.stat().st_size == 2001
    bound_log(log, 2000)
    assert log.stat().st_size == 0
    assert (tmp_path / "log.1").read_text() == "a" * 2000 + "\n"
    assert (tmp_path / "log.1").stat().st_mode & 0o077 == 0
    writer.stdin.write("b\n")
    writer.stdin.close()
    assert writer.wait(60) == 0
    assert log.read_text() == "b\n"
    bound_log(tmp_path / "none")
