"""A world of its own for a process: user, mount, network, process, IPC, host-name and cgroup
namespaces (namespaces(7)).

The new root is an empty, read-only tmpfs in which the measured files and folders stand at the paths
that they have outside, bound read-only, and one small scratch tmpfs. There is no /proc, /sys or
/dev but the few files that the caller names, and no network interface but a dead loopback.
Roots are opened once, without following a symbolic link anywhere on the way, and what was opened is
what is bound: exchanging a folder for a link, or for another folder, between hashing and binding is
refused.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from stat import S_ISCHR, S_ISDIR
from typing import Final

from fedark.sandbox.syscalls import mount, syscall

__all__ = ["SCRATCH", "Mount", "build_root", "open_root", "separate"]

SCRATCH: Final = "/scratch"
"""Where the scratch folder is inside the new root."""

_NEW_MOUNT, _NEW_CGROUP, _NEW_UTS, _NEW_IPC = 0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000
_NEW_USER, _NEW_PID, _NEW_NET = 0x1000_0000, 0x2000_0000, 0x4000_0000
_ALL_BUT_USER = _NEW_MOUNT | _NEW_CGROUP | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x4_0000
_MNT_DETACH = 2
_AT_EMPTY_PATH, _AT_RECURSIVE, _OPEN_TREE_CLONE = 0x1000, 0x8000, 1
_MOVE_MOUNT_FROM_EMPTY_PATH = 4
_ATTR_READ_ONLY, _ATTR_NO_SUID, _ATTR_NO_DEV, _ATTR_NO_EXEC = 0x1, 0x2, 0x4, 0x8
_RESOLVE_NO_SYMLINKS = 0x4
_SCRATCH_FILES = 4096
_HOST_NAME = b"enclave"


@dataclass(frozen=True)
class Mount:
    """A measured file or folder: where it is, where it shall be seen, and which one it is.

    Attributes:
        source: absolute path without symbolic links.
        target: absolute path inside the new root; differs from `source` for a library that is known
            by its soname.
        device, inode: identity at the time it was measured.
    """

    source: str
    target: str
    device: int
    inode: int

    @classmethod
    def of(cls, source: str, target: str | None = None) -> Mount:
        """The root at `source`, links resolved, as it is now; `target` is a name for it that may be
        a link.

        Raises:
            OSError: there is none.
        """
        real = os.path.realpath(source, strict=True)
        status = os.stat(real)
        if target is None:
            return cls(real, real, status.st_dev, status.st_ino)
        folder, name = os.path.split(target)
        return cls(real, os.path.join(os.path.realpath(folder), name), status.st_dev, status.st_ino)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


def open_root(root: Mount) -> int:
    """A descriptor (O_PATH) of exactly the file or folder that was measured.

    Raises:
        OSError: it is gone, stands behind a symbolic link, or is another one by now (ESTALE).
    """
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS)
    descriptor = syscall(
        "openat2", -100, root.source.encode(), ctypes.byref(how), ctypes.sizeof(how)
    )
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) != (root.device, root.inode):
        os.close(descriptor)
        raise OSError(116, "It is not the one that was measured", root.source)
    return descriptor


def separate(*, own_user: bool) -> None:
    """Leave the namespaces of the host. The next child is process 1 of the new process namespace.

    Args:
        own_user: make a user namespace too, in which this user keeps its number: the way of an
            ordinary user.

    Raises:
        OSError: the kernel, or who confines this machine, refuses.
    """
    user, group = os.geteuid(), os.getegid()
    syscall("unshare", _ALL_BUT_USER | (_NEW_USER if own_user else 0))
    if own_user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    syscall("sethostname", _HOST_NAME, len(_HOST_NAME))


def build_root(
    roots: Sequence[tuple[Mount, int]], *, scratch_bytes: int, owner: tuple[int, int]
) -> None:
    """Make the new root, move into it, and let go of the old one.

    Args:
        roots: what to show, each with its descriptor from `open_root`, opened after `separate`.
        scratch_bytes: size of the scratch folder.
        owner: user and group of the scratch folder.

    Raises:
        OSError: the kernel refused.
    """
    trees = [
        (root, _read_only_tree(descriptor), S_ISDIR(os.fstat(descriptor).st_mode))
        for root, descriptor in roots
    ]
    # The mount point is arbitrary: nothing is read through its path any more, and it vanishes with
    # the old root.
    mount("fedark", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=8m,nr_inodes=16384")  # noqa: S108  # nosec B108
    os.chdir("/tmp")  # noqa: S108  # nosec B108
    top = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in (
        "lib",
        "lib64",
        "bin",
        "sbin",
    ):  # merged /usr: the dynamic linker looks under the short names
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), name)
    # Outer folders first, so that a root inside another one is seen.
    for root, tree, is_folder in sorted(trees, key=lambda item: item[0].target):
        place = root.target.lstrip("/")
        if is_folder:
            os.makedirs(place, exist_ok=True)
        elif not os.path.lexists(place):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444))
        syscall("move_mount", tree, b"", top, place.encode(), _MOVE_MOUNT_FROM_EMPTY_PATH)
        os.close(tree)
    os.mkdir(SCRATCH.lstrip("/"))
    options = (
        f"mode=0700,size={scratch_bytes},nr_inodes={_SCRATCH_FILES},uid={owner[0]},gid={owner[1]}"
    )
    mount(
        "fedark-scratch", SCRATCH.lstrip("/"), "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options
    )
    _set_attributes(
        top, _ATTR_READ_ONLY | _ATTR_NO_SUID | _ATTR_NO_DEV | _ATTR_NO_EXEC, recursive=False
    )
    os.fchdir(top)
    syscall("pivot_root", b".", b".")
    syscall("umount2", b".", _MNT_DETACH)
    os.chdir("/")
    os.close(top)


def _read_only_tree(descriptor: int) -> int:
    """A detached copy of the mounts at and below `descriptor`, read-only, without set-uid, and
    without devices except itself.
    """
    tree = syscall(
        "open_tree",
        descriptor,
        b"",
        _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE,
    )
    device = S_ISCHR(os.fstat(descriptor).st_mode)
    _set_attributes(
        tree, _ATTR_READ_ONLY | _ATTR_NO_SUID | (0 if device else _ATTR_NO_DEV), recursive=True
    )
    return tree


def _set_attributes(tree: int, attributes: int, *, recursive: bool) -> None:
    wanted = _MountAttributes(attributes, 0, 0, 0)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    syscall("mount_setattr", tree, b"", flags, ctypes.byref(wanted), ctypes.sizeof(wanted))
