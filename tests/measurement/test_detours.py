"""Files that would lead an interpreter past what is measured: each works on a real interpreter, and
each is refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedark.foundation.errors import Refused
from fedark.measurement import detours, measure_enclave, runtime
from fedark.measurement.detours import refuse_detours

VERSION = f"python3.{sys.version_info.minor}"
ARCHIVE = f"{VERSION.replace('.', '')}.zip"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A copy of this interpreter in a prefix of its own, with this one's standard library."""
    real = runtime.python_binary()
    copy = tmp_path / "above" / "prefix" / "bin" / real.name
    copy.parent.mkdir(parents=True)
    shutil.copy(real, copy)
    folder = copy.parents[1] / sys.platlibdir
    folder.mkdir()
    (folder / VERSION).symlink_to(library())
    return copy


def library() -> Path:
    _, paths = runtime.stdlib_roots([])
    return paths[0]


def poisoned(folder: Path) -> None:
    """Make `folder` a standard library whose json is not Python's."""
    folder.mkdir(parents=True)
    for path in library().iterdir():
        if path.name != "json":
            (folder / path.name).symlink_to(path)
    (folder / "json.py").write_text("POISON = True\n")


def archive(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("json.py", "POISON = True\n")


def make(kind: str, python: Path, evil: Path) -> None:
    """Put the detour `kind` there; `evil` is a prefix of the attacker's."""
    bin_folder, prefix = python.parent, python.parents[1]
    match kind:
        case "archive":
            archive(prefix / sys.platlibdir / ARCHIVE)
        case "archive above":
            archive(prefix.parent / sys.platlibdir / ARCHIVE)
            (prefix.parent / sys.platlibdir / VERSION).symlink_to(library())
        case "nearer library":
            poisoned(bin_folder / sys.platlibdir / VERSION)
        case "pyvenv.cfg beside":
            poisoned(evil / sys.platlibdir / VERSION)
            (bin_folder / "pyvenv.cfg").write_text(f"home = {evil / 'bin'}\n")
        case "pyvenv.cfg above":
            poisoned(evil / sys.platlibdir / VERSION)
            (prefix / "pyvenv.cfg").write_text(f"home = {evil / 'bin'}\n")
        case "_pth":
            poisoned(evil)
            Path(f"{python}._pth").write_text(f"{evil}\n")
        case "pybuilddir.txt" | "Modules/Setup.local":
            (bin_folder / kind).parent.mkdir(exist_ok=True)
            (bin_folder / kind).write_text("")


KINDS = [
    "archive",
    "archive above",
    "nearer library",
    "pyvenv.cfg beside",
    "pyvenv.cfg above",
    "_pth",
    "pybuilddir.txt",
    "Modules/Setup.local",
]


def outcome(python: Path) -> str:
    script = "import json; print('poisoned' if hasattr(json, 'POISON') else 'good')"
    done = subprocess.run(
        [str(python), "-I", "-S", "-B", "-c", script],
        capture_output=True,
        text=True,
        env={},
        check=False,
    )
    return done.stdout.strip() or "broken"


@pytest.mark.parametrize("kind", KINDS)
def test_what_leads_the_interpreter_elsewhere_is_refused(
    python: Path, tmp_path: Path, kind: str
) -> None:
    refuse_detours(detours.detours(python, library()))
    assert outcome(python) == "good"
    make(kind, python, tmp_path / "evil")
    assert outcome(python) == (
        "broken" if kind in ("pybuilddir.txt", "Modules/Setup.local") else "poisoned"
    )
    with pytest.raises(Refused, match="would put code into the enclave"):
        refuse_detours(detours.detours(python, library()))


def test_a_link_to_nowhere_and_a_folder_of_such_a_name_are_refused_too(python: Path) -> None:
    path = python.parents[1] / sys.platlibdir / ARCHIVE
    path.symlink_to("nowhere")
    with pytest.raises(Refused):
        refuse_detours(detours.detours(python, library()))
    path.unlink()
    path.mkdir()
    with pytest.raises(Refused):
        refuse_detours(detours.detours(python, library()))


def test_nothing_is_measured_where_the_loader_would_preload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preload = tmp_path / "ld.so.preload"
    monkeypatch.setattr(detours, "PRELOAD", str(preload))
    preload.write_text(" \n")
    measurement = measure_enclave("aggregator")
    preload.write_text("/opt/spy.so\n")
    with pytest.raises(Refused, match=r"ld\.so\.preload would put code into the enclave"):
        measure_enclave("aggregator")
    with pytest.raises(Refused, match=r"ld\.so\.preload would put code into the enclave"):
        measurement.check_unchanged()


def test_an_interpreter_opens_nothing_before_its_first_line_that_is_neither_measured_nor_refused(
    python: Path,
) -> None:
    """What the kernel saw: every path that the start of an interpreter asked for beside its own
    folders.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("takes strace")
    log = python.parent / "log"
    subprocess.run(
        [
            strace,
            "-f",
            "-o",
            str(log),
            "-e",
            "trace=open,openat,stat,newfstatat,access",
            str(python),
            "-I",
            "-S",
            "-B",
            "-c",
            "",
        ],
        check=True,
        env={},
    )
    asked = {line.split('"')[1] for line in log.read_text().splitlines() if '"' in line}
    known = {str(path) for path in detours.detours(python, library())}
    prefix = str(python.parents[1])
    own = os.path.join(prefix, sys.platlibdir, VERSION)
    assert {
        path
        for path in asked
        if path.startswith(prefix) and path != str(python) and not path.startswith(own)
    } <= known | {os.path.join(prefix, sys.platlibdir)}
