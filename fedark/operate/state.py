"""The version of what lies in a host's or a node's folder: `state.json`, written when the folder is
made.

A release reads exactly the version that it writes. A folder of a newer release is refused, one of
an older release is migrated where a migration exists, and refused with an explanation where none
does; a migration runs once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import fedark
from fedark.foundation.errors import FederationError, InputError
from fedark.foundation.files import write_atomic
from fedark.links.flower.service import LONGEST_PATH

__all__ = [
    "MIGRATIONS",
    "STATE",
    "VERSION",
    "locked",
    "open_state",
    "require_own",
    "running",
    "write_state",
]

STATE = "state.json"
VERSION = 1
_GLANCES = 4
Migration = Callable[[Path], None]
MIGRATIONS: Mapping[tuple[str, int], Migration] = {}
"""(kind, version) -> what brings a folder of that version to the next. None was needed yet."""


def write_state(folder: Path, kind: str, version: int = VERSION) -> None:
    """Mark a folder.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps({"kind": kind, "version": version, "written_by": fedark.__version__})
    write_atomic(folder / STATE, text.encode(), mode=0o600)


def open_state(
    folder: Path,
    kind: str,
    *,
    migrations: Mapping[tuple[str, int], Migration] = MIGRATIONS,
    version: int = VERSION,
) -> None:
    """Return if this release can work with the folder, after a migration if need be.

    Raises:
        InputError: it is no such folder, or of another version and cannot be migrated; nothing was
            changed.
    """
    path = folder / STATE
    try:
        value = json.loads(path.read_bytes())
        found_kind, found = str(value["kind"]), int(value["version"])
        by = str(value.get("written_by", "?"))
    except OSError:
        how = "fedark aggregator init" if kind == "host" else "fedark node join"
        raise InputError(
            f"{folder} is not a {kind}'s folder.", fix=f"Make one with: {how}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is malformed.", safe="Nothing was changed.", fix="Restore it from a backup."
        ) from None
    if found_kind != kind:
        raise InputError(f"{folder} is a {found_kind}'s folder, not a {kind}'s.")
    if found > version:
        raise InputError(
            f"{folder} is of state version {found}, written by fedark {by}; this release"
            f" ({fedark.__version__}) reads {version}.",
            safe="Nothing was changed.",
            fix="Install that release, or a later one, on this machine.",
        )
    while found < version:
        migrate = migrations.get((kind, found))
        if migrate is None:
            raise InputError(
                f"{folder} is of state version {found}, written by fedark {by}, and no migration to"
                f" {version} exists.",
                safe="Nothing was changed.",
                fix="Finish its jobs with that release, then make a new folder.",
            )
        migrate(folder)
        found += 1
        write_state(folder, kind, found)


@contextmanager
def locked(folder: Path, fix: str = "Stop it first.") -> Iterator[None]:
    """Hold a folder for this process; the kernel lets go when it ends, however it ends.

    Args:
        fix: what whoever finds it held is told to do.

    Raises:
        FederationError: another process holds it.
    """
    descriptor = os.open(
        folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        for patience in range(_GLANCES, -1, -1):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not patience:
                    raise FederationError(
                        f"Another process runs {folder}.", safe="It was left alone.", fix=fix
                    ) from None
                time.sleep(0.05)  # perhaps it is `running` that holds it, for an instant
        yield
    finally:
        os.close(descriptor)


def running(folder: Path) -> bool:
    """Whether a living process holds the folder (`locked`), as the kernel says."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def require_own(folder: Path) -> None:
    """Return if the folder is this user's: what another user writes there (root by sudo), its owner
    could not read.

    Raises:
        InputError: it is another user's.
    """
    try:
        owner = folder.stat().st_uid
    except FileNotFoundError:
        return
    if owner != os.geteuid():
        name = _user(owner)
        raise InputError(
            f"{folder} belongs to user {name}, and this is user {_user(os.geteuid())}.",
            safe="Nothing was written.",
            fix=f"Run it as that user: sudo -u {shlex.quote(name)} fedark ...",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def socket_of(folder: Path, name: str = "node.sock") -> Path:
    """A socket of the host or node whose folder this is: in it, or in a private directory of the
    system's temporary one where the path is too long.
    """
    path = folder.resolve() / "run" / name
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"fedark-{os.geteuid()}-{digest}" / name
