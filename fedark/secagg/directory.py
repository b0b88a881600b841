"""Whose keys a client masks with: announcements signed by attested enclaves of parties on the
contract's roster.

The server only relays announcements; `Directory.verify` is the one way to a `Directory`, and every
client runs it for itself:

1. the attested identities are trainers of this contract and this run, one for each party, and stand
   on the roster: an enclave that was not attested, or a party that the customers did not sign for,
   is nobody (no Sybils);
2. each announcement is signed by the attested key of the party that it names, under this very
   session terms;
3. no party and no key stands twice, in whatever form, so a key can be neither reflected nor claimed
   by another party;
4. at least the minimum cohort is there.

The session identifier hashes the whole directory, so two clients that were shown different
directories share no key. Signed announcements of attested keys follow the PKI assumption of
Bonawitz et al. 2017, section 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from fedark.foundation.errors import ProtocolError, Refused, printable
from fedark.foundation.keys import SigningKey
from fedark.secagg import schedule, wire
from fedark.secagg.terms import SessionTerms
from fedark.secagg.topology import Topology

__all__ = ["AttestedIdentity", "Directory", "announce", "check_cohort", "check_round"]

_KIND = "hello"
_SHAPE = {"terms": 32, "key": 32, "nonce": 32}
_LIMIT = 1024
ROLE = "trainer"


class AttestedIdentity(Protocol):
    """What attestation established about a peer; `fedark.attestation.gate.AttestedPeer` is one,
    made by the gate alone.
    """

    @property
    def party(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def signing_public(self) -> bytes: ...
    @property
    def contract_digest(self) -> bytes: ...
    @property
    def run_id(self) -> str: ...


def announce(
    terms: SessionTerms, party: str, key: bytes, nonce: bytes, signing: SigningKey
) -> bytes:
    """The signed announcement of a session key."""
    return wire.message(
        wire.signed(
            _KIND, {"party": party, "terms": terms.digest, "key": key, "nonce": nonce}, signing
        )
    )


class Directory:
    """The verified members of a session. Only `verify` makes one.

    Attributes:
        terms: of the session.
        sid: session identifier, 32 bytes.
        parties: names, sorted; a client's index is its position.
        keys: X25519 public keys, in that order.
        signers: name -> attested Ed25519 public key.
        topology: graph, committee and thresholds.
    """

    __slots__ = ("index", "keys", "parties", "sid", "signers", "terms", "topology")

    terms: SessionTerms
    sid: bytes
    parties: tuple[str, ...]
    keys: tuple[bytes, ...]
    signers: dict[str, bytes]
    topology: Topology
    index: dict[str, int]

    def __init__(self) -> None:
        raise TypeError("use Directory.verify")

    @classmethod
    def verify(
        cls, terms: SessionTerms, attested: Iterable[AttestedIdentity], hellos: Iterable[bytes]
    ) -> Directory:
        """Check announcements against attestation and roster.

        Raises:
            Refused: an identity or announcement that does not belong here.
            ProtocolError: a malformed announcement.
        """
        signers: dict[str, bytes] = {}
        for peer in attested:
            if (
                peer.role != ROLE
                or peer.contract_digest != terms.contract_digest
                or peer.run_id != terms.run_id
            ):
                raise _refused(
                    f"The attested enclave of {printable(peer.party)} is not a trainer of this"
                    " contract and run."
                )
            if peer.party not in terms.roster:
                raise _refused(
                    f"{printable(peer.party)} is not on the roster that the customers signed."
                )
            if peer.party in signers or peer.signing_public in signers.values():
                raise _refused(f"The attested identity of {peer.party} stands twice.")
            signers[peer.party] = peer.signing_public
        entries: dict[str, tuple[str, bytes, bytes, bytes]] = {}
        classes: set[bytes] = set()
        for hello in hellos:
            frame = wire.parse(hello, _LIMIT)
            frame.split(0)
            values = wire.verified(frame.header, _KIND, _SHAPE, signers)
            party = values["party"]
            if values["terms"] != terms.digest:
                raise _refused(f"{party} announced a key for other terms.")
            found = schedule.key_class(values["key"], party)
            if party in entries or found in classes:
                raise _refused(f"The key announcement of {party} repeats a party or a key.")
            classes.add(found)
            entries[party] = (party, values["key"], values["nonce"], signers[party])
        if len(entries) < terms.minimum:
            raise _refused(
                f"{len(entries)} clients are fewer than the minimum cohort of {terms.minimum}."
            )
        self = object.__new__(cls)
        self.terms = terms
        self.parties = tuple(sorted(entries))
        ordered = [entries[party] for party in self.parties]
        self.keys = tuple(entry[1] for entry in ordered)
        self.signers = {entry[0]: entry[3] for entry in ordered}
        self.index = {party: i for i, party in enumerate(self.parties)}
        self.sid = schedule.session_id(terms.digest, ordered)
        self.topology = Topology(terms, len(ordered), schedule.topology_seed(self.sid))
        return self

    def names(self, indices: Iterable[int]) -> tuple[str, ...]:
        """The parties at these indices."""
        return tuple(self.parties[i] for i in indices)


def _refused(what: str) -> Refused:
    return Refused(
        what,
        safe="No key was agreed and nothing was uploaded.",
        fix="The session must start again without it.",
    )


def check_round(directory: Directory, number: int, layout: str, participants: list[int]) -> None:
    """What both sides ask of a round, whoever proposes it.

    Raises:
        ProtocolError: an unknown layout or a round number out of range.
        Refused: a cohort that is too small or too thinly connected.
    """
    terms = directory.terms
    if layout not in terms.by_name:
        raise ProtocolError(
            "A round names a vector that the contract does not know.", safe="Nothing was uploaded."
        )
    if not 1 <= number <= terms.rounds:
        raise ProtocolError(
            f"Round {number} is not in 1..{terms.rounds}.", safe="Nothing was uploaded."
        )
    check_cohort(directory, participants)


def check_cohort(directory: Directory, members: list[int]) -> None:
    """Refuse a set of clients whose sum would tell too much.

    Raises:
        Refused: fewer than the minimum, or a client with too few neighbours among them.
    """
    if len(members) < directory.terms.minimum:
        raise Refused(
            f"{len(members)} clients are fewer than the minimum cohort of"
            f" {directory.terms.minimum}.",
            safe="Nothing was revealed.",
            fix="Run another round with more clients.",
        )
    lonely = directory.topology.sparse_in(np.array(members, np.intp))
    if lonely.size:
        raise Refused(
            f"{lonely.size} clients would keep too few masking neighbours.",
            safe="Nothing was revealed.",
            fix="Run another round with more clients.",
        )
