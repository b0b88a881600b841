"""The launcher's bytecode cache: made once, bound to content, and refused when it was touched."""

from __future__ import annotations

import hashlib
import marshal
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.enclave import bytecode
from fedark.foundation.errors import EnclaveFailed, Refused, StorageError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source file, with the cache's folder moved beside it."""
    monkeypatch.setattr(bytecode, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "src"
    folder.mkdir()
    path = folder / "some_module.py"
    path.write_text("VALUE = 'from the source'\n")
    return path


def sources(module: Path) -> dict[str, bytes]:
    return {str(module): hashlib.sha384(module.read_bytes()).digest()}


def importing(module: Path):
    def start(prefix: Path) -> subprocess.Popen[bytes]:
        script = f"import sys; sys.path.insert(0, {str(module.parent)!r}); import some_module"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", f"pycache_prefix={prefix}", "-c", script]
        )

    return start


def never(prefix: Path) -> subprocess.Popen[bytes]:
    raise AssertionError("the cache should have been there")


def test_it_is_filled_once_and_holds_the_code_of_its_source(module: Path) -> None:
    made = bytecode.ensure("key", sources(module), importing(module))
    ((path, digest),) = made.digests.items()
    data = Path(path).read_bytes()
    assert hashlib.sha384(data).digest() == digest
    assert data[4:8] == b"\1\0\0\0"
    assert "from the source" in marshal.loads(data[16:]).co_consts
    assert bytecode.ensure("key", sources(module), never) == made


def test_python_finds_it_where_it_is(module: Path) -> None:
    made = bytecode.ensure("key", sources(module), importing(module))
    script = (
        f"import sys; sys.path.insert(0, {str(module.parent)!r}); import some_module;"
        " print(some_module.__cached__)"
    )
    options = ["-I", "-S", "-B", "-X", f"pycache_prefix={made.prefix}"]
    done = subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in made.digests


def test_a_file_that_is_not_measured_is_not_cached(module: Path) -> None:
    assert bytecode.ensure("key", {}, importing(module)).digests == {}


@pytest.mark.parametrize("attack", ["edit", "add", "remove", "link", "mode", "index", "folder"])
def test_an_altered_cache_is_refused(module: Path, attack: str) -> None:
    made = bytecode.ensure("key", sources(module), importing(module))
    file = Path(next(iter(made.digests)))
    match attack:
        case "edit":
            file.write_bytes(file.read_bytes().replace(b"from the source", b"from the poison"))
        case "add":
            file.with_name("other.pyc").write_bytes(b"")
        case "remove":
            file.unlink()
        case "link":
            file.rename(file.with_name("moved"))
            file.symlink_to("moved")
        case "mode":
            file.chmod(0o666)
        case "index":
            (made.prefix.parent / "index.json").write_text("{}")
        case "folder":
            made.prefix.parent.chmod(0o777)
    with pytest.raises(Refused, match="was altered"):
        bytecode.ensure("key", sources(module), never)


def test_a_source_that_changes_while_it_is_compiled_is_refused_and_leaves_nothing(
    module: Path,
) -> None:
    measured = sources(module)

    def start(prefix: Path) -> subprocess.Popen[bytes]:
        module.write_text("VALUE = 'from the attacker'\n")
        return importing(module)(prefix)

    with pytest.raises(Refused, match="changed while it was compiled"):
        bytecode.ensure("key", measured, start)
    assert os.listdir(bytecode.cache_folder()) == ["lock"]


def test_only_the_caches_that_were_used_last_are_kept(module: Path) -> None:
    for number in range(12):
        bytecode.ensure(f"key-{number}", sources(module), importing(module))
        bytecode.ensure("key-0", sources(module), importing(module))
    kept = {name for name in os.listdir(bytecode.cache_folder()) if name != "lock"}
    assert {"key-0", "key-11"} <= kept
    assert len(kept) == 8


def test_a_process_that_fails_leaves_nothing(module: Path) -> None:
    with pytest.raises(EnclaveFailed, match="exit code 3"):
        bytecode.ensure(
            "key",
            {},
            lambda prefix: subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]),
        )
    assert os.listdir(bytecode.cache_folder()) == ["lock"]


def test_a_folder_that_cannot_be_made_is_said_as_that(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "cache_folder", lambda: module / "cache")
    with pytest.raises(StorageError):
        bytecode.ensure("key", sources(module), importing(module))
