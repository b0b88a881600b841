"""Linux system calls over ctypes: numbers, and the few that Python's `os` does not have.

Numbers are those of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl); a test compares them with the
kernel's own header. Other architectures are refused by `fedark.sandbox.survey`: a filter that
nobody ran there would be worth nothing.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any, Final

__all__ = [
    "AUDIT_ARCH",
    "CAP_KILL",
    "NUMBERS",
    "give_up_privileges",
    "hide_arguments",
    "libc",
    "mount",
    "no_new_privileges",
    "prctl",
    "set_capabilities",
    "syscall",
]

AUDIT_ARCH: Final = 0xC000_003E
"""AUDIT_ARCH_X86_64 of linux/audit.h."""

# fmt: off
NUMBERS: Final[dict[str, int]] = {
    "accept": 43, "accept4": 288, "access": 21, "acct": 163, "add_key": 248, "adjtimex": 159,
    "arch_prctl": 158, "bind": 49, "bpf": 321, "brk": 12, "capget": 125, "capset": 126, "chmod": 90,
    "chown": 92, "chroot": 161, "clock_adjtime": 305, "clock_getres": 229, "clock_gettime": 228,
    "clock_nanosleep": 230, "clock_settime": 227, "clone": 56, "clone3": 435, "close": 3,
    "connect": 42, "creat": 85, "delete_module": 176, "dup": 32, "execve": 59, "execveat": 322,
    "exit": 60, "exit_group": 231, "faccessat": 269, "faccessat2": 439, "fadvise64": 221,
    "fallocate": 285, "fanotify_init": 300, "fanotify_mark": 301, "fchmod": 91, "fchmodat": 268,
    "fchown": 93, "fchownat": 260, "fcntl": 72, "fdatasync": 75, "finit_module": 313, "fork": 57,
    "fremovexattr": 199, "fsconfig": 431, "fsetxattr": 190, "fsmount": 432, "fsopen": 430,
    "fspick": 433, "fstat": 5, "fstatfs": 138, "fsync": 74, "ftruncate": 77, "futex": 202,
    "get_mempolicy": 239, "get_robust_list": 274, "getcpu": 309, "getcwd": 79, "getdents64": 217,
    "getegid": 108, "geteuid": 107, "getgid": 104, "getgroups": 115, "getpgid": 121, "getpgrp": 111,
    "getpid": 39, "getppid": 110, "getrandom": 318, "getresgid": 120, "getresuid": 118,
    "getrusage": 98, "getsid": 124, "gettid": 186, "gettimeofday": 96, "getuid": 102,
    "init_module": 175, "inotify_add_watch": 254, "inotify_init": 253, "inotify_init1": 294,
    "io_uring_enter": 426, "io_uring_register": 427, "io_uring_setup": 425, "ioctl": 16,
    "ioperm": 173, "iopl": 172, "ioprio_set": 251, "kcmp": 312, "kexec_file_load": 320,
    "kexec_load": 246, "keyctl": 250, "kill": 62, "landlock_add_rule": 445,
    "landlock_create_ruleset": 444, "landlock_restrict_self": 446, "lchown": 94, "listen": 50,
    "lookup_dcookie": 212, "lremovexattr": 198, "lseek": 8, "lsetxattr": 189, "lstat": 6,
    "madvise": 28, "mbind": 237, "membarrier": 324, "memfd_create": 319, "memfd_secret": 447,
    "migrate_pages": 256, "mincore": 27, "mkdir": 83, "mkdirat": 258, "mknod": 133, "mknodat": 259,
    "mmap": 9, "modify_ldt": 154, "mount": 165, "mount_setattr": 442, "move_mount": 429,
    "move_pages": 279, "mprotect": 10, "mq_getsetattr": 245, "mq_notify": 244, "mq_open": 240,
    "mq_timedreceive": 243, "mq_timedsend": 242, "mq_unlink": 241, "mremap": 25, "msgctl": 71,
    "msgget": 68, "msgrcv": 70, "msgsnd": 69, "msync": 26, "munmap": 11, "name_to_handle_at": 303,
    "nanosleep": 35, "newfstatat": 262, "nfsservctl": 180, "open": 2, "open_by_handle_at": 304,
    "open_tree": 428, "openat": 257, "openat2": 437, "perf_event_open": 298, "personality": 135,
    "pidfd_getfd": 438, "pidfd_open": 434, "pidfd_send_signal": 424, "pivot_root": 155,
    "pkey_alloc": 330, "pkey_free": 331, "pkey_mprotect": 329, "poll": 7, "ppoll": 271,
    "prctl": 157, "pread64": 17, "preadv2": 327, "prlimit64": 302, "process_madvise": 440,
    "process_mrelease": 448, "process_vm_readv": 310, "process_vm_writev": 311, "pselect6": 270,
    "ptrace": 101, "pwrite64": 18, "quotactl": 179, "quotactl_fd": 443, "read": 0, "readahead": 187,
    "readlink": 89, "readlinkat": 267, "readv": 19, "reboot": 169, "recvfrom": 45, "recvmmsg": 299,
    "recvmsg": 47, "removexattr": 197, "rename": 82, "renameat": 264, "renameat2": 316,
    "request_key": 249, "restart_syscall": 219, "rmdir": 84, "rseq": 334, "rt_sigaction": 13,
    "rt_sigpending": 127, "rt_sigprocmask": 14, "rt_sigqueueinfo": 129, "rt_sigreturn": 15,
    "rt_sigsuspend": 130, "rt_sigtimedwait": 128, "rt_tgsigqueueinfo": 297,
    "sched_get_priority_max": 146, "sched_get_priority_min": 147, "sched_getaffinity": 204,
    "sched_getparam": 143, "sched_getscheduler": 145, "sched_setattr": 314, "sched_setparam": 142,
    "sched_setscheduler": 144, "sched_yield": 24, "seccomp": 317, "select": 23, "semctl": 66,
    "semget": 64, "semop": 65, "semtimedop": 220, "sendmmsg": 307, "sendmsg": 46, "sendto": 44,
    "set_mempolicy": 238, "set_robust_list": 273, "set_tid_address": 218, "setdomainname": 171,
    "setfsgid": 123, "setfsuid": 122, "setgid": 106, "setgroups": 116, "sethostname": 170,
    "setns": 308, "setpgid": 109, "setpriority": 141, "setregid": 114, "setresgid": 119,
    "setresuid": 117, "setreuid": 113, "setrlimit": 160, "setsid": 112, "settimeofday": 164,
    "setuid": 105, "setxattr": 188, "shmat": 30, "shmctl": 31, "shmdt": 67, "shmget": 29,
    "sigaltstack": 131, "socket": 41, "socketpair": 53, "splice": 275, "stat": 4, "statfs": 137,
    "statx": 332, "swapoff": 168, "swapon": 167, "sync_file_range": 277, "sysfs": 139,
    "sysinfo": 99, "syslog": 103, "tee": 276, "tgkill": 234, "time": 201, "times": 100,
    "tkill": 200, "truncate": 76, "umask": 95, "umount2": 166, "uname": 63, "unlink": 87,
    "unlinkat": 263, "unshare": 272, "uselib": 134, "userfaultfd": 323, "vfork": 58, "vhangup": 153,
    "vmsplice": 278, "write": 1, "writev": 20,
}
# fmt: on

libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
PR_SET_MM, _PR_SET_MM_MAP = 35, 14
PR_SET_NAME, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = (
    15,
    24,
    28,
    38,
    47,
)
_AMBIENT_CLEAR_ALL = 4
# SECBIT_NOROOT, _NO_SETUID_FIXUP and _NO_CAP_AMBIENT_RAISE, each with its lock; not _KEEP_CAPS,
# whose lock keeps it off.
_SECUREBITS = 0b1110_1111
CAP_KILL, CAP_SETPCAP = 5, 8
_CAPABILITY_VERSION_3 = 0x2008_0522


def syscall(name: str, *arguments: Any) -> int:
    """Make a system call; integers are passed as 64 bits.

    Raises:
        OSError: with the kernel's error number.
    """
    result = int(
        libc.syscall(
            ctypes.c_long(NUMBERS[name]),
            *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments),
        )
    )
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def prctl(option: int, *arguments: int) -> int:
    """prctl(2) with integer arguments; the missing ones are zero.

    Raises:
        OSError: with the kernel's error number.
    """
    return syscall("prctl", option, *arguments, *[0] * (4 - len(arguments)))


def hide_arguments() -> None:
    """Let /proc/PID/cmdline show nothing: it is this process's own memory, which any user reads and
    this process may write.

    Raises:
        OSError: the kernel refused, or has no such call (one without CONFIG_CHECKPOINT_RESTORE).
    """
    with open("/proc/self/stat", "rb") as file:
        field = [
            0,
            0,
            0,
            *map(_number, file.read().rpartition(b")")[2].split()),
        ]  # as numbered in proc(5), from 3 on
    start_code, end_code, stack, start_data, end_data, start_break = (
        field[number] for number in (26, 27, 28, 45, 46, 47)
    )
    now = int(libc.sbrk(0))
    empty = (field[48], field[48], field[50], field[50])
    places = (start_code, end_code, start_data, end_data, start_break, now, stack, *empty)
    # struct prctl_mm_map: eleven addresses, an auxiliary vector of no length, and no other
    # executable.
    layout = ctypes.create_string_buffer(struct.pack("<11QQIi", *places, 0, 0, -1))
    syscall("prctl", PR_SET_MM, _PR_SET_MM_MAP, ctypes.byref(layout), 104, 0)


def _number(text: bytes) -> int:
    return int(text) if text.lstrip(b"-").isdigit() else 0


def no_new_privileges() -> None:
    """From here on, no exec gains a privilege; also the condition for unprivileged seccomp and
    landlock.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    """mount(2).

    Raises:
        OSError: with the kernel's error number.
    """
    syscall(
        "mount",
        *(None if s is None else s.encode() for s in (source, target, kind)),
        flags,
        options and options.encode(),
    )


def give_up_privileges() -> None:
    """Make sure that no later step regains a capability: bounding set, ambient set, secure bits.
    Call it while there is one thread.

    The sets that are in force stay; `set_capabilities` empties them. Without CAP_SETPCAP there is
    no bounding set to empty: no_new_privileges then forbids the same.

    Raises:
        OSError: the kernel refused.
    """
    if _effective() & (1 << CAP_SETPCAP):
        for capability in range(64):
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError:
                break  # past the last one that this kernel knows
        prctl(PR_SET_SECUREBITS, _SECUREBITS)
    prctl(PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
    no_new_privileges()


def set_capabilities(*keep: int) -> None:
    """Keep exactly these capabilities of this thread. Threads that already run are not touched.

    Raises:
        OSError: the kernel refused.
    """
    mask = sum(1 << capability for capability in keep)
    low, high = mask & 0xFFFF_FFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    syscall("capset", header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0))


def _effective() -> int:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    syscall("capget", header, data)
    return int(data[0]) | int(data[3]) << 32
