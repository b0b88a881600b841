"""Edits, and other ways to slip in code: what is not what was measured is not executed, or gets no
evidence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.enclave import launcher
from fedark.foundation.errors import EnclaveFailed, Refused
from fedark.measurement import Measurement
from fedark.measurement.tree import TreeEntry


@pytest.fixture
def own(probing, tmp_path: Path) -> tuple[Path, Measurement]:
    """A module of a test's own, measured as part of the application and on the search path, and the
    measurement.
    """
    folder = (tmp_path / "own").resolve()
    folder.mkdir()
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path(parent.anchor):
            parent.chmod(parent.stat().st_mode | 0o055)
    module = folder / "measured_helper.py"
    module.write_text("VALUE = 1\n")
    probe = probing("aggregator")
    entry = TreeEntry(
        "helper.py", "f", False, hashlib.sha384(module.read_bytes()).digest(), str(module)
    )
    measurement = dataclasses.replace(
        probe,
        visible=(*probe.visible, folder),
        search_path=(probe.search_path[0], folder, *probe.search_path[1:]),
        entries={**probe.entries, "application": (*probe.entries["application"], entry)},
    )
    return module, measurement


def test_a_measured_module_can_be_imported_late(do, start, own) -> None:
    _, measurement = own
    enclave = start(measurement=measurement)
    assert do(enclave, "import", "measured_helper") == b"imported"
    assert do(enclave, "quote").startswith(b"simulated")


def test_an_edit_after_the_start_is_not_executed_and_gets_no_evidence(do, start, own) -> None:
    module, measurement = own
    enclave = start(measurement=measurement)
    module.write_text("VALUE = 2\n")
    assert b"is not the file that was measured" in do(enclave, "import", "measured_helper")
    with pytest.raises(Refused, match="measured_helper"):
        do(enclave, "quote")
    with pytest.raises(EnclaveFailed):
        do(enclave, "echo")


def test_an_edit_between_measuring_and_starting_is_not_executed(do, start, own) -> None:
    module, measurement = own
    module.write_text("VALUE = 3\n")
    enclave = start(measurement=measurement)
    assert b"is not the file that was measured" in do(enclave, "import", "measured_helper")


def test_an_edit_while_libraries_load_is_found_even_if_it_is_undone(
    start, own, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, measurement = own
    real = launcher._spawn

    def edit_and_undo(*arguments, **options):
        process = real(*arguments, **options)
        before = module.stat()
        module.write_text("VALUE = 4\n")
        module.write_text("VALUE = 1\n")
        os.utime(module, ns=(before.st_atime_ns, before.st_mtime_ns))
        return process

    monkeypatch.setattr(launcher, "_spawn", edit_and_undo)
    with pytest.raises(Refused, match="was changed while the enclave loaded it"):
        start(measurement=measurement)


def test_a_file_that_is_added_while_libraries_load_is_found(
    start, own, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, measurement = own
    real = launcher._spawn

    def add(*arguments, **options):
        process = real(*arguments, **options)
        (module.parent / "cbor2.py").write_text("raise SystemExit")
        return process

    monkeypatch.setattr(launcher, "_spawn", add)
    with pytest.raises((Refused, EnclaveFailed)):
        start(measurement=measurement)


def test_bytecode_that_the_host_writes_meanwhile_is_no_change(
    do, start, own, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, measurement = own
    real = launcher._spawn

    def compile_beside(*arguments, **options):
        process = real(*arguments, **options)
        py_compile.compile(str(module))
        return process

    monkeypatch.setattr(launcher, "_spawn", compile_beside)
    enclave = start(measurement=measurement)
    assert do(enclave, "quote").startswith(b"simulated")
    (module.parent / "__pycache__" / "more").mkdir()
    assert do(enclave, "quote").startswith(b"simulated")
    (module.parent / "libextra.so").write_bytes(b"")
    with pytest.raises(Refused, match="was changed"):
        do(enclave, "quote")


def test_a_change_of_the_role_itself_is_found_by_measuring_again(
    probing, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probing("aggregator")
    registers = {**real.registers, "application": bytes(48)}
    with pytest.raises(Refused, match="changed after it was measured"):
        start(measurement=dataclasses.replace(real, registers=registers))


def test_a_module_that_was_added_is_not_seen(do, start, own) -> None:
    module, measurement = own
    (module.parent / "stranger.py").write_text("raise SystemExit")
    (module.parent / "cbor2.py").write_text("raise SystemExit")
    enclave = start(measurement=measurement)
    assert do(enclave, "import", "stranger").startswith(b"ModuleNotFoundError")


def test_poisoned_bytecode_beside_a_source_is_not_executed(do, start, own) -> None:
    module, measurement = own
    cache = module.parent / "__pycache__"
    cache.mkdir()
    poison = cache / f"measured_helper.{sys.implementation.cache_tag}.pyc"
    script = module.with_name("poison.py")
    script.write_text("raise SystemExit")
    py_compile.compile(
        str(script), str(poison), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    script.unlink()
    enclave = start(measurement=measurement)
    assert do(enclave, "import", "measured_helper") == b"imported"


def test_the_hosts_environment_changes_nothing(
    do, start, own, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = own
    (module.parent / "sitecustomize.py").write_text("raise SystemExit")
    for name in (
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONSTARTUP",
        "PYTHONPYCACHEPREFIX",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "LD_AUDIT",
    ):
        monkeypatch.setenv(name, str(module.parent))
    monkeypatch.setenv("PYTHONINSPECT", "1")
    enclave = start()
    facts = json.loads(do(enclave, "facts"))
    assert str(module.parent) not in facts["path"]
    assert not {name for name in facts["environment"] if name.startswith(("PYTHON", "LD_"))}
    assert not {"site", "sitecustomize", "usercustomize"} & set(json.loads(do(enclave, "modules")))


def test_a_module_that_came_from_elsewhere_before_the_lock_stops_the_enclave(
    start, own, tmp_path: Path
) -> None:
    module, measurement = own
    script = module.parent / "main.py"
    probe = measurement.entry_point.read_text()
    script.write_text(
        probe.replace('SPECIFICATION["path"]\n', 'SPECIFICATION["path"]\nimport stray\n', 1)
    )
    (module.parent / "stray.py").write_text("")
    entry = TreeEntry(
        "main.py", "f", False, hashlib.sha384(script.read_bytes()).digest(), str(script)
    )
    entries = {**measurement.entries, "application": (*measurement.entries["application"], entry)}
    with pytest.raises(
        Refused, match=r"module stray was imported from .*stray\.py, which is not measured"
    ):
        start(measurement=dataclasses.replace(measurement, entry_point=script, entries=entries))


def test_the_hosts_settings_for_openssl_are_not_read(probing, tmp_path: Path) -> None:
    """They can name shared objects, which would be loaded before the enclave confines itself."""
    strace, log = shutil.which("strace"), tmp_path / "log"
    if strace is None:
        pytest.skip("takes strace")
    command = [
        strace,
        "-f",
        "-o",
        str(log),
        "-e",
        "trace=open,openat",
        str(probing("aggregator").python),
    ]
    arguments = ["-I", "-S", "-B", "-c", "import hashlib; hashlib.sha384(b'')"]
    subprocess.run([*command, *arguments], env=launcher._ENVIRONMENT, check=True)
    assert "openssl.cnf" not in log.read_text()


@pytest.fixture
def detour(probing, tmp_path: Path) -> tuple[Path, Measurement]:
    """Where an archive of a standard library would be, which is not there, and a measurement that
    looks there.
    """
    path = (tmp_path / "prefix" / "python.zip").resolve()
    path.parent.mkdir()
    return path, dataclasses.replace(probing("aggregator"), detours=(path,))


def test_what_leads_the_interpreter_past_its_library_stops_the_start(start, detour) -> None:
    path, measurement = detour
    path.write_bytes(b"")
    with pytest.raises(Refused, match=r"python\.zip would put code into the enclave"):
        start(measurement=measurement)


@pytest.mark.parametrize("undone", [False, True])
def test_what_leads_it_there_while_it_starts_is_found_even_if_it_is_undone(
    start, detour, monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    path, measurement = detour
    real = launcher._spawn

    def divert(*arguments, **options):
        process = real(*arguments, **options)
        path.write_bytes(b"")
        if undone:
            path.unlink()
        return process

    monkeypatch.setattr(launcher, "_spawn", divert)
    with pytest.raises(Refused, match="put code into"):
        start(measurement=measurement)


def test_what_leads_it_there_later_gets_no_evidence(do, start, detour) -> None:
    path, measurement = detour
    enclave = start(measurement=measurement)
    path.write_bytes(b"")
    with pytest.raises(Refused, match="would put code into the enclave"):
        do(enclave, "quote")


def test_a_change_of_the_loaders_cache_while_it_starts_is_found(
    start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, real = tmp_path / "ld.so.cache", launcher._spawn
    monkeypatch.setattr(launcher.loader, "CACHE", str(cache))

    def change(*arguments, **options):
        process = real(*arguments, **options)
        cache.write_bytes(b"")
        cache.unlink()
        cache.symlink_to("nowhere")
        return process

    monkeypatch.setattr(launcher, "_spawn", change)
    with pytest.raises(Refused, match=r"ld\.so\.cache was changed while the enclave loaded"):
        start()
