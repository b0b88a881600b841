"""What runs in the sandbox cannot get out: each attack is tried for real, in both modes, as root
and as an ordinary user.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import stat
import threading
from pathlib import Path

import pytest

from fedark.enclave.usage import peak_mib

DENIED = {"EPERM", "EACCES"}
ABSENT = DENIED | {"ENOENT", "EROFS"}


def opened_to_all(folder: Path) -> Path:
    """`folder`, which every user may reach, read and write."""
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path(parent.anchor):
            parent.chmod(parent.stat().st_mode | 0o055)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that everyone may read and write, with a customer's record in it."""
    folder = opened_to_all(tmp_path_factory.mktemp("outside"))
    record = folder / "other-customer.csv"
    record.write_text("secret record")
    record.chmod(0o666)
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in a home folder that everyone may read: only the sandbox can refuse it."""
    file = opened_to_all(tmp_path_factory.mktemp("home")) / "home.txt"
    file.write_text("x")
    file.chmod(0o666)
    return file


@pytest.mark.attack(
    {"AF_UNIX": "unix socket", "AF_NETLINK": "netlink socket", "AF_VSOCK": "vsock socket"},
    param="family",
)
@pytest.mark.attack(
    {"SOCK_STREAM": "TCP socket", "SOCK_DGRAM": "UDP socket"},
    param="kind",
    where={"family": "AF_INET"},
)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("AF_INET", "SOCK_STREAM"),
        ("AF_INET", "SOCK_DGRAM"),
        ("AF_INET", "SOCK_RAW"),
        ("AF_INET6", "SOCK_STREAM"),
        ("AF_INET6", "SOCK_DGRAM"),
        ("AF_UNIX", "SOCK_STREAM"),
        ("AF_UNIX", "SOCK_DGRAM"),
        ("AF_NETLINK", "SOCK_RAW"),
        ("AF_VSOCK", "SOCK_STREAM"),
        ("AF_PACKET", "SOCK_RAW"),
        ("AF_ALG", "SOCK_SEQPACKET"),
    ],
)
def test_no_socket_of_any_family_can_be_made(inmate, family: str, kind: str) -> None:
    assert inmate.ask("socket", family, kind) == "EPERM"


@pytest.mark.parametrize(
    "name", ["socketpair", "connect", "bind", "sendto", "recvfrom", "sendmsg", "recvmsg"]
)
def test_the_channel_cannot_be_used_as_a_socket(inmate, name: str) -> None:
    assert inmate.ask("call", name, inmate.setup.channel, 0, 0, 0, 0, 0) == "EPERM"


@pytest.mark.attack({"/etc/passwd": "reading passwd"}, param="path")
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        "/proc/self/status",
        "/proc/1/environ",
        "/dev/mem",
    ],
)
def test_files_of_the_host_cannot_be_read(inmate, path: str) -> None:
    assert inmate.ask("open", path, "r") in ABSENT


@pytest.mark.attack("reading home")
def test_a_file_in_the_home_folder_cannot_be_read_though_its_mode_would_allow_it(
    inmate, home: Path
) -> None:
    assert inmate.ask("open", str(home), "r") in ABSENT


@pytest.mark.attack("reading another customer's data")
def test_another_customers_data_cannot_be_read_though_its_mode_would_allow_it(
    inmate, outside: Path
) -> None:
    assert inmate.ask("open", str(outside / "other-customer.csv"), "r") in ABSENT


def test_folders_of_the_host_cannot_be_listed(inmate, outside: Path) -> None:
    assert inmate.ask("list", str(outside)) in ABSENT
    if inmate.setup.mode == "namespaces":
        assert not inmate.ask("exists", str(outside))
        assert inmate.ask("list", "/proc") == ["cpuinfo"]
        assert inmate.ask("list", "/dev") == ["urandom"]
        shown = {Path(root.target).parts[1] for root in inmate.setup.roots}
        assert set(inmate.ask("list", "/")) <= shown | {
            "bin",
            "dev",
            "lib",
            "lib64",
            "proc",
            "sbin",
            "scratch",
            "sys",
        }
    else:
        assert inmate.ask("list", "/") == "EACCES"


@pytest.mark.attack("writing outside scratch")
def test_writing_outside_scratch_is_refused_though_the_folder_is_open_to_all(
    inmate, outside: Path
) -> None:
    assert inmate.ask("open", str(outside / "leak.txt"), "w") in ABSENT
    assert inmate.ask("open", str(outside / "other-customer.csv"), "a") in ABSENT
    assert inmate.ask("mkdir", str(outside / "leak")) in ABSENT
    assert inmate.ask("unlink", str(outside / "other-customer.csv")) in ABSENT
    assert inmate.ask("truncate", str(outside / "other-customer.csv")) in ABSENT
    assert sorted(path.name for path in outside.iterdir()) == ["other-customer.csv"]
    assert (outside / "other-customer.csv").read_text() == "secret record"


@pytest.mark.parametrize("folder", ["/", "/tmp", "/dev/shm", "/var/tmp", "."])
def test_no_file_can_be_made_in_the_usual_places(inmate, folder: str) -> None:
    assert inmate.ask("open", f"{folder}/fedark-leak", "w") in ABSENT


def test_measured_files_can_be_read_and_not_changed(inmate) -> None:
    measured = str(Path(inmate.setup.roots[1].target) / "__init__.py")
    assert inmate.ask("open", measured, "r") == "ok"
    for probe in ("chmod", "truncate", "unlink", "bare chown"):
        assert inmate.ask(probe, measured) in ABSENT
    assert inmate.ask("open", measured, "a") in ABSENT


@pytest.mark.attack("exec")
def test_no_program_can_be_executed(inmate) -> None:
    assert inmate.ask("exec") == "EPERM"
    assert inmate.ask("spawn") in ABSENT
    assert inmate.ask("call", "execveat", -100, 0, 0, 0, 0) == "EPERM"


@pytest.mark.attack("fork, and with it a fork bomb")
def test_no_process_can_be_made_so_a_fork_bomb_has_no_first_fork(inmate) -> None:
    assert inmate.ask("fork") == "EPERM"
    assert inmate.ask("call", "fork") == "EPERM"
    assert inmate.ask("call", "vfork") == "EPERM"
    assert inmate.ask("clone", 17) == "EPERM"  # SIGCHLD: what fork is made of


@pytest.mark.attack("namespaces by clone")
@pytest.mark.parametrize("flag", [0x2000_0000, 0x1000_0000, 0x4000_0000, 0x0002_0000])
def test_clone_makes_no_namespaces_not_even_as_a_thread(inmate, flag: int) -> None:
    assert inmate.ask("clone", 0x0001_0000 | flag) == "EPERM"


@pytest.mark.attack("clone3")
def test_clone3_does_not_exist_so_that_threads_work(inmate) -> None:
    assert inmate.ask("call", "clone3", 0, 0) == "ENOSYS"
    assert inmate.ask("threads", 8) == [i * i for i in range(8)]


@pytest.mark.attack("ptrace")
@pytest.mark.attack("process_vm_readv out of the enclave")
@pytest.mark.attack("kill")
@pytest.mark.parametrize("target", [1, "host", "monitor"])
def test_no_other_process_can_be_traced_read_or_signalled(inmate, target: int | str) -> None:
    pid = {"host": os.getpid(), "monitor": inmate.process.pid}.get(str(target), 1)
    assert inmate.ask("call", "ptrace", 16, pid, 0, 0) == "EPERM"
    assert inmate.ask("vm", "process_vm_readv", pid) == "EPERM"
    assert inmate.ask("vm", "process_vm_writev", pid) == "EPERM"
    assert inmate.ask("call", "kill", pid, 0) == "EPERM"
    assert inmate.ask("call", "tkill", pid, 0) == "EPERM"
    assert inmate.ask("call", "pidfd_open", pid, 0) == "EPERM"
    assert inmate.ask("call", "tgkill", pid if pid != 1 else 2, pid, 0) == "EPERM"


@pytest.mark.attack(
    {
        "unshare": "unshare",
        "mount": "mount",
        "io_uring_setup": "io_uring",
        "bpf": "bpf",
        "keyctl": "keyctl",
        "shmget": "shm",
        "memfd_create": "memfd",
    },
    param="name",
)
@pytest.mark.parametrize(
    "name",
    [
        "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount",
        "fsopen", "fsmount",
        "mount_setattr",
        "io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "keyctl", "add_key",
        "request_key", "userfaultfd",
        "perf_event_open", "memfd_create", "memfd_secret", "shmget", "shmat", "msgget", "semget",
        "mq_open", "pidfd_getfd",
        "kcmp", "process_madvise", "name_to_handle_at", "open_by_handle_at", "fanotify_init",
        "inotify_init1", "mknod",
        "init_module", "kexec_load", "reboot", "swapon", "acct", "quotactl", "iopl", "ioperm",
        "modify_ldt", "personality",
        "setuid", "setresuid", "setgroups", "capset", "setsid", "setrlimit", "setpriority",
        "sched_setscheduler", "splice",
        "vmsplice", "tee", "pkey_alloc", "seccomp", "landlock_create_ruleset",
        "landlock_restrict_self", "syslog",
    ],
)  # fmt: skip
def test_kernel_interfaces_that_an_enclave_needs_not_are_refused(inmate, name: str) -> None:
    assert inmate.ask("call", name, 0, 0, 0, 0, 0, 0) == "EPERM"


def test_flags_that_no_filter_could_see_have_no_call(inmate) -> None:
    assert inmate.ask("call", "openat2", -100, 0, 0, 0) == "ENOSYS"


@pytest.mark.attack("names of threads as a way out")
def test_a_thread_cannot_send_by_its_name_and_goes_on(inmate, refusal) -> None:
    process = Path(f"/proc/{inmate.pid()}")
    before = (process / "comm").read_text()
    assert inmate.ask("name threads", "secret record") == ["EPERM", "EPERM", 45]
    assert (process / "comm").read_text() == before
    assert inmate.ask("open", f"/proc/{inmate.pid()}/comm", "w") in ABSENT
    assert inmate.ask("open", "/proc/self/comm", "w") in ABSENT
    refusal("system call filter: no thread names itself (EPERM)")


@pytest.mark.attack("the command line as a way out")
def test_a_process_cannot_send_by_its_command_line(inmate, refusal) -> None:
    assert inmate.ask("write argument", "secret record") == "EPERM"
    assert Path(f"/proc/{inmate.pid()}/cmdline").read_bytes() == b""
    refusal("arguments hidden before the start: /proc shows none")


@pytest.mark.parametrize("option", [1, 4, 8, 23, 24, 28, 36, 38, 47, 0x59616D61])
def test_prctl_changes_nothing_that_confines(inmate, option: int) -> None:
    # PDEATHSIG, DUMPABLE, KEEPCAPS, CAPBSET_READ, CAPBSET_DROP, SECUREBITS, CHILD_SUBREAPER,
    # NO_NEW_PRIVS, CAP_AMBIENT, PTRACER
    assert inmate.ask("call", "prctl", option, 1, 0, 0, 0) == "EPERM"


@pytest.mark.parametrize("request_number", [0x5412, 0x541C, 0x8901, 0x8905])
def test_no_terminal_input_can_be_faked_and_no_device_driven(inmate, request_number: int) -> None:
    assert inmate.ask("call", "ioctl", 0, request_number, 0) == "ENOTTY"


@pytest.mark.attack("raising rlimits")
@pytest.mark.parametrize(
    "name", ["RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"]
)
def test_no_resource_limit_can_be_raised(inmate, name: str) -> None:
    assert inmate.ask("raise limit", name) in {"PermissionError", "ValueError"}


@pytest.mark.attack("memory bomb")
@pytest.mark.parametrize("kind", ["private", "shared", "stack"])
def test_a_memory_bomb_hits_its_limit_and_the_enclave_lives(inmate, kind: str, refusal) -> None:
    got = inmate.ask("memory bomb", kind, 16 << 30)
    if kind == "private":
        assert inmate.setup.memory_bytes / 2 < got < inmate.setup.memory_bytes
        refusal(f"RLIMIT_DATA after {got >> 20} MiB")
    else:
        assert got == 0
        refusal(f"system call filter: no {kind} memory (EPERM)")
    assert peak_mib(inmate.pid()) < inmate.setup.memory_bytes >> 20
    assert inmate.ask("sum of squares") == 332833500


def test_a_thread_bomb_hits_its_limit_and_the_enclave_lives_but_for_user_0_there_is_none(
    inmate,
) -> None:
    """User 0 remains where a root's enclave could not read its files as another user, in mode
    "landlock" alone.
    """
    user, most = inmate.ask("status")["uid"], 2500
    started = inmate.ask("thread bomb", most)
    if user == 0:
        assert inmate.setup.mode == "landlock"
        assert started == most
    elif inmate.setup.mode == "namespaces" or 61184 <= user < 65520:
        assert 8 <= started <= 512
    else:
        assert 512 <= started < most
    assert inmate.ask("threads", 4) == [0, 1, 4, 9]


@pytest.mark.attack("full scratch")
def test_scratch_is_small_or_absent(inmate, refusal) -> None:
    written, why = inmate.ask("fill", "/scratch", 64 << 20)
    if inmate.setup.mode == "namespaces":
        assert 0 < written <= inmate.setup.scratch_bytes
        assert why == "ENOSPC"
        assert inmate.ask("open", "/scratch/again", "w") == "ok"
        refusal(f"size of the scratch folder ({why}) after {written >> 10} KiB")
    else:
        assert (written, why) == (0, "EROFS")
        refusal("there is no scratch folder (EROFS)")


def test_scratch_takes_no_links_and_no_devices(inmate) -> None:
    assert inmate.ask("symlink", "/scratch/link") in DENIED
    assert inmate.ask("call", "mknod", 0, 0, 0) == "EPERM"


@pytest.mark.attack("inherited descriptors")
def test_descriptors_are_null_three_times_and_the_channel(inmate, refusal) -> None:
    found = inmate.ask("descriptors")
    assert set(found) == {"0", "1", "2", str(inmate.setup.channel)}
    for number in ("0", "1", "2"):
        mode, device = found[number]
        assert stat.S_ISCHR(mode)
        assert device == os.stat("/dev/null").st_rdev
    assert stat.S_ISSOCK(found[str(inmate.setup.channel)][0])
    refusal(f"closed before the lock: {len(found)} are left, null three times and the channel")


def test_it_has_no_privilege_no_environment_and_no_dump(inmate) -> None:
    status = inmate.ask("status")
    assert status["dumpable"] == 0
    assert status["no_new_privileges"] == 1
    assert not {key for key in status["environment"] if key not in {"LC_CTYPE", "PWD"}}
    seen = Path(f"/proc/{inmate.pid()}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in seen.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["Seccomp"].strip() == "2"
    assert fields["NoNewPrivs"].strip() == "1"
    if inmate.setup.mode == "namespaces":
        assert status["pid"] == 1
        assert status["host"] == "enclave"
        assert fields["Uid"].split()[0] != "0"


@pytest.mark.parametrize("ordinary", [False, True])
def test_the_files_that_are_refused_can_be_read_by_the_same_user_that_is_not_confined(
    confined, outside: Path, home: Path, ordinary: bool
) -> None:
    free = confined("landlock", free=True, ordinary=ordinary)
    assert free.ask("open", str(outside / "other-customer.csv"), "r") == "ok"
    assert free.ask("open", str(home), "r") == "ok"


def test_the_same_probes_succeed_in_a_process_that_is_not_confined(confined, outside: Path) -> None:
    free = confined("landlock", free=True)
    for family, kind in (
        ("AF_INET", "SOCK_STREAM"),
        ("AF_UNIX", "SOCK_DGRAM"),
        ("AF_NETLINK", "SOCK_RAW"),
    ):
        assert free.ask("socket", family, kind) == "ok"
    assert free.ask("open", "/etc/passwd", "r") == "ok"
    assert free.ask("open", str(outside / "other-customer.csv"), "r") == "ok"
    assert free.ask("open", str(outside / "leak.txt"), "w") == "ok"
    assert free.ask("unlink", str(outside / "leak.txt")) == "ok"
    for probe in ("fork", "spawn"):
        assert free.ask(probe) == "ok"
    assert free.ask("vm", "process_vm_readv", free.process.pid) == "ok"
    for name in ("memfd_create", "unshare", "setsid", "shmget", "msgget", "getpid"):
        assert (
            free.ask("call", name, *([0x10] if name == "memfd_create" else [0]), 0, 0) != "EPERM"
        ), name
    for kind in ("private", "shared", "stack"):
        assert free.ask("memory bomb", kind, 1 << 30) == 1 << 30
    assert free.ask("name threads", "secret record") == ["ok", "ok", 45]
    free.ask("write argument", "secret record")
    assert Path(f"/proc/{free.process.pid}/comm").read_text() == "secret record\n"
    assert Path(f"/proc/{free.process.pid}/cmdline").read_bytes().startswith(b"secret record")


# Files that the enclave and other accounts of the host can both read.
SHARED_FILE = str(Path(__file__).with_name("inmate.py"))


def in_memory(path: str) -> bool:
    """Whether the first page of a file is in memory, as any account that may read it can ask."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _on_disk(path: Path) -> bool:
    """Whether the file's pages can leave memory at all: those of a tmpfs cannot."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    kinds = {place: kind for place, kind in mounts if path.is_relative_to(place)}
    return kinds[max(kinds, key=len)] != "tmpfs"


class Waiter:
    """Waits, as any account that may read a file can, until somebody wakes it on its first word."""

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        with path.open("rb") as file:
            place = libc.mmap(
                None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0
            )
        word = ctypes.c_uint32.from_address(place).value
        call = (ctypes.c_long(202), ctypes.c_void_p(place), 0, word, None, None, 0)
        self.thread = threading.Thread(target=lambda: libc.syscall(*call), daemon=True)
        self.thread.start()


@pytest.mark.attack("evicted pages of a shared file as a way out")
def test_pages_of_a_file_that_others_can_read_cannot_be_evicted(inmate) -> None:
    assert inmate.ask("evict", SHARED_FILE) == "EPERM"
    assert inmate.ask("call", "mincore", 0, 0, 0) == "EPERM"
    assert inmate.ask("call", "readahead", 0, 0, 0) == "EPERM"
    assert inmate.ask("call", "preadv2", 0, 0, 0, 0, 0, 0x8) == "EPERM"
    for advice in (20, 21, 22, 3, 12):
        assert inmate.ask("call", "madvise", 0, 0, advice) == "EINVAL"


@pytest.mark.attack("waking a waiter on a shared file as a way out")
def test_nobody_is_woken_on_a_file_that_others_can_read(inmate, refusal) -> None:
    assert inmate.ask("wake", SHARED_FILE, False) == "EAGAIN"
    assert inmate.ask("wake", SHARED_FILE, True) == 0
    refusal("system call filter (EAGAIN for a shared futex); a private one wakes nobody else")
    assert inmate.ask("threads", 20) == [i * i for i in range(20)]  # and still they are joined


@pytest.mark.attack("the umask as a way out")
def test_the_umask_which_everybody_can_read_cannot_be_set(inmate) -> None:
    assert inmate.ask("umask") == "EPERM"


def test_without_the_filter_evicted_pages_a_wake_and_a_umask_tell_others(
    confined, outside: Path
) -> None:
    """The control: each of the three ways out works where nothing denies it."""
    free = confined("landlock", free=True)
    page = outside / "page.bin"
    with page.open("wb") as file:
        file.write(b"x" * mmap.PAGESIZE)
        os.fsync(file.fileno())
    page.read_bytes()
    assert in_memory(str(page))
    # Asking may itself bring the page back, so not every look finds it gone.
    gone = False
    for _ in range(1000):
        assert free.ask("evict", str(page)) == "ok"
        gone = gone or not in_memory(str(page))
    assert gone or not _on_disk(page)
    waiter = Waiter(page)
    woken = 0
    for _ in range(100_000):
        woken = free.ask("wake", str(page), False)
        if woken:
            break
    assert woken == 1
    waiter.thread.join(60)
    assert not waiter.thread.is_alive()
    assert free.ask("umask") == "ok"
    status = Path(f"/proc/{free.process.pid}/status").read_text()
    assert re.search(r"^Umask:\s0123$", status, re.MULTILINE)
