"""The launcher's own cache of compiled Python, because importing torch and its friends from source
takes many seconds.

Poisoned bytecode is executed without a question, so:
- an enclave never looks into `__pycache__` (`-X pycache_prefix`) and never writes bytecode (`-B`;
  the folder is bound read-only);
- the launcher fills the cache in a process of its own that runs only measured files, once for each
  runtime register, and keeps the SHA-384 of every file; each start compares all of them, and the
  files' owner and mode, and refuses an altered cache;
- the enclave compares again what it reads (`fedark.enclave.imports`), so an edit after that is not
  executed either;
- a file is bound to the content of its source (PEP 552, hash-based), which the runtime register
  fixes, not to a time stamp.

Only the runtime is cached: fedark's own few files are compiled at each start. Whoever can write as
the launcher's user can replace the launcher itself, and no cache can help there.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import EnclaveFailed, Refused
from fedark.foundation.files import disk_errors, sync_directory

__all__ = ["Bytecode", "cache_folder", "ensure"]

_INDEX, _TREE, _LOCK = "index.json", "tree", "lock"
_HEADER = 16
_UNCHECKED_HASH = (1).to_bytes(4, "little")
_BUILD_SECONDS = 600
_KEPT = 8


@dataclass(frozen=True)
class Bytecode:
    """A verified cache.

    Attributes:
        prefix: for `-X pycache_prefix`.
        digests: absolute path of a bytecode file -> SHA-384.
    """

    prefix: Path
    digests: Mapping[str, bytes]


def cache_folder() -> Path:
    """Where caches are kept: below `/var/cache` for root, else `$XDG_CACHE_HOME` or `~/.cache`.
    Nothing in it is secret.
    """
    if os.geteuid() == 0:
        return Path("/var/cache/fedark/bytecode")
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedark" / "bytecode"


def ensure(
    key: str, sources: Mapping[str, bytes], compile_into: Callable[[Path], subprocess.Popen[bytes]]
) -> Bytecode:
    """The cache named `key`, made first if there is none.

    Args:
        key: changes whenever any of `sources`, or where they are, changes.
        sources: absolute path -> SHA-384 of the source files that may be cached.
        compile_into: starts a process that imports what an enclave imports, with its bytecode
            written to a folder.

    Raises:
        Refused: the cache, or its folder, was altered or can be written by others.
        EnclaveFailed: the process that fills it failed.
        StorageError: it cannot be written.
    """
    base = cache_folder()
    with disk_errors(base):
        if not base.is_dir():
            base.mkdir(parents=True, exist_ok=True)
            base.chmod(0o755)
        _owned(base.lstat(), base)
        lock = os.open(base / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two enclaves that start together fill it once
        folder = base / key
        if not folder.is_dir():
            _fill(folder, sources, compile_into)
            _prune(base)
        with disk_errors(folder):
            os.utime(folder)
    finally:
        os.close(lock)
    return _verified(folder)


def _fill(
    folder: Path,
    sources: Mapping[str, bytes],
    compile_into: Callable[[Path], subprocess.Popen[bytes]],
) -> None:
    with disk_errors(folder):
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        raw, tree = work / "raw", work / _TREE
        with disk_errors(folder):
            raw.mkdir()
            tree.mkdir()
        with compile_into(raw) as process:
            try:
                code = process.wait(_BUILD_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise EnclaveFailed(
                    "Compiling the enclave's libraries did not end in time.",
                    safe="No enclave was started.",
                ) from None
        if code:
            raise EnclaveFailed(
                f"The enclave's libraries cannot be loaded on this machine (exit code {code}).",
                safe="No enclave was started.",
                fix="The enclave's log has the message.",
            )
        with disk_errors(folder):
            index = {}
            for source, digest in sources.items():
                if not source.endswith(".py"):
                    continue
                relative = _relative(source)
                if (raw / relative).is_file():
                    index[relative] = _adopt(raw / relative, tree / relative, Path(source), digest)
            for opened in (work, *(path for path in tree.rglob("*") if path.is_dir()), tree):
                opened.chmod(0o755)  # whatever the umask: the enclave's own user reads here
            (work / _INDEX).write_text(json.dumps(index), encoding="utf-8")
            shutil.rmtree(raw)
            # Thousands of small files: a power cut must not leave empty ones, which would look
            # like tampering.
            os.sync()
            os.rename(work, folder)
            sync_directory(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prune(base: Path) -> None:
    """Remove the caches that were used longest ago: each upgrade of the runtime leaves one."""
    caches = sorted(
        (path for path in base.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns
    )
    for old in caches[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _adopt(raw: Path, target: Path, source: Path, digest: bytes) -> str:
    """Bind compiled code to its source's content instead of its time stamp; returns the SHA-384 of
    the new file.
    """
    text, code = source.read_bytes(), raw.read_bytes()
    status = source.stat()
    stamp = (int(status.st_mtime) & 0xFFFF_FFFF).to_bytes(4, "little") + (
        status.st_size & 0xFFFF_FFFF
    ).to_bytes(4, "little")
    if hashlib.sha384(text).digest() != digest or code[4:_HEADER] != bytes(4) + stamp:
        raise Refused(
            f"{source} changed while it was compiled.",
            safe="No enclave was started.",
            fix="Start it again.",
        )
    data = code[:4] + _UNCHECKED_HASH + importlib.util.source_hash(text) + code[_HEADER:]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    target.chmod(0o644)
    return hashlib.sha384(data).hexdigest()


def _relative(source: str) -> str:
    """Where Python keeps the bytecode of `source` below a prefix (sys.pycache_prefix)."""
    name = Path(importlib.util.cache_from_source(source)).name
    return os.path.join(os.path.dirname(source).lstrip("/"), name)


def _verified(folder: Path) -> Bytecode:
    tree = folder / _TREE
    try:
        _owned(folder.lstat(), folder)
        _owned((folder / _INDEX).lstat(), folder / _INDEX)
        index = json.loads((folder / _INDEX).read_bytes())
        found = {path: hashlib.sha384(Path(path).read_bytes()).digest() for path in _files(tree)}
        listed = {str(tree / relative): bytes.fromhex(digest) for relative, digest in index.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _altered(folder, type(error).__name__) from None
    if found != listed:
        changed = sorted(
            path for path in found.keys() | listed.keys() if found.get(path) != listed.get(path)
        )
        raise _altered(folder, f"{len(changed)} files, first {changed[0]}")
    return Bytecode(tree, found)


def _files(tree: Path) -> Iterator[str]:
    _owned(tree.lstat(), tree)
    for folder, folders, files in os.walk(tree, onerror=_reraise):
        for name in (*folders, *files):
            path = Path(folder, name)
            _owned(path.lstat(), path)
        yield from (os.path.join(folder, name) for name in files)


def _reraise(error: OSError) -> None:
    raise error


def _owned(status: os.stat_result, path: Path) -> None:
    """Refuse what is not this user's own file or folder, or what others can write."""
    kind_ok = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    if not kind_ok or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _altered(path, "it is not this user's own, or others may write it")


def _altered(path: Path, detail: str) -> Refused:
    return Refused(
        f"The launcher's bytecode cache {path} was altered ({detail}).",
        safe="Nothing of it was executed, and no enclave was started.",
        fix=f"Find out who wrote there; then remove {cache_folder()}, which is made anew.",
    )
