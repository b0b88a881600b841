"""`fedark model` on real directories: seal, show, verify, open; the weight key never appears on the
terminal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedark.cli.model import app
from fedark.foundation.errors import FedarkError, InputError, ModelError, Refused, SealBroken
from fedark.foundation.keys import PartyKeys, SigningKey


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exception is None, result.output
    return result.output


def failure(kind: type[FedarkError], *arguments: Any) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.frombuffer(os.urandom(3000), dtype=np.uint8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def options(tmp_path: Path) -> list[Any]:
    return ["--key", tmp_path / "party.keys", "--licence", "Apache-2.0", "--platform", "simulated"]


@pytest.fixture
def bundle(model: Path, tmp_path: Path, options: list[Any]) -> Path:
    output("seal", model, "--out", tmp_path / "grid.fedark", *options, "--title", "Grid base")
    return tmp_path / "grid.fedark"


def test_a_sealed_model_opens_again_for_its_provider(
    model: Path, bundle: Path, tmp_path: Path
) -> None:
    assert "2 files" in output(
        "open", bundle, "--out", tmp_path / "back", "--key", tmp_path / "party.keys"
    )
    assert contents(tmp_path / "back") == contents(model)


def test_sealing_says_where_the_weight_key_is_and_never_what_it_is(
    model: Path, tmp_path: Path, options: list[Any]
) -> None:
    said = output("seal", model, "--out", tmp_path / "grid.fedark", *options)
    (stored,) = (tmp_path / "weight-keys").iterdir()
    assert str(stored) in said.replace("\n", "")
    secret = stored.read_text().split("\n")[1]
    for text in (
        said,
        output("show", tmp_path / "grid.fedark"),
        output("verify", tmp_path / "grid.fedark"),
    ):
        assert secret not in text
        assert PartyKeys.load(tmp_path / "party.keys").signing.secret_bytes().hex() not in text
    assert stored.stat().st_mode & 0o777 == 0o600


def test_show_prints_card_policy_and_files_for_people_and_for_programs(bundle: Path) -> None:
    text = output("show", bundle)
    for part in ("Grid base (grid)", "Apache-2.0", "model.safetensors", "config.json", "simulated"):
        assert part in text
    shown = json.loads(output("show", bundle, "--json"))
    assert shown["card"]["name"] == "grid"
    assert [entry["name"] for entry in shown["files"]] == ["config.json", "model.safetensors"]


def test_verify_names_provider_and_bundle_and_holds_against_the_right_provider_alone(
    bundle: Path, tmp_path: Path
) -> None:
    public = PartyKeys.load(tmp_path / "party.keys").signing.public.hex()
    assert "compare it" in output("verify", bundle)
    assert public in output("verify", bundle, "--provider", public)
    assert "does not verify" in failure(
        Refused, "verify", bundle, "--provider", SigningKey().public.hex()
    )
    assert "hex" in failure(InputError, "verify", bundle, "--provider", "zz")


def test_verify_finds_a_single_flipped_bit(bundle: Path) -> None:
    payload = bytearray((bundle / "payload").read_bytes())
    payload[-1] ^= 1
    (bundle / "payload").write_bytes(payload)
    assert "not the one that its provider sealed" in failure(SealBroken, "verify", bundle)


def test_open_refuses_another_party_and_a_missing_weight_key(bundle: Path, tmp_path: Path) -> None:
    PartyKeys().save(tmp_path / "other.keys")
    assert "does not verify" in failure(
        Refused, "open", bundle, "--out", tmp_path / "x", "--key", tmp_path / "other.keys"
    )
    keys = ["--key", tmp_path / "party.keys", "--weight-keys", tmp_path / "empty"]
    assert "No weight key" in failure(InputError, "open", bundle, "--out", tmp_path / "x", *keys)
    assert not (tmp_path / "x").exists()


def test_a_refused_directory_leaves_no_bundle_and_no_keys(
    model: Path, tmp_path: Path, options: list[Any]
) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    before = sorted(tmp_path.rglob("*"))
    assert "run code" in failure(
        ModelError, "seal", model, "--out", tmp_path / "grid.fedark", *options
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_whose_key_cannot_be_stored_is_not_left_behind(
    model: Path, tmp_path: Path, options: list[Any]
) -> None:
    (tmp_path / "weight-keys").write_text("a file where a folder should be")
    failure(FedarkError, "seal", model, "--out", tmp_path / "grid.fedark", *options)
    assert not (tmp_path / "grid.fedark").exists()


def test_options_that_do_not_fit_are_all_named_at_once(
    model: Path, tmp_path: Path, options: list[Any]
) -> None:
    text = failure(
        InputError, "seal", model, "--out", tmp_path / "Bad Name", *options, "--task", "poetry"
    )
    assert "name:" in text
    assert "task:" in text
    assert not (tmp_path / "party.keys").exists()


def test_no_platform_is_trusted_unless_it_is_named(model: Path, tmp_path: Path) -> None:
    result = run(
        "seal", model, "--out", tmp_path / "g", "--key", tmp_path / "k", "--licence", "MIT"
    )
    assert result.exit_code == 2
    assert "--platform" in result.output


def test_what_is_no_bundle_is_an_error_that_says_so(tmp_path: Path) -> None:
    for command in ("show", "verify"):
        assert "cannot be read" in failure(ModelError, command, tmp_path / "none")
