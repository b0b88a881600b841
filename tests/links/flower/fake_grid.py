"""A Flower grid in one process: every message is serialised, nodes answer in threads, errors come
from node 1.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedark.foundation.errors import FedarkError
from fedark.links.flower.payload import pack, unpack


def use_identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class FakeGrid(Grid):
    """Nodes 101, 102, ... for the handlers' parties, each with the key `key-PARTY`."""

    def __init__(self, handlers: Mapping[str, Callable[[bytes], bytes]]) -> None:
        use_identity()
        self.handlers = dict(handlers)
        self.ids = {party: 101 + index for index, party in enumerate(handlers)}
        self.strangers: list[NodeInfo] = []
        self.offline: set[str] = set()
        self.sent: list[Message] = []
        self.replies: dict[str, Message] = {}
        self.rejects: set[str] = set()

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        known = [
            NodeInfo(node_id=node_id, public_key=f"key-{party}\n".encode())
            for party, node_id in self.ids.items()
            if party not in self.offline
        ]
        return [*known, *self.strangers]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            party = next(
                p for p, node_id in self.ids.items() if node_id == message.metadata.dst_node_id
            )
            if party in self.rejects:
                ids.append("")
                continue
            message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
            wire = message_to_proto(message).SerializeToString()
            self.sent.append(message)
            threading.Thread(target=self._serve, args=(party, wire), daemon=True).start()
            ids.append(message.metadata.message_id)
        return ids

    def _serve(self, party: str, wire: bytes) -> None:
        message = message_from_proto(type(message_to_proto(self.sent[0])).FromString(wire))
        try:
            reply = Message(pack(self.handlers[party](unpack(message.content))), reply_to=message)
        except Exception as error:
            text = (
                f"{type(error).__name__}: {error.what}"
                if isinstance(error, FedarkError)
                else type(error).__name__
            )
            reply = Message(Error(code=2, reason=text), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1
        self.replies[message.metadata.message_id] = message_from_proto(message_to_proto(reply))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(key) for key in list(message_ids) if key in self.replies]

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError
