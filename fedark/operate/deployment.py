"""All processes of one machine: the SuperLink and its executor, the aggregator's daemon, one daemon
a node.

    with Deployment(plan) as deployment:
        deployment.wait(deployment.submit(), timeout=240)

Rules: nothing is waited for by the clock, everything by asking it. While `wait` watches a run, a
process that dies is started again, the ServerApp too, until it has died `Plan.attempts` times in a
row: then it is reported with the end of its log. Leaving the `with` block, in whatever way (end,
exception, Ctrl-C, SIGTERM, SIGHUP), ends every process, and it is checked that none is left and no
port is open. If the supervisor itself is killed, the kernel ends the rest; in the same directory,
another one goes on.

Order: keys and certificates; SuperLink, asked over TLS under our own authority until it answers;
node keys registered; daemons and executor; all nodes online.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fedark.foundation.errors import FederationError, InputError, StorageError, printable
from fedark.links.flower import configuration, server_app
from fedark.links.flower.adapter import Control, RunState
from fedark.links.flower.provision import provision, provision_node_key
from fedark.links.flower.service import LONGEST_PATH, NodeClient
from fedark.operate import node_daemon, pinned
from fedark.operate.keeper import Keeper
from fedark.operate.processes import (
    Child,
    alive,
    child_environment,
    console_script,
    flower_environment,
    module,
    stop,
    tail,
)

__all__ = ["Deployment", "Member", "Plan"]

_START_SECONDS = 60.0
_PORT_ATTEMPTS = 4
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_CALM, _LONGEST_PAUSE = 10.0, 4.0
_BEGIN_SECONDS, _BEGIN_AGAIN_SECONDS = 60.0, 12.0
_RAISED = "ServerApp failed with exception"


@dataclass(frozen=True)
class Member:
    """A party, the function that makes its node ("module:function"), and that function's settings.

    `stock`: connect with Flower's own SuperNode instead of ours.
    """

    party: str
    factory: str
    settings: dict[str, Any] = field(default_factory=dict)
    stock: bool = False


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        root: directory of keys, state and logs; made if missing.
        nodes: provider and customers.
        aggregator: the aggregator's daemon.
        coordinator: "module:function", called in the ServerApp as `function(link, aggregator,
            settings)`.
        settings: the coordinator's own.
        attempts: how often in a row a process may die without having lived for a while.
        host, port: where the SuperLink listens; port 0 takes a free one. The host is a loopback
            address: node keys authenticate Flower's Fleet API only, and whoever reaches the port
                could register nodes and submit runs.
    """

    root: Path
    nodes: tuple[Member, ...]
    aggregator: Member
    coordinator: str
    settings: dict[str, Any] = field(default_factory=dict)
    attempts: int = 5
    host: str = "127.0.0.1"
    port: int = 0


class Deployment:
    """Starts a plan's processes, and ends them all. Use it as a context manager, in a thread that
    stays.
    """

    def __init__(self, plan: Plan, *, progress: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.session = secrets.token_hex(32)
        self._progress = progress or (lambda _: None)
        self._keepers: dict[str, Keeper] = {}
        self._submissions = 0
        self._must_begin = 0.0, 0
        self._sockets: Path | None = None
        self._lock: int | None = None
        self._control: Control | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._port = plan.port

    @property
    def address(self) -> str:
        """host:port of the SuperLink."""
        return f"{self.plan.host}:{self._port}"

    @property
    def control(self) -> Control:
        """The client of the SuperLink's control API."""
        if self._control is None:
            raise FederationError("The deployment is not started.")
        return self._control

    @property
    def children(self) -> tuple[Child, ...]:
        """The processes that were started."""
        return tuple(keeper.child for keeper in self._keepers.values() if keeper.child is not None)

    def child(self, name: str) -> Child:
        """A process by its name: "superlink", "superexec", or a party."""
        return next(child for child in self.children if child.name == name)

    @property
    def server_pid(self) -> int:
        """The ServerApp's process, 0 before its first."""
        return server_app.running(self._server_config)

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process was started again; the ServerApp is "serverapp"."""
        return {name: keeper.restarts for name, keeper in self._keepers.items()} | {
            "serverapp": max(0, self._submissions - 1)
        }

    @property
    def _server_config(self) -> Path:
        return self.plan.root / "state" / "server.json"

    @property
    def _server_log(self) -> Path:
        return self.plan.root / "logs" / "serverapp.log"

    def __enter__(self) -> Deployment:
        self._catch_signals()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self) -> int:
        """Start the job's run. Returns Flower's run id."""
        self.check()
        self._submissions += 1
        server_app.forget(self._server_config)
        executor = self._keepers["superexec"]
        # An executor that dies between taking a task and starting its process takes the task along.
        self._must_begin = time.monotonic() + _BEGIN_SECONDS, executor.restarts
        return self.control.start_run(self.session)

    def wait(
        self,
        run_id: int,
        *,
        timeout: float,
        on_look: Callable[[], None] | None = None,
        pause: float = 0.4,
    ) -> None:
        """Wait until the run is over. What dies meanwhile is started again, and the run submitted
        again if its ServerApp died.

        Args:
            run_id: as `submit` returned it.
            timeout: seconds.
            on_look: called at every look.
            pause: seconds between two looks.

        Raises:
            FederationError: it failed, was stopped, or took longer; or a process kept dying.
        """
        for _ in _looks(timeout, pause):
            self.supervise()
            if on_look is not None:
                on_look()
            try:
                state = self.control.run_state(run_id)
            except FederationError:
                continue  # the SuperLink is being started again
            if state.completed:
                return
            if self._server_died(state):
                self._progress("the ServerApp ended without a word; the run is submitted again")
                with suppress(FederationError):
                    self.control.stop_run(run_id)
                try:
                    run_id = self.submit()
                except FederationError:
                    continue
            elif state.finished:
                raise FederationError(
                    f"The run ended as {state.sub_status}:"
                    f" {state.details}\n{tail(self._server_log)}",
                    safe="No result was written.",
                    fix=f"The logs are in {self.plan.root / 'logs'}.",
                )
        with suppress(FederationError):
            self.control.stop_run(run_id)
        raise FederationError(
            f"The run took longer than {timeout:g} s and was stopped.",
            safe="No result was written.",
        )

    def check(self) -> None:
        """Raise FederationError if a process has died."""
        for child in self.children:
            child.require_alive()

    def supervise(self) -> None:
        """Start again what has died.

        Raises:
            FederationError: it has died too often in a row.
        """
        for keeper in self._keepers.values():
            keeper.look()
            if keeper.failures >= self.plan.attempts:
                raise FederationError(
                    f"{keeper.name} has ended {keeper.failures} times in a row and is not started"
                    f" any more. {keeper.last_end}",
                    safe="What the parties keep of the run is on their disks.",
                    fix=(
                        f"The logs are in {self.plan.root / 'logs'}. Mend it and start the"
                        " deployment again in the same directory."
                    ),
                )

    def _server_died(self, state: RunState) -> bool:
        """Whether the ServerApp was killed, or stopped because the SuperLink did not know it any
        more.
        """
        if state.finished:
            return not state.details.startswith(_RAISED)
        pid = self.server_pid
        if pid > 0:
            return not alive(pid)
        due, restarts = self._must_begin
        sooner = (
            _BEGIN_AGAIN_SECONDS
            if self._keepers["superexec"].restarts != restarts
            else _BEGIN_SECONDS
        )
        return time.monotonic() > due - _BEGIN_SECONDS + sooner

    def close(self) -> None:
        """End every process, and make sure of it. May be called more than once; signals wait until
        it is done.

        Raises:
            FederationError: a process or the port is left.
        """
        self._ignore_signals()
        try:
            if self._control is not None:
                self._control.close()
                self._control = None
            children, self._keepers = self.children, {}
            stop(children)
            if children and self._port and _answers(self.plan.host, self._port):
                raise FederationError(
                    f"Port {self._port} is still open.", fix="Another program opened it meanwhile."
                )
        finally:
            if self._sockets is not None:
                shutil.rmtree(self._sockets, ignore_errors=True)
                self._sockets = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            self._restore_signals()

    def _start(self) -> None:
        plan, root = self.plan, self.plan.root
        parties = [member.party for member in (*plan.nodes, plan.aggregator)]
        if len(set(parties)) != len(parties):
            raise InputError(
                "Two members of the deployment share a name.", safe="Nothing was started."
            )
        _require_loopback(plan.host)
        for name in (
            "",
            "logs",
            "state",
            "keys",
            "daemons",
            *(f"daemons/{party}" for party in parties),
        ):
            _private_directory(root / name)
        self._lock = _locked(root)
        self._sockets = _socket_directory(root, parties)
        keys = provision(root / "keys", () if plan.host == "127.0.0.1" else (plan.host,))
        node_keys = {
            member.party: provision_node_key(root / "keys", member.party) for member in plan.nodes
        }
        environment = flower_environment(root / "state" / "flower")
        tls = (
            "--ssl-ca-certfile",
            str(keys.ca),
            "--ssl-certfile",
            str(keys.certificate),
            "--ssl-keyfile",
            str(keys.key),
        )
        secret = ("--superexec-auth-secret-file", str(keys.superexec_secret))
        self._progress("starting the SuperLink")
        self._start_superlink(keys.ca, tls, secret, environment)

        known = {node.public_key.strip(): node for node in self.control.nodes()}
        for party, (_, public) in node_keys.items():
            if public.strip() not in known:
                self.control.register_node(party, public)
        self._progress("starting the nodes")
        settings = server_app.Settings(
            session=self.session,
            coordinator=plan.coordinator,
            aggregator=str(self._socket(plan.aggregator.party)),
            roster={party: public.decode() for party, (_, public) in node_keys.items()},
            settings=plan.settings,
        )
        environment[server_app.CONFIG_VARIABLE] = str(
            configuration.write(self._server_config, settings)
        )
        commands = pinned.write_commands(root / "state" / "bin", self._server_log)
        environment["PATH"] = os.pathsep.join((str(commands), environment.get("PATH", "")))
        for member in (plan.aggregator, *plan.nodes):
            connected = member is not plan.aggregator
            self._start_daemon(member, keys.ca, node_keys[member.party][0] if connected else None)
        executor = (
            "--runtime-api-address",
            self.address,
            "--root-certificates",
            str(keys.ca),
            *secret,
        )
        self._spawn("superexec", console_script("flower-superexec", *executor), environment)
        self._await_nodes({public.strip() for _, public in node_keys.values()})

    def _start_superlink(
        self, ca: Path, tls: tuple[str, ...], secret: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        """Start it and ask it until it answers. A port that somebody else took meanwhile is given
        up, if we chose it.
        """
        database = self.plan.root / "state" / "superlink.db"
        for attempt in range(_PORT_ATTEMPTS):
            self._port = self.plan.port or _free_port(self.plan.host)
            if self.plan.port:
                _require_free(self.plan.host, self._port)
            where = ("--host", self.plan.host, "--port", str(self._port))
            how = (
                "--isolation",
                "process",
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
            )
            command = console_script(
                "flower-superlink", *where, *how, *tls, *secret, "--database", str(database)
            )
            child = self._spawn("superlink", command, environment)
            control = Control(self.address, ca.read_bytes())
            for _ in _looks(_START_SECONDS, 0.05):
                if child.exit_code is not None:
                    break
                with suppress(FederationError):
                    control.nodes()
                    child.require_alive()
                    self._control = control
                    return
            control.close()
            taken = "address already in use" in child.tail().lower()
            if not taken or attempt == _PORT_ATTEMPTS - 1:
                child.require_alive()
                raise FederationError(
                    f"The SuperLink does not answer. Its log ends:\n{child.tail()}"
                )
            if self.plan.port:
                raise _in_use(self.plan.host, self._port)
            del self._keepers["superlink"]

    def _start_daemon(self, member: Member, ca: Path, key: Path | None) -> None:
        directory = self.plan.root / "daemons" / member.party
        settings = node_daemon.Settings(
            socket=str(self._socket(member.party)),
            factory=member.factory,
            settings=member.settings,
            superlink=self.address if key else "",
            ca=str(ca),
            key=str(key or ""),
            stock=member.stock,
            stock_port=_free_port("127.0.0.1") if member.stock else 0,
        )
        file = configuration.write(directory / "daemon.json", settings)
        self._spawn(member.party, module(node_daemon.__name__, str(file)), child_environment({}))

    def _await_nodes(self, keys: set[bytes]) -> None:
        waiting = {member.party for member in (*self.plan.nodes, self.plan.aggregator)}
        online = 0
        for _ in _looks(_START_SECONDS, 0.1):
            self.check()
            for party in sorted(waiting):
                with suppress(FederationError), NodeClient(self._socket(party)) as client:
                    if client.status(timeout=1).party != party:
                        raise InputError(f"The daemon of {party} says that it is somebody else.")
                    waiting.discard(party)
            now = sum(
                node.status == "online"
                for node in self.control.nodes()
                if node.public_key.strip() in keys
            )
            if now != online:
                self._progress(f"{now} of {len(keys)} nodes online")
                online = now
            if not waiting and online == len(keys):
                return
        raise FederationError(
            f"{online} of {len(keys)} nodes came online within {_START_SECONDS:g} s; daemons"
            f" missing: {sorted(waiting)}.",
            fix=f"The logs are in {self.plan.root / 'logs'} and {self.plan.root / 'daemons'}.",
        )

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> Child:
        def start() -> Child:
            return Child(
                name, command, environment=environment, log=self.plan.root / "logs" / f"{name}.log"
            )

        keeper = self._keepers[name] = Keeper(
            name, start, say=self._progress, calm=_CALM, longest=_LONGEST_PAUSE
        )
        keeper.look()
        return self.child(name)

    def _socket(self, party: str) -> Path:
        if self._sockets is None:
            raise FederationError("The deployment is not started.")
        return self._sockets / f"{party}.sock"

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._handlers[number] = signal.signal(number, _leave)
            self._handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)

    def _ignore_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN)

    def _restore_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _looks(seconds: float, pause: float) -> Iterator[None]:
    """Once at once, then every `pause` seconds until `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be made: {error.strerror}.", safe="Nothing was started."
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _locked(root: Path) -> int:
    """A descriptor that holds the directory for this process; the kernel releases it when the
    process ends.
    """
    descriptor = os.open(
        root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise FederationError(
            f"Another deployment runs in {root}.",
            safe="It was left alone.",
            fix="Stop it first, or use another directory.",
        ) from None
    return descriptor


def _socket_directory(root: Path, parties: list[str]) -> Path:
    """A new private directory: in `root`, or in the system's temporary one where the path would be
    too long for a socket.
    """
    directory = root / "run"
    if max(len(os.fsencode(directory / f"{party}.sock")) for party in parties) > LONGEST_PATH:
        return Path(tempfile.mkdtemp(prefix="fedark-"))
    shutil.rmtree(directory, ignore_errors=True)
    _private_directory(directory)
    return directory


def _require_loopback(host: str) -> None:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"{printable(host, 60)} is not a loopback address.",
            safe="Nothing was started: only the node API of the SuperLink's port is authenticated.",
            fix="Listen on 127.0.0.1, with a TLS front that lets /v1/fleet/ alone through.",
        )


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _require_free(host: str, port: int) -> None:
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if "in use" in (error.strerror or ""):
                raise _in_use(host, port) from None
            raise FederationError(
                f"The SuperLink cannot listen on {printable(host)}, port {port}: {error.strerror}.",
                safe="Nothing was started.",
                fix="Choose an address of this machine and a port above 1023.",
            ) from None


def _in_use(host: str, port: int) -> FederationError:
    return FederationError(
        f"Port {port} on {printable(host)} is in use by another program.",
        safe="Nothing was started.",
        fix=f"Choose another port, or see who has it: ss -ltnp 'sport = :{port}'",
    )


def _answers(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0
