"""What a node must not forget of a run while its process may be killed at any moment.

    runs/ID/state        where the run is at this node, signed with the party's own key
    runs/ID/answers/     the last few replies, by the hash of their requests: a request that comes
                         again is answered from here
    runs/ID/begun/       requests that have been begun, for steps that must not be done twice
    runs/ID/once/        the newest reply to each of those steps, which no later request displaces
    runs/ID/enclave/     the node's enclave (`fedark.enclave.durable`)

A stage writes state, then its answer, then answers. Whoever is killed in between is asked again and
does the stage again, which finds its work done. All of it is durable and whole or not at all
(`fedark.foundation.files`), holds no weight and no record, and goes with the run's end, but for the
answers: the last request of a run may come again too.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused, StorageError
from fedark.foundation.files import disk_errors, write_atomic
from fedark.foundation.keys import SigningKey, verify_signature

__all__ = ["MEMORY", "REPORT", "RunMemory"]

MEMORY = "memory.json"
"""Beside the report: most resident memory that this party's processes had, MiB."""
REPORT = "report.json"
"""What a run leaves in its folder when it has ended well."""
_LABEL = "fedark/node-state/1"
_VERSION = 1
_STATE, _ANSWERS, _BEGUN, _ONCE, _ENCLAVE = "state", "answers", "begun", "once", "enclave"
_ANSWERS_KEPT = 4
_MAX_STATE = 64 << 20
_MOST_BEGUN = 20_000
"""Requests that a run may begin: one for each round of the longest job, and as many again. Each
costs an empty file.
"""
_RUN_ID = re.compile(r"[0-9a-f]{32}")


class RunMemory:
    """The runs of the party whose folder this is.

    Args:
        folder: the party's.
        key: the party's own; a state that it did not sign is none.
    """

    def __init__(self, folder: Path, key: SigningKey) -> None:
        self._folder, self._key = folder / "runs", key

    def folder(self, run_id: str) -> Path:
        """Where everything of a run is.

        Raises:
            ProtocolError: that is no run's name.
        """
        if not _RUN_ID.fullmatch(run_id):
            raise ProtocolError("A run has an impossible name.", safe="The node did nothing.")
        return self._folder / run_id

    def enclave(self, run_id: str) -> Path:
        """The folder of the run's enclave."""
        return self.folder(run_id) / _ENCLAVE

    def open_runs(self) -> list[str]:
        """Runs that have a state."""
        return sorted(path.parent.name for path in self._folder.glob(f"*/{_STATE}"))

    def save(self, run_id: str, state: dict[str, Any]) -> None:
        """Remember `state`, of types that canonical CBOR takes.

        Raises:
            StorageError: it cannot be written; the former one stands.
        """
        body = canonical.encode({"version": _VERSION, "run_id": run_id, "state": state})
        data = canonical.encode({"body": body, "signature": self._key.sign(_LABEL, body)})
        write_atomic(self.folder(run_id) / _STATE, data, mode=0o600)

    def load(self, run_id: str) -> dict[str, Any] | None:
        """What was saved last, or None.

        Raises:
            StorageError: it is damaged, altered, or of another version of fedark.
        """
        path = self.folder(run_id) / _STATE
        try:
            outer = canonical.decode(path.read_bytes(), max_bytes=_MAX_STATE)
            verify_signature(
                self._key.public, _LABEL, outer["body"], outer["signature"], by="this node"
            )
            body = canonical.decode(outer["body"], max_bytes=_MAX_STATE)
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError, Refused, KeyError, TypeError):
            raise StorageError(
                f"The state of a run, {path}, is damaged or was altered.",
                safe="Nothing of it was used; this party takes no part in the run any more.",
                fix="Look at the disk; the aggregator passes this party over, or ends the job.",
            ) from None
        if body.get("version") != _VERSION or body.get("run_id") != run_id:
            raise StorageError(
                f"The state of a run, {path}, is of version {body.get('version')}, or of another"
                " run.",
                safe="Nothing of it was used.",
                fix="End the run with the release that it began with.",
            )
        state: dict[str, Any] = body["state"]
        return state

    def delivered(self, run_id: str) -> bool:
        """Whether the run ended here with its report stored: a delivery that comes again has been
        taken.
        """
        return (self.folder(run_id) / REPORT).is_file()

    def answer(self, run_id: str, request: bytes) -> bytes | None:
        """The reply that was kept for exactly this request."""
        name, folder = hashlib.sha256(request), self.folder(run_id)
        path = folder / _ANSWERS / name.hexdigest()
        with disk_errors(folder):
            if path.is_file():
                return path.read_bytes()
            for path in (folder / _ONCE).glob("[!.]*"):
                kept = path.read_bytes()
                if kept.startswith(name.digest()):
                    return kept[name.digest_size :]
        return None

    def keep(self, run_id: str, request: bytes, reply: bytes, *, once: str = "") -> None:
        """Keep the reply to a request; of the earlier ones the last few stay.

        Args:
            once: the stage, if it is not the same when it is done twice: its newest reply stays
                until the run ends.

        Raises:
            StorageError: it cannot be written.
        """
        name = hashlib.sha256(request)
        if once:
            write_atomic(self.folder(run_id) / _ONCE / once, name.digest() + reply, mode=0o600)
            return
        folder = self.folder(run_id) / _ANSWERS
        write_atomic(folder / name.hexdigest(), reply, mode=0o600)
        by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-_ANSWERS_KEPT]:
            path.unlink(missing_ok=True)

    def begin(self, run_id: str, request: bytes) -> bool:
        """Note that this request is begun; whether it had been before.

        Raises:
            ProtocolError: more requests than any run needs.
            StorageError: it cannot be noted.
        """
        path = self.folder(run_id) / _BEGUN / hashlib.sha256(request).hexdigest()
        with disk_errors(path.parent):
            if path.exists():
                return True
            if path.parent.is_dir() and len(os.listdir(path.parent)) >= _MOST_BEGUN:
                raise ProtocolError(
                    "This run asks for the same things without end.", safe="The node did nothing."
                )
        write_atomic(path, b"", mode=0o600)
        return False

    def forget(self, run_id: str) -> None:
        """The run is over here: its state goes; what people need and its last answers stay."""
        folder = self.folder(run_id)
        (folder / _STATE).unlink(missing_ok=True)
        for name in (_BEGUN, _ONCE, _ENCLAVE):
            shutil.rmtree(folder / name, ignore_errors=True)
