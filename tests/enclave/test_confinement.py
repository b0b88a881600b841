"""Evidence says what is installed: an enclave whose confinement the kernel does not show gets none,
and is ended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from fedark.enclave import launcher
from fedark.foundation.errors import EnclaveFailed, Refused
from fedark.measurement import Measurement
from fedark.measurement.tree import TreeEntry


@pytest.fixture
def sabotaged(probing, tmp_path: Path):
    """(lines) -> the measurement of a probe that runs them before it becomes an enclave: code of
    its own that is measured.
    """

    def make(lines: str) -> Measurement:
        folder = (tmp_path / "probe").resolve()
        real = Path(__file__).with_name("probe")
        shutil.copytree(real, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for parent in (folder, *folder.parents):
            if parent.stat().st_uid == os.geteuid() and parent != Path(parent.anchor):
                parent.chmod(parent.stat().st_mode | 0o055)
        script = folder / "main.py"
        marker = "from fedark.enclave.main import run  # noqa: E402\n"
        text = script.read_text()
        assert marker in text
        script.write_text(text.replace(marker, marker + lines))
        measurement = probing("aggregator")
        entry = TreeEntry(
            "main.py", "f", False, hashlib.sha384(script.read_bytes()).digest(), str(script)
        )
        entries = {
            **measurement.entries,
            "application": (*measurement.entries["application"], entry),
        }
        return dataclasses.replace(
            measurement, entry_point=script, visible=(*measurement.visible, folder), entries=entries
        )

    return make


NO_LOCK = "import fedark.enclave.main as m\nm.lock = lambda setup: None\n"
NO_FILTER = "from fedark.sandbox import seccomp\nseccomp.install = lambda policy: None\n"
NO_LOSS = (
    "from fedark.sandbox import confine\nconfine.set_capabilities = lambda *keep:"
    " None\nconfine._become = lambda *a: None\n"
)
NO_NAMESPACES = """
import dataclasses
from fedark.enclave import main as m
real = m.enter
m.enter = lambda setup: real(dataclasses.replace(setup, mode="landlock"))
m.lock = lambda setup, lock=m.lock: lock(dataclasses.replace(setup, mode="landlock"))
"""


@pytest.mark.parametrize("lines", [NO_LOCK, NO_FILTER], ids=["lock", "filter"])
def test_an_enclave_that_installs_no_filter_is_ended_before_it_counts_as_locked(
    start, sabotaged, lines: str
) -> None:
    with pytest.raises(Refused, match=r"lacks its system call filter"):
        start(measurement=sabotaged(lines))


def test_an_enclave_that_keeps_capabilities_is_ended(start, sabotaged) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root, which has some")
    with pytest.raises(Refused, match="lacks the loss of every capability"):
        start(measurement=sabotaged(NO_LOSS))


def test_an_enclave_without_the_namespaces_that_it_claims_is_ended(
    start, sabotaged, request
) -> None:
    if request.node.callspec.params["start"] != "namespaces":
        pytest.skip("a matter of the mode namespaces")
    with pytest.raises(Refused, match="lacks a process namespace, a root of its own"):
        start(measurement=sabotaged(NO_NAMESPACES))


def test_an_enclave_that_the_kernel_does_not_show_confined_gets_no_quote(
    do, start, monkeypatch: pytest.MonkeyPatch
) -> None:
    enclave = start()
    assert do(enclave, "quote").startswith(b"simulated")
    monkeypatch.setattr(launcher, "missing", lambda pid, mode: "its system call filter")
    with pytest.raises(Refused, match=r"lacks its system call filter"):
        do(enclave, "quote")
    with pytest.raises(EnclaveFailed):
        do(enclave, "echo")
