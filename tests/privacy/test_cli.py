"""`fedark ledger`: shows, verifies and exports, and holds no record."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedark.cli import app
from fedark.foundation.errors import InputError, Refused
from fedark.privacy.accounting import Budget, Event, Spend
from fedark.privacy.ledger import LEDGER, Ledger


def run(*arguments):
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def charge(folder, name):
    with Ledger.open(folder / LEDGER, create=True) as ledger:
        receipt = ledger.charge(
            [b"one secret", b"two secrets"],
            contract_digest=b"c" * 48,
            run_id=name,
            spend=Spend((Event(4.0, 1.0, 3),)),
            releases=3,
            budget=Budget(8.0, 1e-5),
            now=1_700_000_000,
        )
        ledger.release(receipt.charge, 0, 1_700_000_001)


def test_show_prints_each_charge_and_what_was_released(tmp_path):
    charge(tmp_path, "run-1")
    text = run("show", tmp_path)
    assert "2023-11-14T22:13:20Z  run-1: epsilon 1." in text
    assert "2 records, 1 of 3 releases" in text
    value = json.loads(run("show", tmp_path / LEDGER, "--json"))
    assert (value["run"], value["released"], value["spend"]["unit"]) == ("run-1", 1, "record")


def test_an_export_is_whole_holds_no_record_and_its_head_finds_a_rollback(tmp_path):
    charge(tmp_path, "run-1")
    text = run("export", tmp_path)
    assert "secret" not in text
    value = json.loads(text)
    assert value["head"]["sequence"] == 2 == len(value["entries"])
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    charge(tmp_path, "run-2")
    assert "1 kept heads are of its past" in run("verify", tmp_path, "--against", kept)
    (tmp_path / LEDGER).unlink()
    charge(tmp_path, "run-1")
    assert "only a kept head tells" in run("verify", tmp_path)
    with pytest.raises(Refused):
        run("verify", tmp_path, "--against", kept)


def test_a_missing_ledger_and_a_file_that_is_no_head_are_refused(tmp_path):
    with pytest.raises(InputError):
        run("show", tmp_path)
    assert not (tmp_path / LEDGER).exists()
    charge(tmp_path, "run-1")
    for text in ("[]", "{", "{}"):
        (tmp_path / "head.json").write_text(text)
        with pytest.raises(InputError):
            run("verify", tmp_path, "--against", tmp_path / "head.json")
