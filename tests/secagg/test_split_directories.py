"""A server that shows clients different directories of one contract: every sum is of enough
clients, all of one view, and no client is in two sums for one model.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from fedark.foundation.errors import Refused
from fedark.secagg import Client, Directory, Releases, Server, wire


@pytest.fixture
def sides(lab):
    """Two sessions of eight parties: 0..3 were shown 0..5, and 4..7 were shown 2..7. Every party
    has one key, announced to both.
    """
    whole = lab(size=8, minimum=4, length=30)
    clients = {p: Client(whole.terms, p, whole.signing[p]) for p in whole.parties}
    hellos = {p: client.hello() for p, client in clients.items()}
    found = []
    for shown, joined in (
        (whole.parties[:6], whole.parties[:4]),
        (whole.parties[2:], whole.parties[4:]),
    ):
        side = copy.copy(whole)
        side.directory = Directory.verify(whole.terms, whole.identities, [hellos[p] for p in shown])
        side.parties, side.clients = joined, {p: clients[p] for p in joined}
        side.server = Server(side.directory, 1)
        for client in side.clients.values():
            client.join(side.directory)
        found.append(side)
    return found


def begun(side):
    """A round that the server opened for all whom it showed, and those begin who joined; and their
    uploads, received.
    """
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
                assert (
                    one.clients[mine]._chains[left].state()
                    != two.clients[theirs]._chains[right].state()
                )


def test_members_of_one_view_say_nothing_of_a_round_of_the_other(sides) -> None:
    one, two = sides
    theirs, _ = begun(one)
    begun(two)
    asked = one.survivors_request(theirs, list(range(6)), "unmask", endorsements=[])
    for client in two.clients.values():
        with pytest.raises(Refused, match="did not begin"):
            client.unmask(asked)


def test_shares_that_were_sealed_in_one_view_do_not_open_in_the_other(sides) -> None:
    """The server says in the second view that c0002 survived, and brings what c0002 sealed for the
    same member in the first.
    """
    one, two = sides
    theirs, _ = begun(one)
    mine, _ = begun(two)
    victim, member = "c0002", "c0004"
    first, second = one.directory, two.directory
    at = [m for m in first.topology.committee if m != first.index[victim]].index(
        first.index[member]
    )
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
    reply = two.clients[member].unmask(
        two.survivors_request(mine, survivors, "unmask", body, endorsements=[])
    )
    values = wire.fields(
        wire.parse(reply, 1 << 20).header,
        "shares",
        {"party": str, "ctx": 32, "digest": 32, "missing": list},
    )
    assert values["missing"] == [second.index[victim]]


# --- two sessions of the same enclaves ---

MODEL = b"m" * 48


@pytest.fixture
def two_sessions(lab):
    """Ten enclaves that joined a session of all of them, and seven of the ten, both colluders among
    them, a second one.
    """
    whole = lab(size=10, minimum=7, colluders=2, agreement=True, length=30)
    part = copy.copy(whole)
    part.parties = whole.parties[3:]
    part.clients = {
        p: Client(whole.terms, p, whole.signing[p], whole.releases[p], 1) for p in part.parties
    }
    part.directory = Directory.verify(
        whole.terms, whole.identities, [c.hello() for c in part.clients.values()]
    )
    for client in part.clients.values():
        client.join(part.directory)
    part.server = Server(part.directory, 1)
    return whole, part


def forget(session, parties):
    """What colluders do, and what every client would do without the rule."""
    for party in parties:
        session.releases[party].done.clear()
        session.releases[party].sessions.clear()


def opened(session, parties):
    """A round for `MODEL` of the whole session, begun by `parties`."""
    current = session.server.open(1, "m/update", session.parties, MODEL)
    for party in parties:
        session.clients[party].begin(current.request, MODEL)
    return current


def unmasked(session, current, quorum, colluders):
    """The sum, by the answers of `quorum` and the colluders alone."""
    members = [*quorum, *colluders]
    forget(session, colluders)
    current.close()
    for party in members:
        current.endorse(session.clients[party].endorse(current.endorsement_request()), party)
    requests = current.unmask_requests()
    for party in members:
        current.accept(session.clients[party].unmask(requests[party]), party)
    return current.finish().total()


@pytest.mark.parametrize("begun_before", [True, False])
def test_who_uploaded_for_a_model_in_one_session_uploads_for_it_in_no_other(
    two_sessions, begun_before
) -> None:
    whole, part = two_sessions
    first = opened(whole, whole.parties)
    second = opened(part, part.parties if begun_before else ())
    whole.upload(first, whole.inputs())
    for party, contribution in part.inputs().items():
        client = part.clients[party]
        with pytest.raises(Refused, match="went to another session"):
            client.upload(contribution) if begun_before else client.begin(second.request, MODEL)
    total = unmasked(whole, first, whole.parties[:5], whole.parties[8:])
    assert (
        np.abs(total - sum(c.vector for c in whole.inputs().values())).max()
        <= 10 * whole.layout.step
    )


def test_a_model_is_bound_to_its_session_by_an_upload_and_not_before(two_sessions) -> None:
    """A round that was begun and not uploaded to hinders nobody; nor does another model."""
    whole, part = two_sessions
    opened(whole, whole.parties)
    current = opened(part, part.parties)
    part.upload(current, part.inputs())
    again = whole.server.open(2, "m/update", whole.parties, b"n" * 48)
    for party in whole.parties:
        whole.clients[party].begin(again.request, b"n" * 48)
    whole.upload(again, whole.inputs())


def test_a_restarted_enclave_remembers_in_which_session_it_uploaded(two_sessions) -> None:
    whole, part = two_sessions
    party = part.parties[0]
    current = opened(whole, whole.parties)
    whole.clients[party].upload(whole.inputs()[party])
    state, second = whole.clients[party].state(), part.clients[party].state()
    restored, sibling = (
        Client(whole.terms, party, whole.signing[party], shared) for shared in [Releases()] * 2
    )
    restored.restore(state, whole.directory)
    sibling.restore(second, part.directory)
    with pytest.raises(Refused, match="went to another session"):
        sibling.begin(part.server.open(1, "m/update", part.parties, MODEL).request, MODEL)
    retry = whole.server.open(2, "m/update", whole.parties, MODEL)
    restored.begin(retry.request, MODEL)
    restored.upload(whole.inputs()[party])
    assert current.request != retry.request


def test_restoring_one_session_forgets_nothing_of_its_siblings(two_sessions) -> None:
    whole, part = two_sessions
    party = part.parties[0]
    early = part.clients[party].state()
    current = opened(whole, whole.parties)
    whole.upload(current, whole.inputs())
    unmasked(whole, current, whole.parties[:5], whole.parties[8:])
    restored = Client(whole.terms, party, whole.signing[party], whole.releases[party])
    restored.restore(early, part.directory)
    with pytest.raises(Refused, match="released before"):
        restored.begin(part.server.open(1, "m/update", part.parties, MODEL).request, MODEL)
    assert whole.releases[party].done == {("m/update", MODEL)}
    assert whole.releases[party].sessions == {("m/update", MODEL): whole.directory.sid}


def test_a_member_that_released_in_one_session_releases_in_no_other(lab) -> None:
    """Both rounds were begun before either was unmasked, and it uploaded in one of them only:
    nothing was there to refuse yet.
    """
    session = lab(size=5, minimum=4)
    sibling = copy.copy(session)
    sibling.start()
    first, second = session.open(model=MODEL), sibling.open(model=MODEL)
    member, others = session.parties[0], session.parties[1:]
    session.upload(first, session.inputs())
    forget(session, others)
    sibling.upload(second, sibling.inputs(others))
    answers = []
    for side, current in ((sibling, second), (session, first)):
        current.close()
        answers.append((side.clients[member], current.unmask_requests()[member]))
    (elsewhere, theirs), (client, request) = answers
    elsewhere.unmask(theirs)
    with pytest.raises(Refused, match="released before"):
        client.unmask(request)


def test_control_without_the_rule_two_sessions_give_two_sums_that_overlap(two_sessions) -> None:
    """Found in review: disjoint quorums release in either session, and the difference is of those
    who are not in the second.
    """
    whole, part = two_sessions
    inputs = whole.inputs()
    first, second = opened(whole, whole.parties), opened(part, part.parties)
    whole.upload(first, inputs)
    forget(part, part.parties)
    part.upload(second, {p: inputs[p] for p in part.parties})
    colluders = whole.parties[8:]
    learnt = unmasked(whole, first, whole.parties[:5], colluders) - unmasked(
        part, second, whole.parties[5:8], colluders
    )
    assert (
        np.abs(learnt - sum(inputs[p].vector for p in whole.parties[:3])).max()
        <= 20 * whole.layout.step
    )
