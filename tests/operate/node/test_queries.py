"""What a node's operator is told: contracts with decisions, the node's log, and what was charged to
the privacy ledger.
"""

from __future__ import annotations

from pathlib import Path

import parties
import pytest
from direct import admitted, make_host

from fedark.contract.contract import now
from fedark.foundation.errors import Refused
from fedark.foundation.keys import PartyKeys
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.queries import NodeQueries
from fedark.privacy.accounting import Budget
from fedark.privacy.ledger import LEDGER
from fedark.records.reading import Record
from fedark.stages.budget import charge, release
from fedark.stages.consent import Consent
from fedark.stages.node import LOG
from fedark.translog.log import TransparencyLog

PRIVATE = {"mechanism": "customer-level", "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 4.0}
RECORDS = [Record("open line", "open"), Record("close bus", "close")]


@pytest.fixture
def node(tmp_path: Path) -> NodeFolder:
    return admitted(make_host(tmp_path / "host"), tmp_path / "north", "north", "customer")


def test_an_empty_desk_answers(node: NodeFolder) -> None:
    queries = NodeQueries(node.path)
    assert list(queries.jobs().jobs) == []
    assert list(queries.ledger().entries) == []
    assert queries.budget() == {"spent by a record": 0.0, "spent by a customer": 0.0, "limit": 8.0}
    assert set(queries.decisions().values()) == {0.0}


def test_contracts_are_told_with_their_decision(node: NodeFolder) -> None:
    others = [parties.party(name) for name in ("maker", "east", "south")]
    contract = parties.contract(parties=[*others, node.admission.aggregator, node.request.party])
    Consent(node.path).propose(contract)
    (job,) = NodeQueries(node.path).jobs().jobs
    assert (job.name, job.contract, job.decision) == ("dispatch", contract.digest(), "waiting")
    Consent(node.path).approve(contract)
    assert NodeQueries(node.path).decisions()["approved"] == 1


def test_charges_and_releases_are_told_and_what_is_spent_grows_with_each(node: NodeFolder) -> None:
    queries = NodeQueries(node.path)
    budget = Budget(8.0, 1e-5)
    spent = [queries.budget()["spent by a customer"]]
    for number, rounds in enumerate((2, 3)):
        contract = parties.contract(privacy=PRIVATE, rounds=rounds)
        receipt = charge(node.path, contract, f"run-{number}", RECORDS, budget, now=now())
        assert receipt is not None
        release(node.path, receipt, 1, again=False, now=now())
        spent.append(queries.budget()["spent by a customer"])
        told = queries.ledger().charges[-1]
        assert (told.contract, told.records, told.releases, told.released) == (
            contract.digest(),
            2,
            rounds,
            1,
        )
        assert told.unit == "customer"
        assert 0 < told.epsilon <= spent[-1]
    assert spent == sorted(set(spent))
    assert queries.budget()["spent by a record"] == 0.0


def test_an_altered_ledger_or_log_is_not_told_as_if_it_were_whole(node: NodeFolder) -> None:
    import sqlite3

    charge(
        node.path, parties.contract(privacy=PRIVATE), "run", RECORDS, Budget(8.0, 1e-5), now=now()
    )
    with sqlite3.connect(node.path / LEDGER) as database:
        database.execute("UPDATE entries SET hash = zeroblob(48)")
    database.close()
    with pytest.raises(Refused):
        NodeQueries(node.path).ledger()
    (node.path / LEDGER).unlink()
    stranger = PartyKeys()
    TransparencyLog(node.path / LOG, stranger.signing).refuse(
        party="maker",
        run_id="r",
        contract=bytes(48),
        asked="admission",
        evidence=bytes(48),
        reasons="x",
        now=now(),
    )
    with pytest.raises(Refused):
        NodeQueries(node.path).ledger()
