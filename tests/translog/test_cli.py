"""`fedark log`: what an auditor sees."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedark.cli.log import app
from fedark.contract.contract import Party
from fedark.contract.job import DataSpec
from fedark.foundation.errors import FedarkError, InputError, LogForked, LogRefused
from fedark.foundation.keys import PartyKeys
from fedark.operate.party import DataConfig, PartyConfig, write_party
from fedark.stages.node import LOG, SEEN_LOGS
from fedark.translog.log import TransparencyLog
from fedark.translog.memory import HeadMemory
from fedark.translog.update import make_update


def fedark(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    result: Result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def parties(tmp_path: Path, make_entry: Any) -> dict[str, Path]:
    """A provider with five entries in its log, and a customer that was shown the first three."""
    keys = {"maker": PartyKeys(), "north": PartyKeys()}
    roster = [
        Party(
            name=name,
            role=role,
            signing_key=keys[name].signing.public.hex(),
            hpke_key=keys[name].hpke.public.hex(),
        )
        for name, role in (("maker", "provider"), ("north", "customer"))
    ]
    data = DataConfig(file="records.csv", spec=DataSpec(prompt="{text}", answer="label"))
    for party in roster:
        config = PartyConfig(
            name=party.name,
            role=party.role,
            catalogue="none",
            data=data if party.role == "customer" else None,
        )
        write_party(
            tmp_path / party.name, config, keys=keys[party.name], roster=roster, collateral={}
        )
    signing = keys["maker"].signing
    log = TransparencyLog(tmp_path / "maker" / LOG, signing)
    for number in range(5):
        log.append(make_entry(number))
        if number == 2:
            data_ = make_update(
                log, signing, party="north", run_id="r", head=log.head(), since=None, indexes=[0]
            )
            HeadMemory(tmp_path / "north" / SEEN_LOGS).take(
                data_, signing.public, by="maker", party="north", run_id="r"
            )
    return {name: tmp_path / name for name in keys}


def test_a_whole_log_is_said_to_be_whole_and_what_that_does_not_say_is_said_too(
    parties: dict[str, Path],
) -> None:
    said = fedark("verify", parties["maker"])
    assert "The log is whole: 5 entries (5 attestation)." in said
    assert "compare it with what you know" in said
    assert "use --against" in said


def test_a_customers_remembered_head_is_of_the_providers_past(
    parties: dict[str, Path], tmp_path: Path
) -> None:
    kept = tmp_path / "HEAD.json"
    kept.write_text(fedark("head", parties["north"], "--of", "maker"))
    assert json.loads(kept.read_text())["size"] == 3
    said = fedark("verify", parties["maker"], "--against", kept)
    assert "at 3 of 5 entries" in said
    assert "use --against" not in said
    kept.write_text(fedark("head", parties["maker"]))
    assert "at 5 of 5 entries" in fedark("verify", parties["maker"] / LOG, "--against", kept)


def test_a_log_that_was_cut_since_a_head_was_kept_is_refused(
    parties: dict[str, Path], tmp_path: Path
) -> None:
    kept = tmp_path / "HEAD.json"
    kept.write_text(fedark("head", parties["north"], "--of", "maker"))
    database = sqlite3.connect(parties["maker"] / LOG)
    with database:
        database.execute("DELETE FROM log WHERE number > 1")
    database.close()
    assert "2 entries" in fedark("verify", parties["maker"])
    with pytest.raises(LogForked, match="rewound"):
        fedark("verify", parties["maker"], "--against", kept)


def test_an_altered_log_is_refused_by_every_command(parties: dict[str, Path]) -> None:
    path = parties["maker"] / LOG
    path.write_bytes(path.read_bytes().replace(b"north", b"south"))
    for command in ("verify", "show", "head"):
        with pytest.raises(LogRefused, match="altered"):
            fedark(command, parties["maker"])


def test_entries_are_shown_for_people_and_for_programs(
    parties: dict[str, Path], make_entry: Any
) -> None:
    lines = fedark("show", parties["maker"]).splitlines()
    assert len(lines) == 5
    assert "attestation" in lines[0]
    assert "north: run_id run-1" in lines[0]
    values = [json.loads(line) for line in fedark("show", parties["maker"], "--json").splitlines()]
    assert [value["index"] for value in values] == list(range(5))
    assert values[3]["facts"]["evidence"] == make_entry(3).facts["evidence"].hex()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["verify", "north"], "no log"),
        (["verify", "nowhere"], "cannot be read"),
        (["verify", "maker", "--key", "abcd"], "64 hex digits"),
        (["verify", "maker", "--key", "z"], "64 hex digits"),
        (["verify", "maker", "--against", "nowhere.json"], "cannot be read"),
        (["head", "north", "--of", "nobody"], "has no nobody"),
        (["head", "maker", "--of", "north"], "has seen no log"),
    ],
)
def test_wrong_input_is_said_to_be_wrong(
    parties: dict[str, Path],
    arguments: list[str],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=why):
        fedark(*arguments)


def test_a_log_is_verified_under_the_key_that_the_auditor_knows(parties: dict[str, Path]) -> None:
    with pytest.raises(FedarkError, match="not the owner's"):
        fedark("verify", parties["maker"], "--key", "ab" * 32)
    roster = json.loads((parties["north"] / "roster.json").read_text())
    known = next(party["signing_key"] for party in roster if party["name"] == "maker")
    assert "compare" not in fedark("verify", parties["maker"] / LOG, "--key", known)
