"""Bytes and operations of a masked round by formula, for planning a cohort before it exists.

`Cost.of` follows the messages of `client` and `server`; the tests and the benchmark hold it against
measured messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedark.secagg.cohort import BLOB_OVERHEAD
from fedark.secagg.shamir import SHARE_BYTES
from fedark.secagg.terms import Layout
from fedark.secagg.topology import committee_size, graph_degree, threshold

__all__ = ["Cost"]

_UPLOAD, _REQUEST, _REPLY = 86, 90, 121
"""Headers: names, context, digests."""


@dataclass(frozen=True)
class Cost:
    """What one round costs.

    Attributes:
        degree: mean number of masking neighbours.
        committee: members that unmask, and how many of them must answer.
        threshold: shares that recover a secret.
        vector: bytes of the masked vector in an upload.
        shares: bytes of everything else in an upload: header, sealed shares, commitments.
        request: bytes of an unmask request to one member.
        reply: bytes of a member's reply.
        client_stream: keystream bytes that a client draws for its masks.
        server_stream: keystream bytes that the server draws to unmask.
    """

    degree: int
    committee: int
    threshold: int
    vector: int
    shares: int
    request: int
    reply: int
    client_stream: int
    server_stream: int

    @classmethod
    def of(
        cls,
        layout: Layout,
        cohort: int,
        minimum: int,
        colluders: int,
        dropped: int = 0,
        agreement: bool = False,
    ) -> Cost:
        """The cost for `cohort` participants of which `dropped` do not upload; `agreement` as in
        the session terms.
        """
        degree = graph_degree(cohort, colluders, minimum, agreement).mean
        members = committee_size(cohort, colluders)
        need = threshold(members, colluders if members == cohort else 0)
        alive, vector = cohort - dropped, 8 * layout.words(cohort)
        blob = BLOB_OVERHEAD + (1 + degree) * SHARE_BYTES
        # A survivor's expected neighbours among those that are gone.
        lost = dropped * degree / (cohort - 1)
        secrets = round(alive * (1 + lost))
        receivers = members - 1 if members == cohort else members
        return cls(
            degree=degree,
            committee=members,
            threshold=need,
            vector=vector,
            shares=_UPLOAD + receivers * blob + 32 * (1 + degree),
            request=_REQUEST + (alive - (1 if members == cohort else 0)) * blob,
            reply=_REPLY + secrets * SHARE_BYTES,
            client_stream=(1 + degree) * vector,
            server_stream=secrets * vector,
        )
