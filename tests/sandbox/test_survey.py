"""What a machine offers is found by trying it, and too little is refused with words that help."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.foundation.errors import SandboxUnavailable
from fedark.sandbox import Support, survey

# A container as Docker makes one: a filter answers EPERM to whatever makes namespaces or mounts.
CONTAINER = """
import sys
sys.path.insert(0, sys.argv[1])
from fedark.sandbox.bpf import ALLOW, Arg, SyscallPolicy, SyscallRule, errno
from fedark.sandbox.seccomp import install
denied = ("unshare", "setns", "mount", "umount2", "pivot_root", "open_tree", "move_mount",
    "mount_setattr", "fsopen")
more = ("landlock_create_ruleset",) if sys.argv[2] == "bare" else ()
rules = (SyscallRule(errno(1), denied), SyscallRule(errno(38), more))
install(SyscallPolicy("container", ALLOW, rules))
from fedark.sandbox import survey
from fedark.foundation.errors import SandboxUnavailable
import json
found = survey()
try:
    mode = found.mode(sys.argv[3])
except SandboxUnavailable as error:
    mode = "refused: " + str(error)
print(json.dumps([found.namespaces, found.landlock, mode]))
"""


@pytest.fixture
def contained(interpreter, checkout):
    """(kind of container, minimum mode) -> what a survey in it finds, and decides."""

    def survey_inside(kind: str, minimum: str, *, ordinary: bool = False) -> tuple[str, int, str]:
        done = subprocess.run(
            [
                *interpreter(ordinary),
                "-I",
                "-S",
                "-B",
                "-c",
                CONTAINER,
                str(checkout),
                kind,
                minimum,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        namespaces, landlock, mode = json.loads(done.stdout)
        return namespaces, landlock, mode

    return survey_inside


@pytest.mark.parametrize("ordinary", [False, True], ids=["own", "nobody"])
def test_a_container_that_blocks_namespaces_gets_landlock(
    contained, require, ordinary: bool
) -> None:
    require("landlock")
    namespaces, landlock, mode = contained("docker", "landlock", ordinary=ordinary)
    assert "not permitted" in namespaces
    assert landlock >= 1
    assert mode == "landlock"


def test_a_container_that_blocks_namespaces_is_refused_where_they_are_demanded(contained) -> None:
    _, _, mode = contained("docker", "namespaces")
    assert mode.startswith("refused: ")
    assert "namespaces" in mode


def test_a_machine_with_neither_is_refused_and_told_what_to_mend(contained) -> None:
    namespaces, landlock, mode = contained("bare", "landlock")
    assert namespaces
    assert landlock == 0
    for part in ("landlock", "namespaces", "No enclave was started", "max_user_namespaces"):
        assert part in mode


def test_the_probe_agrees_for_an_ordinary_user(interpreter, require, checkout) -> None:
    require("namespaces")
    text = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fedark.sandbox import survey;"
        " print(survey().mode())"
    )
    done = subprocess.run(
        [*interpreter(True), "-I", "-S", "-B", "-c", text, str(checkout)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "namespaces"


@pytest.mark.parametrize(
    ("support", "minimum", "mode"),
    [
        (Support("", 6, True), "landlock", "namespaces"),
        (Support("", 0, True), "namespaces", "namespaces"),
        (Support("blocked", 6, True), "landlock", "landlock"),
        (Support("blocked", 6, True), "namespaces", None),
        (Support("blocked", 0, True), "landlock", None),
        (Support("", 6, False), "landlock", None),
    ],
)
def test_the_strongest_mode_is_taken_and_never_one_below_the_minimum(
    support: Support, minimum: str, mode: str | None
) -> None:
    if mode is None:
        with pytest.raises(SandboxUnavailable):
            support.mode(minimum)
    else:
        assert support.mode(minimum) == mode


def test_this_machine_is_surveyed_once() -> None:
    assert survey() is survey()
    assert sys.platform == "linux" or not survey().seccomp


@pytest.mark.parametrize(("kills", "found"), [(1, ""), (2, ""), (9, "the probe ended with -9")])
def test_a_probe_that_somebody_killed_says_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, found: str
) -> None:
    survey_module = importlib.import_module(
        "fedark.sandbox.survey"
    )  # the package has a function of that name
    deaths = tmp_path / "deaths"
    deaths.write_text("")
    script = (
        f"import os\nwith open({str(deaths)!r}, 'a') as file:\n    file.write('x')\n"
        f"if os.path.getsize({str(deaths)!r}) <= {kills}:\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setattr(survey_module, "_PROBE", script)
    assert survey_module._namespaces() == found
    assert deaths.read_text() == "x" * min(kills + 1, survey_module._PROBES)
