"""From start to end: what is inherited, who may look inside, and that nothing outlives its host."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedark.sandbox import Mount
from fedark.sandbox.monitor import MONITOR, traced
from fedark.sandbox.namespaces import open_root

MODES = ["namespaces", "landlock"]

# Runs as the enclave's own user: tries every way into the memory of process argv[1], at address
# argv[2].
LOOK = """
import ctypes, os, sys
pid, address = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
found = []
try:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(address)
        found.append(memory.read(200))
except OSError:
    pass
class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
buffer = ctypes.create_string_buffer(200)
local, remote = Vector(ctypes.addressof(buffer), 200), Vector(address, 200)
if libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) > 0:
    found.append(b"process_vm_readv" + buffer.raw)
if libc.ptrace(16, pid, 0, 0) == 0:
    found.append(b"attached")
for name in ("environ", "maps", "ns/user", "fd"):
    try:
        path = f"/proc/{pid}/{name}"
        found.append(os.listdir(path) if name == "fd" else open(path, "rb").read(1)
            if name != "ns/user" else os.open(path, os.O_RDONLY))
    except OSError:
        pass
print(repr(found))
"""


@pytest.mark.attack("a process of the same user reading memory")
@pytest.mark.attack("process_vm_readv into the enclave")
@pytest.mark.parametrize("mode", MODES)
def test_another_process_of_the_same_user_cannot_read_its_memory(
    confined, interpreter, mode: str, refusal
) -> None:
    inmate = confined(mode, ordinary=True)
    address, _ = inmate.ask("secret")
    for pid in (inmate.pid(), inmate.process.pid):
        done = subprocess.run(
            [*interpreter(True), "-I", "-S", "-c", LOOK, str(pid), str(address)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[]"
        refusal("not dumpable: process_vm_readv, ptrace and /proc refuse")


def test_the_same_look_finds_the_secret_in_a_process_that_is_not_confined(
    confined, interpreter
) -> None:
    free = confined("landlock", ordinary=True, free=True)
    address, secret = free.ask("secret")
    command = [*interpreter(True), "-I", "-S", "-c", LOOK, str(free.process.pid), str(address)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    free.process.send_signal(signal.SIGCONT)  # attaching had stopped it
    assert secret in done.stdout
    assert "attached" in done.stdout
    assert "process_vm_readv" in done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_root_of_the_host_does_read_its_memory_which_is_why_simulation_protects_nothing_from_it(
    confined, mode: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    inmate = confined(mode)
    address, secret = inmate.ask("secret")
    with open(f"/proc/{inmate.pid()}/mem", "rb") as memory:
        memory.seek(address)
        assert secret.encode() in memory.read(200)


@pytest.mark.parametrize("ordinary", [False, True], ids=["own", "nobody"])
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_monitor_takes_the_enclave_along(
    confined, gone, mode: str, ordinary: bool
) -> None:
    inmate = confined(mode, ordinary=ordinary)
    pid = inmate.pid()
    inmate.process.kill()
    assert gone(pid)


@pytest.mark.parametrize("mode", MODES)
def test_a_closed_channel_ends_enclave_and_monitor(confined, gone, mode: str) -> None:
    inmate = confined(mode)
    pid = inmate.pid()
    assert inmate.close() == 0
    assert gone(pid)


@pytest.mark.parametrize("mode", MODES)
def test_terminating_the_monitor_ends_a_busy_enclave_and_says_by_which_signal(
    confined, gone, mode: str
) -> None:
    inmate = confined(mode)
    pid = inmate.pid()
    inmate.channel.sendall(b'["sleep", 600]\n')
    inmate.process.send_signal(signal.SIGTERM)
    assert inmate.process.wait(30) == 128 + signal.SIGKILL
    assert gone(pid)


@pytest.mark.attack("x32 calls")
@pytest.mark.parametrize("mode", MODES)
def test_an_x32_call_kills_and_the_exit_code_says_so(confined, mode: str, refusal) -> None:
    inmate = confined(mode)
    with pytest.raises(EOFError):
        inmate.ask("x32")
    assert inmate.process.wait(30) == 128 + signal.SIGSYS
    refusal("system call filter: foreign call table, killed (SIGSYS)")


@pytest.mark.parametrize("mode", MODES)
def test_descriptors_and_environment_of_the_host_do_not_come_along(
    confined, mode: str, tmp_path: Path
) -> None:
    with (tmp_path / "host-file").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        inmate = confined(mode, leak=(file.fileno(),))
        assert set(inmate.ask("descriptors")) == {"0", "1", "2", str(inmate.setup.channel)}


@pytest.mark.parametrize("mode", MODES)
def test_of_a_monitor_and_its_enclave_the_host_sees_a_name_and_no_command_line(
    confined, mode: str
) -> None:
    inmate = confined(mode)
    assert Path(f"/proc/{inmate.process.pid}/comm").read_text().strip() == MONITOR
    for pid in (inmate.process.pid, inmate.pid()):
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b""


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_behind(confined, mode: str) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    inmate = confined(mode)
    inmate.ask("fill", "/scratch", 1 << 16)
    inmate.close()
    assert Path("/proc/self/mountinfo").read_text() == before


def test_a_folder_exchanged_for_a_link_or_another_one_is_not_opened(tmp_path: Path) -> None:
    folder, other = tmp_path / "measured", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    root = Mount.of(str(folder))
    os.close(open_root(root))
    folder.rename(tmp_path / "away")
    folder.symlink_to(other)
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        open_root(root)
    folder.unlink()
    other.rename(folder)
    with pytest.raises(OSError, match="not the one that was measured"):
        open_root(root)


def test_a_link_anywhere_on_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "measured").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    real = Mount.of(str(tmp_path / "link" / "measured"))
    assert real.source == str(tmp_path / "real" / "measured")
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        open_root(dataclasses.replace(real, source=str(tmp_path / "link" / "measured")))


def test_a_traced_process_is_recognised() -> None:
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            (
                f"import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, 0, 0); os.write({writer},"
                " b'1'); os.read(0, 1)"
            ),
        ],
        stdin=subprocess.PIPE,
        pass_fds=(writer,),
    )
    try:
        assert os.read(reader, 1) == b"1"
        assert traced(proc, child.pid)
        assert not traced(proc, os.getpid())
    finally:
        ctypes.CDLL(None).ptrace(7, child.pid, 0, 0)
        child.kill()
        child.wait()
        for descriptor in (proc, reader, writer):
            os.close(descriptor)


def test_an_old_kernels_landlock_confines_too(confined) -> None:
    for abi in (1, 2, 3, 4, 5):
        inmate = confined("landlock", landlock=abi)
        assert inmate.ask("open", "/etc/passwd", "r") == "EACCES"
        assert inmate.ask("open", "/tmp/fedark-leak", "w") == "EROFS"
        assert inmate.ask("socket", "AF_INET", "SOCK_STREAM") == "EPERM"


def test_namespaces_without_landlock_confine_too(confined) -> None:
    inmate = confined("namespaces", landlock=0)
    assert inmate.ask("open", "/etc/passwd", "r") == "ENOENT"
    assert inmate.ask("open", "/usr/fedark-leak", "w") == "EROFS"
    assert inmate.ask("open", "/scratch/file", "w") == "ok"


def test_root_becomes_a_user_that_nobody_is(confined) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root")
    first = confined("namespaces")
    user = first.ask("status")["uid"]
    assert 61184 <= user < 65520
    assert first.ask("status")["groups"] == []
