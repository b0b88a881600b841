"""A customer's node charges its ledger before any record reaches an enclave, once, and never beyond
its budget.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from small import CUSTOMERS, write_job

from fedark.contract.contract import now
from fedark.contract.job import Job
from fedark.foundation.errors import FedarkError, ProtocolError, Refused
from fedark.operate.party import PartyConfig
from fedark.privacy.accounting import Budget
from fedark.privacy.ledger import LEDGER, ChargeReceipt, Head, Ledger
from fedark.records.reading import Record
from fedark.simulation import simulate
from fedark.stages.budget import charge, read_head, release, show_head


def _private(folder: Path) -> Job:
    path = write_job(folder, minimum=3, rounds=2)
    path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    return Job.load(
        path,
        ('privacy.mechanism="customer-level"', "privacy.epsilon=4.0", "privacy.accept_noise=true"),
    )


def test_a_job_is_charged_before_its_rounds_and_each_of_them_is_ticked_off(tmp_path: Path) -> None:
    with simulate(_private(tmp_path / "job"), tmp_path / "work") as running:
        running.run()
        for name in CUSTOMERS:
            with Ledger.open(running.federation.folder(name) / LEDGER) as ledger:
                assert [entry["kind"] for entry in ledger.entries()] == [
                    "charge",
                    "release",
                    "release",
                ]
                ledger.verify()


def test_a_job_over_budget_is_refused_before_a_record_reaches_the_enclave(tmp_path: Path) -> None:
    said: list[str] = []
    with simulate(_private(tmp_path / "job"), tmp_path / "work", say=said.append) as running:
        node = running.nodes["north"]
        object.__setattr__(node.settings, "budget", Budget(2.0, 1e-5))
        with pytest.raises(
            FedarkError, match="The privacy budget of north does not allow this job"
        ) as caught:
            running.run()
    assert "epsilon" not in str(caught.value), "what was spent is for its own people"
    assert any(
        line.startswith("north: The privacy budget would be exceeded: epsilon") for line in said
    )
    assert not any("north: weights and records are in the enclave" in line for line in said)


def test_a_run_is_charged_once_and_no_round_leaves_twice(tmp_path: Path) -> None:
    with simulate(_private(tmp_path / "job"), tmp_path / "work") as running:
        contract = running.federation.contract
    records = [Record(f"line {number}", "open") for number in range(9)]
    folder, budget = tmp_path, Budget(4.1, 1e-5)
    first = charge(folder, contract, "one", records, budget, now=now())
    again = charge(
        folder, contract, "one", list(reversed(records)), budget, now=now() + timedelta(hours=1)
    )
    assert first is not None
    assert again is not None
    assert (again.charge, again.resumed) == (first.charge, True)
    release(folder, first, 1, again=False, now=now())
    release(folder, first, 1, again=True, now=now())
    with pytest.raises(Refused, match="made before"):
        release(folder, first, 1, again=False, now=now())
    with pytest.raises(Refused, match="other records"):
        charge(folder, contract, "one", records[:-1], budget, now=now())
    with pytest.raises(Refused, match="budget"):
        charge(folder, contract, "two", records, budget, now=now())


def test_the_budget_of_a_party_is_finite_unless_its_operator_says_otherwise() -> None:
    config = PartyConfig.model_validate({"name": "north", "role": "customer", "catalogue": "c"})
    assert (config.budget.epsilon, config.budget.delta) == (8.0, 1e-5)


def test_the_providers_log_witnesses_every_ledger_and_tells_of_one_that_was_rolled_back(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    with simulate(_private(tmp_path / "job"), tmp_path / "work", say=said.append) as running:
        running.run()
        provider, contract = running.nodes["maker"], running.federation.contract
        log = provider._log
        witnessed = [log.entry(index) for index in range(log.head().size)]
        heads = {entry.facts["party"]: entry.facts for entry in witnessed if entry.kind == "charge"}
        assert set(heads) == set(CUSTOMERS)
        for name in CUSTOMERS:
            facts = heads[name]
            with Ledger.open(running.federation.folder(name) / LEDGER) as ledger:
                ledger.verify([Head(facts["ledger"], facts["sequence"], facts["head"])])
        assert not any("rolled back" in line for line in said)
        party, keys = contract.party("north"), running.nodes["north"].settings.keys
        assert party is not None
        old = ChargeReceipt(1, Head(heads["north"]["ledger"], 1, bytes(48)), None, False, 0)  # type: ignore[arg-type]
        shown = show_head(keys.signing, old, "another", contract)
        provider._witness(contract, "another", party, shown, log.verify().entries)
        assert any("ledger of north was rolled back" in line for line in said)
        other = running.nodes["south"].settings.keys
        for forged in (
            show_head(other.signing, old, "x", contract),
            show_head(keys.signing, old, "y", contract),
            b"junk",
        ):
            with pytest.raises((Refused, ProtocolError)):
                read_head(forged, contract, "x", party, now=now())
