"""A process inside the sandbox that tries what it is told, and says what came of it. Standard
library only.

Started by `conftest.Inmate`. Reads a Setup (JSON) from standard input, confines itself, then
answers one JSON line per request: `["name", argument...]` -> the probe's result.
A refused system call gives the name of its error. Told to stay "free" it confines nothing: the
control that probes can succeed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import threading
import time

SPECIFICATION = json.loads(sys.stdin.buffer.read())
sys.path.insert(0, SPECIFICATION["package"])

from fedark.sandbox import Setup, enter, lock  # noqa: E402

libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = SPECIFICATION["numbers"]


def call(name: str, *arguments: object) -> str:
    """A raw system call: "ok", or the name of its error."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(NUMBERS[name]), *converted) < 0:
        return errno.errorcode[ctypes.get_errno()]
    return "ok"


def attempt(action) -> str:
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ok"


def _open_socket(family: str, kind: str) -> str:
    return attempt(lambda: socket.socket(getattr(socket, family), getattr(socket, kind)))


def _open(path: str, mode: str) -> str:
    def action() -> None:
        with open(path, mode) as file:
            if "r" in mode:
                file.read(1)
            else:
                file.write("x")

    return attempt(action)


def _fork() -> str:
    try:
        pid = os.fork()
    except OSError as error:
        return errno.errorcode[error.errno]
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "ok"


def _spawn() -> str:
    return attempt(lambda: subprocess.run(["/bin/true"], check=False))


def _exec() -> str:
    return attempt(lambda: os.execv(sys.executable, ["python", "-c", ""]))


def _vm(name: str, pid: int) -> str:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    local, remote = Vector(ctypes.addressof(buffer), 8), Vector(ctypes.addressof(buffer), 8)
    return call(name, pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def _threads(count: int) -> list[int]:
    found: list[int] = []
    workers = [threading.Thread(target=lambda i=i: found.append(i * i)) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sorted(found)


def _thread_bomb(most: int) -> int:
    gate = threading.Event()
    started = []
    try:
        threading.stack_size(64 << 10)
        for _ in range(most):
            worker = threading.Thread(target=gate.wait)
            worker.start()
            started.append(worker)
    except RuntimeError:
        pass
    gate.set()
    for worker in started:
        worker.join()
    threading.stack_size(0)
    return len(started)


SHARINGS = {
    "private": mmap.MAP_PRIVATE,
    "shared": mmap.MAP_SHARED,
    "stack": mmap.MAP_PRIVATE | 0x100,
}  # MAP_GROWSDOWN


def _memory_bomb(kind: str, most: int) -> int:
    """Bytes that could be had, and written to, before the kernel said no."""
    held, size = [], 16 << 20
    try:
        while len(held) * size < most:
            held.append(mmap.mmap(-1, size, flags=mmap.MAP_ANONYMOUS | SHARINGS[kind]))
            for place in range(0, size, mmap.PAGESIZE):
                held[-1][place] = 1
    except (OSError, MemoryError):
        pass
    count = len(held)
    for piece in held:
        piece.close()
    return count * size


def _fill(folder: str, most: int) -> list[object]:
    """Write files until it is refused: bytes written, and why it ended."""
    written, number, why = 0, 0, "ok"
    try:
        while written < most:
            with open(f"{folder}/{number}", "wb", buffering=0) as file:
                written += file.write(b"x" * (1 << 16))
            number += 1
    except OSError as error:
        why = errno.errorcode[error.errno]
    for index in range(number + 1):
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/{index}")
    return [written, why]


def _descriptors() -> dict[int, list[int]]:
    found = {}
    for number in range(1024):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        found[number] = [status.st_mode, status.st_rdev]
    return found


def _limit_up(name: str) -> str:
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (hard, hard + 1))
    except (OSError, ValueError) as error:
        return type(error).__name__
    return "ok"


def _tree(top: str) -> list[str] | str:
    try:
        return sorted(os.listdir(top))
    except OSError as error:
        return errno.errorcode[error.errno]


def _status() -> dict[str, object]:
    return {
        "uid": os.getuid(),
        "groups": os.getgroups(),
        "dumpable": libc.prctl(3, 0, 0, 0, 0),
        "no_new_privileges": libc.prctl(39, 0, 0, 0, 0),
        "pid": os.getpid(),
        "threads": threading.active_count(),
        "environment": dict(os.environ),
        "host": os.uname().nodename,
    }


def _name_threads(name: str) -> list[object]:
    """Name this thread and one that is started for it: what both attempts gave, and the other's
    result.
    """
    found: list[object] = [call("prctl", 15, name.encode(), 0, 0, 0)]

    def work() -> None:
        found.append(call("prctl", 15, name.encode(), 0, 0, 0))
        found.append(sum(range(10)))

    worker = threading.Thread(target=work, name=name)
    worker.start()
    worker.join()
    return found


def _write_argument(text: str) -> str:
    """Overwrite the program's first argument in memory, whose place libc knows, and try to have it
    shown again.
    """
    place = ctypes.c_void_p.in_dll(libc, "program_invocation_name").value
    ctypes.memmove(place, text.encode(), len(text))
    return call("prctl", 35, 8, place, 0, 0)


def _evict(path: str) -> str:
    """Drop a file's pages from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return attempt(lambda: os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED))
    finally:
        os.close(descriptor)


def _wake(path: str, private: bool) -> object:
    """Wake whoever waits on the first word of a file, mapped to read: how many, or why not."""
    descriptor = os.open(path, os.O_RDONLY)
    libc.mmap.restype = ctypes.c_void_p
    place = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    os.close(descriptor)
    woken = libc.syscall(
        ctypes.c_long(NUMBERS["futex"]), ctypes.c_void_p(place), 129 if private else 1, 1, 0, 0, 0
    )
    return errno.errorcode[ctypes.get_errno()] if woken < 0 else woken


SECRET = "inmate-secret-" + os.urandom(16).hex()


PROBES = {
    "call": call,
    "socket": _open_socket,
    "open": _open,
    "fork": _fork,
    "spawn": _spawn,
    "exec": _exec,
    "vm": _vm,
    "threads": _threads,
    "name threads": _name_threads,
    "evict": _evict,
    "wake": _wake,
    "umask": lambda: call("umask", 0o123),
    "write argument": _write_argument,
    "thread bomb": _thread_bomb,
    "memory bomb": _memory_bomb,
    "fill": _fill,
    "descriptors": _descriptors,
    "raise limit": _limit_up,
    "list": _tree,
    "status": _status,
    "exists": os.path.exists,
    "clone": lambda flags: call("clone", flags, 0, 0, 0, 0),
    "chmod": lambda path: attempt(lambda: os.chmod(path, 0o777)),
    "bare chown": lambda path: attempt(lambda: os.chown(path, 0, 0)),
    "truncate": lambda path: attempt(lambda: os.close(os.open(path, os.O_RDONLY | os.O_TRUNC))),
    "unlink": lambda path: attempt(lambda: os.unlink(path)),
    "mkdir": lambda path: attempt(lambda: os.mkdir(path)),
    "symlink": lambda path: attempt(lambda: os.symlink("/etc/passwd", path)),
    "secret": lambda: [id(SECRET), SECRET],
    "sum of squares": lambda: sum(i * i for i in range(1000)),
    "abort": lambda: os.abort(),
    "x32": lambda: libc.syscall(ctypes.c_long(0x4000_0000 | NUMBERS["getpid"])),
    "sleep": lambda seconds: time.sleep(seconds),
}


def main() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    setup = Setup.from_map(SPECIFICATION["setup"])
    if not SPECIFICATION["free"]:
        enter(setup)
        _threads(2)
        lock(setup)
    os.write(setup.channel, b'"locked"\n')
    pending = b""
    while chunk := os.read(setup.channel, 1 << 16):
        pending += chunk
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            name, *arguments = json.loads(line)
            os.write(setup.channel, json.dumps(PROBES[name](*arguments)).encode() + b"\n")


main()
