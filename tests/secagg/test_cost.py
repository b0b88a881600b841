"""The cost formulas against messages that were really made."""

from __future__ import annotations

import pytest

from fedark.secagg import Layout
from fedark.secagg.cost import Cost


@pytest.mark.parametrize(
    ("size", "colluders", "dropped"), [(4, 0, 0), (10, 1, 2), (30, 3, 3), (80, 4, 8)]
)
def test_the_formulas_meet_the_messages(lab, size, colluders, dropped):
    session = lab(size=size, colluders=colluders, length=5000)
    current = session.open()
    messages = session.upload(current, session.inputs(), lost=session.parties[size - dropped :])
    requests, replies = {}, {}
    genuine = current.unmask_requests
    current.unmask_requests = lambda: requests.update(genuine()) or requests
    session.unmask(current, tamper=lambda party, reply: replies.setdefault(party, reply))
    cost = Cost.of(session.layout, size, session.terms.minimum, colluders, dropped)

    def mean(found):
        return sum(map(len, found.values())) / len(found)

    assert len(session.directory.topology.committee) == cost.committee
    assert session.directory.topology.threshold == cost.threshold
    assert mean(messages) == pytest.approx(cost.vector + cost.shares, rel=0.1)
    assert mean(requests) == pytest.approx(cost.request, rel=0.1)
    # Of a random graph's edges a random number leads to those who dropped: six standard deviations
    # are allowed for.
    assert mean(replies) == pytest.approx(
        cost.reply, rel=0.1 if session.directory.topology.complete else 0.25
    )


def test_shares_do_not_grow_with_the_vector():
    short, long = (Cost.of(Layout("x", length), 10, 7, 1) for length in (1, 10_000_000))
    assert short.shares == long.shares
    assert short.reply == long.reply


@pytest.mark.parametrize(("size", "limit"), [(10, 2.7), (16, 2.7), (50, 4.1)])
def test_the_wire_stays_below_its_goal_at_16_bits(size, limit):
    cost = Cost.of(Layout("x", 1_000_000), size, -(-7 * size // 10), 1)
    assert (cost.vector + cost.shares) / 1_000_000 <= limit
