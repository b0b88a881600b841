"""Child processes that never outlive their parent and never go unnoticed.

- Each child leads a session of its own: the terminal's Ctrl-C does not reach it, and its whole
  session is ended together.
- Each child dies with its parent, also if that is killed with SIGKILL (see `_spawn`). Start
  children in a thread that lives as long as they shall: the kernel watches the thread.
- Each child has a log file, which `bound_log` keeps in bounds. What is shown of it passes through
  `redact`.
- `stop` asks (SIGTERM), waits, kills, and then looks into /proc for anything that is left of the
  session.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import fedark
from fedark.foundation.errors import FederationError, StorageError, printable
from fedark.foundation.proxies import without_proxies
from fedark.foundation.redact import redact
from fedark.operate import _spawn

__all__ = [
    "Child",
    "alive",
    "bound_log",
    "child_environment",
    "console_script",
    "flower_environment",
    "module",
    "session_members",
    "sessions_below",
    "stop",
    "tail",
]

MAX_LOG_BYTES = 32 << 20
_TAIL_BYTES, _TAIL_LINES = 16384, 15


def tail(log: Path) -> str:
    """The last lines of a log file, redacted."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return "  | (no log)"
    lines = [printable(line, 400) for line in redact(text).splitlines() if line.strip()]
    return "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])


def bound_log(log: Path, limit: int = MAX_LOG_BYTES) -> None:
    """Keep a growing log in bounds: over `limit` bytes it becomes LOG.1, and LOG begins anew.

    Writers append, so they go on in the emptied file; what they write between copy and truncation
    is lost.
    """
    try:
        if log.stat().st_size > limit:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            log.with_name(f"{log.name}.1").chmod(0o600)
            os.truncate(log, 0)
    except OSError:
        return  # a log that is not there, or a full disk: the processes matter more


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a child: fedark importable as here, no proxy and no Flower
    settings of the user's, `extra` on top.
    """
    environment = {
        name: value
        for name, value in without_proxies(os.environ).items()
        if not name.startswith("FLWR_")
    }
    root = str(Path(fedark.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment | dict(extra)


def flower_environment(home: Path) -> dict[str, str]:
    """`child_environment` for Flower: its state in `home` instead of ~/.flwr, no telemetry, no look
    for updates.
    """
    return child_environment(
        {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_COLOR": "1",
        }
    )


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter; the working directory is not searched
    for modules.
    """
    return [sys.executable, "-P", "-m", name, *arguments]


def console_script(name: str, *arguments: str) -> list[str]:
    """The command that runs a console script of an installed package with this interpreter,
    wherever its file is.
    """
    code = (
        "import sys; from importlib.metadata import entry_points; sys.argv[0] = sys.argv.pop(1); "
        "sys.exit(entry_points(group='console_scripts', name=sys.argv[0])[sys.argv[0]].load()())"
    )
    return [sys.executable, "-P", "-c", code, name, *arguments]


class Child:
    """A running child process.

    Args:
        name: what messages call it.
        command: its argument list.
        environment: its whole environment.
        log: file for its output, appended to.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        try:
            descriptor = os.open(
                log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise StorageError(
                f"The log {log} cannot be opened: {error.strerror}.",
                safe=f"{name} was not started.",
            ) from None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", _spawn.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=dict(environment),
                cwd=log.parent,
                start_new_session=True,
            )
        except OSError as error:
            raise FederationError(f"{name} cannot be started: {error.strerror}.") from None
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int:
        """Its process id, which is also the id of its session and process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def tail(self) -> str:
        """The last lines of its log, redacted."""
        return tail(self.log)

    def require_alive(self) -> None:
        """Raise FederationError, with the end of its log, if it has ended."""
        code = self.exit_code
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise FederationError(
                f"{self.name} {how}. Its log ends:\n{self.tail()}",
                fix=f"The whole log is {self.log}.",
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole process group."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def wait(self, seconds: float) -> bool:
        """Whether it ended within `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            not in "ZX"
        )
    except OSError:
        return False


def _table() -> dict[int, tuple[bool, int, int]]:
    """pid -> (alive, parent, session) of every process. A leader that has ended is alive while a
    thread of it is.
    """
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                alive = fields[0] not in "ZX" or int(fields[17]) > 1
                table[int(entry.name)] = (alive, int(fields[1]), int(fields[3]))
            except (OSError, IndexError, ValueError):
                continue
    return table


def sessions_below(pids: Iterable[int]) -> set[int]:
    """The sessions of these processes' descendants, and the processes' own; this process's session
    is never among them.
    """
    table, found = _table(), set(pids)
    while more := {pid for pid, (_, parent, _) in table.items() if parent in found} - found:
        found |= more
    return (set(pids) | {table[pid][2] for pid in found if pid in table}) - {os.getsid(0)}


def session_members(sessions: Iterable[int]) -> list[int]:
    """The processes of these sessions that are alive (a zombie is not)."""
    wanted = set(sessions)
    return [pid for pid, (alive, _, session) in _table().items() if alive and session in wanted]


def stop(children: Sequence[Child], *, grace: float = 5.0) -> None:
    """End children and all that they started: asked first, killed after `grace` seconds.

    Raises:
        FederationError: something is left even after SIGKILL.
    """
    sessions = sessions_below(child.pid for child in children if child.exit_code is None)
    sessions |= {child.pid for child in children}
    for child in reversed(children):
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    for child in reversed(children):
        child.wait(max(0.0, deadline - time.monotonic()))
    deadline = time.monotonic() + 5.0
    while left := session_members(sessions):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise FederationError(
                f"Processes {left} cannot be ended.",
                fix="Look at what they wait for (ps -o pid,stat,wchan).",
            )
        time.sleep(0.01)
    for child in children:
        child.wait(5.0)
