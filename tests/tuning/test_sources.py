"""Finding a base model: data alone, from a package, a folder or the hub."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fedark.foundation.errors import ModelError
from fedark.tuning.sources import model_files, resolve


@pytest.fixture
def folder(zoo: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo["minilm"].folder, tmp_path / "model"))


def test_a_folder_is_taken_with_what_must_be_sealed_and_no_more(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / "other.safetensors").write_bytes(b"")
    assert resolve(f"dir:{folder}") == folder
    assert set(model_files(folder)) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "1_Pooling/config.json",
    }


def test_a_package_is_found_without_running_its_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "some_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copytree(folder, package / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve("package:some-model-package") == package / "model"
    assert "some_model_package" not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        "",
        "x",
        "package:",
        "package:a.b",
        "package:../x",
        "dir:",
        "hub:x",
        "hub:a/b/c",
        "http://x",
        "package:surely_not_installed",
        "package:json",
    ],
)
def test_a_source_that_is_not_there_or_not_understood_is_refused(source: str) -> None:
    with pytest.raises(ModelError):
        resolve(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_without_a_needed_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError):
        resolve(f"dir:{folder}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80\x02.pickle.."),
    ],
)
def test_a_model_with_a_damaged_file_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError):
        resolve(f"dir:{folder}")


def test_the_hub_is_asked_for_data_files_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("hub:some/model@v1") == folder
    assert (asked["repo"], asked["revision"]) == ("some/model", "v1")
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])


def test_a_failed_download_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="could not be fetched"):
        resolve("hub:some/model")


def test_configurations_that_are_not_objects_are_refused_when_loading(zoo: Any) -> None:
    tiny = zoo["minilm"]
    terms = tiny.terms()
    files = tiny.files()
    good = json.loads(files["config.json"])
    for bad in (
        b"[]",
        b"1",
        b"{}",
        json.dumps({**good, "model_type": "evil"}).encode(),
        json.dumps({**good, "quantization_config": {}}).encode(),
    ):
        with pytest.raises(ModelError):
            type(tiny.load(terms)).load({**files, "config.json": bad}, terms)
