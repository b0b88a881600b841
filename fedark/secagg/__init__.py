"""Secure aggregation: the server learns the sum over the surviving cohort and nothing else, even if
it lies.

    terms             what a session is bound to; proves that nothing overflows
    directory         whose keys count: attestation, roster
    topology          graph, committee and thresholds, from the session id
    schedule          every key and what it is bound to
    client, server    the enclave's state machine, and the untrusted server's
    vector, stream    clip, round, noise, pack, mask, decode; AES-256 masks
    shamir, wire      sharing of seeds; strict messages
    cohort            orders and lengths that both sides derive
    exactness, cost   which methods may be averaged; bytes and operations by formula

The server is malicious, and works with up to `SessionTerms.colluders` clients. What the protocol
keeps against it, and why, is argued in docs/design/secure-aggregation.md: the steps (a) to (e) and
the client's rules 1 to 8 that comments name. Protocol: Bonawitz et al., CCS 2017; Bell et al., CCS
2020; Ma et al. (Flamingo), S&P 2023.
"""

from __future__ import annotations

from fedark.secagg.client import Client, Releases
from fedark.secagg.directory import AttestedIdentity, Directory
from fedark.secagg.exactness import check_method
from fedark.secagg.server import Server, ServerRound
from fedark.secagg.terms import Lane, Layout, SessionTerms
from fedark.secagg.vector import Contribution, Noise, RoundSum

__all__ = [
    "AttestedIdentity",
    "Client",
    "Contribution",
    "Directory",
    "Layout",
    "Lane",
    "Noise",
    "SessionTerms",
    "Releases",
    "ServerRound",
    "RoundSum",
    "Server",
    "check_method",
]
