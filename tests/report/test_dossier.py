"""A dossier proves a run to a stranger, and proves nothing once any part of it is changed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small import CUSTOMERS, write_job
from typer.testing import CliRunner

from fedark.bench._lies import CHANGES, leaves, lies, signed
from fedark.cli import app
from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation import canonical
from fedark.foundation.errors import InputError
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.report.verify import DossierRefused, verify_dossier
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER, OWN, Dossier, OwnDossier
from fedark.stages.report import _covered

MODES = {
    "sealed": ("curve.every=1", "protection.clip_norm=2.0"),
    "private": (
        'protection.mode="masked"',
        'privacy.mechanism="example-distributed"',
        "privacy.epsilon=8.0",
        "privacy.records=90",
        "privacy.sampling_rate=0.5",
        "privacy.accept_noise=true",
    ),
}


@pytest.fixture(scope="module", params=MODES)
def ran(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[bytes, SigningKey]]:
    """A run's folder, and its `run`."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, _dossier(folder, MODES[request.param])


@pytest.fixture
def run(ran: tuple[Path, tuple[bytes, SigningKey]]) -> tuple[bytes, SigningKey]:
    """A run's dossier, and the aggregator's key: whoever holds it may sign a dossier of lies."""
    return ran[1]


@pytest.fixture
def own(ran: tuple[Path, tuple[bytes, SigningKey]]) -> tuple[bytes, PartyKeys]:
    """The own dossier of a customer, and its keys."""
    north = ran[0] / "work" / "parties" / "north"
    (path,) = (north / "runs").glob(f"*/{OWN}")
    return path.read_bytes(), PartyKeys.load(north / "party.keys")


def _dossier(folder: Path, terms: tuple[str, ...]) -> tuple[bytes, SigningKey]:
    path = write_job(folder / "job", minimum=3)
    if len(terms) > 1:  # records are not replayed under a mechanism
        path.write_text(path.read_text().replace("replay = 0.2\n", ""))
    job = Job.load(path, terms)
    with simulate(job, folder / "work") as running:
        running.run()
        found = [running.federation.folder(name) / "runs" for name in ("maker", *CUSTOMERS)]
        copies = {(runs / running.run_id / DOSSIER).read_bytes() for runs in found}
        key = PartyKeys.load(running.federation.folder("pool") / "party.keys").signing
    assert len(copies) == 1
    return copies.pop(), key


def test_a_dossier_of_a_run_holds(run: tuple[bytes, SigningKey]) -> None:
    verified = verify_dossier(run[0])
    said = [f"{proven.what} ({proven.by})" for proven in verified.proven]
    assert any("4 enclaves ran what the contract names" in line for line in said)
    assert any("3 weight keys" in line for line in said)
    assert "Simulated enclaves keep nothing from the root user" in verified.trusted[0]
    assert verified.adapters.keys() == {"tiny"}
    private = verified.contract.privacy.mechanism != "none"
    assert private == any(line.startswith("epsilon") for line in said)
    assert private == any("charged their privacy ledgers" in line for line in said)
    assert verified.report["models"]["tiny"]["metrics"]


def test_the_command_says_what_is_proven_and_what_is_not(
    run: tuple[bytes, SigningKey], tmp_path: Path
) -> None:
    path, lie = tmp_path / "a dossier.fedark", tmp_path / "lie.fedark"
    path.write_bytes(run[0])
    lie.write_bytes(run[0][:-9] + b"\0" + run[0][-8:])
    runner = CliRunner()
    told = runner.invoke(app, ["verify", str(path)])
    assert told.exit_code == 0
    assert "every figure of the report" in " ".join(told.output.split())
    assert "What rests on trust" in told.output
    facts = json.loads(runner.invoke(app, ["verify", str(path), "--json"]).output)
    assert facts["report"]["job"] == facts["job"] == "small"
    refused = runner.invoke(app, ["verify", str(lie)])
    assert isinstance(refused.exception, DossierRefused)
    missing = runner.invoke(app, ["verify", str(tmp_path / "none")])
    assert isinstance(missing.exception, InputError)


def test_a_folder_is_tied_to_its_job(tmp_path: Path, measured_once: None) -> None:
    job = Job.load(write_job(tmp_path / "job", minimum=3))
    with simulate(job, tmp_path / "work") as running:
        running.run()
        folder = running.federation.folder("north") / "runs" / running.run_id
    adapter, runner = folder / "adapter-tiny", CliRunner()
    arguments = ["verify", str(folder / DOSSIER), "--adapter", str(adapter), "--json"]
    told = runner.invoke(app, arguments)
    assert "the adapter for tiny is this job's" in told.output
    head = adapter / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    refused = runner.invoke(app, arguments)
    assert "not the one that was delivered" in str(refused.exception)


def _body(data: bytes) -> bytes:
    body: bytes = canonical.decode(data, max_bytes=1 << 28)["body"]
    return body


_NAMED = {
    "contract": "contract|signature of pool",
    "run_id": "another run|another party or run|run_id|signature of pool",
    "collateral": "collateral|revocation list|platform 'simulated' cannot be verified",
    "delivered": "the statement of the adapters",
    "report": "report",
    "report_signature": "the report",
    "signatures": "the contract",
    "evidence": "the evidence of|the provider's log",
    "log": "the provider's log",
    "manifests": "the manifest",
    "receipts": "the receipts of",
    "views": "view",
    "ledger_heads": "the head of the privacy ledger|the heads of privacy ledgers",
    "sums": "the sums|the report's 'models'",
}
"""Part -> what the reasons must name when a leaf of it is changed."""


def test_every_leaf_that_is_changed_in_any_way_is_found_though_the_aggregator_signs_again(
    run: tuple[bytes, SigningKey],
) -> None:
    """A lying aggregator holds the key over the whole: each part must speak for itself."""
    body, key = _body(run[0]), run[1]
    paths, told = set(), 0
    for lie in lies(body):
        with pytest.raises(DossierRefused) as caught:
            verify_dossier(signed(key, lie.body))
        said = "; ".join(caught.value.reasons)
        assert "could not be read" not in said, (lie.path, lie.change, said)
        part = lie.path[1] if lie.path[0] == "proofs" else lie.path[0]
        beside = len(lie.path) == 1 and "another" in lie.change  # the neighbour is named as well
        named = f"{_NAMED[part]}|does not hold what it must"
        assert beside or re.search(named, said), (lie.path, lie.change, said)
        paths.add(lie.path)
        told += 1
    assert paths == set(leaves(canonical.decode(body, max_bytes=1 << 28)))
    assert told > 5 * len(paths) > 5 * 25


def test_a_customers_own_dossier_holds_and_is_in_no_shared_one(
    run: tuple[bytes, SigningKey], own: tuple[bytes, PartyKeys]
) -> None:
    shared, verified = verify_dossier(run[0]), verify_dossier(own[0])
    said = [f"{proven.what} ({proven.by})" for proven in verified.proven]
    assert "the own figures of north (the trainer enclave of north)" in said
    assert "the personal adapters of north (the trainer enclave of north)" in said
    figures = verified.own["north"]["tiny"]
    assert figures["federated/own"][1] > 0
    assert figures["personal"]["chosen"]
    private = verified.contract.privacy.mechanism != "none"
    assert private == any(
        "north charged this job, and spent at most epsilon" in one for one in said
    )
    assert shared.own == {}
    body = OwnDossier.decode(_body(own[0]))
    assert body.dossier == run[0]
    for part in (body.figures, body.statement, *body.ledger):
        assert part not in run[0]


def test_every_leaf_of_an_own_dossier_that_is_changed_is_found_though_the_customer_signs_again(
    own: tuple[bytes, PartyKeys],
) -> None:
    data, keys = own
    for lie in lies(_body(data)):
        told = signed(keys.signing, lie.body, label="fedark/own-dossier/1")
        with pytest.raises(DossierRefused) as caught:
            verify_dossier(told)
        said = "; ".join(caught.value.reasons)
        assert "could not be read" not in said, (lie.path, lie.change, said)
        named = "north|own dossier|shared dossier|signature|the file"
        assert re.search(named, said), (lie.path, lie.change, said)


def test_nobody_shows_another_customers_own_part_as_his(
    own: tuple[bytes, PartyKeys], ran: tuple[Path, tuple[bytes, SigningKey]]
) -> None:
    east = PartyKeys.load(ran[0] / "work" / "parties" / "east" / "party.keys").signing
    body = OwnDossier.decode(_body(own[0]))
    for lie in (body, body.model_copy(update={"party": "east"})):
        with pytest.raises(DossierRefused, match=r"signature|trainer enclave"):
            verify_dossier(lie.sign(east))


def test_no_byte_of_the_file_can_be_another(run: tuple[bytes, SigningKey]) -> None:
    data = run[0]
    for at in range(0, len(data), max(1, len(data) // 400)):
        with pytest.raises(DossierRefused):
            verify_dossier(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    for cut in (b"", data[:-1], data + b"\0"):
        with pytest.raises(DossierRefused):
            verify_dossier(cut)


def test_a_part_of_another_run_is_found(
    run: tuple[bytes, SigningKey], tmp_path: Path, measured_once: None
) -> None:
    """The same terms, the same keys' names, another run: nothing of one stands for the other."""
    other, _ = _dossier(tmp_path, ())
    ours, theirs = (canonical.decode(_body(data), max_bytes=1 << 28) for data in (run[0], other))
    for path in leaves(ours):
        at, source = ours, theirs
        try:
            for key in path[:-1]:
                at, source = at[key], source[key]
            own, foreign = at[path[-1]], source[path[-1]]
        except (KeyError, IndexError):
            continue
        assert own != foreign, path
        at[path[-1]] = foreign
        with pytest.raises(DossierRefused):
            verify_dossier(signed(run[1], canonical.encode(ours)))
        at[path[-1]] = own
    assert verify_dossier(signed(run[1], canonical.encode(ours)))


def test_two_runs_do_not_merge(
    run: tuple[bytes, SigningKey], tmp_path: Path, measured_once: None
) -> None:
    """A whole part of another run's, or both runs' together, prove neither run."""
    other, _ = _dossier(tmp_path, ())
    theirs = canonical.decode(_body(other), max_bytes=1 << 28)
    for name in ("collateral", *canonical.decode(_body(run[0]), max_bytes=1 << 28)["proofs"]):
        for merge in (_theirs, _both):
            ours = canonical.decode(_body(run[0]), max_bytes=1 << 28)
            of = ours if name == "collateral" else ours["proofs"]
            foreign = (theirs if name == "collateral" else theirs["proofs"])[name]
            merged = merge(of[name], foreign)
            if merged == of[name]:
                continue
            of[name] = merged
            with pytest.raises(DossierRefused):
                verify_dossier(signed(run[1], canonical.encode(ours)))


def _theirs(ours: Any, theirs: Any) -> Any:
    return theirs


def _both(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, list):
        return [*ours, *theirs]
    return ours | {f"{name}2": value for name, value in theirs.items()}


def test_every_field_of_the_report_is_proven_or_named_as_the_hosts_word(
    run: tuple[bytes, SigningKey],
) -> None:
    """An aggregator who signs another report: no figure, term or name of it can be another."""
    dossier = Dossier.decode(_body(run[0]))
    report, trusted = json.loads(dossier.report), set[str]()
    words = {"seconds", "stages", "peak_mib"}
    for path in leaves(report):
        for change in ("altered", "left out", "given twice"):
            lie = json.loads(dossier.report)
            at = lie
            for key in path[:-1]:
                at = at[key]
            CHANGES[change](at, path[-1])
            if lie == report:
                continue
            told = _reasons(_reported(dossier, lie, run[1]))
            if not told:
                trusted.add(path[0])
            assert not told or "report" in told, (path, change, told)
    assert trusted == words


def test_parts_that_change_places_are_found(run: tuple[bytes, SigningKey]) -> None:
    tree = canonical.decode(_body(run[0]), max_bytes=1 << 28)
    for name, parts in tree["proofs"].items():
        keys = list(range(len(parts))) if isinstance(parts, list) else sorted(parts)
        if len(keys) < 2:
            continue
        parts[keys[0]], parts[keys[1]] = parts[keys[1]], parts[keys[0]]
        with pytest.raises(DossierRefused):
            verify_dossier(signed(run[1], canonical.encode(tree)))
        parts[keys[0]], parts[keys[1]] = parts[keys[1]], parts[keys[0]]
        assert name


def test_a_figure_that_the_aggregator_writes_itself_is_found(run: tuple[bytes, SigningKey]) -> None:
    dossier = Dossier.decode(_body(run[0]))
    report = json.loads(dossier.report)
    key = next(iter(report["models"]["tiny"]["metrics"]))
    for field, value in (("correct", 12), ("accuracy", 1.0), ("loss", 0.0)):
        lie = json.loads(dossier.report)
        lie["models"]["tiny"]["metrics"][key][field] = value
        _refused(dossier, lie, run[1], "models")
    for name, value in (
        ("rounds", 3),
        ("privacy", {"mechanism": "none", "epsilon": 1.0}),
        ("job", "other"),
        ("customers", [*CUSTOMERS, "west"]),
    ):
        _refused(dossier, report | {name: value}, run[1], name)


def _refused(dossier: Dossier, report: dict[str, Any], key: SigningKey, named: str) -> None:
    with pytest.raises(DossierRefused, match=named):
        verify_dossier(_reported(dossier, report, key))


def _reasons(data: bytes) -> str:
    """Why a dossier is refused; "" if it holds."""
    try:
        verify_dossier(data)
    except DossierRefused as error:
        return "; ".join(error.reasons)
    return ""


def _reported(dossier: Dossier, report: dict[str, Any], key: SigningKey) -> bytes:
    """The dossier with another report, signed by the aggregator."""
    data = json.dumps(report).encode()
    contract = Contract.decode(dossier.contract).digest()
    signature = key.sign("fedark/report/1", _covered(data, contract, dossier.run_id))
    lie = dossier.model_copy(update={"report": data, "report_signature": signature})
    return signed(key, lie.encode())


def test_what_the_caller_knows_is_held_against_it(run: tuple[bytes, SigningKey]) -> None:
    good = verify_dossier(run[0])
    terms = good.contract.attestation
    installed = {"trainer": dict(terms.trainer), "aggregator": dict(terms.aggregator)}
    held = verify_dossier(
        run[0], root=terms.simulated_root, installed=installed, adapters=good.adapters
    )
    assert len(held.proven) == len(good.proven) + 3
    with pytest.raises(DossierRefused, match="another simulated root"):
        verify_dossier(run[0], root="0" * 64)
    installed["trainer"] |= {"runtime": "0" * 96}
    with pytest.raises(DossierRefused, match="measures otherwise: runtime"):
        verify_dossier(run[0], installed=installed)
    with pytest.raises(DossierRefused, match="not the one that was delivered"):
        verify_dossier(run[0], adapters={"tiny": b"0" * 48})
