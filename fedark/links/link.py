"""How the aggregator's side reaches the parties: one request and one reply a stage, as bytes.

Two bodies, and the same behavioural tests for both: `InProcessLink` calls functions of this
process, and `fedark.links.flower.link.FlowerLink` goes through a Flower grid. Rules that both keep:

- Every message crosses as bytes; no object of one party is ever seen by another.
- A party that fails, is unknown or is late gives an error in its own place; the others' replies are
  kept.
- Every stage has a deadline. A reply that comes after it is dropped.
- A `Tap` sees every byte that passes, so that a test can search all of it for what must never
  cross.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from google.protobuf.message import DecodeError

from fedark.foundation.errors import FedarkError, FederationError, printable
from fedark.v1 import stage_pb2

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Handler",
    "InProcessLink",
    "Link",
    "Outcome",
    "Passed",
    "Superseded",
    "Tap",
    "VERSION",
    "Unavailable",
    "check_size",
    "party_of",
    "stage_of",
]

MAX_MESSAGE_BYTES = 512 << 20
VERSION = 1
"""Of the messages of the stages; node and aggregator must speak the same."""


class Unavailable(FederationError):
    """A party was not reached, or not in time. It may be there again later."""


class Superseded(Exception):
    """The link was closed under its user, which is to stop without a word to anybody: another one
    goes on.
    """


Handler = Callable[[bytes], bytes]
Outcome = dict[str, bytes | FedarkError]


@dataclass(frozen=True)
class Passed:
    """One message that crossed the link."""

    direction: Literal["request", "reply"]
    party: str
    stage: str
    data: bytes


Tap = Callable[[Passed], None]


class Link(Protocol):
    """The way to the parties. Neither method raises for what one party did; both return one entry
    for each party asked.
    """

    def exchange(self, requests: Mapping[str, bytes], *, stage: str, timeout: float) -> Outcome:
        """Send each party its request and wait, at most `timeout` seconds, for all replies."""
        ...

    def present(self) -> set[str]:
        """The parties that can be reached now, as far as is known."""
        ...

    def broadcast(self, request: bytes, *, expect: int, stage: str, timeout: float) -> Outcome:
        """First contact: wait until `expect` parties are there, send all of them the same request.

        The `party` field of each reply must be the name that the party is known by.

        Raises:
            FederationError: fewer than `expect` parties appeared within `timeout` seconds. Nothing
                was sent.
        """
        ...


def check_size(data: bytes, party: str, stage: str) -> None:
    """Raise FederationError if `data` is larger than a message may be."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise FederationError(
            f"A message of {len(data)} bytes with {party} in stage {stage} is over the limit of"
            f" {MAX_MESSAGE_BYTES}.",
            safe="It was not passed on.",
        )


def party_of(reply: bytes) -> str:
    """The `party` field of a serialised StageReply.

    Raises:
        FederationError: `reply` is not one.
    """
    message = stage_pb2.StageReply()
    try:
        message.ParseFromString(reply)
    except DecodeError:
        raise FederationError("A reply is not a StageReply.", safe="It was dropped.") from None
    return str(message.party)


def stage_of(request: stage_pb2.StageRequest) -> str:
    """The stage that a request is of: its body, or the call that it has passed on to an enclave."""
    stage = request.WhichOneof("body") or ""
    if stage == "forward":
        stage = request.forward.call.WhichOneof("body") or ""
    return stage or "unknown"


def named(party: str, reply: bytes) -> bytes | FedarkError:
    """`reply` if it names `party` as its sender, else the error that stands in its place."""
    try:
        claimed = party_of(reply)
    except FederationError as error:
        return error
    if claimed != party:
        return FederationError(
            f"{party} answered in the name of {printable(claimed, 60)!r}.",
            safe="Its reply was dropped.",
            fix="Exclude that node.",
        )
    return reply


def failure(party: str, stage: str, error: Exception) -> FederationError:
    """What stands in the place of a party whose handler raised. Only our own errors' texts are
    known to hold no secret.
    """
    detail = f": {printable(error.what)}" if isinstance(error, FedarkError) else ""
    return FederationError(
        f"{party} failed in stage {stage} ({type(error).__name__}{detail})",
        safe="Nothing of it was used.",
        fix=f"See the log of {party}.",
    )


def late(party: str, stage: str, timeout: float) -> Unavailable:
    """What stands in the place of a party that did not answer in time."""
    return Unavailable(
        f"{party} did not answer stage {stage} within {timeout:g} s.",
        safe="A reply that comes later is dropped.",
        fix=f"Look whether the node of {party} runs, or allow more time.",
    )


class InProcessLink:
    """A link to handlers of this process, for simulation and tests.

    Args:
        handlers: party -> its node's `handle`.
        tap: sees every message.
        parallel: how many handlers run at the same time; 0 means all. A handler that hangs keeps
            its place.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], *, tap: Tap | None = None, parallel: int = 0
    ) -> None:
        self._handlers = dict(handlers)
        self._tap = tap
        self._slots = threading.Semaphore(parallel or max(1, len(self._handlers)))
        self._busy = {party: threading.Lock() for party in self._handlers}

    def exchange(self, requests: Mapping[str, bytes], *, stage: str, timeout: float) -> Outcome:
        """See `Link.exchange`."""
        deadline = time.monotonic() + timeout
        done: queue.SimpleQueue[tuple[str, bytes | FedarkError]] = queue.SimpleQueue()
        outcome: Outcome = {}
        waiting: set[str] = set()
        for party, request in requests.items():
            handler = self._handlers.get(party)
            if handler is None:
                outcome[party] = Unavailable(
                    f"No node of {party} is connected.", fix=f"Start the node of {party}."
                )
                continue
            try:
                check_size(request, party, stage)
            except FederationError as error:
                outcome[party] = error
                continue
            self._see("request", party, stage, request)
            waiting.add(party)
            work = (party, handler, bytes(request), stage, deadline, done)
            threading.Thread(
                target=self._serve, args=work, name=f"node-{party}", daemon=True
            ).start()
        while waiting:
            try:
                party, reply = done.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            waiting.discard(party)
            if isinstance(reply, bytes):
                self._see("reply", party, stage, reply)
            outcome[party] = reply
        outcome |= {party: late(party, stage, timeout) for party in waiting}
        return outcome

    def present(self) -> set[str]:
        """See `Link.present`."""
        return set(self._handlers)

    def broadcast(self, request: bytes, *, expect: int, stage: str, timeout: float) -> Outcome:
        """See `Link.broadcast`."""
        if len(self._handlers) < expect:
            raise FederationError(
                f"{len(self._handlers)} of {expect} nodes are connected.", safe="Nothing was sent."
            )
        outcome = self.exchange(
            dict.fromkeys(self._handlers, request), stage=stage, timeout=timeout
        )
        return {
            party: named(party, reply) if isinstance(reply, bytes) else reply
            for party, reply in outcome.items()
        }

    def _serve(
        self,
        party: str,
        handler: Handler,
        request: bytes,
        stage: str,
        deadline: float,
        done: queue.SimpleQueue[tuple[str, bytes | FedarkError]],
    ) -> None:
        # A node does one stage at a time; one that is still busy with a late stage answers this one
        # after it, or late.
        with self._busy[party], self._slots:
            if time.monotonic() >= deadline:
                return
            try:
                reply = handler(request)
                check_size(reply, party, stage)
                done.put((party, bytes(reply)))
            except Exception as error:
                done.put((party, failure(party, stage, error)))

    def _see(
        self, direction: Literal["request", "reply"], party: str, stage: str, data: bytes
    ) -> None:
        if self._tap is not None:
            self._tap(Passed(direction, party, stage, data))
