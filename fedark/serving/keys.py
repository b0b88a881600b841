"""API keys of a server: a file of what they hash to.

A key is 256 random bits, so one SHA-256 of it can be stored: there is nothing to guess, and no file
to gain by reading this one (NIST SP 800-63B, section 5.1.1.2, asks for slow hashes of what people
remember). Whoever holds a key may ask the models of its owner, and those that have none.

The file is read again whenever it has changed: what is revoked is refused at the next request.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedark.foundation.errors import InputError, printable
from fedark.foundation.files import disk_errors, write_atomic
from fedark.foundation.jsontext import read_json

__all__ = ["ApiKey", "KeyFile", "Keys", "once"]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
_PREFIX = "sk-fedark-"
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key.

    Attributes:
        name: by which people call it.
        owner: whose models it may ask besides those of nobody; or "".
        digest: SHA-256 of the key, hex.
        created: ISO 8601.
    """

    name: str
    owner: str
    digest: str
    created: str


class Keys:
    """The keys of one process. `find` is what a server asks."""

    def __init__(self, known: Mapping[str, ApiKey]) -> None:
        self._known = dict(known)

    def find(self, key: str) -> ApiKey | None:
        """The key of that text, if there is one."""
        digest = _digest(key)
        found = self._known.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None


class KeyFile(Keys):
    """Keys in a file, which only its owner may read.

    Raises (whatever reads it):
        InputError: it is no such file, or others may write it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__({})
        self._path = path
        self._seen: tuple[int, ...] = ()

    def find(self, key: str) -> ApiKey | None:
        self._refresh()
        return super().find(key)

    def list(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        self._refresh()
        return sorted(self._known.values(), key=lambda one: (one.created, one.name))

    def create(self, name: str, owner: str = "") -> str:
        """Make a key and return it: it stands nowhere else.

        Raises:
            InputError: a name is malformed or taken.
            StorageError: the file cannot be written.
        """
        for text in (name, owner) if owner else (name,):
            if not _NAME.fullmatch(text):
                raise InputError(
                    f"{printable(text, 60)!r} is no name of a key or an owner: small letters,"
                    " digits and hyphens, at most 48."
                )
        with self._locked():
            if any(one.name == name for one in self._known.values()):
                raise InputError(f"There is a key {name} already.", fix="Revoke it first.")
            key, made = _make(name, owner)
            self._known[made.digest] = made
            self._write()
        return key

    def revoke(self, name: str) -> None:
        """Forget a key.

        Raises:
            InputError: there is none of that name.
            StorageError: the file cannot be written.
        """
        with self._locked():
            kept = {digest: one for digest, one in self._known.items() if one.name != name}
            if len(kept) == len(self._known):
                raise InputError(f"There is no key {printable(name, 60)!r}.")
            self._known = kept
            self._write()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._refresh()
            yield
        finally:
            os.close(lock)

    def _write(self) -> None:
        text = json.dumps({"keys": [asdict(one) for one in self._known.values()]}, indent=1)
        write_atomic(self._path, text.encode(), mode=0o600)

    def _refresh(self) -> None:
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                if seen == self._seen:
                    return
                data = file.read(_MAX_BYTES)
        except FileNotFoundError:
            self._known, self._seen = {}, ()
            return
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror}.") from None
        if found.st_mode & 0o077:
            raise InputError(
                f"{self._path} can be read or written by others.",
                safe="No key of it was taken.",
                fix=f"chmod 600 {self._path}",
            )
        self._known, self._seen = self._parsed(data), seen

    def _parsed(self, data: bytes) -> dict[str, ApiKey]:
        try:
            found = [ApiKey(**one) for one in read_json(data)["keys"]]
            if all(type(v) is str for one in found for v in asdict(one).values()):
                return {one.digest: one for one in found}
        except (ValueError, TypeError, KeyError):
            pass
        raise InputError(f"{self._path} is no file of API keys.", safe="No key of it was taken.")


def once() -> tuple[Keys, str]:
    """A key for as long as this process runs, and the key itself."""
    key, made = _make("once", "")
    return Keys({made.digest: made}), key


def _make(name: str, owner: str) -> tuple[str, ApiKey]:
    key = _PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return key, ApiKey(name, owner, _digest(key), created)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
