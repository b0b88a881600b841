"""`fedark enclave`: signed reference values are compared with what is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedark.cli.enclave import app
from fedark.foundation.errors import InputError, Refused
from fedark.foundation.keys import PartyKeys


@pytest.fixture
def publisher(tmp_path: Path) -> PartyKeys:
    keys = PartyKeys()
    keys.save(tmp_path / "party.keys")
    return keys


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sign(tmp_path: Path, source: object, out: str = "trainer.reference") -> Any:
    options = (
        "--key",
        tmp_path / "party.keys",
        "--release",
        "fedark 0.1.0",
        "--out",
        tmp_path / out,
    )
    return run("sign-reference", source, *options)


def test_what_is_measured_here_is_signed_and_found_to_be_what_is_installed(
    tmp_path: Path, publisher: PartyKeys
) -> None:
    assert publisher.signing.public.hex() in sign(tmp_path, "aggregator").output
    path = tmp_path / "trainer.reference"
    result = run(
        "verify-reference", path, "--publisher", publisher.signing.public.hex(), "--installed"
    )
    assert result.exit_code == 0
    assert result.output.count("as installed") == 3
    assert result.output.count("known here") == 2 + 13
    assert path.stat().st_size < 4000
    with pytest.raises(InputError, match="exists already"):
        sign(tmp_path, "aggregator")


def test_another_installation_differs_and_the_exit_status_says_so(
    tmp_path: Path, publisher: PartyKeys
) -> None:
    registers = dict.fromkeys(("launcher", "runtime", "application"), "ab" * 48)
    (tmp_path / "measured.json").write_text(
        json.dumps({"role": "aggregator", "registers": registers, "files": {}})
    )
    sign(tmp_path, tmp_path / "measured.json")
    arguments = (
        "verify-reference",
        tmp_path / "trainer.reference",
        "--publisher",
        publisher.signing.public.hex(),
    )
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--installed")
    assert result.exit_code == 1
    assert result.output.count("DIFFERS") == 3


def test_values_that_leave_a_register_of_this_installation_out_are_not_passed_off_as_complete(
    tmp_path: Path, publisher: PartyKeys
) -> None:
    (tmp_path / "measured.json").write_text(
        json.dumps({"role": "aggregator", "registers": {"tdx.mrtd": "ab" * 48}})
    )
    sign(tmp_path, tmp_path / "measured.json")
    path = tmp_path / "trainer.reference"
    with pytest.raises(InputError, match="no value for application, launcher, runtime"):
        run("verify-reference", path, "--publisher", publisher.signing.public.hex(), "--installed")


def test_another_publishers_values_are_refused(tmp_path: Path, publisher: PartyKeys) -> None:
    sign(tmp_path, "aggregator")
    with pytest.raises(Refused, match="not one that is trusted here"):
        run(
            "verify-reference",
            tmp_path / "trainer.reference",
            "--publisher",
            PartyKeys().signing.public.hex(),
        )
    with pytest.raises(InputError, match="64 hex digits"):
        run("verify-reference", tmp_path / "trainer.reference", "--publisher", "no key")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"role": "janitor", "registers": {"x": "y"}}', "nonsense"]
)
def test_what_is_no_measurement_is_not_signed(
    tmp_path: Path, publisher: PartyKeys, content: str
) -> None:
    (tmp_path / "measured.json").write_text(content)
    with pytest.raises(InputError):
        sign(tmp_path, tmp_path / "measured.json")
    assert not (tmp_path / "trainer.reference").exists()
