"""Secure aggregation: the server learns the sum over the surviving cohort and nothing else, even if
it lies.

    policy      what a session is bound to; proves that nothing overflows      directory   whose keys count: attestation, roster
    topology    graph, committee, thresholds, from the session id              schedule    every key and what it is bound to
    client      the enclave's state machine                                    server      the untrusted server's
    vector      clip, round, noise, pack, mask; decode                         stream      AES-256 masks
    shamir      sharing of seeds                                               wire        strict messages
    cohort      orders and lengths that both sides derive                      exactness   which methods may be averaged
    cost        bytes and operations by formula

Threat model. The server is malicious: it sees, drops, delays, replays and alters every message, and
works with up to `Policy.colluders` clients, the same ones all along. Clients are attested enclaves
on a signed roster. Against that the protocol keeps privacy: whatever the server does, what it
learns about honest clients is sums, each over all honest survivors of a set of at least the minimum
cohort (less what `Topology` bounds where no agreement is asked for), and no honest client is in two
of one (layout, model): one session gives one sum for it, and the sums of two sessions have no
honest client in common. It does not keep availability or correctness: a server that lies, or a
client that uploads rubbish, can spoil a sum. What the sum itself tells is a matter of differential
privacy. So is the difference between the sums for two models that the server makes equal in all but
their digest, as an encryption of one model is each time: with a client left out of one of the two,
it is that client's vector, exactly if the others upload the same in both. Nothing secret blurs it:
training in fedark is a function of records, model and the contract's public seed.

The argument in short, for 2 t > c + g (each step is a test in tests/secagg):
(a) A mask of an honest pair is known to the two clients alone: its X25519 keys are signed by
attested enclaves. (directory) (b) A self-mask seed b_v needs t - g honest members who answered a
    set with v in it; a pair seed s_uv needs t - g honest members who answered a set without v. An
    honest member answers one set, and 2 (t - g) > c - g, so never both. (Bonawitz 2017, 6.2)
(c) So an upload whose sender counts as gone keeps its self-mask, and the survivors' uploads keep
    their mutual masks, which cancel only in the sum of all of them: the graph of honest survivors
    is connected. (Bell 2020; `topology`)
(d) The same quorum argument over two rounds of a session: a sum is released once for each model
    digest, which says nothing of two digests. Two sessions have two committees, so there a client
    uploads for a model digest in one session alone. (`Releases`)
(e) A revealed s_uv is a PRF output at ctx. Other rounds use other outputs. (Flamingo 2023)

Papers: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS
2017; Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020; Ma
et al., "Flamingo: Multi-Round Single-Server Secure Aggregation", S&P 2023. Our departures: recovery
shares ride in the upload (no share-distribution trip); pair seeds instead of key-agreement secrets
are shared, so recovery never reveals a key; no trip is saved by dropping the unmask step, because
an upload that reveals the sum by itself plus a recovery that reveals a subset would expose the
difference.
"""

from __future__ import annotations

from fedark.secagg.client import Client, Releases
from fedark.secagg.directory import AttestedIdentity, Directory
from fedark.secagg.exactness import check_method
from fedark.secagg.policy import Layout, Metric, Policy
from fedark.secagg.server import Round, Server
from fedark.secagg.vector import Contribution, Noise, RoundSum

__all__ = [
    "AttestedIdentity",
    "Client",
    "Contribution",
    "Directory",
    "Layout",
    "Metric",
    "Noise",
    "Policy",
    "Releases",
    "Round",
    "RoundSum",
    "Server",
    "check_method",
]
