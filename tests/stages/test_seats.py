"""A relay that fills a customer's seat with a trainer enclave of its own: genuine, and on a machine
that the contract admits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CUSTOMERS, write_job

from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation.keys import PartyKeys
from fedark.links.link import InProcessLink
from fedark.operate.party import reference_values
from fedark.simulation import Simulation, in_process_enclaves, simulate
from fedark.stages.coordinator import coordinate
from fedark.stages.customer import CustomerNode
from fedark.v1 import stage_pb2

pytestmark = pytest.mark.usefixtures("measured_once")


class Stolen(CustomerNode):
    """The relay's node in the name of a customer: it has all but that customer's keys."""

    def _agree(self, data: bytes) -> Contract:
        return Contract.decode(data)


def steal(running: Simulation, party: str, state: Path) -> Callable[[bytes], bytes]:
    """Answers as `party`, whose real node is asked for its signature of the contract and for
    nothing else.
    """
    real = running.nodes[party]
    assert isinstance(real, CustomerNode)
    state.mkdir()
    machine = in_process_enclaves(running.federation.folder("pool"), reference_values())
    node = Stolen(
        replace(real.settings, keys=PartyKeys(), state=state, start_enclave=machine),
        real._loader._data,
    )

    def handle(request: bytes) -> bytes:
        answer = stage_pb2.StageReply.FromString(node.handle(request))
        if answer.HasField("enrol"):
            answer.enrol.signature = stage_pb2.StageReply.FromString(
                real.handle(request)
            ).enrol.signature
        return answer.SerializeToString()

    return handle


@pytest.mark.attack("an enclave that its party did not start", mode="in process")
@pytest.mark.parametrize("mode", ["sealed", "masked"])
def test_a_relay_cannot_fill_a_customers_seat_with_an_enclave_of_its_own(
    mode: str, tmp_path: Path, refusal: Any
) -> None:
    torch.set_num_threads(1)
    job = Job.load(
        write_job(tmp_path / "job", rounds=1, minimum=3, customers=(*CUSTOMERS, "west")),
        (
            f'protection.mode="{mode}"',
            "protection.max_records=40",
            "models.0.training.baseline_epochs=0",
        ),
    )
    with simulate(job, tmp_path / "work") as running:
        seats = {name: node.handle for name, node in running.nodes.items()}
        seats["west"] = steal(running, "west", tmp_path / "stolen")
        report = coordinate(InProcessLink(seats, parallel=1), running.host.handle)
    assert list(report["customers"]) == list(CUSTOMERS)
    assert list(report["passed_over"]) == ["west"]
    reason = "west has not signed that this enclave is its own"
    assert reason in report["passed_over"]["west"]
    refusal(f"EvidenceRefused: {reason}")
