"""What the customers of one run tell each other: "this is the head of the provider's log that I was
shown".

A provider shows its log to each customer apart, so it could show each a different one; every head
would be consistent with what that customer remembers. In one run all are to be shown the same head.
Each signs what it was shown, the aggregator passes the views on, and before the first update leaves
each compares them. The aggregator cannot forge a view. It can keep one back: so as many are asked
for as there must be customers in a sum.

Form: canonical CBOR of {"body", "signature"}; body: {"party", "run_id", "contract", "head"}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import LogRefused, ProtocolError, Refused
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.translog.head import TreeHead
from fedark.translog.memory import HeadMemory

__all__ = ["check_views", "head_in_view", "sign_view"]

_LABEL = "fedark/log-view/1"
_MAX_BYTES = 2048


def sign_view(
    key: SigningKey, *, party: str, run_id: str, contract: bytes, head: TreeHead
) -> bytes:
    """The view of `party`, the owner of `key`. `contract`: digest."""
    body = canonical.encode(
        {"party": party, "run_id": run_id, "contract": contract, "head": head.encoded}
    )
    return canonical.encode({"body": body, "signature": key.sign(_LABEL, body)})


def check_views(
    views: Mapping[str, bytes],
    *,
    own: TreeHead,
    party: str,
    run_id: str,
    contract: bytes,
    customers: Mapping[str, bytes],
    minimum: int,
    owner: bytes,
    by: str,
    memory: HeadMemory,
) -> None:
    """Return if enough customers of the run were shown the head `own`, and none another one.

    Args:
        views: party -> what `sign_view` gave it.
        own: what `party` itself was shown.
        customers: name -> signing key, of the contract; `minimum`: the fewest that a sum has.
        owner: signing key of the log's owner, whose name is `by`.
        memory: where the proof of a fork is kept.

    Raises:
        LogForked: two customers were shown different logs.
        LogRefused: too few views agree; one that is forged, or of another run or size, counts as
            none.
    """
    agreeing = {party}
    for name in sorted(customers.keys() & views.keys() - {party}):
        head = head_in_view(
            views[name],
            customers[name],
            party=name,
            run_id=run_id,
            contract=contract,
            owner=owner,
            by=by,
        )
        if head is None or head.size != own.size:
            continue
        if head.root != own.root:
            raise memory.fork(
                own.encoded,
                head.encoded,
                by=by,
                how=f"{name} was shown another tree of {own.size} entries",
            )
        agreeing.add(name)
    if len(agreeing) < minimum:
        raise LogRefused(
            f"Only {len(agreeing)} customers are known to have been shown one and the same log of"
            f" {by}; a sum has {minimum}.",
            safe="No update left.",
            fix=(
                "The log was shown differently to"
                f" {', '.join(sorted(customers.keys() - agreeing))}, or their views were lost or"
                " replaced on the way: ask the aggregator and them."
            ),
        )


def head_in_view(
    data: bytes, key: bytes, *, party: str, run_id: str, contract: bytes, owner: bytes, by: str
) -> TreeHead | None:
    """The head in a view, if `party`, whose key is `key`, signed it for this run and contract."""
    expected = {"party": party, "run_id": run_id, "contract": contract}
    try:
        outer: Any = canonical.decode(data, max_bytes=_MAX_BYTES, max_depth=1)
        if type(outer) is not dict or {n: type(v) for n, v in outer.items()} != {
            "body": bytes,
            "signature": bytes,
        }:
            return None
        verify_signature(key, _LABEL, outer["body"], outer["signature"], by=party)
        body: Any = canonical.decode(outer["body"], max_bytes=_MAX_BYTES, max_depth=1)
        if (
            type(body) is not dict
            or type(body.get("head")) is not bytes
            or body != expected | {"head": body["head"]}
        ):
            return None
        return TreeHead.verify(body["head"], owner, by=by)
    except (ProtocolError, Refused):
        return None
