"""An enclave that outlives its process: the host's side of checkpoints.

`DurableEnclave` is a handle like any other. It keeps, in a folder of its own and always whole or
not at all:

    state       the last sealed checkpoint, and the digest and the reply of the call that led to it
    journal/N   calls that are part of no checkpoint and must be made again (what an aggregator got
                in the open round)

written before the reply is handed on. When the enclave dies it is started again from there, the
journal is replayed, whatever else it needs is brought by `refeed`, and the call that was under way
is made again. A call that is the last one in `state` gets the reply that stands there: who repeats
it after a crash of its own changes nothing.

Nothing secret is in these files: a checkpoint is sealed by the enclave, calls and replies are what
crosses to the host anyway. A host that keeps back, repeats or rewinds them gains nothing;
`fedark.enclave.checkpoint` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from fedark.enclave.host import EnclaveHandle, ProgressHandler
from fedark.foundation.errors import EnclaveFailed, FedarkError, ProtocolError, StorageError
from fedark.foundation.files import disk_errors, write_atomic
from fedark.foundation.snapshot import Bytes32, Snapshot
from fedark.v1 import enclave_pb2 as pb

__all__ = ["DurableEnclave"]

STATE, JOURNAL = "state", "journal"
_HASH = 32
_ATTEMPTS = 5
"""How often one call is tried: an enclave that dies of the call itself is not started for ever."""


_PIECES = ("grant", "sealed", "records")
"""Calls that fill an enclave's memory. They are always made, also when they were made before; and
an enclave that dies of one is not started again for it, for what filled it so far is gone.
"""


class _Kept(Snapshot):
    """The file `state`, behind its SHA-256: the last checkpoint, and the digest and the reply of
    the call that led to it.
    """

    call: Bytes32
    reply: bytes
    sealed: bytes


class DurableEnclave:
    """See the module's docstring.

    Args:
        start: starts the enclave from a checkpoint, or a new one from b"".
        folder: of this enclave alone; made if it is missing. What is in it is gone on with.
        refeed: brings an enclave that was started from a checkpoint what is not in it.
        journal: kinds of calls that are kept and replayed; all of them are forgotten when a call of
            kind `ends` succeeds.
        say: told of restarts.

    Raises:
        StorageError: the folder cannot be used, or what is in it is damaged.
    """

    def __init__(
        self,
        start: Callable[[bytes], EnclaveHandle],
        folder: Path,
        *,
        refeed: Callable[[EnclaveHandle], None] = lambda enclave: None,
        journal: frozenset[str] = frozenset(),
        ends: str = "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._start, self._folder, self._refeed, self._say = start, folder, refeed, say
        self._journaled, self._ends = journal, ends
        self._one_at_a_time = threading.RLock()
        self._inner: EnclaveHandle | None = None
        self._closed = False
        with disk_errors(folder):
            (folder / JOURNAL).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept = _read(folder / STATE)
        self._unwritten = False

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._kept is not None

    def call(
        self,
        call: pb.Call,
        *,
        on_progress: ProgressHandler | None = None,
        timeout: float | None = None,
        restart: bool = True,
    ) -> pb.Reply:
        """See `EnclaveProcess.call`; an enclave that dies is started again, at most four times for
        one call.

        Args:
            restart: whether the call can be made of an enclave that was started again for it.
                Pieces of weights and records cannot: what came before them is gone, and the caller
                begins anew.

        Raises:
            EnclaveFailed: it died each time, or was ended by `close`.
            StorageError: its state cannot be written. The reply is not given; the same call gives
                it once there is room.
            FedarkError: what the enclave answered.
        """
        kind, data = str(call.WhichOneof("body")), call.SerializeToString(deterministic=True)
        name = hashlib.sha256(data).digest()
        with self._one_at_a_time:
            if kind not in _PIECES and (stored := self.done(call)) is not None:
                return stored
            attempts = 1 if kind in _PIECES or not restart else _ATTEMPTS
            reply = self._tried(call, on_progress, timeout, attempts)
            if reply.checkpoint:
                sealed = reply.checkpoint
                reply.ClearField("checkpoint")
                self._kept = _Kept(call=name, reply=reply.SerializeToString(), sealed=sealed)
                self._unwritten = True
                self._write()
                if kind == self._ends:
                    self._forget()
            elif kind in self._journaled:
                self._note(name, data)
            return reply

    def done(self, call: pb.Call) -> pb.Reply | None:
        """The reply to `call` if it was the last that changed the enclave's state; the enclave is
        not asked.
        """
        name = hashlib.sha256(call.SerializeToString(deterministic=True)).digest()
        with self._one_at_a_time:
            if self._kept is None or self._kept.call != name:
                return None
            self._write()
            stored = pb.Reply()
            stored.ParseFromString(self._kept.reply)
            return stored

    def peak_mib(self) -> float:
        """Most resident memory that the enclave has had since it was last started, MiB; 0 for one
        without a process of its own.
        """
        measure = getattr(self._inner, "peak_mib", None)
        return float(measure()) if measure is not None else 0.0

    def wake(self) -> None:
        """Start the enclave now, if it is not running."""
        with self._one_at_a_time:
            self._alive()

    def close(self) -> None:
        """End the enclave; what is needed to go on with it stays. From any thread."""
        self._closed = True
        inner = self._inner
        if inner is not None:
            inner.close()

    def discard(self) -> None:
        """End the enclave for good: its state goes too."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tried(
        self,
        call: pb.Call,
        on_progress: ProgressHandler | None,
        timeout: float | None,
        attempts: int,
    ) -> pb.Reply:
        for attempt in range(1, attempts + 1):
            try:
                return self._alive().call(call, on_progress=on_progress, timeout=timeout)
            except EnclaveFailed as error:
                inner, self._inner = self._inner, None
                if inner is not None:
                    inner.close()
                if self._closed or attempt == attempts:
                    raise
                self._say(f"the enclave ended and is started again: {error.what}")
        raise AssertionError("unreachable")

    def _alive(self) -> EnclaveHandle:
        if self._closed:
            raise EnclaveFailed(
                "The enclave was ended by its host.", safe="Its sealed state was kept."
            )
        if self._inner is None:
            inner = self._start(self._kept.sealed if self._kept is not None else b"")
            try:
                if self._kept is not None:
                    for path in sorted((self._folder / JOURNAL).iterdir()):
                        self._replay(inner, path)
                    self._refeed(inner)
            except BaseException:
                inner.close()
                raise
            self._inner = inner
            if self._closed:  # by another thread, meanwhile
                inner.close()
        return self._inner

    @staticmethod
    def _replay(inner: EnclaveHandle, path: Path) -> None:
        try:
            inner.call(pb.Call.FromString(path.read_bytes()))
        except EnclaveFailed:
            raise
        except (FedarkError, DecodeError):
            # Of a round that was closed just before the crash, or damaged: whoever sent it sends it
            # again if it is needed.
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._unwritten and self._kept is not None:
            body = self._kept.encode()
            write_atomic(self._folder / STATE, hashlib.sha256(body).digest() + body, mode=0o600)
            self._unwritten = False

    def _note(self, name: bytes, data: bytes) -> None:
        """Journal a call, once: a sender that was interrupted sends it again, and each entry is one
        more to replay.
        """
        written = [path.name for path in (self._folder / JOURNAL).iterdir()]
        if not any(entry.endswith(name.hex()) for entry in written):
            write_atomic(
                self._folder / JOURNAL / f"{len(written):06d}-{name.hex()}", data, mode=0o600
            )

    def _forget(self) -> None:
        for path in (self._folder / JOURNAL).iterdir():
            path.unlink(missing_ok=True)


def _read(path: Path) -> _Kept | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}.", safe="The enclave was not started."
        ) from None
    digest, body = data[:_HASH], data[_HASH:]
    with contextlib.suppress(ProtocolError):
        if hashlib.sha256(body).digest() == digest:
            return _Kept.decode(body)
    raise StorageError(
        f"The kept state of an enclave, {path}, is damaged or of another version.",
        safe="The enclave was not started, and nothing of the state was used.",
        fix=(
            "Look at the disk. The party cannot take part in this run any more; the others go"
            " on if there are enough."
        ),
    )
