"""A dossier proves a run to a stranger, and proves nothing once any part of it is changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small import CUSTOMERS, write_job
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.contract import Contract
from fedark.contract.job import Job
from fedark.foundation import canonical
from fedark.foundation.errors import InputError
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.report.verify import DossierRefused, verify_dossier
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER, Dossier

_LABEL = "fedark/dossier/1"
MODES = {
    "sealed": (),
    "masked": ('protection.mode="masked"',),
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
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, SigningKey]:
    """A run's dossier, and the aggregator's key: whoever holds it may sign a dossier of lies."""
    return _dossier(tmp_path_factory.mktemp(request.param), MODES[request.param])


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


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if not items and not isinstance(value, (dict, list)):
        yield path
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _changed(body: bytes, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    tree = canonical.decode(body, max_bytes=1 << 28)
    at = tree
    for key in path[:-1]:
        at = at[key]
    change(at, path[-1])
    return canonical.encode(tree)


def _flip(at: Any, key: Any) -> None:
    value = at[key]
    if isinstance(value, str):
        at[key] = value[:-1] + chr(ord(value[-1]) ^ 1)
    else:
        middle = len(value) // 2
        at[key] = value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


def _drop(at: Any, key: Any) -> None:
    del at[key]


def _rename(at: Any, key: Any) -> None:
    if isinstance(at, dict):
        at[f"{key}x"] = at.pop(key)
    else:
        at.append(at[key])


def _signed(body: bytes, key: SigningKey) -> bytes:
    return canonical.encode({"body": body, "signature": key.sign(_LABEL, body)})


def _body(data: bytes) -> bytes:
    body: bytes = canonical.decode(data, max_bytes=1 << 28)["body"]
    return body


def test_every_leaf_that_is_changed_dropped_or_renamed_is_found_though_the_aggregator_signs_again(
    run: tuple[bytes, SigningKey],
) -> None:
    """A lying aggregator holds the key over the whole: each part must speak for itself."""
    body, key = _body(run[0]), run[1]
    paths = list(_leaves(canonical.decode(body, max_bytes=1 << 28)))
    assert len(paths) > 25
    for path in paths:
        for change in (_flip, _drop, _rename):
            lie = _signed(_changed(body, path, change), key)
            with pytest.raises(DossierRefused) as caught:
                verify_dossier(lie)
            assert caught.value.reasons
            assert "could not be read" not in str(caught.value), (path, change, caught.value)


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
    for path in _leaves(ours):
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
            verify_dossier(_signed(canonical.encode(ours), run[1]))
        at[path[-1]] = own
    assert verify_dossier(_signed(canonical.encode(ours), run[1]))


def test_parts_that_change_places_are_found(run: tuple[bytes, SigningKey]) -> None:
    tree = canonical.decode(_body(run[0]), max_bytes=1 << 28)
    for name, parts in tree["proofs"].items():
        keys = list(range(len(parts))) if isinstance(parts, list) else sorted(parts)
        if len(keys) < 2:
            continue
        parts[keys[0]], parts[keys[1]] = parts[keys[1]], parts[keys[0]]
        with pytest.raises(DossierRefused):
            verify_dossier(_signed(canonical.encode(tree), run[1]))
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
    from fedark.stages.report import sign_report

    data = json.dumps(report).encode()
    contract = Contract.decode(dossier.contract).digest()
    lie = dossier.model_copy(
        update={
            "report": data,
            "report_signature": sign_report(key, data, contract, dossier.run_id),
        }
    )
    with pytest.raises(DossierRefused, match=named):
        verify_dossier(_signed(lie.encode(), key))


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
