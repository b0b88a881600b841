"""The policies themselves: numbers, verdicts, and digests that say what was installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedark.sandbox import landlock, policy_digests
from fedark.sandbox.bpf import ALLOW, compile_policy, errno
from fedark.sandbox.seccomp import enclave_policy, loading_policy
from fedark.sandbox.syscalls import NUMBERS

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

# What no policy may ever let through, whatever else changes.
NEVER = [
    "socket",
    "socketpair",
    "connect",
    "bind",
    "execve",
    "execveat",
    "fork",
    "vfork",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "kill",
    "tkill",
    "mount",
    "umount2",
    "unshare",
    "setns",
    "pivot_root",
    "chroot",
    "io_uring_setup",
    "bpf",
    "keyctl",
    "memfd_create",
    "shmget",
    "userfaultfd",
    "perf_event_open",
    "seccomp",
    "pidfd_open",
    "pidfd_getfd",
    "sendmsg",
    "recvmsg",
    "setrlimit",
    "open_by_handle_at",
    "capset",
]
# What shows other accounts, or asks of them, something about files that they can read too.
OF_SHARED_FILES = [
    "fadvise64",
    "mincore",
    "preadv2",
    "readahead",
    "set_robust_list",  # the kernel wakes whom it names when a thread ends
    "set_tid_address",  # the same
    "sync_file_range",
    "umask",  # stands in /proc/PID/status
]


def verdict(policy, name: str, arguments: tuple[int, ...] = (0, 0, 0, 0, 0, 0)) -> int:
    for rule in policy.rules:
        if name in rule.calls and all(
            arguments[arg.index] & arg.mask == arg.value for arg in rule.when
        ):
            return rule.verdict
    return policy.default


@pytest.mark.skipif(not HEADER.is_file(), reason="no kernel headers here")
def test_call_numbers_are_the_kernels() -> None:
    header = {
        name: int(number)
        for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())
    }
    assert {name: header.get(name) for name in NUMBERS} == NUMBERS


@pytest.mark.parametrize("name", NEVER)
def test_no_running_enclave_may_ever(name: str) -> None:
    for scratch in (True, False):
        assert verdict(enclave_policy(1, scratch=scratch), name) != ALLOW


@pytest.mark.parametrize("name", OF_SHARED_FILES)
def test_no_running_enclave_may_tell_others_by_files_that_they_share(name: str) -> None:
    for scratch in (True, False):
        assert verdict(enclave_policy(1, scratch=scratch), name) == errno(1)


@pytest.mark.parametrize("scratch", [True, False])
def test_a_futex_is_private_or_not_waited_on_at_all(scratch: bool) -> None:
    policy = enclave_policy(1, scratch=scratch)
    for operation in range(14):
        for clock in (0, 256):
            private, shared = ((0, operation | clock | bit, 0, 0, 0, 0) for bit in (128, 0))
            assert verdict(policy, "futex", private) == ALLOW
            assert verdict(policy, "futex", shared) == errno(11)


@pytest.mark.parametrize("scratch", [True, False])
def test_advice_is_about_memory_of_ones_own(scratch: bool) -> None:
    policy = enclave_policy(1, scratch=scratch)
    allowed = {a for a in range(256) if verdict(policy, "madvise", (0, 0, a, 0, 0, 0)) == ALLOW}
    assert allowed == {4, 8, 14, 15}
    page_out, cold, populate, mergeable = 21, 20, 22, 12
    assert not allowed & {page_out, cold, populate, mergeable}


@pytest.mark.parametrize("name", [name for name in NEVER if name != "seccomp"])
def test_loading_libraries_may_not_either(name: str) -> None:
    assert verdict(loading_policy(1), name) == errno(1)


def test_whatever_the_loading_filter_denies_the_final_one_denies() -> None:
    loading = loading_policy(1)
    for scratch in (True, False):
        final = enclave_policy(1, scratch=scratch)
        for name in NUMBERS:
            if verdict(loading, name) != ALLOW:
                assert verdict(final, name) != ALLOW, name


@pytest.mark.parametrize("flags", [0o1, 0o2, 0o100, 0o1000, 0o20200000, 0o2 | 0o2000])
def test_without_scratch_nothing_opens_for_writing_by_any_call(flags: int) -> None:
    policy = enclave_policy(1, scratch=False)
    assert verdict(policy, "openat", (0, 0, flags, 0, 0, 0)) == errno(30)
    assert verdict(policy, "open", (0, flags, 0, 0, 0, 0)) == errno(30)
    assert verdict(policy, "creat") == errno(30)
    assert verdict(policy, "openat", (0, 0, 0o2000000, 0, 0, 0)) == ALLOW


def test_an_enclave_signals_only_itself() -> None:
    policy = enclave_policy(41, scratch=True)
    assert verdict(policy, "tgkill", (41, 0, 0, 0, 0, 0)) == ALLOW
    assert verdict(policy, "tgkill", (42, 0, 0, 0, 0, 0)) == errno(1)


def test_programs_fit_the_kernel() -> None:
    for policy in (
        loading_policy(1),
        enclave_policy(1, scratch=True),
        enclave_policy(1, scratch=False),
    ):
        assert len(compile_policy(policy)) // 8 < 4096


def test_digests_tell_modes_and_kernels_apart() -> None:
    digests = {
        (mode, abi): policy_digests(mode, abi)
        for mode in ("namespaces", "landlock")
        for abi in range(1, landlock.abi() + 1)
    }
    assert len({seccomp for seccomp, _ in digests.values()}) == 2
    assert policy_digests("namespaces", 0)[1] == b""
    assert all(len(one) == 48 and len(two) == 48 for one, two in digests.values())
    assert digests["landlock", 1][1] != digests["namespaces", 1][1]
    assert len({files for _, files in digests.values()}) == len(digests)


def test_digests_do_not_depend_on_the_process_that_asks() -> None:
    assert enclave_policy(1, scratch=True).digest() == enclave_policy(99, scratch=True).digest()


@pytest.mark.parametrize("flags", [0x21, 0x23, 0x8021, 0x122])
def test_memory_that_no_limit_counts_cannot_be_mapped(flags: int) -> None:
    for scratch in (True, False):
        policy = enclave_policy(1, scratch=scratch)
        assert verdict(policy, "mmap", (0, 0, 3, flags, 0, 0)) == errno(1)
        for private in (0x22, 0x2, 0x1, 0x20022):
            assert verdict(policy, "mmap", (0, 0, 3, private, 0, 0)) == ALLOW
