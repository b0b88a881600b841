"""A host and four nodes as processes of their own, each with its own folder, from invitation to the delivered adapter."""

from __future__ import annotations

import csv
import json
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fronted import flower_routes
from safetensors.numpy import load_file
from small import CUSTOMERS, SECRET_WORDS, write_job
from world import World, free_port, records, until

from fedark.contract import Contract
from fedark.federation.flower.service import NodeClient
from fedark.federation.host.admission import revoke
from fedark.federation.host.front import FLEET_ROUTES
from fedark.federation.onprem.supervisor import socket_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Contract, int, Path]]:
    root = tmp_path_factory.mktemp("w")
    job = write_job(root / "job", minimum=3, rounds=1)
    world = World(root)
    metrics = free_port()
    try:
        world.start_host()
        world.join("maker", "provider")
        for name in CUSTOMERS:
            world.join(name, "customer", records(root / "job" / f"{name}.csv"), metrics=metrics if name == "north" else 0)
        for name in ("maker", *CUSTOMERS):
            world.admit(name)
        world.offer("maker", job)
        contract = world.propose(job)
        for name in ("maker", *CUSTOMERS):
            world.agree(name, contract)
        record = world.ended(contract)
        assert record.status == "done", (record.reason, world.log("pool"), world.log("north"))
        yield world, contract, metrics, job
    finally:
        world.close()


def test_the_adapter_reaches_everyone_whom_the_contract_names_and_is_the_same(done) -> None:
    world, contract, *_ = done
    found = [
        load_file(next((world.root / name).glob("runs/*/adapter-tiny/adapter_model.safetensors")))
        for name in contract.deliver_to
    ]
    assert len(found) == 4
    assert all(set(other) == set(found[0]) for other in found)
    assert all((other[key] == value).all() for other in found for key, value in found[0].items())


def test_no_log_line_of_any_process_holds_a_record_a_word_of_one_or_a_key(done) -> None:
    world, *_ = done
    secrets = [word.encode() for word in SECRET_WORDS]
    for name in CUSTOMERS:
        with (world.root / "job" / f"{name}.csv").open() as file:
            secrets += [row["message"].encode() for row in csv.DictReader(file)]
    for key in (*world.root.rglob("*.key"), *world.root.rglob("party.keys"), *world.root.rglob("superexec.secret")):
        secrets += [line.strip() for line in key.read_bytes().splitlines() if len(line) > 40 and b"-----" not in line]
    secrets += [path.read_bytes().strip() for path in world.root.rglob("weight-keys/*") if path.is_file()]
    secrets += [json.loads(path.read_bytes())["token"].encode() for path in world.root.rglob("invitation.json")]
    logs = list(world.root.rglob("*.log"))
    assert {"pool.log", "front.log", "superlink.log", "serverapp.log", "aggregator.log", "daemon.log", "supernode.log"} <= {
        path.name for path in logs
    }
    for path in logs:
        data = path.read_bytes()
        assert not [secret[:6] for secret in secrets if secret in data], path


def test_every_line_of_a_nodes_own_logs_is_json_and_stages_carry_job_and_session(done) -> None:
    world, contract, *_ = done
    lines = [json.loads(line) for line in (world.root / "north" / "logs" / "daemon.log").read_text().splitlines()]
    assert all({"time", "level", "from", "text"} <= line.keys() for line in lines)
    staged = [line for line in lines if "session" in line]
    assert staged
    assert {line["job"] for line in staged} == {contract.digest().hex()[:16]}


def test_metrics_on_loopback_count_stages_bytes_rounds_and_contracts(done) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{done[2]}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'fedark_stage_seconds_count{stage="round"} 1' in text
    assert 'fedark_stage_bytes_total{direction="in",stage="round"}' in text
    assert "fedark_round 1" in text
    assert 'fedark_contracts{decision="used"} 1' in text


def test_the_nodes_service_tells_status_jobs_and_ledger(done) -> None:
    world, contract, *_ = done
    with NodeClient(socket_of(world.root / "maker")) as client:
        assert client.status().role == "provider"
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
    until(lambda: world.host.store.answers(second.digest().hex()).get("north", ("",))[0] == "waiting", "north waits")
    assert world.job(second).status == "proposed"


def test_of_every_route_that_the_superlink_has_nothing_answers_at_the_exposed_port(done) -> None:
    world, *_ = done
    context = ssl.create_default_context(cadata=world.host.ca.decode())
    with httpx.Client(base_url=f"https://{world.address}", verify=context, trust_env=False) as stranger:
        for method, path in sorted(flower_routes()):
            status = stranger.request(method, path).status_code
            assert status == (401 if (method, path) in {("POST", route) for route in FLEET_ROUTES} else 404), (method, path)


def test_a_revoked_node_is_refused_at_the_front_and_forgotten_by_the_superlink(done) -> None:
    world, *_ = done
    revoke(world.host, "east")
    until(lambda: "east may not connect any more" in world.log("pool"), "the SuperLink forgets it")
    until(lambda: "revoked east" in world.log("east"), "its own operator is told")
    said = [json.loads(line)["text"] for line in world.log("pool").splitlines() if line.startswith("{")]
    assert not any("north may not" in text for text in said)
    with NodeClient(socket_of(world.root / "north")) as client:
        assert client.status().party == "north"


def test_stop_ends_a_node_and_its_supervisor_and_nothing_is_started_again(done) -> None:
    world, *_ = done
    with NodeClient(socket_of(world.root / "south")) as client:
        client.stop()
    assert world.process("south").wait(30) == 0
    assert "asked to stop" in world.log("south")
