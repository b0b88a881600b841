"""Real processes: a host with SuperLink, executor, ServerApp and front, and its nodes; and nothing
of them is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evil
import pytest
from echo_parties import NODE_UP, host_up
from routes import flower_routes
from small import write_job

from fedark.contract.job import Job
from fedark.foundation.errors import FederationError
from fedark.links.flower import configuration
from fedark.links.flower.adapter import Control, RunState
from fedark.links.flower.provision import provision, provision_node_key
from fedark.operate import processes
from fedark.operate.host.folder import host_of, port_of
from fedark.operate.processes import (
    Child,
    child_environment,
    flower_environment,
    module,
    session_members,
    sessions_below,
)
from fedark.operate.state import socket_of
from fedark.simulation.machine import Machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("helpers_in_children"),
    pytest.mark.timeout(560),
]

CUSTOMERS = ("north", "south", "west")
PARTIES = ("maker", *CUSTOMERS)


def machine(root: Path, stages: list[dict[str, Any]], commands: str = "", **more: Any) -> Machine:
    settings = {"expect": len(PARTIES), "report": str(root / "report.json"), "stages": stages}
    return Machine(root / "machine", host_up=host_up(settings | more, commands), node_up=NODE_UP)


def job(root: Path) -> Job:
    return Job.load(write_job(root / "job", customers=CUSTOMERS))


def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text())


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def sessions(running: Machine) -> set[int]:
    return sessions_below(kept.pid for kept in running.processes() if kept.pid)


def control(running: Machine) -> Control:
    return Control(socket_of(running.host.supervisor, "superlink.sock"))


def run_to_the_end(running: Machine, bundle: bytes | None = None) -> RunState:
    """A run that this test submits, past the host's supervisor."""
    with control(running) as client:
        run = client.start_run(bundle)
        until(lambda: client.run_state(run).finished, 120)
        return client.run_state(run)


def listeners(running: Machine) -> set[tuple[str, int]]:
    """(table:address, pid) of every socket on which a process of the machine listens."""
    inodes = {
        link.split("[")[1].rstrip("]"): pid
        for pid in session_members(sessions(running))
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if (link := _readlink(entry)).startswith("socket:[")
    }
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] in ("0A", "07") and fields[9] in inodes:
                found.add((f"{table} {fields[1]}", inodes[fields[9]]))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "00010000" and fields[6] in inodes:  # it accepts connections
            found.add((f"unix {fields[7] if len(fields) > 7 else ''}", inodes[fields[6]]))
    return found


def _readlink(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""


@pytest.fixture(scope="module")
def echo_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Machine, dict[str, Any], set[int]]]:
    """One host and its nodes, with which every kind of failure of a party is tried, then left.

    They are in a folder that every account may enter, so that only their own are closed.
    """
    root = Path(tempfile.mkdtemp(prefix="fedark-test-"))
    root.chmod(0o755)
    stages: list[dict[str, Any]] = [
        {"bytes": 1000},
        {"bytes": 0},
        {"bytes": 7_000_000, "random": True},
        {"command": {"south": "refuse"}},
        {"command": {"south": "crash"}},
        {"to": ["north"], "bytes": 10},
        {"command": {"south": "sleep 25", "west": "die"}, "timeout": 20},
        {"to": ["north", "south"], "bytes": 1000},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # where nobody answers; nobody may ask
        with machine(root, stages) as running:
            running.finish(running.begin(job(root), sandbox="landlock"), timeout=240)
            yield running, report(root), sessions(running)
    shutil.rmtree(root)


def test_first_contact_reaches_all_nodes_over_tls_with_their_own_keys(echo_run) -> None:
    assert echo_run[1]["broadcast"] == dict.fromkeys(PARTIES, True)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_payloads_come_back_unchanged(echo_run, stage: int) -> None:
    assert echo_run[1]["stages"][stage]["replies"] == dict.fromkeys(PARTIES, "echo")


def test_a_refusal_stands_in_the_place_of_that_party_alone(echo_run) -> None:
    replies = echo_run[1]["stages"][3]["replies"]
    assert replies.pop("south").startswith("south failed in stage round: ProtocolError: said no")
    assert replies == dict.fromkeys(("maker", "north", "west"), "echo")


def test_a_crash_stands_in_the_place_of_that_party_alone_and_its_words_are_in_no_log(
    echo_run,
) -> None:
    running, found, *_ = echo_run
    replies = dict(found["stages"][4]["replies"])
    error = replies.pop("south")
    assert "RuntimeError" in error
    assert "secret" not in error
    assert replies == dict.fromkeys(("maker", "north", "west"), "echo")
    words = b"a secret that must not travel"
    holders = {
        path.name
        for path in running.root.rglob("*")
        if path.is_file() and words in path.read_bytes()
    }
    assert holders == set()
    assert "RuntimeError" in (running.folder("south") / "logs" / "daemon.log").read_text()


def test_a_stage_may_go_to_one_party(echo_run) -> None:
    assert echo_run[1]["stages"][5]["replies"] == {"north": "echo"}


def test_a_late_party_is_an_error_in_its_place_and_answers_again_later(echo_run) -> None:
    late, after = echo_run[1]["stages"][6:]
    assert "did not answer stage round within 20 s" in late["replies"]["south"]
    assert late["replies"]["north"] == "echo"
    assert after["replies"] == {"north": "echo", "south": "echo"}


def test_a_dead_node_is_an_error_in_its_place_alone(echo_run) -> None:
    dead, after = echo_run[1]["stages"][6:]
    assert dead["replies"]["north"] == "echo"
    assert dead["replies"]["west"] != "echo"
    assert "west" not in after["replies"]


def test_the_aggregators_daemon_answers_the_coordinator(echo_run) -> None:
    assert echo_run[1]["aggregator"] == "for the aggregator"


def test_a_dead_process_is_reported_by_name(echo_run) -> None:
    assert "daemon was ended by signal 9" in (echo_run[0].root / "logs" / "west.log").read_text()


def test_a_run_of_somebody_else_is_refused_by_the_serverapp(echo_run) -> None:
    state = run_to_the_end(echo_run[0])
    assert not state.completed
    assert "not submitted by this host's supervisor" in state.details


def test_another_bundle_is_refused_by_the_hosts_own_task_process(echo_run, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    state = run_to_the_end(echo_run[0], evil.bundle(marker))
    assert not state.completed
    assert "not fedark's" in state.details
    assert not marker.exists()


def _stranger(running: Machine, tmp_path: Path, ca: Path, key: Path) -> Child:
    connection = configuration.Connection(
        running.host.config.address, str(ca), str(key), str(tmp_path / "none.sock")
    )
    file = configuration.write(tmp_path / "c.json", connection)
    command = module("fedark.links.flower.supernode", str(file))
    environment = flower_environment(tmp_path / "flower")
    child = Child("stranger", command, environment=environment, log=tmp_path / "log")
    assert child.wait(60)
    return child


def test_a_node_whose_key_is_not_registered_is_refused(echo_run, tmp_path: Path) -> None:
    running = echo_run[0]
    key, _ = provision_node_key(tmp_path, "stranger")
    child = _stranger(running, tmp_path, running.folder("north") / "ca.pem", key)
    assert "connected as node" not in child.log.read_text()
    front = (running.host.supervisor / "logs" / "front.log").read_text()
    assert "activate-node from 127.0.0.1 with 401: not the key of an approved node" in front


def test_a_node_does_not_speak_to_a_host_under_another_authority(echo_run, tmp_path: Path) -> None:
    running = echo_run[0]
    other = provision(tmp_path / "other")
    child = _stranger(running, tmp_path, other.ca, running.folder("north") / "transport.key")
    assert child.exit_code == 1
    assert "CERTIFICATE_VERIFY_FAILED" in child.log.read_text()


def test_no_node_listens_on_a_port_and_of_the_host_only_the_front_does(echo_run) -> None:
    running = echo_run[0]
    found = {where for where, _ in listeners(running)}
    front = f"tcp 0100007F:{port_of(running.host.config.listen):04X}"
    assert {where for where in found if not where.startswith("unix ")} == {front}
    sockets = {Path(where.removeprefix("unix ")) for where in found if where.startswith("unix ")}
    assert {path.name for path in sockets} == {"superlink.sock", "node.sock"}
    for path in sockets:
        assert path.parent.stat().st_mode & 0o077 == 0, path
        assert path.stat().st_mode & 0o077 == 0, path


def test_every_folder_is_private_and_nothing_is_in_the_users_flower_directory(echo_run) -> None:
    running = echo_run[0]
    folders = [running.root, running.host.path, *(running.folder(name) for name in PARTIES)]
    assert [path for path in folders if path.stat().st_mode & 0o077] == []
    assert not list(Path(os.environ["HOME"]).glob(".flwr*"))


def test_nothing_secret_is_in_the_configuration_of_a_run_or_in_a_command_line(echo_run) -> None:
    running = echo_run[0]
    (record,) = running.host.store.jobs()
    secrets = [record.session.encode()]
    for path in (*running.root.rglob("*.key"), *running.root.rglob("superexec.secret")):
        secrets += [line for line in path.read_bytes().splitlines() if len(line) > 40]
    database = running.host.supervisor / "state" / "superlink.db"
    for path in (database, database.with_name(f"{database.name}-wal")):
        data = path.read_bytes() if path.exists() else b""
        assert not any(secret in data for secret in secrets), path
    for pid in session_members(sessions(running)):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        assert not any(secret in line for secret in secrets), line


def _as_another_account(act: Callable[[], list[str]]) -> list[str]:
    """What a function returns in a child process under an account that has no rights here."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        found = ["it did not come to its end"]
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            found = act()
        except BaseException as error:
            found = [f"{type(error).__name__}: {error}"]
        finally:
            with os.fdopen(write, "w") as out:
                json.dump(found, out)
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.load(answer)
    os.waitpid(child, 0)
    return found


@pytest.mark.attack("another account of the machine at sockets, files and processes")
def test_another_account_of_the_machine_reaches_no_api_and_no_file_of_host_or_nodes(
    echo_run, refusal: Callable[[str], None]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another account")
    running = echo_run[0]
    for folder in (running.root, running.root / "parties"):
        folder.chmod(0o755)  # what protects host and nodes shall be their own
    at = (host_of(running.host.config.listen), port_of(running.host.config.listen))
    sockets = [where[5:] for where, _ in listeners(running) if where.startswith("unix ")]
    files = [path for path in running.root.rglob("*") if path.is_file()]
    pids = session_members(sessions(running))
    routes = sorted(flower_routes())
    assert {Path(name).name for name in sockets} == {"superlink.sock", "node.sock"}
    assert len(files) > 40
    assert {path for _, path in routes} >= {"/v1/control/list-runs", "/v1/runtime/acquire-task"}
    tls = ssl.create_default_context(cadata=running.host.ca.decode())

    def attack() -> list[str]:
        got = []
        for name in sockets:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(name)
                    got.append(f"connected to {name}")
                except PermissionError:
                    pass
        for path in files:
            try:
                path.read_bytes()
                got.append(f"read {path}")
            except PermissionError:
                pass
        for pid in pids:
            for name in ("environ", "mem", "fd", "root"):
                try:
                    os.listdir(f"/proc/{pid}/{name}") if name in ("fd", "root") else os.open(
                        f"/proc/{pid}/{name}", os.O_RDONLY
                    )
                    got.append(f"opened {name} of {pid}")
                except (PermissionError, FileNotFoundError):
                    pass
            try:
                os.kill(pid, 0)
                got.append(f"may send signals to {pid}")
            except (PermissionError, ProcessLookupError):
                pass
        for method, path in routes:
            with (
                socket.create_connection(at, timeout=60) as plain,
                tls.wrap_socket(plain, server_hostname=at[0]) as wire,
            ):
                wire.sendall(
                    f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    "Content-Length: 0\r\n\r\n".encode()
                )
                status = wire.recv(64).split()[1:2]
            if status not in ([b"404"], [b"401"]):
                got.append(f"{method} {path}: {status}")
        return got

    assert _as_another_account(attack) == []
    with control(running) as client:
        assert client.nodes(), "the host's own account does reach it"
    refusal("the kernel (EACCES): every socket and file is in a folder of the owner's alone")


def test_leaving_ends_every_process_and_closes_the_port(echo_run) -> None:
    running, _, known = echo_run
    known |= sessions(running)
    running.close()
    assert session_members(known) == []
    assert running.processes() == ()
    running.close()


def test_a_malicious_host_cannot_make_any_node_run_its_code(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with machine(tmp_path, [], "evil:stock_server_commands") as running:
        running.finish(running.begin(job(tmp_path), sandbox="landlock"), timeout=200)
        state = run_to_the_end(running, evil.bundle(marker))
        log = running.host.supervisor / "logs" / "serverapp.log"
        assert state.completed, (state, processes.tail(log))
        told = processes.tail(running.folder("south") / "run" / "supernode.log")
    assert (marker / "server-ran").exists()
    count, replies = json.loads((marker / "replies.json").read_text())
    assert count == len(replies) == len(PARTIES)
    assert all(has_error for has_error, _ in replies)
    assert not (marker / "client-ran").exists()
    assert "not fedark" in told
    assert not list((running.root / "parties").rglob("evil_code*"))


def test_a_job_that_fails_is_reported_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    known: set[int] = set()

    def run() -> None:
        with machine(tmp_path, [], fail="the coordinator gave up") as running:
            contract = running.begin(job(tmp_path), sandbox="landlock")
            known.update(sessions(running))
            running.finish(contract, timeout=200)

    with pytest.raises(FederationError, match="the coordinator gave up"):
        run()
    assert len(known) > len(PARTIES)
    assert session_members(known) == []


def test_a_host_that_cannot_start_is_reported_with_its_log_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    with (
        pytest.raises(FederationError, match="pool has ended 5 times in a row") as caught,
        Machine(tmp_path / "machine", host_up=module("nothing_of_that_name")) as running,
    ):
        running.begin(job(tmp_path), sandbox="landlock")
    assert "No module named nothing_of_that_name" in str(caught.value)
    assert running.processes() == ()


def test_sockets_are_in_the_folder_unless_its_path_is_too_long(tmp_path: Path) -> None:
    assert socket_of(tmp_path, "x.sock") == tmp_path / "run" / "x.sock"
    elsewhere = socket_of(tmp_path / ("n" * 90), "x.sock")
    assert len(str(elsewhere)) < 60
    assert elsewhere != socket_of(tmp_path / ("m" * 90), "x.sock")


SUPERVISOR = """\
import json, sys
from pathlib import Path
from echo_parties import NODE_UP, host_up
from fedark.contract.job import Job
from fedark.links.flower import server_app
from fedark.operate.processes import sessions_below
from fedark.simulation.machine import Machine

root = Path(sys.argv[1])
stages = [{"bytes": 1000, "timeout": 100, "command": {"north": "sleep 90"}}]
settings = {"expect": 4, "report": str(root / "report.json"), "stages": stages}
with Machine(root / "machine", host_up=host_up(settings), node_up=NODE_UP) as running:
    contract = running.begin(Job.load(root / "job" / "job.toml"), sandbox="landlock")
    def look():
        if server_app.running(running.host.supervisor / "state" / "server.json"):
            found = sessions_below(kept.pid for kept in running.processes())
            print(json.dumps({"sessions": sorted(found)}), flush=True)
    running.finish(contract, timeout=100, on_look=look)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_is_ended_in_the_middle_of_a_stage(
    tmp_path: Path, how: signal.Signals
) -> None:
    assert job(tmp_path).path == tmp_path / "job" / "job.toml"
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR)
    command = [sys.executable, str(script), str(tmp_path)]
    supervisor = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment({})
    )
    assert supervisor.stdout is not None
    try:
        found = json.loads(supervisor.stdout.readline())
        assert len(session_members(found["sessions"])) >= 10
        supervisor.send_signal(how)
        supervisor.wait(60)
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
    if how is signal.SIGKILL:
        until(lambda: session_members(found["sessions"]) == [])
    assert session_members(found["sessions"]) == []
    assert supervisor.returncode != 0
