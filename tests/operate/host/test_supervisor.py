"""What the supervisor says before it starts anything, and what it does to a job whose run ended
without a word.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import parties
import pytest
from direct import admitted, make_host, proposed
from world import free_port

from fedark.contract.contract import now
from fedark.foundation.errors import FederationError, InputError
from fedark.links.flower.adapter import RunState
from fedark.operate.host import supervisor
from fedark.operate.host.folder import HostFolder, init_host
from fedark.operate.host.supervisor import run_host
from fedark.operate.host.work import Work
from fedark.operate.state import locked


def test_an_address_that_cannot_be_listened_on_is_said_once_and_nothing_is_started(
    tmp_path: Path,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for number, address in enumerate((f"127.0.0.1:{taken.getsockname()[1]}", "192.0.2.1:8443")):
            init_host(
                tmp_path / str(number),
                name="pool",
                listen=address,
                address=address,
                sandbox="landlock",
            )
            with pytest.raises(FederationError, match="cannot listen on") as caught:
                run_host(tmp_path / str(number), lambda text: None)
            assert "host.toml" in caught.value.fix
            assert not (tmp_path / str(number) / "supervisor").exists()


def test_a_host_that_runs_already_is_left_alone(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    host = init_host(
        tmp_path / "host", name="pool", listen=address, address=address, sandbox="landlock"
    )
    with locked(host.path), pytest.raises(FederationError, match="Another process runs"):
        run_host(host.path, lambda text: None)
    with pytest.raises(InputError, match="not a host's folder"):
        run_host(tmp_path, lambda text: None)


# -- jobs, with a SuperLink that only answers


class Answering:
    """Stands in for the SuperLink's control API."""

    def __init__(self, host: HostFolder) -> None:
        self.host = host
        self.state = RunState("running", "", "")
        self.runs: list[str] = []
        self.stopped: list[int] = []
        self.online = True

    def start_run(self) -> int:
        self.runs.append(self.host.store.jobs()[0].session)
        return len(self.runs)

    def run_state(self, run_id: int) -> RunState:
        return self.state

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def nodes(self) -> list[Any]:
        from fedark.links.flower.adapter import NodeRecord

        status = "online" if self.online else "offline"
        rows = self.host.store.nodes()
        return [
            NodeRecord(number, row.name, status, row.transport.encode())
            for number, row in enumerate(rows)
        ]

    def close(self) -> None: ...


class Still:
    """Children that are never started."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.names: list[str] = []
        self.restarts = 0

    all = ()

    def keep(self, name: str, *args: Any, **more: Any) -> None:
        self.names.append(name)

    def __getitem__(self, name: str) -> Still:
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def end(self, name: str) -> None:
        if name in self.names:
            self.names.remove(name)

    def look(self) -> None: ...


@pytest.fixture
def running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Answering, HostFolder, Any]:
    host = make_host(tmp_path / "host")
    people = [host.aggregator]
    for name, role in parties.ROLES.items():
        if role != "aggregator":
            people.append(admitted(host, tmp_path / name, name, role).request.party)
    contract = proposed(host, parties.contract(parties=people))
    monkeypatch.setattr(supervisor, "Supervisor", Still)
    said: list[str] = []
    found = supervisor._Host(host, said.append, Work())
    answering = Answering(host)
    found._control = answering
    return found, answering, host, contract


def status(host: HostFolder) -> tuple[str, str]:
    (job,) = host.store.jobs()
    return job.status, job.reason


def ready(host: HostFolder, contract: Any, *names: str, answer: str = "ready") -> None:
    for name in names or ("maker", "north", "east", "south"):
        host.store.answer(contract.digest().hex(), name, answer, "")


def test_a_job_starts_only_once_every_party_is_ready_and_online(running) -> None:
    found, answering, host, contract = running
    ready(host, contract, "maker", "north", "east")
    found.look()
    assert status(host)[0] == "proposed"
    ready(host, contract, "south")
    answering.online = False
    found.look()
    assert status(host)[0] == "proposed"
    answering.online = True
    found.look()
    assert status(host)[0] == "running"
    assert answering.runs == [host.store.jobs()[0].session]


def test_one_refusal_ends_a_proposal_and_names_who(running) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    ready(host, contract, "east", answer="refused")
    found.look()
    assert status(host) == ("refused", "refused by east")
    assert answering.runs == []


def test_a_run_that_ended_without_an_outcome_is_submitted_again_under_its_session_and_not_for_ever(
    running,
) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    answering.state = RunState("finished", "failed", "no word")
    for _ in range(supervisor._ATTEMPTS + 3):
        found.look()
    assert len(answering.runs) == supervisor._ATTEMPTS
    assert len(set(answering.runs)) == 1
    state, reason = status(host)
    assert state == "failed"
    assert "no word" in reason


def test_a_host_that_was_started_anew_goes_on_with_its_job(
    running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    again = supervisor._Host(host, lambda text: None, Work())
    again._control = answering
    again.look()
    assert answering.runs == [host.store.jobs()[0].session] * 2
    assert status(host)[0] == "running"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("report.json", '{"contract": "DIGEST", "stages": [], "passed_over": {}}', ("done", "")),
        (
            "failed.json",
            '{"contract": "DIGEST", "what": "not every party signed"}',
            ("failed", "not every party signed"),
        ),
    ],
)
def test_the_outcome_that_the_aggregator_wrote_is_the_jobs(
    running, name: str, text: str, expected: tuple[str, str]
) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    folder = host.party_folder / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / name).write_text(text.replace("DIGEST", contract.digest().hex()))
    found.look()
    assert status(host) == expected
    assert host.store.jobs()[0].run == "r1"
    assert answering.stopped == [1]


@pytest.mark.parametrize("name", ["report.json", "failed.json"])
def test_the_outcome_of_another_job_is_not_this_ones(running, name: str) -> None:
    found, _, host, contract = running
    ready(host, contract)
    found.look()
    folder = host.party_folder / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / name).write_text(
        '{"contract": "00", "what": "not this one", "stages": [], "passed_over": {}}'
    )
    found.look()
    assert status(host) == ("running", "")


def test_a_job_that_is_stopped_while_it_is_being_started_leaves_no_daemon_to_the_next(
    running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, answering, host, contract = running
    ready(host, contract)

    def stopped_meanwhile() -> int:
        host.store.set_job(contract.digest().hex(), "stopped", "by hand")
        raise FederationError("The SuperLink did not answer.")

    monkeypatch.setattr(answering, "start_run", stopped_meanwhile)
    found.look()
    assert "aggregator" in found.children
    found.look()
    assert "aggregator" not in found.children


def test_a_killed_serverapp_is_noticed_by_its_process_and_one_that_never_began_by_the_clock(
    running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    config = found._server_config
    config.with_suffix(".pid").write_text(str(os.getpid()))
    found.look()
    assert len(answering.runs) == 1
    config.with_suffix(".pid").write_text("4194304")  # no process has this id
    found.look()
    assert len(answering.runs) == 2
    assert answering.stopped == [1]
    found.look()
    assert len(answering.runs) == 2
    found._submitted -= 13.0
    found.look()
    assert len(answering.runs) == 2
    found.children.restarts += 1  # the executor died, maybe with the task in its hands
    found.look()
    assert len(answering.runs) == 3
    found._submitted -= 61.0
    found.look()
    assert len(answering.runs) == 4


def test_a_stopped_job_is_stopped_at_the_superlink(running) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    host.store.set_job(contract.digest().hex(), "stopped", "by hand")
    found.look()
    assert answering.stopped == [1]
    with pytest.raises(FederationError, match="has ended"):
        host.store.set_job(contract.digest().hex(), "running")


def test_a_contract_that_expires_ends_its_job(running, monkeypatch: pytest.MonkeyPatch) -> None:
    found, answering, host, contract = running
    ready(host, contract)
    found.look()
    monkeypatch.setattr(supervisor, "now", lambda: now() + timedelta(days=3))
    found.look()
    assert status(host)[0] == "expired"
    assert answering.stopped == [1]


def test_certificates_and_the_revocation_list_are_renewed_before_they_end(
    running, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _, host, _ = running
    found.look()
    before = {row.name: row.bundle for row in host.store.nodes()}
    found._renewal_due = 0.0
    monkeypatch.setattr("fedark.operate.host.admission.now", lambda: now() + timedelta(days=61))
    found.look()
    after = {row.name: row.bundle for row in host.store.nodes()}
    assert before["maker"] == after["maker"]
    assert all(before[name] != after[name] for name in ("north", "east", "south"))
