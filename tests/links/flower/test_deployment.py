"""Real processes: SuperLink over TLS with node authentication, executor, ServerApp, daemons; and
nothing of them is left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evil
import pytest

from fedark.foundation.errors import FederationError, InputError
from fedark.links.flower import configuration
from fedark.links.flower.adapter import RunState
from fedark.links.flower.provision import provision_node_key
from fedark.operate import deployment, pinned, processes
from fedark.operate.deployment import Deployment, Member, Plan
from fedark.operate.processes import (
    Child,
    child_environment,
    flower_environment,
    module,
    session_members,
    sessions_below,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("helpers_in_children"),
    pytest.mark.timeout(280),
]

PARTIES = ("north", "south", "west")


def member(party: str, **more: Any) -> Member:
    return Member(party, "echo_parties:node", {"party": party}, **more)


def plan(
    root: Path, stages: list[dict[str, Any]], parties: tuple[Member, ...] | None = None, **more: Any
) -> Plan:
    nodes = parties if parties is not None else tuple(member(party) for party in PARTIES)
    return Plan(
        root=root,
        nodes=nodes,
        aggregator=member("aggregator"),
        coordinator="echo_parties:coordinate",
        settings={"expect": len(nodes), "report": str(root / "report.json"), "stages": stages}
        | more.pop("settings", {}),
        **more,
    )


def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text())


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def sessions(running: Deployment) -> set[int]:
    return sessions_below(child.pid for child in running.children)


def port_is_closed(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def run_to_the_end(running: Deployment, run_id: int) -> RunState:
    """As `wait`, but a process may die."""
    until(lambda: running.control.run_state(run_id).finished, 120)
    return running.control.run_state(run_id)


@pytest.fixture(scope="module")
def echo_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Deployment, dict[str, Any], set[int], str]]:
    """One deployment in which every kind of failure of a party is tried, then left."""
    root = tmp_path_factory.mktemp("echo")
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
        with Deployment(plan(root, stages)) as running:
            known = sessions(running)
            state = run_to_the_end(running, running.submit())
            assert state.completed, (state, processes.tail(root / "logs" / "serverapp.log"))
            known |= sessions(running)
            yield running, report(root), known, running.address


def test_first_contact_reaches_all_nodes_over_tls_with_their_own_keys(echo_run) -> None:
    assert echo_run[1]["broadcast"] == dict.fromkeys(PARTIES, True)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_payloads_come_back_unchanged(echo_run, stage: int) -> None:
    assert echo_run[1]["stages"][stage]["replies"] == dict.fromkeys(PARTIES, "echo")


def test_a_refusal_stands_in_the_place_of_that_party_alone(echo_run) -> None:
    replies = echo_run[1]["stages"][3]["replies"]
    assert replies.pop("south").startswith("south failed in stage round: ProtocolError: said no")
    assert replies == {"north": "echo", "west": "echo"}


def test_a_crash_stands_in_the_place_of_that_party_alone_and_its_words_are_in_no_log(
    echo_run,
) -> None:
    running, found, *_ = echo_run
    replies = dict(found["stages"][4]["replies"])
    error = replies.pop("south")
    assert "RuntimeError" in error
    assert "secret" not in error
    assert replies == {"north": "echo", "west": "echo"}
    words = b"a secret that must not travel"
    holders = {
        path.name
        for path in running.plan.root.rglob("*")
        if path.is_file() and words in path.read_bytes()
    }
    assert holders == set()
    assert "RuntimeError" in (running.plan.root / "logs" / "south.log").read_text()


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
    with pytest.raises(FederationError, match="west was ended by signal 9"):
        echo_run[0].check()


def test_a_run_of_somebody_else_is_refused_by_the_serverapp(echo_run) -> None:
    running = echo_run[0]
    state = run_to_the_end(running, running.control.start_run("not the session"))
    assert not state.completed
    assert "not submitted by this host's supervisor" in state.details


def test_another_bundle_is_refused_by_the_hosts_own_task_process(echo_run, tmp_path: Path) -> None:
    running = echo_run[0]
    marker = tmp_path / "marker"
    state = run_to_the_end(running, running.control.start_run(running.session, evil.bundle(marker)))
    assert not state.completed
    assert "not fedark's" in state.details
    assert not marker.exists()


def test_a_node_whose_key_is_not_registered_is_refused(echo_run, tmp_path: Path) -> None:
    running = echo_run[0]
    key, _ = provision_node_key(tmp_path, "stranger")
    ca = running.plan.root / "keys" / "ca.pem"
    connection = configuration.Connection(
        running.address, str(ca), str(key), str(tmp_path / "none.sock")
    )
    file = configuration.write(tmp_path / "c.json", connection)
    command = module("fedark.links.flower.supernode", str(file))
    child = Child(
        "stranger",
        command,
        environment=flower_environment(tmp_path / "flower"),
        log=tmp_path / "log",
    )
    assert child.wait(60)
    assert child.exit_code == 1
    assert "Failed to initialize the connection" in child.log.read_text()


def test_a_node_does_not_speak_to_a_superlink_under_another_authority(
    echo_run, tmp_path: Path
) -> None:
    from fedark.links.flower.provision import provision

    running = echo_run[0]
    other = provision(tmp_path / "other")
    key = running.plan.root / "keys" / "nodes" / "north.key"
    connection = configuration.Connection(
        running.address, str(other.ca), str(key), str(tmp_path / "none.sock")
    )
    file = configuration.write(tmp_path / "c.json", connection)
    command = module("fedark.links.flower.supernode", str(file))
    child = Child(
        "north", command, environment=flower_environment(tmp_path / "flower"), log=tmp_path / "log"
    )
    assert child.wait(60)
    assert child.exit_code == 1
    assert "CERTIFICATE_VERIFY_FAILED" in child.log.read_text()


def test_no_node_listens_on_a_port_and_the_superlink_only_on_loopback(echo_run) -> None:
    running = echo_run[0]
    members = set(session_members(sessions(running)))
    inodes = {
        link.split("[")[1].rstrip("]"): pid
        for pid in members
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if (link := _readlink(entry)).startswith("socket:[")
    }
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.add((fields[1], inodes[fields[9]]))
    port = int(running.address.rpartition(":")[2])
    assert listening == {(f"0100007F:{port:04X}", running.child("superlink").pid)}


def _readlink(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""


def test_everything_that_is_on_disk_is_private_and_nothing_is_in_the_users_flower_directory(
    echo_run,
) -> None:
    root = echo_run[0].plan.root
    assert [
        str(path)
        for path in root.rglob("*")
        if not path.is_symlink() and path.stat().st_mode & 0o077
    ] == []
    assert list(Path(os.environ["HOME"]).iterdir()) == []


def test_leaving_ends_every_process_and_closes_the_port(echo_run) -> None:
    running, _, known, address = echo_run
    running.close()
    assert session_members(known) == []
    assert port_is_closed(address)
    running.close()


def test_a_malicious_host_cannot_make_any_node_run_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "write_commands", evil.stock_server_commands)
    marker = tmp_path / "marker"
    nodes = (member("north"), member("south", stock=True))
    with Deployment(plan(tmp_path / "d", [], nodes)) as running:
        run_id = running.control.start_run(running.session, evil.bundle(marker))
        state = run_to_the_end(running, run_id)
        assert state.completed, (state, processes.tail(tmp_path / "d" / "logs" / "serverapp.log"))
        told = processes.tail(tmp_path / "d" / "daemons" / "south" / "clientapp.log")
    assert (marker / "server-ran").exists()
    count, replies = json.loads((marker / "replies.json").read_text())
    assert count == len(replies) == 2
    assert all(has_error for has_error, _ in replies)
    assert not (marker / "client-ran").exists()
    assert "not fedark" in told
    assert not list((tmp_path / "d" / "daemons").rglob("evil_code*"))


def test_a_stock_supernode_serves_the_same_run(tmp_path: Path) -> None:
    stages = [{"bytes": 1000, "timeout": 60}, {"command": {"south": "refuse"}, "timeout": 60}]
    with Deployment(
        plan(tmp_path, stages, (member("north"), member("south", stock=True)))
    ) as running:
        running.wait(running.submit(), timeout=200)
    first, second = report(tmp_path)["stages"]
    assert first["replies"] == {"north": "echo", "south": "echo"}
    assert second["replies"]["north"] == "echo"
    assert "ProtocolError: said no" in second["replies"]["south"]


def test_a_run_that_fails_is_reported_with_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    found: list[tuple[set[int], str]] = []

    def run() -> None:
        with Deployment(plan(tmp_path, [], settings={"fail": True})) as running:
            found.append((sessions(running), running.address))
            running.wait(running.submit(), timeout=200)

    with pytest.raises(FederationError) as caught:
        run()
    ((known, address),) = found
    assert "the coordinator gave up" in str(caught.value)
    assert session_members(known) == []
    assert port_is_closed(address)


def test_a_port_in_use_is_named_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = Deployment(plan(tmp_path, [], port=port))
        with (
            pytest.raises(FederationError, match=f"Port {port} on 127.0.0.1 is in use") as caught,
            running,
        ):
            pytest.fail("it started")
    assert "Choose another port" in caught.value.fix
    assert running.children == ()


def test_a_port_that_is_taken_meanwhile_is_given_up_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        real = deployment._free_port
        ports = iter([port])
        monkeypatch.setattr(deployment, "_free_port", lambda host: next(ports, None) or real(host))
        with Deployment(plan(tmp_path, [], (member("north"),))) as running:
            assert running.address != f"127.0.0.1:{port}"
            assert [child.name for child in running.children].count("superlink") == 1


def test_a_daemon_that_cannot_start_is_reported_with_its_log_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    broken = Member("north", "echo_parties:nothing_of_that_name", {})
    running = Deployment(plan(tmp_path, [], (broken,)))
    seen: list[set[int]] = []
    check = running.check
    running.check = lambda: (seen.append(sessions(running)), check())[1]  # type: ignore[method-assign]
    with pytest.raises(FederationError) as caught, running:
        pytest.fail("it started")
    assert "north ended with code 1" in str(caught.value)
    assert "nothing_of_that_name cannot be loaded" in str(caught.value)
    assert session_members(set().union(*seen)) == []


def test_sockets_are_in_the_deployments_own_directory_unless_its_path_is_too_long(
    tmp_path: Path,
) -> None:
    assert deployment._socket_directory(tmp_path, ["north"]) == tmp_path / "run"
    elsewhere = deployment._socket_directory(tmp_path / ("n" * 90), ["north"])
    assert elsewhere.stat().st_mode & 0o077 == 0
    assert len(str(elsewhere)) < 60
    elsewhere.rmdir()


def test_a_directory_in_which_a_deployment_runs_is_left_alone(tmp_path: Path) -> None:
    held = deployment._locked(tmp_path)
    try:
        with (
            pytest.raises(FederationError, match="Another deployment runs"),
            Deployment(plan(tmp_path, [])),
        ):
            pytest.fail("it started")
        assert not (tmp_path / "keys" / "ca.pem").exists()
    finally:
        os.close(held)
    os.close(deployment._locked(tmp_path))


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="share a name"),
        Deployment(plan(tmp_path, [], (member("a"), member("a")))),
    ):
        pytest.fail("it started")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "aggregator.example", ""])
def test_an_address_that_others_can_reach_is_refused(tmp_path: Path, host: str) -> None:
    with (
        pytest.raises(InputError, match="not a loopback address"),
        Deployment(plan(tmp_path, [], host=host)),
    ):
        pytest.fail("it started")


SUPERVISOR = """\
import json, sys, time
from pathlib import Path
from fedark.operate.deployment import Deployment, Member, Plan
from fedark.operate.processes import sessions_below

def member(party):
    return Member(party, "echo_parties:node", {"party": party})

root = Path(sys.argv[1])
stages = [{"bytes": 1000, "timeout": 100, "command": {"north": "sleep 90"}}]
settings = {"expect": 1, "report": str(root / "report.json"), "stages": stages}
plan = Plan(root=root, nodes=(member("north"),), aggregator=member("agg"), coordinator="echo_parties:coordinate", settings=settings)
with Deployment(plan) as d:
    run_id = d.submit()
    def look():
        if d.server_pid:
            found = {"sessions": sorted(sessions_below(c.pid for c in d.children)), "address": d.address}
            print(json.dumps(found), flush=True)
    d.wait(run_id, timeout=100, on_look=look)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_is_ended_in_the_middle_of_a_stage(
    tmp_path: Path, how: signal.Signals
) -> None:
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR)
    command = [sys.executable, str(script), str(tmp_path / "d")]
    supervisor = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment({})
    )
    assert supervisor.stdout is not None
    try:
        found = json.loads(supervisor.stdout.readline())
        assert len(session_members(found["sessions"])) >= 6
        assert not port_is_closed(found["address"])
        supervisor.send_signal(how)
        supervisor.wait(60)
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
    if how is signal.SIGKILL:
        until(lambda: session_members(found["sessions"]) == [])
    assert session_members(found["sessions"]) == []
    assert port_is_closed(found["address"])
    assert supervisor.returncode != 0
