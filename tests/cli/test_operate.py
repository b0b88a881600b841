"""The commands of host and node, from folders and files alone: a host, a provider and two customers
who exchange three files each.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedark.cli import app
from fedark.foundation.errors import FedarkError, InputError, Refused

sys.path[:0] = [str(Path(__file__).parents[1] / "stages")]
from small import write_job  # noqa: E402

pytestmark = pytest.mark.slow

Run = Callable[..., str]
CUSTOMERS = ("north", "east")


@pytest.fixture(scope="module")
def run() -> Run:
    def call(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, FedarkError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    return call


@pytest.fixture(scope="module")
def world(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everybody has joined by files."""
    root = tmp_path_factory.mktemp("operate")
    write_job(root / "job", minimum=2, rounds=1, customers=CUSTOMERS)
    said = run(
        "aggregator",
        "init",
        root / "host",
        "--name",
        "pool",
        "--address",
        "127.0.0.1:8443",
        "--sandbox",
        "landlock",
    )
    assert "manufacturer" in said
    aggregator = re.search(r"^  ((?:[0-9a-f]{4} ?){10})$", said, re.MULTILINE)
    assert aggregator is not None
    for name in ("maker", *CUSTOMERS):
        role = "provider" if name == "maker" else "customer"
        invitation = root / f"{name}.invitation.json"
        run("aggregator", "invite", root / "host", name, "--role", role, "--out", invitation)
        data = [
            "--data",
            root / "job" / f"{name}.csv",
            "--prompt",
            "{desk}: {message}",
            "--answer",
            "action",
        ]
        more = [] if name == "maker" else [*data, "--minimum-cohort", 2]
        said = run("node", "join", invitation, root / name, *more, "--offline")
        assert aggregator.group(1) in said
        told = re.search(rf"{name} \(you tell them\): (.*)", said)
        assert told is not None
        bundle = root / f"{name}.bundle.json"
        request = root / name / "request.json"
        with pytest.raises(Refused):
            run("aggregator", "approve", root / "host", request, "--fingerprint", "0000 " * 10)
        run(
            "aggregator",
            "approve",
            root / "host",
            request,
            "--fingerprint",
            told.group(1),
            "--out",
            bundle,
        )
        assert "has joined pool" in run("node", "join", bundle, root / name)
    return root


@pytest.fixture(scope="module")
def proposed(run: Run, world: Path) -> str:
    """The job is submitted; its contract was carried to the nodes by hand, as their sync would."""
    from fedark.operate.host.folder import HostFolder
    from fedark.stages.consent import Consent

    with pytest.raises(InputError, match="made no offer"):
        run("aggregator", "jobs", "submit", world / "host", world / "job" / "job.toml")
    assert "is signed" in run("node", "offer", world / "maker", world / "job" / "job.toml")
    host = HostFolder.open(world / "host")
    host.store.put_offer(
        "small", "maker", (world / "maker" / "offers" / "small.offer").read_bytes()
    )
    said = run("aggregator", "jobs", "submit", world / "host", world / "job" / "job.toml")
    contract = host.store.jobs()[0]
    assert contract.digest in said
    from fedark.contract.contract import Contract

    for name in ("maker", *CUSTOMERS):
        Consent(world / name).propose(Contract.decode(contract.contract))
    return contract.digest


def test_the_host_lists_and_shows_its_jobs(run: Run, world: Path, proposed: str) -> None:
    assert "small" in run("aggregator", "jobs", "list", world / "host")
    listed = run("aggregator", "jobs", "list", world / "host", "--json")
    (job,) = json.loads(listed.splitlines()[-1])  # before it, on stderr: the host does not run
    assert (job["contract"], job["status"]) == (proposed, "proposed")
    shown = run("aggregator", "jobs", "show", world / "host", proposed[:12])
    assert "customers: north, east; at least 2 in a sum" in shown
    with pytest.raises(InputError, match="No job"):
        run("aggregator", "jobs", "show", world / "host", "other")


def test_the_operator_reads_agrees_and_takes_it_back(run: Run, world: Path, proposed: str) -> None:
    said = run("node", "jobs", world / "north")
    assert "waiting" in said
    assert f"to read it: fedark node jobs {world / 'north'} {proposed[:16]}" in said
    shown = run("node", "jobs", world / "north", "small")
    assert "maker" in shown
    assert "(new: not known here before)" in shown
    told = re.search(r"^to agree: fedark (node approve \S+ [0-9a-f]{96})$", shown, re.MULTILINE)
    assert told is not None
    with pytest.raises(InputError, match="no contract's digest"):
        run("node", "approve", world / "north", "small")
    assert "Approved: " in run(*told.group(1).split())
    assert "(new" not in run("node", "jobs", world / "north", proposed[:10])
    run("node", "refuse", world / "north", "small", "--reason", "no budget")
    assert "refused, no budget" in run("node", "jobs", world / "north")


def test_ledger_doctor_and_status_of_a_node_that_does_not_run(run: Run, world: Path) -> None:
    run("node", "ledger", world / "north")
    found = {
        item["check"]: item
        for item in json.loads(run("node", "doctor", world / "north", "--json", code=1))
    }
    assert found["host"]["level"] == "bad"
    assert found["data"]["level"] == found["sandbox"]["level"] == "good"
    assert "mend:" in run("node", "doctor", world / "maker", code=1)
    for command in ("status", "stop"):
        with pytest.raises(FedarkError, match="cannot be reached"):
            run("node", command, world / "north")


def test_the_host_that_does_not_run_says_so(run: Run, world: Path) -> None:
    said = run("aggregator", "status", world / "host", code=1)
    assert "does not run" in said
    assert "north" in said
    found = json.loads(run("aggregator", "status", world / "host", "--json", code=1))
    assert found["well"] is False
    assert {node["status"] for node in found["nodes"]} == {"approved"}


def test_stop_and_revoke(run: Run, world: Path, proposed: str) -> None:
    run("aggregator", "jobs", "stop", world / "host", "small")
    with pytest.raises(FedarkError, match="has ended"):
        run("aggregator", "jobs", "stop", world / "host", "small")
    run("aggregator", "revoke", world / "host", "east")
    found = json.loads(run("aggregator", "status", world / "host", "--json", code=1))
    assert {node["name"]: node["status"] for node in found["nodes"]}["east"] == "revoked"
    with pytest.raises(InputError, match="east has not joined, or was not approved"):
        run("aggregator", "jobs", "submit", world / "host", world / "job" / "job.toml")
    run("aggregator", "revoke", world / "host", "east", "--forget")
    with pytest.raises(InputError, match="has asked to join"):
        run("aggregator", "revoke", world / "host", "east")


def test_a_host_that_does_not_answer_costs_no_folder(run: Run, world: Path) -> None:
    run(
        "aggregator",
        "invite",
        world / "host",
        "west",
        "--role",
        "provider",
        "--out",
        world / "west.json",
    )
    said = run("node", "join", world / "west.json", world / "west")
    assert "cannot be reached" in said
    assert "west (you tell them)" in said
    assert "warning  daemon" in run("node", "doctor", world / "west", code=1)


def test_an_own_certificate_comes_with_key_and_authority(run: Run, tmp_path: Path) -> None:
    from fedark.links.flower.provision import provision

    own = provision(tmp_path / "own", ["agg.example"])
    base = ["--name", "pool", "--address", "agg.example:443"]
    with pytest.raises(InputError, match="together"):
        run("aggregator", "init", tmp_path / "a", *base, "--certificate", own.certificate)
    run(
        "aggregator",
        "init",
        tmp_path / "b",
        *base,
        "--certificate",
        own.certificate,
        "--key",
        own.key,
        "--ca",
        own.ca,
    )
    run(
        "aggregator",
        "invite",
        tmp_path / "b",
        "north",
        "--role",
        "customer",
        "--out",
        tmp_path / "i.json",
    )
    assert json.loads((tmp_path / "i.json").read_bytes())["ca"] == own.ca.read_text()
    run("aggregator", "init", tmp_path / "c", *base, "--listen", "127.0.0.1:8443", "--ca", own.ca)
    with pytest.raises(InputError, match="problem"):
        run("aggregator", "init", tmp_path / "d", "--name", "Pool!", "--address", "nowhere")
    assert not (tmp_path / "d").exists()


def test_the_manual_names_no_command_that_does_not_exist(run: Run) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
    used = set(re.findall(r"fedark (aggregator jobs|aggregator|node) ([a-z]+)", text))
    assert len(used) > 15
    for group, command in used:
        run(*group.split(), command, "--help")
