"""Which system calls an enclave may make: the two filters, and how they are installed (seccomp(2)).

- `loading_policy` stands while libraries are loaded. It denies what reaches outside: network, new
  programs and processes, other processes' memory, mounts, namespaces, kernel interfaces with a
  history (io_uring, bpf, keyctl, userfaultfd, perf).
- `enclave_policy` stands before the first key exists and until the end. It allows what a training
  step needs and nothing else.

The channel is an inherited socket that is read and written with read(2) and write(2): no socket
call is allowed at all, so no descriptor can be passed in either. clone3 answers "no such call",
whereupon libc starts threads through clone, whose flags a filter can see: threads yes, processes
no. Denied calls return EPERM, which libraries survive; foreign call tables kill. Both filters are
installed for every thread at once (TSYNC); they stack, and none can be taken off.

The measured files are the installation's own, so other accounts of the host may be able to read
them too. What one process does to such a file's pages or waiters, another can see. The final filter
therefore leaves no call that evicts pages (fadvise64, madvise's page-out), asks which are in memory
(mincore, preadv2, cachestat), or waits on or wakes a futex that is not private to the process. It
also takes no umask and no advice to merge equal pages. docs/threat-model.md says what remains.
"""

from __future__ import annotations

import ctypes
import errno as codes

from fedark.foundation.errors import SandboxUnavailable
from fedark.sandbox.bpf import ALLOW, Arg, SyscallPolicy, SyscallRule, compile_policy, errno
from fedark.sandbox.syscalls import NUMBERS, PR_SET_MM, libc, no_new_privileges, syscall

__all__ = ["available", "enclave_policy", "install", "loading_policy"]

_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_FLAG_TSYNC = 1

_CLONE_THREAD = 0x0001_0000
# Every CLONE_NEW* flag that clone(2) takes.
_CLONE_NAMESPACES = (
    0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000
)

# O_WRONLY | O_RDWR | O_CREAT | O_TRUNC | O_TMPFILE's own bit.
_OPEN_WRITES = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000

# MAP_SHARED with MAP_ANONYMOUS, and MAP_GROWSDOWN: memory that RLIMIT_DATA does not count.
_UNCOUNTED = (0x01 | 0x20, 0x100)

_EPERM = errno(codes.EPERM)
_SELF = "own process id"


def _calls(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_OUTSIDE = _calls(
    "socket socketpair bind listen accept accept4 connect sendto recvfrom sendmsg recvmsg sendmmsg"
    " recvmmsg execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise"
    " process_mrelease kcmp pidfd_open pidfd_getfd pidfd_send_signal kill tkill rt_sigqueueinfo"
    " rt_tgsigqueueinfo mount umount2 mount_setattr move_mount open_tree fsopen fsconfig fsmount"
    " fspick pivot_root chroot unshare setns io_uring_setup io_uring_enter io_uring_register bpf"
    " keyctl add_key request_key userfaultfd perf_event_open memfd_create memfd_secret shmget shmat"
    " shmctl shmdt msgget msgsnd msgrcv msgctl semget semop semctl semtimedop mq_open mq_unlink"
    " mq_timedsend mq_timedreceive mq_notify mq_getsetattr init_module finit_module delete_module"
    " kexec_load kexec_file_load reboot swapon swapoff acct quotactl quotactl_fd name_to_handle_at"
    " open_by_handle_at fanotify_init fanotify_mark inotify_init inotify_init1 inotify_add_watch"
    " iopl ioperm modify_ldt personality syslog vhangup sethostname setdomainname settimeofday"
    " adjtimex clock_settime clock_adjtime setuid setgid setreuid setregid setresuid setresgid"
    " setfsuid setfsgid setgroups capset setsid setpgid setrlimit setpriority sched_setscheduler"
    " sched_setparam sched_setattr ioprio_set mknod mknodat chown lchown fchown fchownat setxattr"
    " lsetxattr fsetxattr removexattr lremovexattr fremovexattr migrate_pages move_pages pkey_alloc"
    " pkey_free pkey_mprotect vmsplice splice tee lookup_dcookie uselib sysfs nfsservctl"
    " landlock_create_ruleset landlock_add_rule landlock_restrict_self"
)

_NEEDED = _calls(
    "read write readv writev pread64 lseek close fstat newfstatat stat lstat statx access faccessat"
    " faccessat2 getdents64 getcwd readlink readlinkat statfs fstatfs dup pwrite64 ftruncate fsync"
    " fdatasync mmap munmap mremap mprotect brk msync mbind get_mempolicy set_mempolicy membarrier"
    " sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max"
    " sched_get_priority_min rseq getcpu restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn"
    " sigaltstack rt_sigtimedwait rt_sigsuspend rt_sigpending poll ppoll select pselect6 nanosleep"
    " clock_nanosleep clock_gettime clock_getres gettimeofday time times"
    " getrusage sysinfo uname getrandom getpid gettid getppid getuid geteuid getgid getegid"
    " getresuid getresgid getgroups getpgrp getpgid getsid exit exit_group"
)

_SCRATCH = _calls(
    "mkdir mkdirat unlink unlinkat rmdir rename renameat renameat2 truncate fallocate chmod fchmod"
    " fchmodat"
)

# MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE and MADV_NOHUGEPAGE: what allocators say of their own
# memory. Any other advice is answered as by a kernel that does not know it.
_ADVICE = (4, 8, 14, 15)
# FUTEX_PRIVATE_FLAG. The one shared wait that libraries need is pthread_join's, for the kernel's
# own wake when a thread has ended; told to try again (EAGAIN), it looks at the thread again.
_FUTEX_PRIVATE = 128

# TCGETS, which Python's open() asks of every file, FIONREAD, and the two ways to set close-on-exec.
_IOCTLS = (0x5401, 0x541B, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, no owner, no signals, no
# leases, no seals.
_FCNTLS = (0, 1, 2, 3, 4, 1030)
# PR_GET_DUMPABLE, PR_GET_NAME, PR_GET_SECCOMP, PR_GET_NO_NEW_PRIVS, PR_SET_VMA. Not PR_SET_NAME:
# every user of the host reads the names of threads in /proc. Libraries that would name theirs go on
# without.
_PRCTLS = (3, 16, 21, 39, 0x53564D41)
# ARCH_GET_XCOMP_SUPP, ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM: how matrix kernels switch AMX on.
_ARCH_PRCTLS = (0x1021, 0x1022, 0x1023)
_LOW = 0xFFFF_FFFF


def _threads_only() -> tuple[SyscallRule, ...]:
    return (
        SyscallRule(errno(codes.ENOSYS), ("clone3",)),
        SyscallRule(ALLOW, ("clone",), (Arg(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NAMESPACES),)),
        SyscallRule(_EPERM, ("clone",)),
    )


def _own_signals(pid: int) -> tuple[SyscallRule, ...]:
    return (
        SyscallRule(ALLOW, ("tgkill",), (Arg(0, pid, _LOW, symbol=_SELF),)),
        SyscallRule(_EPERM, ("tgkill",)),
    )


def _limits_read_only() -> tuple[SyscallRule, ...]:
    return (SyscallRule(ALLOW, ("prlimit64",), (Arg(2, 0),)), SyscallRule(_EPERM, ("prlimit64",)))


def loading_policy(pid: int) -> SyscallPolicy:
    """The filter while libraries load, for the process `pid` (as it sees itself): a list of what is
    denied.

    openat2 takes its flags through memory, which no filter sees, so it is absent from here on. What
    `hide_arguments` hid stays so.
    """
    return SyscallPolicy(
        "loading",
        ALLOW,
        (
            *_threads_only(),
            *_own_signals(pid),
            *_limits_read_only(),
            SyscallRule(_EPERM, ("prctl",), (Arg(0, PR_SET_MM, _LOW),)),
            SyscallRule(errno(codes.ENOSYS), ("openat2",)),
            SyscallRule(_EPERM, _OUTSIDE),
        ),
    )


def enclave_policy(pid: int, *, scratch: bool) -> SyscallPolicy:
    """The filter of a running enclave, for the process `pid` (as it sees itself): a list of what is
    allowed.

    Args:
        scratch: whether files may be made at all. Without, even opening one to write is refused,
            whatever its path.
    """
    opens: tuple[SyscallRule, ...] = (SyscallRule(ALLOW, ("open", "openat")),)
    if not scratch:
        opens = (
            SyscallRule(ALLOW, ("open",), (Arg(1, 0, _OPEN_WRITES),)),
            SyscallRule(ALLOW, ("openat",), (Arg(2, 0, _OPEN_WRITES),)),
            SyscallRule(errno(codes.EROFS), ("open", "openat", "creat")),
        )
    return SyscallPolicy(
        "enclave with scratch" if scratch else "enclave",
        _EPERM,
        (
            *(SyscallRule(_EPERM, ("mmap",), (Arg(3, flags, flags),)) for flags in _UNCOUNTED),
            SyscallRule(ALLOW, _NEEDED),
            *opens,
            *((SyscallRule(ALLOW, _SCRATCH),) if scratch else ()),
            *_threads_only(),
            *_own_signals(pid),
            *_limits_read_only(),
            SyscallRule(ALLOW, ("futex",), (Arg(1, _FUTEX_PRIVATE, _FUTEX_PRIVATE),)),
            SyscallRule(errno(codes.EAGAIN), ("futex",)),
            *(SyscallRule(ALLOW, ("madvise",), (Arg(2, advice, _LOW),)) for advice in _ADVICE),
            SyscallRule(errno(codes.EINVAL), ("madvise",)),
            *(SyscallRule(ALLOW, ("ioctl",), (Arg(1, number, _LOW),)) for number in _IOCTLS),
            SyscallRule(errno(codes.ENOTTY), ("ioctl",)),
            *(SyscallRule(ALLOW, ("fcntl",), (Arg(1, number, _LOW),)) for number in _FCNTLS),
            *(SyscallRule(ALLOW, ("prctl",), (Arg(0, number, _LOW),)) for number in _PRCTLS),
            *(
                SyscallRule(ALLOW, ("arch_prctl",), (Arg(0, number, _LOW),))
                for number in _ARCH_PRCTLS
            ),
            SyscallRule(errno(codes.ENOSYS), ("openat2",)),
        ),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def available() -> bool:
    """Whether this kernel has seccomp filters."""
    verdict = ctypes.c_uint32(_EPERM & 0xFFFF_0000)
    return bool(libc.syscall(NUMBERS["seccomp"], _GET_ACTION_AVAIL, 0, ctypes.byref(verdict)) == 0)


def install(policy: SyscallPolicy) -> None:
    """Install `policy` for all threads of this process, irrevocably.

    Raises:
        SandboxUnavailable: the kernel refused, or some thread could not be brought under the
            filter.
    """
    no_new_privileges()
    program = compile_policy(policy)
    filled = _Program(len(program) // 8, program)
    try:
        stuck = syscall("seccomp", _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(filled))
    except OSError as error:
        raise SandboxUnavailable(
            f"The kernel refused the system call filter {policy.name!r}: {error.strerror}.",
            safe="The enclave was not started.",
            fix="A kernel with CONFIG_SECCOMP_FILTER is needed.",
        ) from None
    if stuck:
        raise SandboxUnavailable(
            f"Thread {stuck} could not be brought under the filter {policy.name!r}.",
            safe="The enclave was not started.",
        )
