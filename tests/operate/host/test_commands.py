"""What the operators' commands act on and tell of: the thing that was asked for, and the living
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import parties
import pytest
from direct import admitted, client_of, make_host, proposed
from typer.testing import CliRunner, Result

from fedark.cli import app
from fedark.contract.contract import Contract, now
from fedark.foundation.errors import FedarkError, FederationError, InputError
from fedark.operate import state
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.jobs import find_job
from fedark.operate.host.store import JOB_ENDS
from fedark.operate.node import hostsync, supervisor
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostsync import HostSync
from fedark.operate.state import locked, running
from fedark.stages.consent import Consent

NOWHERE = Path("/nowhere/node.sock")


@pytest.fixture
def host(tmp_path: Path) -> HostFolder:
    return make_host(tmp_path / "host")


@pytest.fixture
def north(host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFolder:
    monkeypatch.setattr(hostsync, "HostClient", client_of(host))
    return admitted(host, tmp_path / "north", "north", "customer")


def contract_for(host: HostFolder, north: NodeFolder, **changes: object) -> Contract:
    people = [
        host.aggregator,
        north.request.party,
        *(parties.party(name) for name in ("maker", "east", "south")),
    ]
    return parties.contract(parties=people, **changes)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -- the host's jobs


def test_a_name_of_several_jobs_is_refused_with_the_list_and_nothing_is_done(
    host: HostFolder,
) -> None:
    first, second = (proposed(host, parties.contract(rounds=rounds)) for rounds in (3, 4))
    host.store.set_job(first.digest().hex(), "running", session="s")
    for command in ("stop", "show"):
        result = run("aggregator", "jobs", command, host.path, "dispatch")
        assert isinstance(result.exception, InputError)
        for contract, status in ((first, "running"), (second, "proposed")):
            assert f"{contract.digest().hex()[:16]} ({status}, of 20" in str(result.exception)
    assert {job.status for job in host.store.jobs()} == {"running", "proposed"}
    result = run("aggregator", "jobs", "stop", host.path, first.digest().hex()[:16])
    assert f"job dispatch ({first.digest().hex()[:16]}..., running) is stopped" in result.output
    assert [job.status for job in host.store.jobs()] == ["stopped", "proposed"]


def test_of_several_jobs_of_a_name_the_one_that_has_not_ended_is_stopped(host: HostFolder) -> None:
    for rounds, status in ((3, "done"), (4, "proposed"), (5, "failed")):
        made = proposed(host, parties.contract(rounds=rounds))
        if status != "proposed":
            host.store.set_job(made.digest().hex(), status)  # type: ignore[arg-type]
    assert "proposed) is stopped" in run("aggregator", "jobs", "stop", host.path, "dispatch").output
    assert "3 jobs are named" in str(
        run("aggregator", "jobs", "stop", host.path, "dispatch").exception
    )
    assert "3 jobs are named" in str(
        run("aggregator", "jobs", "show", host.path, "dispatch").exception
    )
    with pytest.raises(InputError, match="No job is named"):
        find_job(host.store, "other")


def test_a_job_that_has_ended_is_not_stopped(host: HostFolder) -> None:
    made = proposed(host, parties.contract())
    host.store.set_job(made.digest().hex(), "done")
    result = run("aggregator", "jobs", "stop", host.path, "dispatch")
    assert isinstance(result.exception, FederationError)
    assert host.store.jobs()[0].status == "done"


# -- whether it runs

_HOLD = """
import sys, time
from pathlib import Path
from fedark.operate.state import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _written(host: HostFolder, *, old: bool = False, trouble: str = "") -> None:
    folder = host.supervisor / "state"
    folder.mkdir(parents=True, exist_ok=True)
    when = now() - timedelta(seconds=90 if old else 0)
    processes = {"front": {"alive": True, "restarts": 0, "last_end": ""}}
    value = {"pid": 1, "time": when.isoformat(), "processes": processes, "trouble": trouble}
    (folder / "status.json").write_text(json.dumps(value))


@pytest.mark.parametrize("end", ["terminate", "kill"])
def test_status_tells_of_the_living_process_and_not_of_what_it_wrote(
    host: HostFolder, end: str
) -> None:
    _written(host)
    result = run("aggregator", "status", host.path)
    assert result.exit_code == 1
    assert "does not run" in result.output
    assert "alive" not in result.output
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(host.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        _written(host)
        result = run("aggregator", "status", host.path)
        assert (result.exit_code, "front        alive" in result.output) == (0, True)
        assert not run("aggregator", "jobs", "list", host.path).stderr
        _written(host, old=True)
        result = run("aggregator", "status", host.path)
        assert result.exit_code == 1
        assert "has not looked at its processes for" in result.output
        _written(host, trouble="the SuperLink does not answer")
        assert run("aggregator", "status", host.path).exit_code == 1
    finally:
        getattr(process, end)()
        process.communicate()
    _written(host)  # the last thing that it did
    result = run("aggregator", "status", host.path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["running"] == {}
    assert "does not run" in run("aggregator", "jobs", "list", host.path).stderr


def test_looking_whether_a_folder_is_in_use_keeps_nobody_from_using_it(tmp_path: Path) -> None:
    assert not running(tmp_path)
    with locked(tmp_path):
        assert running(tmp_path)
        with pytest.raises(FederationError, match="Another process runs"), locked(tmp_path):
            pass
    for _ in range(20):
        with locked(tmp_path):
            pass
        assert not running(tmp_path)


# -- at a node


@pytest.mark.parametrize("how", JOB_ENDS)
def test_a_job_that_is_over_at_the_host_is_over_at_the_nodes_and_cannot_be_approved(
    host: HostFolder, north: NodeFolder, how: str
) -> None:
    contract = proposed(host, contract_for(host, north))
    node = HostSync(north, NOWHERE, lambda text: None)
    node.step()
    consent = Consent(north.path)
    assert consent.decision(contract).status == "waiting"
    host.store.set_job(contract.digest().hex(), how, "at the host")  # type: ignore[arg-type]
    node.step()
    assert consent.decision(contract).status == "ended"
    result = run("node", "approve", north.path, contract.digest().hex())
    assert isinstance(result.exception, InputError)
    assert "is over" in str(result.exception)
    assert consent.decision(contract).status == "ended"
    said = run("node", "jobs", north.path).output
    assert f"ended, {how} at the host" in said
    assert "to read it" not in said
    assert "to agree" not in run("node", "jobs", north.path, "dispatch").output
    with pytest.raises(FedarkError, match="is over"):
        consent.require(contract, "north")


def test_a_contract_whose_time_is_over_cannot_be_approved(
    host: HostFolder, north: NodeFolder
) -> None:
    past = now() - timedelta(days=3)
    dates = {"created": past.isoformat(), "expires": (past + timedelta(days=1)).isoformat()}
    contract = contract_for(host, north, **dates)
    consent = Consent(north.path)
    consent.propose(contract)
    assert consent.decision(contract).status == "ended"
    with pytest.raises(InputError, match="is over"):
        consent.approve(contract)


def test_what_is_over_is_said_in_its_own_words(
    north: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local daemon that answers again is not the host."""
    troubles = [FederationError("The node daemon cannot be reached."), None, None]

    class Stop:
        def wait(self, seconds: float) -> bool:
            return not troubles

    class Nothing:
        done = False

        def look(self) -> None: ...

    class Step:
        def __init__(self, *_: object) -> None: ...

        def step(self) -> None:
            trouble = troubles.pop(0)
            if trouble is not None:
                raise trouble

    said: list[str] = []
    monkeypatch.setattr(supervisor, "HostSync", Step)
    monkeypatch.setattr(supervisor, "_ASK", 0.0)
    supervisor._watch(north, Nothing(), Nothing(), Nothing(), said.append, Stop())  # type: ignore[arg-type]
    assert said == [
        "The node daemon cannot be reached.",
        "this is over: The node daemon cannot be reached.",
    ]


def _empty(north: NodeFolder) -> str:
    Path(north.config.data.file).write_text("desk,message,action\n")
    return "data"


def _gone(north: NodeFolder) -> str:
    Path(north.config.data.file).unlink()
    return "data"


def _full(north: NodeFolder) -> str:
    return "disk"


@pytest.mark.parametrize("spoil", [_empty, _gone, _full])
def test_a_node_says_ready_only_when_its_data_and_disk_are(
    host: HostFolder,
    north: NodeFolder,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[NodeFolder], str],
) -> None:
    contract = proposed(host, contract_for(host, north))
    monkeypatch.setattr(HostSync, "_fetch_bundles", lambda *_: None)
    monkeypatch.setattr(hostsync, "_CHECK_EVERY", 0.0)
    Consent(north.path).approve(contract)
    data = Path(north.config.data.file)
    before, said = data.read_text(), []
    what = spoil(north)
    with monkeypatch.context() as patch:
        if what == "disk":
            from fedark.operate.node import doctor

            patch.setattr(doctor, "_ROOM", 1 << 60)
        node = HostSync(north, NOWHERE, said.append)
        node.step()
        answer, reason = host.store.answers(contract.digest().hex())["north"]
        assert answer == "waiting"
        assert reason == f"its own check of its {what} finds a problem"
        assert str(north.path) not in reason
        assert any(str(data if what == "data" else north.path) in text for text in said)
    data.write_text(before)
    node.step()
    assert host.store.answers(contract.digest().hex())["north"][0] == "ready"
    assert "ready for a job again" in said


# -- another user's folder


@pytest.fixture
def foreign(host: HostFolder, north: NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders are another user's, as they are for root by sudo."""
    mine = os.geteuid()
    monkeypatch.setattr(state.os, "geteuid", lambda: mine + 4321)


def test_every_command_that_writes_into_another_users_folder_is_refused(
    host: HostFolder, north: NodeFolder, tmp_path: Path, foreign: None
) -> None:
    contract = contract_for(host, north)
    Consent(north.path).propose(contract)
    proposed(host, contract)
    bundle, request = north.path / "host.json", north.path / "request.json"
    digest = contract.digest().hex()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in (
        ("node", "approve", north.path, digest),
        ("node", "refuse", north.path, "dispatch"),
        ("node", "join", bundle, north.path),
        ("node", "offer", north.path, "job.toml"),
        ("node", "up", north.path),
        ("aggregator", "up", host.path),
        ("aggregator", "invite", host.path, "x", "--role", "customer", "--out", tmp_path / "x"),
        ("aggregator", "approve", host.path, request, "--fingerprint", "0"),
        ("aggregator", "revoke", host.path, "north"),
        ("aggregator", "jobs", "submit", host.path, "job.toml"),
        ("aggregator", "jobs", "stop", host.path, "dispatch"),
    ):
        result = run(*command)
        assert isinstance(result.exception, InputError), (command, result.output)
        assert "belongs to user" in str(result.exception), command
        assert "sudo -u" in str(result.exception)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert run("node", "jobs", north.path).exit_code == 0  # reading is free


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_root_is_told_whose_folder_it_is(north: NodeFolder) -> None:
    os.chown(north.path, 65534, 65534)
    result = run("node", "approve", north.path, "0" * 16)
    assert "belongs to user nobody, and this is user root" in str(result.exception)
    assert "sudo -u nobody" in str(result.exception)


def test_a_file_that_cannot_be_read_is_told_with_its_path(
    north: NodeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedark import cli

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/north/consent/1.approved")

    monkeypatch.setattr(Consent, "proposed", denied)
    monkeypatch.setattr(sys, "argv", ["fedark", "node", "jobs", str(north.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "fedark: /srv/north/consent/1.approved: Permission denied" in capsys.readouterr().err
