"""Whose keys count: only those that an attested enclave of a party on the roster has signed."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedark.foundation.errors import ProtocolError, Refused
from fedark.foundation.keys import SigningKey
from fedark.secagg import Client, Directory, Layout, Releases
from fedark.secagg.directory import announce


def key_of(session, party):
    return session.directory.keys[session.directory.index[party]]


def verify(session, hellos, identities=None):
    return Directory.verify(
        session.terms, session.identities if identities is None else identities, hellos.values()
    )


def test_a_directory_is_made_by_verification_alone():
    with pytest.raises(TypeError, match="verify"):
        Directory()


def test_a_substituted_key_is_refused_by_every_client(lab):
    """The server puts its own key in the place of a client's: it has no attested key to sign it
    with.
    """
    session = lab(size=4)
    forged = announce(session.terms, "c0001", bytes(range(32)), bytes(32), SigningKey())
    with pytest.raises(Refused, match="does not verify"):
        verify(session, {**session.hellos, "c0001": forged})


def test_control_a_key_signed_by_the_attested_enclave_is_accepted(lab):
    session = lab(size=4)
    good = announce(session.terms, "c0001", bytes(range(32)), bytes(32), session.signing["c0001"])
    assert verify(session, {**session.hellos, "c0001": good}).keys[1] == bytes(range(32))


def test_a_client_refuses_a_directory_with_another_key_in_its_own_place(lab):
    session = lab(size=4)
    other = announce(session.terms, "c0001", bytes(range(32)), bytes(32), session.signing["c0001"])
    swapped = verify(session, {**session.hellos, "c0001": other})
    fresh = Client(session.terms, "c0001", session.signing["c0001"])
    with pytest.raises(Refused, match="own key"):
        fresh.join(swapped)


def test_an_enclave_that_was_not_attested_is_a_stranger(lab):
    session = lab(size=4)
    with pytest.raises(ProtocolError, match="stranger"):
        verify(session, session.hellos, session.identities[:-1])


@pytest.mark.parametrize(
    "change",
    [
        {"role": "aggregator"},
        {"contract_digest": bytes(48)},
        {"run_id": "run-2"},
        {"party": "c9999"},
    ],
)
def test_an_attested_enclave_of_another_role_contract_run_or_roster_does_not_count(lab, change):
    """A party that no customer signed for cannot fill the cohort, however well it is attested (no
    Sybils).
    """
    session = lab(size=4)
    with pytest.raises(Refused, match=r"not a trainer|roster"):
        verify(
            session,
            session.hellos,
            [*session.identities[:-1], replace(session.identities[-1], **change)],
        )


def test_one_attested_enclave_cannot_stand_for_two_parties(lab):
    session = lab(size=4)
    twin = replace(session.identities[1], party="c0000")
    with pytest.raises(Refused, match="twice"):
        verify(session, session.hellos, [*session.identities[1:], twin])


def test_a_key_cannot_be_reflected_or_claimed_by_another_party(lab):
    session = lab(size=4)
    copied = announce(
        session.terms, "c0001", key_of(session, "c0000"), bytes(32), session.signing["c0001"]
    )
    with pytest.raises(Refused, match="repeats"):
        verify(session, {**session.hellos, "c0001": copied})


P = 2**255 - 19
A = 486662


def number(key):
    return int.from_bytes(key, "little")


def top_bit(key):
    """RFC 7748, section 5: it is ignored."""
    return key[:31] + bytes([key[31] | 0x80])


def beside_order_two(key):
    """u of the point plus (0, 0), which has order 2: 1 / u."""
    return pow(number(key), -1, P).to_bytes(32, "little")


def beside_order_four(key):
    """u of the point plus (1, sqrt(A + 2)), which has order 4, by either sign of the point."""
    u = number(key)
    v = root(u * (u * u + A * u + 1) % P)
    slope = (v - root(A + 2)) * pow(u - 1, -1, P)
    return ((slope * slope - A - u - 1) % P).to_bytes(32, "little")


def root(square):
    """A square root modulo P, which is 5 modulo 8."""
    for found in (
        pow(square, (P + 3) // 8, P),
        pow(square, (P + 3) // 8, P) * pow(2, (P - 1) // 4, P) % P,
    ):
        if found * found % P == square:
            return found
    raise AssertionError("no square")


@pytest.mark.parametrize("twin", [top_bit, beside_order_two, beside_order_four])
def test_a_key_cannot_be_reflected_in_another_form_that_agrees_on_the_same_secrets(lab, twin):
    session = lab(size=4)
    key = key_of(session, "c0000")
    assert twin(key) != key
    mine = X25519PrivateKey.generate()
    assert mine.exchange(X25519PublicKey.from_public_bytes(twin(key))) == mine.exchange(
        X25519PublicKey.from_public_bytes(key)
    )
    other = announce(session.terms, "c0001", twin(key), bytes(32), session.signing["c0001"])
    with pytest.raises(Refused, match="repeats"):
        verify(session, {**session.hellos, "c0001": other})


def test_a_key_at_or_above_p_is_the_one_that_it_is_taken_for(lab):
    session = lab(size=4)
    keys = {"c0000": (9).to_bytes(32, "little"), "c0001": (P + 9).to_bytes(32, "little")}
    hellos = {
        p: announce(session.terms, p, key, bytes(32), session.signing[p]) for p, key in keys.items()
    }
    with pytest.raises(Refused, match="repeats"):
        verify(session, {**session.hellos, **hellos})


def test_a_key_of_small_order_is_in_no_directory(lab):
    session = lab(size=4)
    other = announce(session.terms, "c0001", bytes(32), bytes(32), session.signing["c0001"])
    with pytest.raises(Refused, match="not a usable"):
        verify(session, {**session.hellos, "c0001": other})


def test_a_party_cannot_announce_twice(lab):
    session = lab(size=4)
    again = announce(session.terms, "c0001", bytes(range(32)), bytes(32), session.signing["c0001"])
    with pytest.raises(Refused, match="repeats"):
        verify(session, {**session.hellos, "extra": again})


def test_an_announcement_for_other_terms_is_refused(lab):
    """A lower threshold, another width, a smaller minimum: any other terms."""
    session = lab(size=5)
    other = replace(session.terms, minimum=3)
    hello = announce(other, "c0001", bytes(range(32)), bytes(32), session.signing["c0001"])
    with pytest.raises(Refused, match="other terms"):
        verify(session, {**session.hellos, "c0001": hello})


def test_a_client_joins_no_directory_for_other_terms(lab):
    session = lab(size=5)
    other = replace(session.terms, layouts=(Layout("m/update", 40, 16, 2.0),))
    clients = {p: Client(other, p, session.signing[p]) for p in session.parties}
    directory = Directory.verify(other, session.identities, [c.hello() for c in clients.values()])
    with pytest.raises(Refused, match="terms"):
        Client(session.terms, "c0000", session.signing["c0000"]).join(directory)


def test_fewer_announcements_than_the_minimum_cohort_make_no_session(lab):
    session = lab(size=5, minimum=4)
    with pytest.raises(Refused, match="minimum"):
        verify(session, {p: session.hellos[p] for p in session.parties[:3]})


@pytest.mark.parametrize(
    "damage",
    [lambda h: h[:-1], lambda h: h + b"\0", lambda h: b"", lambda h: b"FSA1" + b"\xff" * 40],
)
def test_a_malformed_announcement_is_refused(lab, damage):
    session = lab(size=4)
    with pytest.raises(ProtocolError):
        verify(session, {**session.hellos, "c0001": damage(session.hellos["c0001"])})


def test_every_flipped_bit_of_an_announcement_is_noticed(lab):
    session = lab(size=3)
    hello = session.hellos["c0001"]
    for at in range(len(hello)):
        with pytest.raises((ProtocolError, Refused)):
            verify(
                session,
                {**session.hellos, "c0001": hello[:at] + bytes([hello[at] ^ 1]) + hello[at + 1 :]},
            )


def test_clients_that_were_shown_different_directories_get_no_sum(lab):
    session = lab(size=5, minimum=3)
    # The server hides c0004 from c0000 and c0001 only.
    smaller = verify(session, {p: session.hellos[p] for p in session.parties[:4]})
    clients = {p: Client(session.terms, p, session.signing[p], Releases()) for p in session.parties}
    hellos = {p: c.hello() for p, c in clients.items()}
    full = verify(session, hellos)
    smaller = verify(session, {p: hellos[p] for p in session.parties[:4]})
    for party, client in clients.items():
        client.join(smaller if party in ("c0000", "c0001") else full)
    session.clients, session.directory = clients, full
    assert smaller.sid != full.sid
    from fedark.secagg import Server

    session.server = Server(full)
    current = session.server.open(1, "m/update", session.parties[:4], bytes(48))
    for party in session.parties[:4]:
        clients[party].begin(current.request, bytes(48))
    clients["c0004"].begin(current.request, bytes(48))
    with pytest.raises((Refused, ProtocolError)):
        session.upload(current, session.inputs(session.parties[:4]))


def test_a_client_is_neither_copied_nor_stored(lab):
    """A rolled-back enclave could release twice: there is nothing to roll back to."""
    client = lab(size=3).clients["c0000"]
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor stored"):
            attempt(client)
    assert "secret" not in repr(client)


def test_a_session_is_joined_once(lab):
    session = lab(size=3)
    with pytest.raises(ProtocolError, match="joined already"):
        session.clients["c0000"].join(session.directory)
