"""The host's handle to an enclave process: start it, call it, end it, and say truthfully how it
ended.

The host never waits for ever: every wait has a deadline, and an enclave that misses one is ended,
because an answer that comes late would be taken for the next one. After any end nothing is left: no
process, no zombie, no mount (the namespaces die with their last process), no open descriptor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from fedark.attestation.platforms.base import EnclavePlatform
from fedark.enclave.channel import MAX_FRAME, Channel, ChannelTimeout, Disconnected, Torn
from fedark.enclave.launcher import Launch, launch
from fedark.enclave.main import LOCKED
from fedark.enclave.usage import peak_below_mib
from fedark.foundation.closing import Closing
from fedark.foundation.errors import EnclaveFailed, FedarkError, ProtocolError, restore
from fedark.measurement import Measurement, measure_enclave
from fedark.sandbox.monitor import TRACED
from fedark.v1 import enclave_pb2 as pb

__all__ = ["EnclaveHandle", "EnclaveProcess"]

ProgressHandler = Callable[[pb.Progress], None]

_START_SECONDS = 180.0
_CALL_SECONDS = 3600.0
_END_SECONDS = 5.0
_DYING_SECONDS = (
    30.0  # in which a busy machine reaps what has closed its channel, so that its exit code is seen
)
_FRAME_MARGIN = 64
_SAFE = "Its keys, weights and records were in its memory alone, and are gone."


class EnclaveHandle(Protocol):
    """The host's end of an enclave."""

    def call(
        self,
        call: pb.Call,
        *,
        on_progress: ProgressHandler | None = None,
        timeout: float | None = None,
    ) -> pb.Reply:
        """One call; see `EnclaveProcess.call`."""
        ...

    def close(self) -> None:
        """End the enclave."""
        ...


class EnclaveProcess(Closing):
    """An enclave in its own confined process.

    Attributes:
        role: "trainer", "aggregator" or "inference".
        registers: the four measurement registers.
        sandbox: mode and policy digests, as attested.
        hello: the enclave's answer to its start: its public keys.
    """

    def __init__(self, role: str, launched: Launch) -> None:
        self.role = role
        self.registers = launched.registers
        self.sandbox = launched.sandbox
        self.hello = pb.Hello()
        self._launch = launched
        self._channel = Channel(launched.channel.detach())
        self._one_at_a_time = threading.RLock()
        self._ended: EnclaveFailed | None = None

    @classmethod
    def start(
        cls,
        role: str,
        run_config: bytes,
        *,
        device: EnclavePlatform,
        log: Path,
        minimum_sandbox: str = "landlock",
        memory_bytes: int | None = None,
        message_bytes: int = MAX_FRAME,
        checkpoint: bytes = b"",
        measurement: Measurement | None = None,
    ) -> EnclaveProcess:
        """Measure, start and lock an enclave, and hand it its run configuration.

        Args:
            run_config: canonical form (`fedark.enclave.session.RunConfig.encode`).
            device: the simulated device, or the confidential guest, that it runs on; a quoting key
                stays here.
            log: file for what libraries print while they load; nothing is printed after that.
            minimum_sandbox: "landlock" or "namespaces".
            memory_bytes: most private memory; by default three quarters of the machine's for one
                that holds a model, 4 GiB for an aggregator.
            message_bytes: the largest frame that the run needs (`RunConfig.message_bytes`).
            checkpoint: of an enclave of this run that has ended, which this one continues.
            measurement: of the role, if it was made just now.

        Raises:
            SandboxUnavailable: this machine cannot confine it as asked.
            Refused: a file of the enclave changed after it was measured, or one leads past what was
                measured; or its process is not confined as its evidence would say.
            EnclaveFailed: it did not start.
            FedarkError: it refused its run configuration.
        """
        if memory_bytes is None:
            physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            memory_bytes = physical * 3 // 4 if role != "aggregator" else min(4 << 30, physical)
        launched = launch(
            measurement or measure_enclave(role),
            run_config,
            device=device,
            log=log,
            minimum_sandbox=minimum_sandbox,
            memory_bytes=memory_bytes,
        )
        enclave = cls(role, launched)
        try:
            launched.settle()
            enclave._await_lock(time.monotonic() + _START_SECONDS)
            enclave._channel.limit = message_bytes
            enclave.hello = enclave.call(
                pb.Call(start=pb.Start(run_config=run_config)), timeout=_START_SECONDS
            ).hello
            if checkpoint:
                resume = pb.Call(resume=pb.Resume(checkpoint=checkpoint))
                enclave.hello = enclave.call(resume, timeout=_START_SECONDS).hello
        except BaseException:
            enclave.close()
            raise
        return enclave

    def call(
        self,
        call: pb.Call,
        *,
        on_progress: ProgressHandler | None = None,
        timeout: float | None = None,
    ) -> pb.Reply:
        """One call and its reply.

        Args:
            on_progress: called, in this thread, for each progress report meanwhile.
            timeout: seconds for all of it; an hour by default. An enclave that takes longer is
                ended.

        Raises:
            EnclaveFailed: it died, was killed, ran out of memory or of time, or was ended before;
                says which.
            ProtocolError: the call is too large, and was not sent.
            FedarkError: what the enclave answered, as the class that it named.
        """
        if call.ByteSize() > self._channel.limit - _FRAME_MARGIN:
            raise ProtocolError(
                f"A call of {call.ByteSize()} bytes is too large for an enclave.",
                safe="It was not sent.",
            )
        with self._one_at_a_time:
            if self._ended is not None:
                raise self._ended
            deadline = time.monotonic() + (_CALL_SECONDS if timeout is None else timeout)
            with self._ending_on_failure():
                answer = self._exchange(call, on_progress, deadline)
            if answer.WhichOneof("kind") == "reply":
                return answer.reply
            raise self._error_of(answer.fault)

    def close(self) -> None:
        """End the enclave: its memory, its scratch folder and its mounts go with it.

        Harmless when done twice, and from any thread: a call in progress then raises EnclaveFailed.
        """
        self._end(EnclaveFailed("The enclave was ended by its host.", safe=_SAFE))

    def peak_mib(self) -> float:
        """Most resident memory that the enclave has had, MiB."""
        return peak_below_mib(self._launch.process.pid)

    def _exchange(
        self, call: pb.Call, on_progress: ProgressHandler | None, deadline: float
    ) -> pb.Frame:
        self._channel.send(pb.Frame(call=call), deadline)
        while True:
            frame = self._channel.receive(deadline)
            match frame.WhichOneof("kind"):
                case "reply" | "fault":
                    return frame
                case "progress":
                    if on_progress is not None:
                        on_progress(frame.progress)
                case "quote_request":
                    self._channel.send(
                        pb.Frame(quote_reply=self._quote(frame.quote_request)), deadline
                    )
                case "sealing_request":
                    self._launch.check_loaded()
                    self._channel.send(
                        pb.Frame(sealing_reply=pb.SealingReply(key=self._launch.sealing_key())),
                        deadline,
                    )
                case other:
                    raise ProtocolError(f"it sent a {other!r}.")

    def _await_lock(self, deadline: float) -> None:
        with self._ending_on_failure():
            frame = self._channel.receive(deadline)
            if frame.WhichOneof("kind") == "progress" and frame.progress.stage == LOCKED:
                self._launch.check_locked()
                return
            if frame.WhichOneof("kind") != "fault":
                raise ProtocolError("it spoke before it was locked.")
        raise self._error_of(frame.fault)

    def _quote(self, request: pb.QuoteRequest) -> pb.QuoteReply:
        self._launch.check_loaded()
        attester = self._launch.attester
        return pb.QuoteReply(
            platform=attester.platform, token=attester.quote(request.report_data, request.nonce)
        )

    def _error_of(self, fault: pb.Fault) -> FedarkError:
        error = restore(
            fault.code, fault.what, safe=fault.safe, fix=fault.fix, reasons=fault.reasons
        )
        return self._end(error, patience=1.0) if isinstance(error, EnclaveFailed) else error

    @contextlib.contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        """After a failure of the channel, or of the caller's own progress handler, the stream is
        out of step: end the enclave.
        """
        try:
            yield
        except Disconnected:
            raise self._end(None, patience=_DYING_SECONDS) from None
        except ChannelTimeout:
            late = EnclaveFailed(
                "The enclave did not answer in time, and was ended.",
                safe=_SAFE,
                fix="Allow it more time.",
            )
            raise self._end(late) from None
        except ProtocolError as error:
            # A death looks like a broken protocol; the exit code tells them apart.
            broken = EnclaveFailed(
                f"The enclave broke the protocol and was ended: {error.what}", safe=_SAFE
            )
            raise self._end(
                broken, patience=_DYING_SECONDS if isinstance(error, Torn) else 1.0
            ) from None
        except BaseException:
            self.close()
            raise

    def _end(self, reason: EnclaveFailed | None, *, patience: float = 0.0) -> EnclaveFailed:
        """End the process and reap it; the first reason counts. None: what its exit code says.

        Args:
            patience: seconds to let it end by itself first, so that its own exit code is seen.
        """
        process = self._launch.process
        if reason is not None and not patience and self._ended is None:
            # Before the death, so that a call in another thread reports this and not the signal.
            self._ended = reason
        by_itself = _waited(process, patience)
        # The monitor kills its enclave and reports; if it does not, its own death takes the enclave
        # along. Nothing is lost by a hard end: an enclave keeps nothing.
        if not by_itself:
            process.terminate()
            if not _waited(process, _END_SECONDS):
                process.kill()
                process.wait()
        if by_itself and (reason is None or _signal_of(process.returncode)):
            reason = _obituary(process.returncode)
        if self._ended is None:
            self._ended = reason or EnclaveFailed(
                "The enclave closed its channel, and was ended.", safe=_SAFE
            )
        with self._one_at_a_time:
            self._channel.close()
        return self._ended


def _waited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process has ended within `seconds`."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal_of(code: int) -> int:
    """The signal that ended the enclave (128 + n, from its monitor) or its monitor (-n); 0 for
    none.
    """
    return -code if code < 0 else code - 128 if code > 128 else 0


def _obituary(code: int) -> EnclaveFailed:
    number = _signal_of(code)
    if code == TRACED:
        return EnclaveFailed(
            "The enclave was not let run: another process, such as a debugger, traced it.",
            safe="It never had a key.",
            fix="Start it without one.",
        )
    if number == signal.SIGKILL:
        return EnclaveFailed(
            "The enclave was killed (SIGKILL): by the kernel, because the machine ran out of"
            " memory, or by a person.",
            safe=_SAFE,
            fix=(
                "Look into the kernel's log; free memory or use smaller batches, then start it"
                " again."
            ),
        )
    if number == signal.SIGSYS:
        return EnclaveFailed(
            "The enclave made a forbidden system call and was killed (SIGSYS).", safe=_SAFE
        )
    if number:
        return EnclaveFailed(
            f"The enclave was killed by signal {number} ({_name(number)}).", safe=_SAFE
        )
    return EnclaveFailed(
        f"The enclave ended by itself (exit code {code}).", safe=_SAFE, fix="Its log may say why."
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
