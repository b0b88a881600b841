"""The key schedule against vectors that were made without it, from the RFCs with hashlib and hmac
alone (`vectors.json`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedark.foundation.errors import Refused
from fedark.secagg import Lane, Layout, SessionTerms, schedule
from fedark.secagg.stream import Keystream
from fedark.secagg.topology import Topology

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def hexed(name):
    return bytes.fromhex(VECTORS[name])


def info(*parts):
    return cbor2.dumps(["fedark/secagg/1/" + parts[0], *parts[1:]], canonical=True)


def expand(key, text):
    """RFC 5869, section 2.3, for 32 bytes."""
    return hmac.digest(key, text + b"\x01", "sha256")


def independent():
    """Every value of the schedule, derived by hand."""
    shared = bytes.fromhex(
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )  # RFC 7748, section 6.1
    sid = hashlib.sha256(
        info(
            "session",
            bytes(32),
            [["alice", b"A" * 32, b"a" * 32, b"1" * 32], ["bob", b"B" * 32, b"b" * 32, b"2" * 32]],
        )
    ).digest()
    root = expand(hmac.digest(sid, shared, "sha256"), info("pair", "alice", "bob"))
    ctx = hashlib.sha256(info("context", sid, 3, "m/update", b"m" * 48, [0, 1, 4])).digest()
    chain = root
    for _ in range(3):
        chain = expand(chain, info("step"))
    pair = expand(chain, info("round", ctx))
    seed = expand(pair, info("mask"))
    seal = expand(pair, info("seal", "alice", b"s" * 16))
    commitment = hashlib.sha256(
        b"fedark/secagg/1/commit" + ctx + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x07" + seed
    ).digest()
    survivors = hashlib.sha256(info("survivors", ctx, [0, 4])).digest()
    topology = expand(sid, info("topology"))
    near, committee = drawn(topology)
    return {
        "sid": sid,
        "root": root,
        "context": ctx,
        "pair": pair,
        "mask_seed": seed,
        "seal_key": seal,
        "commitment": commitment,
        "survivors": survivors,
        "stream": stream(seed, 3, 32),
        "topology_seed": topology,
        "terms": (
            hashlib.sha256(cbor2.dumps(["fedark/secagg/2/policy", POLICY], canonical=True)).digest()
        ),
        "graph": hashlib.sha256(json.dumps(near).encode()).digest(),
        "committee": hashlib.sha256(json.dumps(committee).encode()).digest(),
    }


COHORT, DEGREE, COMMITTEE = 120, 44, 64


def stream(key, block, size):
    """SP 800-38D: data's first counter block is nonce || 2. The stream's block 3 has nonce 3."""
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    return cipher.update(
        b"".join(
            block.to_bytes(12, "big") + (2 + at).to_bytes(4, "big") for at in range(-(-size // 16))
        )
    )


def drawn(seed):
    """Everybody's neighbours, and the committee."""
    edges = stream(seed, 0, 2 * COHORT * COHORT)
    assert len(edges) <= 8 << 15, "of one block"
    chance = round(DEGREE / (COHORT - 1) * 65536)

    def joined(one, other):
        at = 2 * (COHORT * min(one, other) + max(one, other))
        return one != other and int.from_bytes(edges[at : at + 2], "little") < chance

    near = [[other for other in range(COHORT) if joined(one, other)] for one in range(COHORT)]
    draws = stream(seed, 1 << 32, 8 * COHORT)
    lots = sorted(
        range(COHORT), key=lambda at: int.from_bytes(draws[8 * at : 8 * at + 8], "little")
    )
    return near, sorted(lots[:COMMITTEE])


POLICY = {
    "contract_digest": bytes(range(48)),
    "run_id": "run-1",
    "roster": [f"c{at:04d}" for at in range(COHORT)],
    "minimum": 60,
    "colluders": 3,
    "layouts": [
        {
            "name": "m/update",
            "length": 40,
            "bits": 12,
            "clip_norm": 1.5,
            "value_range": 0.1,
            "max_weight": 7,
            "metrics": [{"name": "loss", "limit": 100.0, "resolution": 0.25}],
            "noise_bound": 5,
        }
    ],
    "agreement": True,
    "rounds": 12,
}


def terms():
    """`POLICY`, as the protocol's own."""
    (layout,) = POLICY["layouts"]
    made = Layout(**{**layout, "metrics": tuple(Lane(**metric) for metric in layout["metrics"])})
    return SessionTerms(**{**POLICY, "roster": tuple(POLICY["roster"]), "layouts": (made,)})


def test_the_vectors_are_what_the_rfcs_give():
    assert {name: value.hex() for name, value in independent().items()} == VECTORS


BOB_SECRET = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")


def test_the_schedule_meets_the_vectors():
    entries = [("alice", b"A" * 32, b"a" * 32, b"1" * 32), ("bob", b"B" * 32, b"b" * 32, b"2" * 32)]
    sid = schedule.session_id(bytes(32), entries)
    root = schedule.pair_root(
        X25519PrivateKey.from_private_bytes(BOB_SECRET), ALICE_PUBLIC, sid, "bob", "alice"
    )
    ctx = schedule.context(sid, 3, "m/update", b"m" * 48, [0, 1, 4])
    pair = schedule.Chain(root).take(3, schedule.round_info(ctx))
    seed = schedule.mask_seed(pair)
    words = Keystream(seed).words(4, first=3)
    topology = Topology(terms(), COHORT, schedule.topology_seed(sid))
    near = [topology.neighbours(one).tolist() for one in range(COHORT)]
    got = {
        "sid": sid,
        "root": root,
        "context": ctx,
        "pair": pair,
        "mask_seed": seed,
        "seal_key": schedule.seal_key(pair, schedule.seal_info("alice", b"s" * 16)),
        "commitment": schedule.commitment(ctx, 2, 7, seed),
        "survivors": schedule.survivors_digest(ctx, [0, 4]),
        "stream": words.astype("<u8").tobytes(),
        "topology_seed": schedule.topology_seed(sid),
        "terms": terms().digest,
        "graph": hashlib.sha256(json.dumps(near).encode()).digest(),
        "committee": hashlib.sha256(json.dumps(topology.committee).encode()).digest(),
    }
    assert {name: value.hex() for name, value in got.items()} == VECTORS


def test_a_chain_never_goes_back_and_skipped_rounds_lead_to_the_same_place():
    stepped, jumped = schedule.Chain(bytes(32)), schedule.Chain(bytes(32))
    for number in range(5):
        stepped.take(number, schedule.round_info(bytes([number])))
    ctx = schedule.round_info(b"x")
    assert stepped.take(5, ctx) == jumped.take(5, ctx)
    for number in (0, 5):
        with pytest.raises(Refused, match="over"):
            stepped.take(number, ctx)


def test_rounds_and_contexts_give_unrelated_secrets():
    """A revealed round seed is one PRF output; no other context or round repeats it."""
    seen = set()
    for number in range(1, 20):
        for ctx in (b"a" * 32, b"b" * 32):
            seen.add(
                schedule.mask_seed(schedule.Chain(bytes(32)).take(number, schedule.round_info(ctx)))
            )
    assert len(seen) == 38


@pytest.mark.parametrize(
    "change",
    [
        {"number": 4},
        {"layout": "m/evaluate"},
        {"model_digest": b"n" * 48},
        {"participants": [0, 1, 2]},
        {"sid": b"t" * 32},
    ],
)
def test_whatever_a_round_is_changes_its_context(change):
    base = {
        "sid": b"s" * 32,
        "number": 3,
        "layout": "m/update",
        "model_digest": b"m" * 48,
        "participants": [0, 1, 4],
    }
    assert schedule.context(**base) != schedule.context(**{**base, **change})


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little")])
def test_a_point_of_small_order_is_refused(point):
    with pytest.raises(Refused, match="not a usable"):
        schedule.pair_root(X25519PrivateKey.generate(), point, bytes(32), "a", "b")
