"""Confine this process before it touches a secret, in the one order that holds.

`enter` (one thread, nothing but the standard library loaded):
1. pin the host process; hide the arguments; leave its namespaces (mode "namespaces"); stop being
   dumpable, so that no process of the same user can attach, read memory or get a core; fork, so
   that the enclave's memory was never readable, not even for a moment;
2. new root with the measured files, read-only, and a scratch folder; the old root is let go;
3. an unprivileged user; no capabilities; no new privileges; parent-death signal (after the change
   of user, which clears it); landlock; resource limits; the filter for loading.
The caller loads its libraries and runs them once. `lock` then replaces standard streams by null,
closes what was left open, and installs the final filter for every thread. Only after it are keys
made. Exec comes before all of this and never again: an exec inside a user namespace would hand the
memory to the namespace's owner.

Mode "landlock" has no namespaces and no scratch folder: it can make no file at all.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedark.foundation.errors import SandboxUnavailable
from fedark.sandbox import landlock, monitor, seccomp
from fedark.sandbox.namespaces import SCRATCH, Mount, build_root, open_root, separate
from fedark.sandbox.syscalls import (
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    give_up_privileges,
    hide_arguments,
    prctl,
    set_capabilities,
)

__all__ = ["Mode", "Setup", "enter", "known_policies", "lock", "policy_digests"]

Mode = Literal["namespaces", "landlock"]

# systemd's range for dynamic users: reserved for exactly this, and assigned to nobody
# (systemd.exec(5), DynamicUser).
_FIRST_USER, _USERS = 61184, 4336
# What torch refuses to start without, and what it chooses its vector instructions by: without them
# it computes with none.
_KERNEL_FILES = (
    "/dev/urandom",
    "/proc/cpuinfo",
    *(
        f"/sys/devices/system/cpu/{name}"
        for name in ("kernel_max", "online", "possible", "present")
    ),
)
_MAPPING_SLACK = 8 << 30
_THREADS = 512
_THREADS_SHARED = 2048
"""Above what a user's processes have when an enclave starts that is counted with them: others of
that user may start later.
"""
_DESCRIPTORS = 256


@dataclass(frozen=True)
class Setup:
    """Everything that a confinement depends on; passes from launcher to enclave as a map, and holds
    no secret.

    Attributes:
        mode: "namespaces" or "landlock".
        landlock: the ABI to use; 0 for none, in mode "namespaces" only.
        host: process id of the host.
        channel: the descriptor to keep.
        roots: what may be read.
        listed: folders whose names, at any depth, may be listed though not all in them may be read:
            imports look for modules there. For mode "landlock"; a root of our own shows only what
            was put there.
        memory_bytes: writable memory (RLIMIT_DATA; what that does not count, the final filter
            refuses). Pages that are written and then made read-only count towards the address space
            alone, which is 8 GiB more: libraries reserve that much.
        scratch_bytes: size of the scratch folder; without effect in mode "landlock".
    """

    mode: Mode
    landlock: int
    host: int
    channel: int
    roots: tuple[Mount, ...]
    listed: tuple[str, ...]
    memory_bytes: int
    scratch_bytes: int

    def to_map(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_map(cls, value: dict[str, Any]) -> Setup:
        return cls(
            **{
                **value,
                "roots": tuple(Mount(**root) for root in value["roots"]),
                "listed": tuple(value["listed"]),
            }
        )

    @property
    def scratch(self) -> str | None:
        """The folder that may be written, if there is one."""
        return SCRATCH if self.mode == "namespaces" else None


def policy_digests(mode: str, landlock_abi: int) -> tuple[bytes, bytes]:
    """SHA-384 of the final system call policy, and of the landlock policy if there is one: claims
    of the enclave's evidence.
    """
    scratch = mode == "namespaces"
    files = landlock.policy_digest(landlock_abi, scratch=scratch) if landlock_abi else b""
    return seccomp.enclave_policy(0, scratch=scratch).digest(), files


def known_policies(
    minimum: str = "landlock",
) -> dict[str, tuple[tuple[bytes, ...], tuple[bytes, ...]]]:
    """What `policy_digests` can be on any kernel: mode -> (system call policies, landlock
    policies), from mode `minimum` on.

    Mode "landlock" has a landlock policy; in "namespaces" b"" stands for none, which a kernel
    without landlock leaves.
    """
    modes: tuple[Mode, ...] = (
        ("namespaces",) if minimum == "namespaces" else ("namespaces", "landlock")
    )
    abis = range(landlock.NEWEST + 1)
    found = {
        mode: [policy_digests(mode, abi) for abi in abis if abi or mode == "namespaces"]
        for mode in modes
    }
    return {
        mode: ((pairs[0][0],), tuple(files for _, files in pairs)) for mode, pairs in found.items()
    }


def enter(setup: Setup) -> None:
    """Confine this process for loading. Returns only in the enclave, which is a child of the
    process that called.

    Raises:
        SandboxUnavailable: some step was refused; nothing secret had been there.
    """
    try:
        _enter(setup)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise SandboxUnavailable(
            f"The sandbox of mode {setup.mode!r} could not be built{where}: {error.strerror}.",
            safe="The enclave was not started; it never had a key.",
            fix=(
                "`fedark.sandbox.survey` says what this machine offers."
                if error.errno != errno.ESTALE
                else (
                    "Files changed between measuring and starting: start it again when the"
                    " installation is at rest."
                )
            ),
        ) from None


def _enter(setup: Setup) -> None:
    host = monitor.pin_host(setup.host)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (files, files)
    )  # every root is open at once, for a moment
    os.umask(
        0o022
    )  # the private root's folders must be passable for the user that the enclave becomes
    root_user = os.geteuid() == 0
    user = (
        _FIRST_USER + os.getpid() % _USERS if root_user and _mapped(_FIRST_USER, _USERS) else None
    )
    own_count = user is not None or setup.mode == "namespaces"
    threads = _THREADS if own_count else _threads_of(os.getuid()) + _THREADS_SHARED
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(
        OSError
    ):  # without that call one more place in /proc is open: docs/threat-model.md
        hide_arguments()
    if setup.mode == "namespaces":
        separate(own_user=user is None)
    prctl(PR_SET_DUMPABLE, 0)
    kernel = (Mount.of(path) for path in _KERNEL_FILES if os.path.exists(path))
    roots = [(root, open_root(root)) for root in (*setup.roots, *kernel)]
    if setup.mode == "namespaces":
        owner = (user, user) if user is not None else (os.geteuid(), os.getegid())
        build_root(roots, scratch_bytes=setup.scratch_bytes, owner=owner)
    waiting, go = os.pipe()
    pid = os.fork()
    if pid:
        os.close(waiting)
        os.close(setup.channel)
        if monitor.traced(proc, pid):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(monitor.TRACED)
        os.write(go, b"1")
        # `go` stays open: its end tells the enclave that this process is gone.
        monitor.watch(host, pid)
    os.close(go)
    if os.read(waiting, 1) != b"1":
        os._exit(0)
    _become(user, setup)
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    prctl(PR_SET_DUMPABLE, 0)
    os.set_blocking(waiting, False)
    with suppress(BlockingIOError):
        if os.read(waiting, 1) == b"":
            os._exit(0)  # the monitor died before the signal was set
    if setup.landlock:
        scratch = (
            None if setup.scratch is None else os.open(setup.scratch, os.O_PATH | os.O_DIRECTORY)
        )
        # In a root of our own everything that can be listed was put there by us.
        folders = ("/",) if setup.mode == "namespaces" else setup.listed
        listed = [os.open(folder, os.O_PATH | os.O_DIRECTORY) for folder in folders]
        landlock.confine(
            setup.landlock,
            read=[descriptor for _, descriptor in roots],
            listed=listed,
            write=scratch,
        )
    _close_all_but(setup.channel)
    _limit(setup, threads)
    seccomp.install(seccomp.loading_policy(os.getpid()))


def lock(setup: Setup) -> None:
    """Close the door: no standard stream, no left-over descriptor, the final filter on every
    thread.

    Raises:
        SandboxUnavailable: the kernel refused the filter.
    """
    os.dup2(0, 1)
    os.dup2(0, 2)
    _close_all_but(setup.channel)
    seccomp.install(seccomp.enclave_policy(os.getpid(), scratch=setup.scratch is not None))


def _mapped(first: int, count: int) -> bool:
    """Whether these user numbers exist in this user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(start <= first and first + count <= start + length for start, _, length in ranges)


def _threads_of(user: int) -> int:
    """How many threads the processes of `user` have, as far as they are shown."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with (
                suppress(OSError, KeyError, ValueError),
                open(f"/proc/{name}/status", encoding="utf-8", errors="replace") as file,
            ):
                status = dict(
                    line.split(":", 1) for line in file if line.startswith(("Uid:", "Threads:"))
                )
                count += int(status["Threads"]) if int(status["Uid"].split()[0]) == user else 0
    return count


def _limit(setup: Setup, threads: int) -> None:
    """Resource limits, hard and soft.

    Args:
        threads: how many this user number may have. The kernel exempts user 0, with capabilities or
            without.
    """
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: setup.memory_bytes,
        resource.RLIMIT_AS: setup.memory_bytes + _MAPPING_SLACK,
        resource.RLIMIT_FSIZE: setup.scratch_bytes,
        resource.RLIMIT_NOFILE: _DESCRIPTORS,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        resource.RLIMIT_NICE: 0,
        resource.RLIMIT_NPROC: threads,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _become(user: int | None, setup: Setup) -> None:
    """Take the dedicated user number, where there is one, and give up every capability.

    Without namespaces, a root whose own files nobody else can reach (a Python below /root) stays
    user 0, without capabilities: landlock then bars what the file modes would not.
    """
    if user is not None and (setup.mode == "namespaces" or _reachable(user, setup.roots)):
        give_up_privileges()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        give_up_privileges()
    set_capabilities()


def _reachable(user: int, roots: tuple[Mount, ...]) -> bool:
    os.seteuid(user)
    try:
        return all(os.access(root.source, os.R_OK, effective_ids=True) for root in roots)
    finally:
        os.seteuid(0)


def _close_all_but(channel: int) -> None:
    os.closerange(3, channel)
    os.closerange(channel + 1, 1 << 20)
