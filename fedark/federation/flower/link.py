"""`FlowerLink`: the link's body over a Flower grid.

- It speaks only to the nodes of its roster: a node is known by the key that the host registered for a party, so nobody can
  answer in another's name.
- It pushes and pulls itself with a short, growing pause, instead of Flower's fixed 3 s.
- Every message has a time to live that ends with its stage. An error reply comes from the SuperLink itself (source node 1):
  it is mapped by the message that it replies to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from fedark.errors import FedarkError, FederationError, printable
from fedark.federation.flower.payload import MESSAGE_TYPE, pack, unpack
from fedark.federation.link import Outcome, Passed, Tap, check_size, failure, late, named

__all__ = ["FlowerLink"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 0.5
_GRACE = 5.0


class FlowerLink:
    """A link through a grid.

    Args:
        grid: the ServerApp's grid.
        roster: party -> public key (PEM) of its node, as registered at the SuperLink.
        tap: sees every message.
        progress: told in a few words what is waited for.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Mapping[str, bytes],
        *,
        tap: Tap | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._grid = grid
        self._party_of_key = {key.strip(): party for party, key in roster.items()}
        self._tap = tap
        self._progress = progress or (lambda _: None)

    def exchange(self, requests: Mapping[str, bytes], *, stage: str, timeout: float) -> Outcome:
        """See `fedark.federation.link.Link.exchange`."""
        return self._exchange(requests, self._online(), stage, timeout)

    def broadcast(self, request: bytes, *, expect: int, stage: str, timeout: float) -> Outcome:
        """See `fedark.federation.link.Link.broadcast`."""
        started = time.monotonic()
        online: dict[str, int] = {}
        for _ in _pauses(started + timeout):
            seen = self._online()
            if seen.keys() != online.keys():
                self._progress(f"{len(seen)} of {expect} nodes are online: {', '.join(sorted(seen))}")
            online = seen
            if len(online) >= expect:
                break
        else:
            missing = sorted(set(self._party_of_key.values()) - online.keys())
            raise FederationError(
                f"{len(online)} of {expect} nodes came online within {timeout:g} s; missing: {', '.join(missing)}.",
                safe="Nothing was sent.",
                fix="Look at the logs of the missing nodes.",
            )
        remaining = max(1.0, timeout - (time.monotonic() - started))
        outcome = self._exchange(dict.fromkeys(online, request), online, stage, remaining)
        return {party: named(party, reply) if isinstance(reply, bytes) else reply for party, reply in outcome.items()}

    def _online(self) -> dict[str, int]:
        nodes = {self._party_of_key.get(bytes(node.public_key).strip()): node.node_id for node in self._grid.get_nodes()}
        return {party: node_id for party, node_id in nodes.items() if party is not None}

    def _exchange(self, requests: Mapping[str, bytes], online: Mapping[str, int], stage: str, timeout: float) -> Outcome:
        deadline = time.monotonic() + timeout
        outcome: Outcome = {}
        messages: dict[str, Message] = {}
        for party, request in requests.items():
            try:
                check_size(request, party, stage)
                if party not in online:
                    raise FederationError(f"No node of {party} is online.", fix=f"Start the node of {party}.")
            except FederationError as error:
                outcome[party] = error
                continue
            messages[party] = Message(
                pack(request), dst_node_id=online[party], message_type=MESSAGE_TYPE, ttl=timeout + _GRACE, group_id=stage
            )
            self._see("request", party, stage, request)
        waiting: dict[str, str] = {}
        if messages:
            ids = list(self._grid.push_messages(list(messages.values())))
            ids += [""] * (len(messages) - len(ids))
            for party, message_id in zip(messages, ids, strict=True):
                if message_id:
                    waiting[message_id] = party
                else:
                    outcome[party] = FederationError(f"The SuperLink did not take the message for {party} in stage {stage}.")
        messages.clear()
        for _ in _pauses(deadline):
            if not waiting:
                break
            for message_id, party in list(waiting.items()):
                # One at a time: a malformed reply makes the pull itself raise, and that must cost its sender alone.
                try:
                    pulled = list(self._grid.pull_messages([message_id]))
                except Exception as error:
                    del waiting[message_id]
                    outcome[party] = failure(party, stage, error)
                    continue
                for message in pulled:
                    if message.metadata.reply_to_message_id == message_id:
                        del waiting[message_id]
                        outcome[party] = self._read(message, party, stage)
        return outcome | {party: late(party, stage, timeout) for party in waiting.values()}

    def _read(self, message: Message, party: str, stage: str) -> bytes | FedarkError:
        if message.has_error():
            return FederationError(
                f"{party} failed in stage {stage}: {printable(message.error.reason or 'no reason given', 600)}",
                safe="Nothing of it was used.",
                fix=f"See the log of {party}.",
            )
        try:
            reply = unpack(message.content)
            check_size(reply, party, stage)
        except FedarkError as error:
            return failure(party, stage, error)
        self._see("reply", party, stage, reply)
        return reply

    def _see(self, direction: Literal["request", "reply"], party: str, stage: str, data: bytes) -> None:
        if self._tap is not None:
            self._tap(Passed(direction, party, stage, data))


def _pauses(deadline: float) -> Iterable[None]:
    """Once at once, then after growing pauses until the deadline, and once at the deadline."""
    pause = _FIRST_PAUSE
    while True:
        yield
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE)
