"""A server that shows clients different directories of one contract: every sum is of enough clients, all of one view."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from fedark.errors import Refused
from fedark.secagg import Client, Directory, Server, wire


@pytest.fixture
def sides(lab):
    """Two sessions of eight parties: 0..3 were shown 0..5, and 4..7 were shown 2..7. Every party has one key, announced to both."""
    whole = lab(size=8, minimum=4, length=30)
    clients = {p: Client(whole.policy, p, whole.signing[p]) for p in whole.parties}
    hellos = {p: client.hello() for p, client in clients.items()}
    found = []
    for shown, joined in ((whole.parties[:6], whole.parties[:4]), (whole.parties[2:], whole.parties[4:])):
        side = copy.copy(whole)
        side.directory = Directory.verify(whole.policy, whole.identities, [hellos[p] for p in shown])
        side.parties, side.clients = joined, {p: clients[p] for p in joined}
        side.server = Server(side.directory, 1)
        for client in side.clients.values():
            client.join(side.directory)
        found.append(side)
    return found


def begun(side):
    """A round that the server opened for all whom it showed, and those begin who joined; and their uploads, received."""
    model = b"m" * 48
    current = side.server.open(1, "m/update", list(side.directory.parties), model)
    for client in side.clients.values():
        client.begin(current.request, model)
    return current, side.upload(current, side.inputs(side.parties))


def test_each_view_gives_the_sum_of_those_who_joined_it(sides) -> None:
    for side in sides:
        current, _ = begun(side)
        current.close()
        requests = current.unmask_requests()
        for party in side.parties:
            current.accept(side.clients[party].unmask(requests[party]), party)
        total = current.finish()
        assert total.survivors == tuple(side.parties)
        plain = sum(contribution.vector for contribution in side.inputs(side.parties).values())
        assert np.abs(total.total() - plain).max() <= len(side.parties) * side.layout.step


def test_no_pair_across_the_views_has_a_mask_in_common(sides) -> None:
    one, two = sides
    for mine in one.parties:
        for theirs in two.parties:
            left, right = one.directory.index.get(theirs), two.directory.index.get(mine)
            if left is not None and right is not None:
                assert one.clients[mine]._chains[left].state() != two.clients[theirs]._chains[right].state()


def test_members_of_one_view_say_nothing_of_a_round_of_the_other(sides) -> None:
    one, two = sides
    theirs, _ = begun(one)
    begun(two)
    asked = one.survivors_request(theirs, list(range(6)), "unmask", endorsements=[])
    for client in two.clients.values():
        with pytest.raises(Refused, match="did not begin"):
            client.unmask(asked)


def test_shares_that_were_sealed_in_one_view_do_not_open_in_the_other(sides) -> None:
    """The server says in the second view that c0002 survived, and brings what c0002 sealed for the same member in the first."""
    one, two = sides
    theirs, _ = begun(one)
    mine, _ = begun(two)
    victim, member = "c0002", "c0004"
    first, second = one.directory, two.directory
    at = [m for m in first.topology.committee if m != first.index[victim]].index(first.index[member])
    size = theirs._cohort.blob_bytes(first.index[victim])
    stolen = theirs._uploads[first.index[victim]].sealed[at * size : (at + 1) * size]
    survivors = [second.index[victim], *(second.index[p] for p in two.parties)]
    body = b""
    for sender in survivors:
        if sender == second.index[victim]:
            body += stolen
        elif sender != second.index[member]:
            size = mine._cohort.blob_bytes(sender)
            at = [m for m in second.topology.committee if m != sender].index(second.index[member])
            body += mine._uploads[sender].sealed[at * size : (at + 1) * size]
    reply = two.clients[member].unmask(two.survivors_request(mine, survivors, "unmask", body, endorsements=[]))
    values = wire.fields(wire.parse(reply, 1 << 20).header, "shares", {"party": str, "ctx": 32, "digest": 32, "missing": list})
    assert values["missing"] == [second.index[victim]]
