"""What an enclave may open, as a landlock domain (landlock(7)): read the measured roots, write the
scratch folder, nothing else.

Landlock needs no privilege and no namespace, so it is what remains in a container that forbids
both. The right to execute is granted nowhere. What the kernel is too old to handle is not silently
lost: the ABI is part of the policy's digest, and opening for writing is refused by the system call
filter as well where there is no scratch folder.

Landlock does not hide that a file exists (stat, readlink) and does not mediate sockets by path: the
filter denies sockets.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from stat import S_ISDIR
from typing import Final

from fedark.sandbox.syscalls import NUMBERS, libc, no_new_privileges, syscall

__all__ = ["NEWEST", "abi", "confine", "policy_digest"]

_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
# WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG; REFER (ABI 2) and TRUNCATE (ABI 3): no
# devices, sockets, pipes, links.
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14
# Rights on a file rather than a folder.
_FILE_RIGHTS = _READ_FILE | 1 << 1 | 1 << 14

# By ABI: file system rights it handles; network rights; scopes (abstract unix sockets, signals).
_FILESYSTEM: Final = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}
_NETWORK = 0b11
_SCOPES = 0b11
NEWEST = 6


def abi() -> int:
    """The landlock ABI of this kernel that is used here; 0 where there is none."""
    version = int(
        libc.syscall(
            NUMBERS["landlock_create_ruleset"],
            None,
            ctypes.c_size_t(0),
            ctypes.c_uint32(_VERSION_FLAG),
        )
    )
    return max(0, min(version, NEWEST))


def _handled(version: int) -> tuple[int, int, int]:
    return (
        _FILESYSTEM[min(version, 5)],
        _NETWORK if version >= 4 else 0,
        _SCOPES if version >= 6 else 0,
    )


def policy_digest(version: int, *, scratch: bool) -> bytes:
    """SHA-384 of the policy as data, 48 bytes. Paths are not part of it: roots are measured."""
    handled = _handled(version)
    text = repr(
        [
            "fedark/landlock/1",
            version,
            handled,
            _READ & handled[0],
            _WRITE & handled[0] if scratch else 0,
        ]
    )
    return hashlib.sha384(text.encode("ascii")).digest()


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("filesystem", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("parent", ctypes.c_int32))


def confine(
    version: int, *, read: Iterable[int], listed: Iterable[int] = (), write: int | None
) -> None:
    """Restrict this thread, and all that it starts from now on, for good. Call it while there is
    one thread.

    Args:
        version: the ABI to use, as `abi` gave it.
        read: descriptors of files and folders to read, with everything beneath.
        listed: descriptors of folders whose names may be listed, with everything beneath.
        write: descriptor of the scratch folder.

    Raises:
        OSError: the kernel refused.
    """
    filesystem, network, scopes = _handled(version)
    attributes = _Ruleset(filesystem, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = syscall("landlock_create_ruleset", ctypes.byref(attributes), size, 0)
    try:
        for descriptor in read:
            _allow(ruleset, descriptor, _READ & filesystem)
        for descriptor in listed:
            _allow(ruleset, descriptor, _READ_DIR)
        if write is not None:
            _allow(ruleset, write, (_READ | _WRITE) & filesystem)
        no_new_privileges()
        syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, descriptor: int, rights: int) -> None:
    if not S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= _FILE_RIGHTS
    rule = _PathBeneath(rights, descriptor)
    syscall("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
