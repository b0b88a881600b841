"""Real confined processes for the sandbox's tests: both modes, root and ordinary user."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attacks
import pytest

import fedark
from fedark.sandbox import Mount, Setup, survey
from fedark.sandbox.syscalls import NUMBERS

PACKAGE = Path(fedark.__file__).resolve().parent
ORDINARY_USER = 65534
MEMORY, SCRATCH_BYTES = 512 << 20, 2 << 20

CASES = ["namespaces-own", "landlock-own", "namespaces-nobody", "landlock-nobody"]


def _reachable(path: Path) -> bool:
    """Whether every other user could reach `path`."""
    return all(parent.stat().st_mode & 0o001 for parent in path.parents) and bool(
        path.stat().st_mode & 0o004
    )


def _interpreter(ordinary: bool) -> list[str]:
    """The command that runs Python as this user, or as "nobody" (which takes root)."""
    own = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    if not ordinary:
        return [str(own)]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another user takes root and setpriv")
    system = Path(f"/usr/bin/python3.{sys.version_info.minor}")
    python = next((path for path in (own, system) if path.is_file() and _reachable(path)), None)
    if python is None or not _reachable(PACKAGE / "foundation" / "errors.py"):
        pytest.skip("no Python, or not this checkout, is within reach of another user")
    user = str(ORDINARY_USER)
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", str(python)]


class Inmate:
    """`inmate.py`, confined; `ask` runs one probe in it."""

    def __init__(
        self, mode: str, *, ordinary: bool = False, landlock: int | None = None, **changes: Any
    ) -> None:
        command = _interpreter(ordinary)
        library = subprocess.run(
            [command[-1], "-I", "-S", "-c", "import os; print(os.path.dirname(os.__file__))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        script = Path(__file__).with_name("inmate.py")
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(60)
        roots = [
            library,
            str(PACKAGE / "sandbox"),
            str(PACKAGE / "foundation" / "errors.py"),
            str(PACKAGE / "__init__.py"),
            str(script),
        ]
        roots += [
            path
            for path in ("/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu")
            if os.path.isdir(path)
        ]
        self.setup = Setup(
            mode=mode,  # type: ignore[arg-type]
            landlock=survey().landlock if landlock is None else landlock,
            host=os.getpid(),
            channel=theirs.fileno(),
            roots=tuple(dict.fromkeys(Mount.of(path) for path in roots)),
            listed=(),
            memory_bytes=changes.get("memory_bytes", MEMORY),
            scratch_bytes=SCRATCH_BYTES,
        )
        specification = {
            "setup": self.setup.to_map(),
            "package": str(PACKAGE.parent),
            "numbers": NUMBERS,
            "free": changes.get("free", False),
        }
        self.process = subprocess.Popen(
            [*command, "-I", "-S", "-B", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(), *changes.get("leak", ())),
            env=changes.get("environment", {}),
            cwd="/",
        )
        theirs.close()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(specification).encode())
            self.process.stdin.close()
        self._pending = b""
        try:
            assert self._line() == "locked"
        except (EOFError, ConnectionError):
            self.process.wait(30)
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read().decode()) from None

    def ask(self, name: str, *arguments: object) -> Any:
        """The probe's result; EOFError if the inmate died of it."""
        self.channel.sendall(json.dumps([name, *arguments]).encode() + b"\n")
        result = self._line()
        attacks.probed(result)
        return result

    def pid(self) -> int:
        """The confined process as the host sees it: the monitor's only child."""
        monitor = self.process.pid
        return int(Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split()[0])

    def close(self) -> int:
        """End it; the monitor's exit code."""
        self.channel.close()
        try:
            return self.process.wait(30)
        finally:
            assert self.process.stderr is not None
            self.process.stderr.close()

    def _line(self) -> Any:
        while b"\n" not in self._pending:
            chunk = self.channel.recv(1 << 20)
            if not chunk:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)


def _require(mode: str) -> None:
    """Skip where this machine has not what `mode` needs."""
    support = survey()
    if mode == "namespaces" and support.namespaces:
        pytest.skip(f"no namespaces here: {support.namespaces}")
    if mode == "landlock" and not support.landlock:
        pytest.skip("no landlock here")


@pytest.fixture(scope="session", params=CASES)
def inmate(request: pytest.FixtureRequest) -> Iterator[Inmate]:
    """One confined process for each mode and kind of user, for all probes that it survives."""
    mode, user = request.param.split("-")
    _require(mode)
    prisoner = Inmate(mode, ordinary=user == "nobody")
    yield prisoner
    prisoner.close()


@pytest.fixture
def confined() -> Iterator[Callable[..., Inmate]]:
    """Makes confined processes of a test's own; ends them."""
    made: list[Inmate] = []

    def make(mode: str, **options: Any) -> Inmate:
        _require(mode)
        made.append(Inmate(mode, **options))
        return made[-1]

    yield make
    for prisoner in made:
        prisoner.close()


def _gone(pid: int, seconds: float = 30) -> bool:
    """Whether process `pid` ends within `seconds`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


@pytest.fixture(scope="session")
def gone() -> Callable[[int], bool]:
    """(process id) -> whether it ends within half a minute."""
    return _gone


@pytest.fixture(scope="session")
def interpreter() -> Callable[[bool], list[str]]:
    """(as another, ordinary user) -> the command that runs Python; skips where there is none."""
    return _interpreter


@pytest.fixture(scope="session")
def require() -> Callable[[str], None]:
    """(mode) skips where the machine has not what it needs."""
    return _require


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder that holds the package fedark."""
    return PACKAGE.parent
