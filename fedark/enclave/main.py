"""The life of an enclave process, from its first instruction to its last.

1. The entry point of its role (`enclaves/ROLE/main.py`) reads the launch specification from
   standard input, sets `sys.path`, and calls `run`. Nothing but the standard library and this
   package's sandbox is loaded yet.
2. `fedark.sandbox.enter`, then the role's libraries and one warm-up, then `fedark.sandbox.lock`.
3. Only now does the host get a frame, and may send `Start`; the session makes its keys.
4. Calls, one at a time, until the host closes the channel.

What leaves is a Reply, Progress, a request for a quote or the sealing key, or a Fault. A
FedarkError becomes a Fault with its texts, which never hold a secret, and the session goes on. Any
other exception may hold anything in its text: the Fault names its type alone, and the process ends,
for its state is unknown.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from fedark.enclave import imports
from fedark.foundation.errors import FedarkError, ProtocolError, SandboxUnavailable
from fedark.sandbox import SCRATCH, Setup, enter, lock

if TYPE_CHECKING:
    from fedark.enclave.channel import Channel
    from fedark.enclave.checkpoint import SealingKey
    from fedark.enclave.session import Quote, Session
    from fedark.v1 import enclave_pb2 as pb

__all__ = ["COMPILE", "LOCKED", "Create", "run"]

LOCKED = "locked"
"""Stage of the one Progress frame that an enclave sends unasked: its sandbox is final."""

COMPILE = "compile"
"""What a launch specification asks for when the launcher fills its bytecode cache: load, warm up,
end.
"""

_EXIT_REFUSED, _EXIT_BROKEN = 77, 70

Create = Callable[[bytes, "Quote", "SealingKey"], "Session"]
"""(run configuration, quote, sealing key) -> session; `fedark.enclave.session.create`."""


def run(specification: dict[str, Any], load: Callable[[], Create]) -> NoReturn:
    """Be the enclave that `specification` (`fedark.enclave.launcher`) describes.

    Args:
        load: imports the role's libraries, runs them once, and returns what makes the session.
    """
    if specification["task"] == COMPILE:
        load()
        sys.exit(0)
    setup = Setup.from_map(specification["setup"])
    # Standard input held the specification.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    # Libraries ask for a folder as they load; without this, Python would try some, and fail where
    # nothing can be written.
    tempfile.tempdir = SCRATCH
    try:
        imports.install(
            {path: bytes.fromhex(digest) for path, digest in specification["digests"].items()}
        )
        enter(setup)
        create = load()
        from fedark.enclave.channel import Channel

        channel = Channel(setup.channel)
        lock(setup)
    except FedarkError as error:
        _refuse(setup, error)
    except BaseException as error:
        # To the log: nothing secret was here yet; from `lock` on there is no log.
        traceback.print_exc()
        _refuse(
            setup,
            SandboxUnavailable(
                "The enclave's libraries did not load inside its sandbox"
                f" ({type(error).__name__}).",
                safe="The enclave never had a key.",
                fix="Its log has the message.",
            ),
        )
    try:
        _serve(channel, create)
    except BaseException:
        os._exit(_EXIT_BROKEN)
    os._exit(0)


def _refuse(setup: Setup, error: FedarkError) -> NoReturn:
    try:
        from fedark.enclave.channel import Channel

        Channel(setup.channel).send(_fault(error))
    finally:
        # Whatever state the sandbox is in: a host that got no frame finds the exit code, and the
        # text in the log.
        os._exit(_EXIT_REFUSED)


def _serve(channel: Channel, create: Create) -> None:
    from fedark.enclave.channel import Disconnected
    from fedark.v1 import enclave_pb2 as pb

    def progress(report: pb.Progress) -> None:
        channel.send(pb.Frame(progress=report))

    def quote(report_data: bytes, nonce: bytes) -> tuple[str, bytes]:
        channel.send(pb.Frame(quote_request=pb.QuoteRequest(report_data=report_data, nonce=nonce)))
        answer = channel.receive()
        if answer.WhichOneof("kind") != "quote_reply":
            raise ConnectionError(
                "the launcher did not answer with a quote"
            )  # out of step: ends the process
        return answer.quote_reply.platform, answer.quote_reply.token

    def sealing_key() -> bytes:
        channel.send(pb.Frame(sealing_request=pb.SealingRequest()))
        answer = channel.receive()
        if answer.WhichOneof("kind") != "sealing_reply" or len(answer.sealing_reply.key) != 32:
            raise ConnectionError(
                "the launcher did not answer with a sealing key"
            )  # out of step: ends the process
        return answer.sealing_reply.key

    session: Session | None = None
    progress(pb.Progress(stage=LOCKED))
    while True:
        try:
            frame = channel.receive()
            if frame.WhichOneof("kind") != "call":
                raise ConnectionError("the host sent something that is not a call")
        except (Disconnected, ProtocolError, ConnectionError):
            return
        try:
            if session is None:
                if frame.call.WhichOneof("body") != "start":
                    raise ProtocolError("The first call to an enclave is its start.")
                session = create(frame.call.start.run_config, quote, sealing_key)
                channel.limit = session.message_bytes
            channel.send(pb.Frame(reply=session.handle(frame.call, progress)))
        except Disconnected:
            return
        except FedarkError as error:
            channel.send(_fault(error))
        except BaseException as error:
            _report(channel, error)
            os._exit(_EXIT_BROKEN)


def _report(channel: Channel, error: BaseException) -> None:
    from fedark.enclave.channel import Disconnected
    from fedark.v1 import enclave_pb2 as pb

    # torch says "not enough memory" in a RuntimeError; the words are its own, so only whether they
    # stand there is used.
    memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )
    what = "ran out of memory" if memory else f"met an unexpected {type(error).__name__}"
    fix = (
        "Give it more memory, or train with smaller batches."
        if memory
        else "Start it again; this is a defect worth reporting."
    )
    fault = pb.Fault(
        code="EnclaveFailed",
        what=f"The enclave {what} and ended.",
        safe="Its keys and data went with it.",
        fix=fix,
    )
    try:
        channel.send(pb.Frame(fault=fault))
    except Disconnected:
        return


def _fault(error: FedarkError) -> pb.Frame:
    from fedark.v1 import enclave_pb2 as pb

    reasons = [
        str(reason) for name in ("reasons", "problems") for reason in getattr(error, name, ())
    ]
    fault = pb.Fault(
        code=type(error).__name__, what=error.what, safe=error.safe, fix=error.fix, reasons=reasons
    )
    return pb.Frame(fault=fault)
