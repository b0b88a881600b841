"""What the owner of a log shows one party in one run: its latest head, that this goes on from the
head which the party remembers, and the party's own entries, each with the proof that it is under
that head.

All of it is signed by the log's owner: a proof that fails is then the owner's own word and not the
work of whoever relayed it.

Form: canonical CBOR of {"body", "signature"}.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import LogRefused, ProtocolError, Refused
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.translog.entry import Entry
from fedark.translog.head import TreeHead
from fedark.translog.log import TransparencyLog
from fedark.translog.merkle import MAX_PATH

__all__ = ["MAX_UPDATE_BYTES", "Shown", "LogUpdate", "make_update"]

MAX_UPDATE_BYTES = 1 << 20
_LABEL = "fedark/log-update/1"
_MAX_ENTRIES = 256


@dataclass(frozen=True)
class Shown:
    """One entry with its inclusion proof."""

    index: int
    entry: Entry
    path: tuple[bytes, ...]


@dataclass(frozen=True)
class LogUpdate:
    """A log's word to one party, its signature verified, its proofs not yet
    (`fedark.translog.memory` does that).

    Attributes:
        party, run_id: for whom, and for which run.
        head: the latest.
        since: size of the head that `consistency` starts from; 0 where the party remembers none.
        consistency: that `head` goes on from it.
        entries: the party's own.
    """

    party: str
    run_id: str
    head: TreeHead
    since: int
    consistency: tuple[bytes, ...]
    entries: tuple[Shown, ...]

    @classmethod
    def verify(cls, data: bytes, public: bytes, *, by: str) -> LogUpdate:
        """Read an update of the log whose owner `by` has the signing key `public`.

        Raises:
            LogRefused: it is malformed, or not signed by that key.
        """
        try:
            outer: Any = canonical.decode(data, max_bytes=MAX_UPDATE_BYTES, max_depth=1)
            if not _is_map(outer, body=bytes, signature=bytes):
                raise ProtocolError("not a signed map")
            verify_signature(public, _LABEL, outer["body"], outer["signature"], by=by)
            body: Any = canonical.decode(outer["body"], max_bytes=MAX_UPDATE_BYTES, max_depth=4)
            if not _is_map(
                body, party=str, run_id=str, head=bytes, since=int, consistency=list, entries=list
            ):
                raise ProtocolError("not an update")
            if len(body["entries"]) > _MAX_ENTRIES:
                raise ProtocolError("too many entries")
            entries = tuple(_shown(item) for item in body["entries"])
            consistency = _path(body["consistency"])
        except (ProtocolError, Refused) as error:
            raise LogRefused(
                f"The word of {by}'s log was refused: {error.what}",
                safe="Nothing was concluded from it.",
            ) from None
        head = TreeHead.verify(body["head"], public, by=by)
        return cls(body["party"], body["run_id"], head, body["since"], consistency, entries)


def make_update(
    log: TransparencyLog,
    key: SigningKey,
    *,
    party: str,
    run_id: str,
    head: TreeHead,
    since: TreeHead | None,
    indexes: Iterable[int],
) -> bytes:
    """The update of `log` for one party.

    Args:
        key: of the log's owner.
        head: of `log`; give all parties of a run the same.
        since: the head that the party remembers, if any; of this log too.
        indexes: of the party's entries.

    Raises:
        LogForked: `since` is not of this log's past.
    """
    shown = [
        {"index": index, "entry": log.entry(index).encode(), "path": log.inclusion(index, head)}
        for index in sorted(set(indexes))
    ]
    body = canonical.encode(
        {
            "party": party,
            "run_id": run_id,
            "head": head.encoded,
            "since": since.size if since is not None else 0,
            "consistency": log.consistency(since, head),
            "entries": shown,
        }
    )
    return canonical.encode({"body": body, "signature": key.sign(_LABEL, body)})


def _shown(item: Any) -> Shown:
    if not _is_map(item, index=int, entry=bytes, path=list):
        raise ProtocolError("an entry of it is malformed")
    return Shown(item["index"], Entry.decode(item["entry"]), _path(item["path"]))


def _path(items: list[Any]) -> tuple[bytes, ...]:
    if len(items) > MAX_PATH or any(type(item) is not bytes or len(item) != 32 for item in items):
        raise ProtocolError("a proof in it is malformed")
    return tuple(items)


def _is_map(value: Any, **forms: type) -> bool:
    return type(value) is dict and {name: type(item) for name, item in value.items()} == forms
