"""A signed tree head: the owner of a log commits to all of it, at one size (RFC 9162, 4.10, in this
project's own form).

Form: canonical CBOR of {"body", "signature"}; body: {"log", "size", "root", "time"}; signature:
Ed25519 by the owner's long-lived key under a label of its own. The log's id is a digest of that
key: a party has one log, and two heads of one size with different roots under one id prove that it
has two.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import InputError, LogRefused, ProtocolError, Refused
from fedark.foundation.jsontext import read_json
from fedark.foundation.keys import SigningKey, verify_signature

__all__ = ["HEAD_LABEL", "MAX_HEAD_BYTES", "TreeHead", "log_id", "sign_head"]

HEAD_LABEL = "fedark/tree-head/1"
MAX_HEAD_BYTES = 512
_SIZE_LIMIT = 1 << 63
_TIME_LIMIT = 1 << 40


def log_id(public: bytes) -> bytes:
    """The id of the log that the owner of a signing key keeps, 32 bytes."""
    return hashlib.sha256(canonical.encode(["fedark/log-id/1", public])).digest()


@dataclass(frozen=True, init=False)
class TreeHead:
    """A head whose signature was verified. `verify` and `from_json` alone make one.

    Attributes:
        log: id of the log, 32 bytes.
        size: entries under it.
        root: of the tree, 32 bytes.
        time: seconds since 1970, UTC; does not go back from one head of a log to a larger one.
        encoded: as it was received.
    """

    log: bytes
    size: int
    root: bytes
    time: int
    encoded: bytes

    def __init__(self) -> None:
        raise TypeError("use TreeHead.verify")

    @classmethod
    def verify(cls, data: bytes, public: bytes, *, by: str) -> TreeHead:
        """Read a head of the log whose owner has the signing key `public`; `by` names the owner in
        texts.

        Raises:
            LogRefused: it is malformed, of another log, or not signed by that key.
        """
        body = _signed_body(data)
        try:
            verify_signature(public, HEAD_LABEL, body.raw, body.signature, by=by)
        except Refused:
            raise LogRefused(
                f"A tree head does not carry the signature of {by}.",
                safe="Nothing was concluded from it.",
            ) from None
        if body.log != log_id(public):
            raise LogRefused(
                f"A tree head of {by} is of another log than that key's.",
                safe="Nothing was concluded from it.",
            )
        head = object.__new__(cls)
        for name in ("log", "size", "root", "time"):
            object.__setattr__(head, name, getattr(body, name))
        object.__setattr__(head, "encoded", data)
        return head

    def to_json(self, public: bytes) -> str:
        """The head as a small text file that can be sent to anyone; `public` is for the reader to
        compare.
        """
        value = {
            "fedark": HEAD_LABEL,
            "log": self.log.hex(),
            "size": self.size,
            "root": self.root.hex(),
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(),
            "signing_key": public.hex(),
            "signed": self.encoded.hex(),
        }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, public: bytes, *, by: str) -> TreeHead:
        """Read `to_json`'s text. What is signed counts; the readable fields must say the same.

        Raises:
            InputError: it is no such text.
            LogRefused: as `verify`.
        """
        try:
            value = read_json(text)
            signed = bytes.fromhex(value["signed"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "That is not a tree head in JSON.", fix="`fedark log head` writes one."
            ) from None
        head = cls.verify(signed, public, by=by)
        if json.loads(head.to_json(public)) != value:
            raise LogRefused(
                "The readable fields of a tree head differ from what is signed.",
                safe="It was not used.",
            )
        return head


@dataclass(frozen=True)
class _Body:
    log: bytes
    size: int
    root: bytes
    time: int
    raw: bytes
    signature: bytes


def _malformed() -> LogRefused:
    return LogRefused("A tree head is malformed.", safe="Nothing was concluded from it.")


def _signed_body(data: bytes) -> _Body:
    try:
        outer: Any = canonical.decode(data, max_bytes=MAX_HEAD_BYTES, max_depth=1)
        if type(outer) is not dict or outer.keys() != {"body", "signature"}:
            raise _malformed()
        if type(outer["body"]) is not bytes or type(outer["signature"]) is not bytes:
            raise _malformed()
        body: Any = canonical.decode(outer["body"], max_bytes=MAX_HEAD_BYTES, max_depth=1)
    except ProtocolError:
        raise _malformed() from None
    if type(body) is not dict or body.keys() != {"log", "size", "root", "time"}:
        raise _malformed()
    if [type(body[name]) for name in ("log", "size", "root", "time")] != [bytes, int, bytes, int]:
        raise _malformed()
    if len(body["log"]) != 32 or len(body["root"]) != 32:
        raise _malformed()
    if not (0 <= body["size"] < _SIZE_LIMIT and 0 <= body["time"] < _TIME_LIMIT):
        raise _malformed()
    return _Body(**body, raw=outer["body"], signature=outer["signature"])


def sign_head(key: SigningKey, *, size: int, root: bytes, time: int) -> TreeHead:
    """The head of the key owner's log."""
    body = canonical.encode({"log": log_id(key.public), "size": size, "root": root, "time": time})
    data = canonical.encode({"body": body, "signature": key.sign(HEAD_LABEL, body)})
    return TreeHead.verify(data, key.public, by="this log")
