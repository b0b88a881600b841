"""Bad input as a user meets it: one command, one clear answer that names file and line, and nothing
left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedark.cli import main

Spoil = Callable[[Path], None]


def _write(name: str, content: bytes | str) -> Spoil:
    data = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def _pickled(folder: Path) -> None:
    (folder / "base/model.safetensors").rename(folder / "base/pytorch_model.bin")


def _add(line: str) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "job.toml"
        path.write_text(path.read_text().replace("[protection]\n", f"[protection]\n{line}\n"))

    return spoil


HEAD = "desk,message,action\n"
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing data": (
        lambda folder: (folder / "north.csv").unlink(),
        ("north.csv", "does not exist"),
    ),
    "empty data": (_write("north.csv", ""), ("north.csv",)),
    "a header alone": (_write("north.csv", HEAD), ("north.csv",)),
    "a column is missing": (
        _write("north.csv", "desk,text\nnorth,line open\n"),
        ("north.csv", "message"),
    ),
    "a malformed line": (
        _write("north.csv", HEAD + "north,line,open\nnorth,line\n"),
        ("north.csv", "line 3"),
    ),
    "a record without an answer": (
        _write("north.csv", HEAD + "north,line is hot,open\nnorth,line,\n"),
        ("north.csv", "line 3", "leave-out"),
    ),
    "not UTF-8": (
        _write("north.csv", HEAD.encode() + b"north,line,open\nnorth,\xff\xfe,shed\n"),
        ("north.csv", "line 3"),
    ),
    "an unknown label": (
        _write("north.csv", HEAD + "north,line,open\nnorth,bus,explode\n"),
        ("north.csv", "line 3"),
    ),
    "no safetensors": (_pickled, ("base", "safetensors")),
    "broken safetensors": (
        _write("base/model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
        ("model.safetensors",),
    ),
    "an unknown key": (_add("mod = 1"), ("protection.mod", "unknown key", "line 4")),
    "broken TOML": (_add("mode ="), ("line 4",)),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_with_its_place_and_leaves_nothing(
    case: str,
    small_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, wanted = CASES[case]
    spoil(small_job.parent)
    before = {path: path.read_bytes() for path in small_job.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        sys, "argv", ["fedark", "simulate", str(small_job), "--work", str(tmp_path / "work")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    answer = capsys.readouterr().err
    assert stopped.value.code == 2
    assert all(word in answer for word in wanted), answer
    assert "Traceback" not in answer
    assert not (tmp_path / "work").exists(), "nothing was begun"
    assert before == {
        path: path.read_bytes() for path in small_job.parent.rglob("*") if path.is_file()
    }


def test_every_bad_file_is_named_in_one_answer(
    small_job: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write("north.csv", HEAD)(small_job.parent)
    _write("south.csv", b"\xff")(small_job.parent)
    monkeypatch.setattr(
        sys, "argv", ["fedark", "simulate", str(small_job), "--work", str(tmp_path / "work")]
    )
    with pytest.raises(SystemExit):
        main()
    answer = capsys.readouterr().err
    assert "north.csv" in answer
    assert "south.csv" in answer


def _on_a_small_disk(
    mount: Path, kibibytes: int, command: list[str]
) -> subprocess.CompletedProcess[str]:
    """Run `command` where `mount` is a file system of that size, which only the command sees."""
    script = f'mount -t tmpfs -o size={kibibytes}k none "$0" && exec "$@"'
    prefix = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, "true"], capture_output=True).returncode
    ):
        pytest.skip("no small file system can be mounted here: unshare is not allowed")
    return subprocess.run(
        [*prefix, "sh", "-c", script, str(mount), *command],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kibibytes", [64, 260])
def test_a_full_disk_is_an_error_that_says_so_and_no_half_of_a_file_stays(
    kibibytes: int, small_job: Path, tmp_path: Path
) -> None:
    """64 KiB end while sealing; 260 KiB later, while a party writes its results or its log."""
    mount = tmp_path / "disk"
    mount.mkdir()
    code = "from fedark.cli import main; main()"
    listing = f"find {mount} -name '*.draft' -o -name '.*.tmp' | sed 's/^/LEFT /'"
    command = (
        f'"{sys.executable}" -c "{code}" simulate "{small_job}" --work "{mount}/work" --quiet; echo'
        f' "exit $?"; {listing}'
    )
    done = _on_a_small_disk(mount, kibibytes, ["sh", "-c", command])
    assert "exit 1" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr.lower() or "disk" in done.stderr.lower(), done.stderr
    assert "LEFT" not in done.stdout
