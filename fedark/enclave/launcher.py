"""The launcher: measures an enclave, starts it confined, proves that what it measured is what runs,
and signs its evidence.

It is an object in the host's own process. A separate process would guard the simulated quoting key
against nobody: both would belong to one user, and the simulated platform protects nothing from its
host. What counts is that the key is in no enclave. In a confidential guest the launcher is part of
the measured image, and states what it measured (`fedark.attestation.guest`).

Order of a start:
1. measure (`fedark.measurement`); note the identity (device, inode, size, both times) of every
   measured file and folder, and of the folders in which a file would lead the interpreter past them
   (`fedark.measurement.detours`);
2. verify, or fill, the bytecode cache;
3. exec the measured interpreter with a clean environment, `-I -S -B`, one inherited socket and the
   specification on its standard input; meanwhile measure again, which closes the gap between
   hashing and noting;
4. the enclave confines itself, loads, locks, and says so; every identity must still be the same,
   and the kernel must show its confinement from outside (`fedark.sandbox.witness`), or it is
   killed.
So a file that was edited while libraries were loaded is found, even if it was put back. Python code
that is imported later is compared by the enclave itself. What remains: someone who can write the
shared objects of a running enclave changes it, as someone who can trace it does; on the simulated
platform that is the host's root, or the owner of the installation.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedark.attestation.claims import SandboxFacts
from fedark.attestation.platforms.base import Attester, EnclavePlatform
from fedark.enclave import bytecode
from fedark.enclave.main import COMPILE
from fedark.foundation.errors import EnclaveFailed, Refused, StorageError
from fedark.measurement import Measurement, loader, run_config_register
from fedark.measurement.manifest import package_dir
from fedark.sandbox import Mount, Setup, missing, policy_digests, survey

__all__ = ["Launch", "launch"]

Identity = tuple[int, int, int, int, int, int]

_ENVIRONMENT: Final = {
    # Python coerces the locale otherwise and puts LC_CTYPE in by itself; nothing in an enclave may
    # depend on its host's language.
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    "PATH": "",
    # No settings for OpenSSL: the host's may name shared objects to load, and Python hashes before
    # it is confined.
    "OPENSSL_CONF": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # torch wants to make a folder for compiled kernels as it loads. None is compiled here; this one
    # exists, and stays empty.
    "TORCHINDUCTOR_CACHE_DIR": "/",
    # Waiting threads sleep: several enclaves share the cores of one machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
}
SCRATCH_BYTES: Final = 16 << 20
_BYTECODE = "__pycache__"


@dataclass
class Launch:
    """A started enclave process that has not yet said that it is locked.

    Attributes:
        process: the monitor, whose end is the enclave's end.
        channel: the host's end of the channel.
        registers: all four.
        sandbox: as it will be attested.
        attester: signs for this enclave and no other.
        sealing_key: gives the key of this enclave's checkpoints.
    """

    process: subprocess.Popen[bytes]
    channel: socket.socket
    registers: Mapping[str, bytes]
    sandbox: SandboxFacts
    attester: Attester
    sealing_key: Callable[[], bytes] = field(repr=False)
    _watched: _Watch = field(repr=False)
    _remeasure: Callable[[], None] = field(repr=False)

    def settle(self) -> None:
        """Measure again, while the enclave loads.

        Raises:
            Refused: a file changed since it was measured.
        """
        self._remeasure()

    def check_locked(self) -> None:
        """Compare once, when the enclave says that it is locked.

        Raises:
            Refused: as `check_loaded`; or something came, or went, where the interpreter or the
                loader would have taken it.
        """
        self.check_loaded()
        touched = self._watched.touched()
        if touched:
            raise Refused(
                f"{touched[0]} was changed while the enclave loaded, which could have put code into"
                " it that is not measured.",
                safe="No evidence was made for this enclave, and it was ended.",
                fix="Start it again when the installation is at rest.",
            )

    def check_loaded(self) -> None:
        """Compare, and look at its confinement, once the enclave is locked, and before each quote.

        Raises:
            Refused: a measured file or folder was touched since it was measured, or a file leads
                past them; names it. Or the process is not confined as its evidence would say.
        """
        lacking = missing(self.process.pid, self.sandbox.mode)
        if lacking:
            raise Refused(
                "The enclave is not confined as its evidence would say (mode"
                f" {self.sandbox.mode!r}); it lacks {lacking}.",
                safe="No evidence was made for this enclave, and it was ended.",
                fix="If /proc hides processes (hidepid), let this user's group see them (gid=).",
            )
        self._watched.measurement.check_no_detours()
        changed = self._watched.changed()
        if changed:
            raise Refused(
                f"{changed[0]} was changed while the enclave loaded it ({len(changed)} paths in"
                " all).",
                safe="No evidence was made for this enclave, and it was ended.",
                fix="Start it again when the installation is at rest.",
            )


def launch(
    measurement: Measurement,
    run_config: bytes,
    *,
    device: EnclavePlatform,
    log: Path,
    minimum_sandbox: str,
    memory_bytes: int,
) -> Launch:
    """Start the enclave of `measurement`.

    Args:
        run_config: what it is started for; hashed into its evidence, and handed over by the host's
            first call.
        device: the simulated device, or the confidential guest, that it runs on.
        log: file for what libraries print until the sandbox is locked; replaced.
        minimum_sandbox: the weakest mode that will do.
        memory_bytes: most private memory.

    Raises:
        SandboxUnavailable: this machine cannot confine it as asked.
        Refused: a measured file, or the bytecode cache, was altered, or a file leads past what was
            measured.
        StorageError, EnclaveFailed: it cannot be started.
    """
    support = survey()
    mode = support.mode(minimum_sandbox)
    watched = _Watch(measurement)
    modules = _modules(measurement)
    with _open_log(log) as output:
        cache = bytecode.ensure(
            f"{measurement.role}-{_cache_key(measurement)}",
            modules["runtime"],
            lambda prefix: _spawn(
                measurement,
                {"task": COMPILE, "path": _search_path(measurement)},
                ("-X", f"pycache_prefix={prefix}"),
                output.fileno(),
            ),
        )
        host_end, enclave_end = socket.socketpair()
        try:
            setup = Setup(
                mode=mode,
                landlock=support.landlock,
                host=os.getpid(),
                channel=enclave_end.fileno(),
                roots=_roots(measurement, cache.prefix),
                listed=_listed(measurement),
                memory_bytes=memory_bytes,
                scratch_bytes=SCRATCH_BYTES,
            )
            known = {**modules["runtime"], **modules["application"], **cache.digests}
            process = _spawn(
                measurement,
                {
                    "task": "run",
                    "path": _search_path(measurement),
                    "setup": setup.to_map(),
                    "digests": {path: digest.hex() for path, digest in known.items()},
                },
                ("-B", "-X", f"pycache_prefix={cache.prefix}"),
                output.fileno(),
                channel=enclave_end.fileno(),
            )
        except BaseException:
            host_end.close()
            raise
        finally:
            enclave_end.close()
    facts = SandboxFacts(mode, *policy_digests(mode, support.landlock))
    registers = {**measurement.registers, "runconfig": run_config_register(run_config)}
    attester = device.attester(measurements=registers, sandbox=facts)
    key = functools.partial(device.sealing_key, registers, facts)
    return Launch(
        process, host_end, registers, facts, attester, key, watched, measurement.check_unchanged
    )


def _spawn(
    measurement: Measurement,
    specification: Mapping[str, Any],
    options: tuple[str, ...],
    output: int,
    channel: int | None = None,
) -> subprocess.Popen[bytes]:
    measurement.check_no_detours()
    # A file, not a pipe: writing it never waits for the reader.
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(specification).encode("utf-8"))
        given.seek(0)
        try:
            return subprocess.Popen(
                [str(measurement.python), "-I", "-S", *options, str(measurement.entry_point)],
                stdin=given,
                stdout=output,
                stderr=output,
                env=_ENVIRONMENT,
                cwd="/",
                pass_fds=() if channel is None else (channel,),
                start_new_session=True,
            )
        except OSError as error:
            raise EnclaveFailed(
                f"The enclave could not be started: {error.strerror}.", safe="It never had a key."
            ) from None


def _open_log(log: Path) -> Any:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise StorageError(
            f"The log {log} cannot be written: {error.strerror}.", safe="No enclave was started."
        ) from None
    return os.fdopen(descriptor, "wb", buffering=0)


def _search_path(measurement: Measurement) -> list[str]:
    return [str(path) for path in measurement.search_path]


def _modules(measurement: Measurement) -> dict[str, dict[str, bytes]]:
    return {
        name: {
            entry.path: entry.digest
            for entry in entries
            if entry.kind == "f" and entry.path.endswith((".py", ".so"))
        }
        for name, entries in measurement.entries.items()
    }


def _cache_key(measurement: Measurement) -> str:
    """The runtime by content and place: bytecode names the places of its sources."""
    places = "\0".join(_library_folders(measurement))
    return (
        measurement.registers["runtime"].hex()[:32]
        + hashlib.sha384(places.encode()).hexdigest()[:16]
    )


def _roots(measurement: Measurement, prefix: Path) -> tuple[Mount, ...]:
    visible = [Mount.of(str(path)) for path in (*measurement.visible, prefix)]
    seen = {root.target for root in visible}
    named = [Mount.of(str(path), str(path)) for path in measurement.libraries]
    return (*visible, *(root for root in named if root.target not in seen))


def _listed(measurement: Measurement) -> tuple[str, ...]:
    """The package, and the folders of the search path that hold libraries; not what lies beside a
    checkout of fedark.
    """
    return (*_library_folders(measurement), str(package_dir()))


def _library_folders(measurement: Measurement) -> list[str]:
    runtime = [entry.path for entry in measurement.entries["runtime"]]
    return [
        str(folder)
        for folder in measurement.search_path
        if any(path.startswith(f"{folder}/") for path in runtime)
    ]


class _Watch:
    """The identity of every measured file, and of every folder that was measured whole: adding to
    one counts too.

    Python itself may make a `__pycache__` in such a folder, when the host imports from it for the
    first time. That alone is no change, for no enclave looks into it.
    """

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement
        entries = [entry for part in measurement.entries.values() for entry in part]
        libraries = {os.path.realpath(path) for path in measurement.libraries}
        visible = {str(path) for path in measurement.visible}
        self._files = (
            {entry.path for entry in entries}
            | {entry.outside for entry in entries if entry.outside}
            | libraries
        )
        inside = (
            {entry.path for entry in entries}
            - visible
            - {str(path) for path in measurement.libraries}
        )
        self._folders = {os.path.dirname(path) for path in inside}
        self._before = {path: _identity(path) for path in self._files | self._folders | visible}
        self._without_bytecode = {
            path for path in self._folders if not os.path.lexists(f"{path}/{_BYTECODE}")
        }
        places = {loader.CACHE, *(os.path.realpath(file.parent) for file in measurement.detours)}
        self._places = {path: _identity(path) for path in places}

    def touched(self) -> list[str]:
        """Folders of `Measurement.detours` in which a file came or went, and the loader's cache if
        it was written; sorted.

        It matters only until all is loaded.
        """
        return sorted(path for path, before in self._places.items() if _identity(path) != before)

    def changed(self) -> list[str]:
        """What is not as it was, sorted."""
        different = [path for path, before in self._before.items() if _identity(path) != before]
        return sorted(path for path in different if not self._only_bytecode_came(path))

    def _only_bytecode_came(self, folder: str) -> bool:
        before, now = self._before[folder], _identity(folder)
        if (
            folder not in self._without_bytecode
            or before is None
            or now is None
            or before[:3] != now[:3]
        ):
            return False
        known = self._files | self._folders | {os.path.dirname(path) for path in self._folders}
        return {f"{folder}/{name}" for name in os.listdir(folder)} - known == {
            f"{folder}/{_BYTECODE}"
        }


def _identity(path: str) -> Identity | None:
    """Device, inode, mode; size; times of content and of change."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
