"""`FlowerLink`: the link's body over a Flower grid.

- It speaks only to the nodes of its roster: a node is known by the key that the host registered for
  a party, so nobody can answer in another's name.
- It pushes and pulls itself with a short, growing pause, instead of Flower's fixed 3 s.
- Every message has a time to live that ends with its stage. An error reply comes from the SuperLink
  itself (source node 1): it is mapped by the message that it replies to.
- A node that is not online is waited for a while. One that connected anew after it was sent a
  message has lost it: it is sent again, and so is one whose reply got lost on the way. Requests are
  such that they may come twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from fedark.foundation.errors import FedarkError, FederationError, printable
from fedark.links.flower.adapter import LOST_ON_THE_WAY, NOT_REACHED, RUN_OVER, sending
from fedark.links.flower.payload import MESSAGE_TYPE, pack, unpack
from fedark.links.link import (
    Outcome,
    Passed,
    Superseded,
    Tap,
    Unavailable,
    check_size,
    failure,
    late,
    named,
)

__all__ = ["FlowerLink"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.4
_GRACE = 5.0
_LOOK = 1.0
_log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    """A request that has no answer yet: the messages that carry it, and when the node that was sent
    the last one had connected.
    """

    request: bytes
    ids: list[str] = field(default_factory=list)
    connected: str | None = None
    refused: FederationError | None = None

    def due(self, node: tuple[int, str] | None) -> bool:
        """Whether it must be sent now: it was not yet, or to a node that has lost it since."""
        return (
            node is not None
            and self.refused is None
            and (not self.ids or node[1] != self.connected)
        )


class FlowerLink:
    """A link through a grid.

    Args:
        grid: the ServerApp's grid.
        roster: party -> public key (PEM) of its node, as registered at the SuperLink.
        tap: sees every message.
        progress: told in a few words what is waited for.
        patience: seconds that a node which is not online when a stage begins has to come back.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Mapping[str, bytes],
        *,
        tap: Tap | None = None,
        progress: Callable[[str], None] | None = None,
        patience: float = 30.0,
    ) -> None:
        self._grid = grid
        self._party_of_key = {key.strip(): party for party, key in roster.items()}
        self._tap = tap
        self._patience = patience
        self._progress = progress or (lambda _: None)

    def exchange(self, requests: Mapping[str, bytes], *, stage: str, timeout: float) -> Outcome:
        """See `fedark.links.link.Link.exchange`."""
        return self._exchange(requests, stage, timeout)

    def present(self) -> set[str]:
        """See `fedark.links.link.Link.present`."""
        return set(self._online())

    def broadcast(self, request: bytes, *, expect: int, stage: str, timeout: float) -> Outcome:
        """See `fedark.links.link.Link.broadcast`."""
        started = time.monotonic()
        online: dict[str, int] = {}
        for _ in _pauses(started + timeout):
            seen = self._online()
            if seen.keys() != online.keys():
                self._progress(
                    f"{len(seen)} of {expect} nodes are online: {', '.join(sorted(seen))}"
                )
            online = seen
            if len(online) >= expect:
                break
        else:
            missing = sorted(set(self._party_of_key.values()) - online.keys())
            raise FederationError(
                f"{len(online)} of {expect} nodes came online within {timeout:g} s; missing:"
                f" {', '.join(missing)}.",
                safe="Nothing was sent.",
                fix="Look at the logs of the missing nodes.",
            )
        remaining = max(1.0, timeout - (time.monotonic() - started))
        outcome = self._exchange(dict.fromkeys(online, request), stage, remaining)
        return {
            party: named(party, reply) if isinstance(reply, bytes) else reply
            for party, reply in outcome.items()
        }

    def _online(self) -> dict[str, int]:
        return {party: node_id for party, (node_id, _) in self._nodes().items()}

    def _nodes(self, known: dict[str, tuple[int, str]] | None = None) -> dict[str, tuple[int, str]]:
        """Of each party whose node is online: the node's id, and when it connected, in the
        SuperLink's words. `known` if it says nothing just now."""
        found = {}
        try:
            nodes = list(self._grid.get_nodes())
        except RUN_OVER:
            raise Superseded from None
        except Exception as error:
            _log.warning(
                "the SuperLink does not say which nodes are online (%s)", type(error).__name__
            )
            return known or {}
        for node in nodes:
            party = self._party_of_key.get(bytes(node.public_key).strip())
            if party is not None:
                found[party] = node.node_id, str(node.last_activated_at)
        return found

    def _exchange(self, requests: Mapping[str, bytes], stage: str, timeout: float) -> Outcome:
        began = time.monotonic()
        outcome: Outcome = {}
        waiting: dict[str, _Waiting] = {}
        for party, request in requests.items():
            try:
                check_size(request, party, stage)
            except FederationError as error:
                outcome[party] = error
                continue
            if party not in self._party_of_key.values():
                outcome[party] = Unavailable(
                    f"No node of {party} is in the roster.", safe="Nothing was sent in its name."
                )
                continue
            waiting[party] = _Waiting(request)
        nodes, looked = self._nodes(), began
        sending.goes_on = lambda: self._all_connected(waiting)
        for _ in _pauses(began + timeout):
            now = time.monotonic()
            if now - looked >= _LOOK:
                nodes, looked = self._nodes(nodes), now
            if sending.trouble.is_set():
                sending.trouble.clear()
                for state in waiting.values():
                    state.connected = None  # its reply may have been lost: ask again
            due = {party: state for party, state in waiting.items() if state.due(nodes.get(party))}
            self._push(due, nodes, stage, began + timeout)
            pulled = self._pull_all(waiting)
            for party, state in list(waiting.items()):
                answer = self._answer(party, state, stage, pulled)
                if answer is None and not state.ids and now - began >= min(self._patience, timeout):
                    answer = Unavailable(
                        f"No node of {party} is online.", fix=f"Start the node of {party}."
                    )
                if answer is not None:
                    del waiting[party]
                    outcome[party] = answer
            if not waiting:
                break
        return outcome | {party: late(party, stage, timeout) for party in waiting}

    def _all_connected(self, waiting: Mapping[str, _Waiting]) -> bool:
        """Whether every node that has a message is still connected as it was when it got it."""
        nodes = self._nodes()
        return all(
            party in nodes and nodes[party][1] == state.connected
            for party, state in waiting.items()
            if state.ids
        )

    def _push(
        self,
        due: Mapping[str, _Waiting],
        nodes: Mapping[str, tuple[int, str]],
        stage: str,
        deadline: float,
    ) -> None:
        if not due:
            return
        ttl = deadline - time.monotonic() + _GRACE
        messages = []
        for party, state in due.items():
            node_id, state.connected = nodes[party]
            content = pack(state.request)
            messages.append(
                Message(
                    content, dst_node_id=node_id, message_type=MESSAGE_TYPE, ttl=ttl, group_id=stage
                )
            )
            self._see("request", party, stage, state.request)
        try:
            ids = list(self._grid.push_messages(messages))
        except RUN_OVER:
            raise Superseded from None
        except Exception as error:
            # A SuperLink that dies takes a half-sent message along; whoever is due stays due.
            _log.warning(
                "messages of stage %s could not be sent (%s) and are sent again",
                stage,
                type(error).__name__,
            )
            return
        for (party, state), message_id in zip(
            due.items(), [*ids, *[""] * (len(messages) - len(ids))], strict=True
        ):
            if message_id:
                state.ids.append(message_id)
            else:
                state.refused = FederationError(
                    f"The SuperLink did not take the message for {party} in stage {stage}."
                )

    def _pull_all(self, waiting: Mapping[str, _Waiting]) -> dict[str, Message | Exception]:
        """What has come, by the message that it replies to."""
        ids = [message_id for state in waiting.values() for message_id in state.ids]
        found: dict[str, Message | Exception] = {}
        if not ids:
            return found
        try:
            found = {
                message.metadata.reply_to_message_id: message
                for message in self._grid.pull_messages(ids)
            }
        except RUN_OVER:
            raise Superseded from None
        except Exception:
            # A malformed reply makes the pull itself raise, and that must cost its sender alone.
            for message_id in ids:
                try:
                    for message in self._grid.pull_messages([message_id]):
                        found[message.metadata.reply_to_message_id] = message
                except RUN_OVER:
                    raise Superseded from None
                except NOT_REACHED as error:
                    _log.warning("replies cannot be fetched just now (%s)", type(error).__name__)
                except Exception as error:
                    found[message_id] = error
        return found

    def _answer(
        self, party: str, state: _Waiting, stage: str, pulled: Mapping[str, Message | Exception]
    ) -> bytes | FedarkError | None:
        """The party's answer, if it is there."""
        if state.refused is not None:
            return state.refused
        for message_id in list(state.ids):
            message = pulled.get(message_id)
            if message is None:
                continue
            if isinstance(message, Exception):
                return failure(party, stage, message)
            if message.has_error() and message.error.code in LOST_ON_THE_WAY:
                state.ids.remove(message_id)
                state.connected = None  # send it again
                continue
            return self._read(message, party, stage)
        return None

    def _read(self, message: Message, party: str, stage: str) -> bytes | FedarkError:
        if message.has_error():
            return FederationError(
                f"{party} failed in stage {stage}:"
                f" {printable(message.error.reason or 'no reason given', 600)}",
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

    def _see(
        self, direction: Literal["request", "reply"], party: str, stage: str, data: bytes
    ) -> None:
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
