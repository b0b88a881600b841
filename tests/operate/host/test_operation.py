"""The deployment test: a host, a provider and two customers on machines of their own, from
invitation to delivered adapter.
"""

from __future__ import annotations

import csv
import json
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from namespaces import network, obstacle
from routes import flower_routes
from safetensors.numpy import load_file
from small import SECRET_WORDS, write_job
from typer.testing import CliRunner
from world import World, free_port, records, until

from fedark.cli import app
from fedark.contract.contract import Contract
from fedark.links.flower.service import NodeClient
from fedark.operate.host.admission import revoke
from fedark.operate.host.front import FLEET_ROUTES
from fedark.operate.state import socket_of

CUSTOMERS = ("north", "east")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Contract, int, Path]]:
    """Each party on a machine of its own (a network namespace), or all on loopback where that
    cannot be.
    """
    root = tmp_path_factory.mktemp("w")
    parties = ("maker", *CUSTOMERS)
    job = write_job(root / "job", minimum=2, rounds=1, customers=CUSTOMERS)
    with ExitStack() as stack:
        world = World(
            root, None if obstacle() else stack.enter_context(network(("pool", *parties)))
        )
        stack.callback(world.close)
        metrics = free_port()
        world.start_host()
        world.join("maker", "provider")
        for name in CUSTOMERS:
            world.join(
                name,
                "customer",
                records(root / "job" / f"{name}.csv"),
                metrics=metrics if name == "north" else 0,
            )
        for name in parties:
            world.admit(name)
        world.offer("maker", job)
        contract = world.propose(job)
        for name in parties:
            world.agree(name, contract)
        until(
            lambda: (
                world.job(contract).status == "running"
                and list(world.host.party_folder.glob("runs/*"))
            ),
            "it runs",
        )
        world.process(
            "pool"
        ).kill()  # and everything of the host with it: nodes find it again, and the job goes on
        world.process("pool").wait()
        world.start_host()
        record = world.ended(contract)
        assert record.status == "done", (record.reason, world.log("pool"), world.log("north"))
        yield world, contract, metrics, job


def test_the_adapter_reaches_everyone_whom_the_contract_names_and_is_the_same(done) -> None:
    world, contract, *_ = done
    found = [
        load_file(next((world.root / name).glob("runs/*/adapter-tiny/adapter_model.safetensors")))
        for name in contract.deliver_to
    ]
    assert len(found) == 3
    assert all(set(other) == set(found[0]) for other in found)
    assert all((other[key] == value).all() for other in found for key, value in found[0].items())


def test_no_log_line_of_any_process_holds_a_record_a_word_of_one_or_a_key(done) -> None:
    world, *_ = done
    secrets = [word.encode() for word in SECRET_WORDS]
    for name in CUSTOMERS:
        with (world.root / "job" / f"{name}.csv").open() as file:
            secrets += [row["message"].encode() for row in csv.DictReader(file)]
    for key in (
        *world.root.rglob("*.key"),
        *world.root.rglob("party.keys"),
        *world.root.rglob("superexec.secret"),
    ):
        secrets += [
            line.strip()
            for line in key.read_bytes().splitlines()
            if len(line) > 40 and b"-----" not in line
        ]
    secrets += [
        path.read_bytes().strip() for path in world.root.rglob("weight-keys/*") if path.is_file()
    ]
    secrets += [
        json.loads(path.read_bytes())["token"].encode()
        for path in world.root.rglob("invitation.json")
    ]
    assert any(
        secret in (world.root / "north" / "invitation.json").read_bytes() for secret in secrets
    )  # it would be found
    logs = list(world.root.rglob("*.log"))
    assert {
        "pool.log",
        "front.log",
        "superlink.log",
        "serverapp.log",
        "aggregator.log",
        "daemon.log",
        "supernode.log",
    } <= {path.name for path in logs}
    for path in logs:
        data = path.read_bytes()
        assert not [secret[:6] for secret in secrets if secret in data], path


def test_every_line_of_a_nodes_own_logs_is_json_and_stages_carry_job_and_session(done) -> None:
    world, contract, *_ = done
    lines = [
        json.loads(line)
        for line in (world.root / "north" / "logs" / "daemon.log").read_text().splitlines()
    ]
    assert all({"time", "level", "from", "text"} <= line.keys() for line in lines)
    staged = [line for line in lines if "session" in line]
    assert staged
    assert {line["job"] for line in staged} == {contract.digest().hex()[:16]}
    front = (world.host.supervisor / "logs" / "front.log").read_text().splitlines()
    assert any("asks to join" in json.loads(line)["text"] for line in front)
    host = [json.loads(line) for line in world.log("pool").splitlines()]
    assert any(
        line.get("job") == contract.digest().hex()[:16] and "is done" in line["text"]
        for line in host
    )


def test_the_operators_commands_answer_while_everything_runs(done) -> None:
    world, contract, *_ = done

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    north = world.root / "north"
    assert "north (customer) waits" in run("node", "status", north)
    assert "small" in run("node", "jobs", north)
    assert "used up: contract" in run("node", "ledger", north)
    assert "release" in run("node", "ledger", world.root / "maker")
    assert "good     standing: approved" in world.call(
        "north", lambda: run("node", "doctor", north)
    )
    said = run("aggregator", "status", world.host.path)
    assert "front        alive" in said
    assert "small" in said
    assert "acceptance" in run(
        "aggregator", "jobs", "show", world.host.path, contract.digest().hex()[:16]
    )


def test_metrics_on_loopback_count_stages_bytes_rounds_and_contracts(done) -> None:
    world, _, port, _ = done

    def read(port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    text = world.call("pool", lambda: read(world.metrics))
    assert 'fedark_jobs{status="done"} 1' in text
    assert 'fedark_nodes{status="approved"} 3' in text
    assert "fedark_job_rounds_total 1" in text
    assert 'fedark_process_up{process="front"} 1' in text
    text = world.call("north", lambda: read(port))
    assert 'fedark_stage_seconds_count{stage="round"} 1' in text
    assert 'fedark_stage_bytes_total{direction="in",stage="round"}' in text
    assert "fedark_round 1" in text
    assert 'fedark_contracts{decision="used"} 1' in text
    assert 'fedark_privacy_epsilon{of="limit"}' in text


def test_the_nodes_service_tells_status_jobs_and_ledger(done) -> None:
    world, contract, *_ = done
    with NodeClient(socket_of(world.root / "maker")) as client:
        assert client.status(timeout=60).role == "provider"
        assert [job.contract for job in client.jobs().jobs] == [contract.digest()]
        kinds = [entry.kind for entry in client.ledger().entries]
    assert kinds.count("release") == len(CUSTOMERS)
    with NodeClient(socket_of(world.root / "north")) as client:
        assert [job.decision for job in client.jobs().jobs] == ["used"]
        assert [job.name for job in client.ledger().spent] == ["small"]


def test_a_contract_counts_for_one_run_and_a_second_needs_a_new_approval(done) -> None:
    world, contract, _, job = done
    second = world.propose(job)
    assert second.digest() != contract.digest()
    until(
        lambda: world.host.store.answers(second.digest().hex()).get("north", ("",))[0] == "waiting",
        "north waits",
    )
    assert world.job(second).status == "proposed"


def test_of_every_route_that_the_superlink_has_nothing_answers_at_the_exposed_port(done) -> None:
    world, *_ = done
    context = ssl.create_default_context(cadata=world.host.ca.decode())

    def scan() -> dict[tuple[str, str], int]:
        with httpx.Client(
            base_url=f"https://{world.address}", verify=context, trust_env=False
        ) as stranger:
            return {route: stranger.request(*route).status_code for route in flower_routes()}

    found = world.call("east", scan)
    assert len(found) > 60
    fleet = {("POST", path) for path in FLEET_ROUTES}
    assert {
        route: status
        for route, status in found.items()
        if status != (401 if route in fleet else 404)
    } == {}


def test_of_all_machines_only_the_hosts_front_can_be_reached(done) -> None:
    world, *_ = done
    if reason := obstacle():
        pytest.skip(reason)
    front = f"{int(world.address.rpartition(':')[2]):04X}"
    for name, machine in world.machines.items():
        code = "print(open('/proc/net/tcp').read(), open('/proc/net/tcp6').read())"
        table = subprocess.run(
            [*machine.enter, sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        listening = [
            fields[1]
            for line in table.splitlines()
            if len(fields := line.split()) > 3 and fields[3] == "0A"
        ]
        reachable = [entry for entry in listening if not entry.startswith("0100007F:")]
        assert [entry.rpartition(":")[2] for entry in reachable] == (
            [front] if name == "pool" else []
        ), name


def test_a_revoked_node_is_refused_at_the_front_and_forgotten_by_the_superlink(done) -> None:
    world, *_ = done
    revoke(world.host, "east")
    until(lambda: "east may not connect any more" in world.log("pool"), "the SuperLink forgets it")
    until(lambda: "revoked east" in world.log("east"), "its own operator is told")
    said = [
        json.loads(line)["text"] for line in world.log("pool").splitlines() if line.startswith("{")
    ]
    assert not any("north may not" in text for text in said)
    with NodeClient(socket_of(world.root / "north")) as client:
        assert client.status(timeout=60).party == "north"


def test_stop_ends_a_node_and_its_supervisor_and_nothing_is_started_again(done) -> None:
    world, *_ = done
    with NodeClient(socket_of(world.root / "maker")) as client:
        client.stop()
    assert world.process("maker").wait(30) == 0
    assert "asked to stop" in world.log("maker")
