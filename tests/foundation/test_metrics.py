"""Metrics in Prometheus' text format, on loopback alone."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from fedark.foundation.errors import FederationError
from fedark.foundation.metrics import GaugeByLabel, MetricsServer
from fedark.operate.host.observed import StageWatch, host_metrics
from fedark.operate.host.store import HostStore
from fedark.operate.node.observed import ObservedNode
from fedark.v1 import stage_pb2

LINE = re.compile(
    r'^[a-z_]+(\{[a-z_]+="[^"\\\n]*(\\.[^"\\\n]*)*"(,[a-z_]+="[^"\\\n]*(\\.[^"\\\n]*)*")*\})?'
    r" [-+0-9.e]+$"
)


def shown(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def parsed(text: str) -> dict[str, float]:
    assert text.endswith("\n")
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            assert LINE.match(line), line
            name, _, value = line.rpartition(" ")
            assert name not in values
            values[name] = float(value)
    return values


class Node:
    party, role = "north", "customer"

    def handle(self, request: bytes) -> bytes:
        message = stage_pb2.StageRequest.FromString(request)
        if message.round.round == 2:
            return stage_pb2.StageReply(
                fault=stage_pb2.StageFault(code="Refused", what="no")
            ).SerializeToString()
        if message.round.round == 3:
            return stage_pb2.StageReply(
                fault=stage_pb2.StageFault(code='x"} 1\nforged 2')
            ).SerializeToString()
        return stage_pb2.StageReply(
            round=stage_pb2.RoundReply(protected_update=b"u" * 100)
        ).SerializeToString()

    def close(self) -> None: ...


def test_stages_bytes_rounds_and_refusals_are_counted_and_no_label_is_another_partys_word() -> None:
    metrics = CollectorRegistry()
    node = ObservedNode(Node(), metrics)
    sizes = []
    for number in (1, 2, 3):
        request = stage_pb2.StageRequest(
            run_id="r", round=stage_pb2.RoundRequest(round=number, state=b"s" * number)
        )
        sizes.append(len(request.SerializeToString()))
        node.handle(request.SerializeToString())
    values = parsed(shown(metrics))
    assert values['fedark_stage_seconds_count{stage="round"}'] == 3
    assert values['fedark_stage_bytes_total{direction="in",stage="round"}'] == sum(sizes)
    assert values["fedark_round"] == 3
    assert values['fedark_refusals_total{code="Refused"}'] == 1
    assert values['fedark_refusals_total{code="other"}'] == 1
    assert "forged" not in shown(metrics)


def test_what_is_no_stage_is_passed_through_and_counted_as_unknown() -> None:
    class Echo(Node):
        def handle(self, request: bytes) -> bytes:
            return request

    metrics = CollectorRegistry()
    assert ObservedNode(Echo(), metrics).handle(b"\xff\xff") == b"\xff\xff"
    assert parsed(shown(metrics))['fedark_stage_seconds_count{stage="unknown"}'] == 1


def test_stages_are_counted_as_they_end_and_once_by_names_from_a_closed_list(
    tmp_path: Path,
) -> None:
    metrics = host_metrics(HostStore(tmp_path / "h.sqlite", create=True), lambda: [])
    noted = tmp_path / "runs" / "1" / "stages.jsonl"
    noted.parent.mkdir(parents=True)
    noted.write_text('{"stage": "round 9/9", "seconds": 9, "sent": 9, "received": 9}\n')
    watch = StageWatch(metrics, tmp_path / "runs")
    stages = [
        {"stage": "round 1/2", "seconds": 1.5, "sent": 10, "received": 20},
        {"stage": "round 2/2", "seconds": 0.5, "sent": 10, "received": 20},
        {"stage": 'evil"} 1', "seconds": 1, "sent": 1, "received": 1},
    ]
    with noted.open("a") as file:
        for stage in stages:
            half = json.dumps(stage)
            file.write(half[:20])
            file.flush()
            watch.look()  # a line that is still being written waits
            file.write(half[20:] + "\n")
            file.flush()
            watch.look()
    with noted.open("a") as file:
        file.write('{"stage": "rou{"stage": "round 2/2", "seconds": 1, "sent": 1, "received": 1}\n')
    watch.look()
    watch.passed_over({"passed_over": {"east": "round: dead", "south": "sum: late"}})
    values = parsed(shown(metrics))
    assert values['fedark_job_stage_seconds_sum{stage="round"}'] == 2.0
    assert values['fedark_job_stage_bytes_total{direction="in",stage="round"}'] == 40
    assert values["fedark_job_rounds_total"] == 2
    assert values['fedark_job_stage_seconds_count{stage="other"}'] == 1
    assert values['fedark_job_passed_over_total{stage="round"}'] == 1


def test_a_gauge_says_what_is_and_no_more_what_was() -> None:
    jobs = {"running": 1.0}
    metrics = CollectorRegistry()
    metrics.register(GaugeByLabel("fedark_jobs", "Jobs.", "status", lambda: dict(jobs)))
    assert parsed(shown(metrics)) == {'fedark_jobs{status="running"}': 1}
    jobs.clear()
    jobs['a"b\\c\nd'] = 2.0
    assert parsed(shown(metrics)) == {r'fedark_jobs{status="a\"b\\c\nd"}': 2}


def test_only_metrics_are_served_and_only_on_loopback() -> None:
    metrics = CollectorRegistry()
    Gauge("fedark_x", "X.", registry=metrics).set(1)
    server = MetricsServer(metrics, 0)
    try:
        assert server._server.server_address[0] == "127.0.0.1"
        with urllib.request.urlopen(
            f"http://127.0.0.1:{server.port}/metrics", timeout=60
        ) as answer:
            assert parsed(answer.read().decode()) == {"fedark_x": 1}
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", b"x", timeout=60)
        with pytest.raises(FederationError, match="in use"):
            MetricsServer(metrics, server.port)
    finally:
        server.close()
