"""`fedark bench secagg`: masked sums against Flower's own SecAgg+ functions, same cohort, length
and bits, no network.

Time of a client: all its stages of one round, summed. Time of the server: all its stages, summed,
down to the mean vector. Fedark agrees keys once a session, Flower in every round; the first round,
with fedark's session set-up, has a row of its own. Fedark's server writes a mean over that of the
round before, as the aggregator does; Flower's makes new arrays. Neither side authenticates a
message here: in a run that is the envelope's work. Rounds of the two sides alternate; figures are
medians. Fedark's vector path uses every core, Flower's numpy one.

The other rows: how much of the machine's own AES-CTR rate masking reaches, peak memory of a client,
and the cost of larger cohorts, measured against the formulas of `fedark.secagg.cost`. The whole
takes several minutes; nearly all of it is the peer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedark.bench import Row, machine
from fedark.bench.secagg_flower import FlowerSession, Timed, available
from fedark.foundation.keys import SigningKey
from fedark.secagg import Client, Contribution, Directory, Layout, Server, SessionTerms
from fedark.secagg.cost import Cost
from fedark.secagg.stream import BLOCK, aligned
from fedark.secagg.vector import apply_masks

__all__ = ["rows"]

BITS = 16
CASES = (
    # clients, values, rounds, goals: client, server, server with a tenth gone (times faster), bytes
    # a value
    (10, 1_000_000, 7, 12, 25, 10, 2.7),
    (50, 1_000_000, 3, 10, 150, 60, 4.1),
    (10, 10_000_000, 3, 20, 25, 12, 2.7),
)
COHORTS = (10, 50, 100, 200, 500, 1000)
_COST_VALUES = 20_000


@dataclass(frozen=True)
class _Identity:
    """Attested by assumption: a benchmark measures masks, not evidence."""

    party: str
    signing_public: bytes
    contract_digest: bytes
    role: str = "trainer"
    run_id: str = "bench"


class MaskedSession:
    """A session of `size` fedark clients and a server in this process."""

    def __init__(
        self, size: int, length: int, *, colluders: int = 1, minimum: int | None = None
    ) -> None:
        self.parties = [f"c{i:04d}" for i in range(size)]
        self.layout = Layout("bench", length, BITS, 64.0, 0.25)
        terms = bytes(48)
        self.terms = SessionTerms(
            terms,
            "bench",
            tuple(self.parties),
            minimum or -(-7 * size // 10),
            colluders,
            (self.layout,),
            agreement=False,  # Flower's protocol has none
            rounds=1 << 20,
        )
        keys = {party: SigningKey() for party in self.parties}
        self.clients = {party: Client(self.terms, party, keys[party]) for party in self.parties}
        self.identities = [_Identity(party, keys[party].public, terms) for party in self.parties]
        self.hellos = [client.hello() for client in self.clients.values()]
        start = time.perf_counter()
        probe = Client(self.terms, self.parties[0], keys[self.parties[0]])
        mine = probe.hello()
        probe.join(Directory.verify(self.terms, self.identities, [mine, *self.hellos[1:]]))
        self.setup = time.perf_counter() - start
        self.directory = Directory.verify(self.terms, self.identities, self.hellos)
        for client in self.clients.values():
            client.join(self.directory)
        self.server = Server(self.directory)
        self.number = 0
        self.sizes: dict[str, int] = {}
        self.mean: NDArray[np.float32] | None = None

    def round(self, vector: NDArray[np.float32], dropped: int) -> Timed:
        """One round in which `dropped` clients, evenly spread, do not upload; the first client and
        the server are timed.
        """
        self.number += 1
        watch, client_time, server_time = time.perf_counter, 0.0, 0.0
        model = self.number.to_bytes(48, "big")
        lengths: dict[str, list[int]] = {"upload": [], "request": [], "reply": []}
        apart = len(self.parties) // max(dropped, 1)
        gone = set(self.parties[apart - 1 :: apart][:dropped])
        alive = [party for party in self.parties if party not in gone]
        first = self.parties[0]
        start = watch()
        current = self.server.open(self.number, "bench", self.parties, model)
        server_time += watch() - start
        for party, client in self.clients.items():
            start = watch()
            client.begin(current.request, model)
            client_time += watch() - start if party == first else 0.0
        for party in alive:
            start = watch()
            message = self.clients[party].upload(Contribution(vector))
            middle = watch()
            current.receive(message, party)
            server_time += watch() - middle
            client_time += middle - start if party == first else 0.0
            lengths["upload"].append(len(message))
        start = watch()
        current.close()
        server_time += watch() - start
        members = [party for party in current.committee if party in set(alive)]
        timed = first if first in members else members[0]
        if current.needs_agreement:
            ask = current.endorsement_request()
            for party in members:
                start = watch()
                endorsement = self.clients[party].endorse(ask)
                middle = watch()
                current.endorse(endorsement, party)
                server_time += watch() - middle
                client_time += middle - start if party == timed else 0.0
        start = watch()
        requests = current.unmask_requests()
        server_time += watch() - start
        for party in members:
            start = watch()
            reply = self.clients[party].unmask(requests[party])
            middle = watch()
            current.accept(reply, party)
            server_time += watch() - middle
            client_time += middle - start if party == timed else 0.0
            lengths["request"].append(len(requests[party]))
            lengths["reply"].append(len(reply))
        start = watch()
        mean = self.mean = current.finish().mean(buffer=self.mean)
        server_time += watch() - start
        if float(np.abs(mean - vector).max()) > self.layout.step:
            raise AssertionError("a masked mean is wrong")
        self.sizes = {kind: round(statistics.mean(found)) for kind, found in lengths.items()}
        return Timed(client_time, server_time, self.sizes["upload"])


def _vector(length: int) -> NDArray[np.float32]:
    return np.random.default_rng(length).normal(0, 0.01, length).astype(np.float32)


def rows() -> Iterator[Row]:
    """Every row of the benchmark."""
    for size, length, rounds, *goals in CASES:
        yield from _against_flower(size, length, rounds, *goals)
    yield _keystream()
    yield from (_memory(size, length) for size, length, *_ in CASES)
    for size in COHORTS:
        yield from _cohort(size)


def _against_flower(
    size: int, length: int, rounds: int, client: float, server: float, gone: float, wire: float
) -> Iterator[Row]:
    vector, dropped = _vector(length), size // 10
    ours = MaskedSession(size, length)
    peer = FlowerSession(size, vector) if available() else None
    ours.round(vector, 0)
    runs: dict[tuple[str, int], list[Timed]] = {}
    for _ in range(rounds):
        for lost in (0, dropped):
            # Two rounds of ours for one of the peer's: ours are short, and one interruption weighs
            # more.
            for _ in range(2):
                runs.setdefault(("ours", lost), []).append(ours.round(vector, lost))
            if peer is not None:
                runs.setdefault(("peer", lost), []).append(peer.round(lost))

    def median(side: str, lost: int, pick: Callable[[Timed], float]) -> float | None:
        return statistics.median(map(pick, runs[side, lost])) if (side, lost) in runs else None

    case = f"n={size}, d={length // 1_000_000}M"
    for what, lost, pick, goal in (
        ("client, a round", 0, lambda t: t.client, client),
        ("server, no drop", 0, lambda t: t.server, server),
        (f"server, {dropped} dropped", dropped, lambda t: t.server, gone),
    ):
        yield _faster(
            f"{case}: {what}", median("ours", lost, pick), median("peer", lost, pick), goal
        )
    mine = median("ours", 0, lambda t: t.client)
    yield _faster(
        f"{case}: client, the first round with session set-up",
        (mine or 0) + ours.setup,
        median("peer", 0, lambda t: t.client),
    )
    width = ours.sizes["upload"] / length
    theirs = median("peer", 0, lambda t: t.wire / length)
    yield Row(
        f"{case}: upload",
        round(width, 3),
        theirs,
        "bytes a value",
        round(width, 3),
        f"<= {wire}",
        width <= wire,
    )


def _faster(case: str, ours: float | None, peer: float | None, goal: float | None = None) -> Row:
    milliseconds = round((ours or 0) * 1e3, 2)
    if peer is None or not ours:
        return Row(case, milliseconds, None, "ms")
    ratio = round(peer / ours, 1)
    met = None if goal is None else ratio >= goal
    return Row(
        case,
        milliseconds,
        round(peer * 1e3, 1),
        "ms",
        ratio,
        "" if goal is None else f">= {goal:g}x",
        met,
    )


def _keystream() -> Row:
    """Masking on one thread against the plain AES-256-CTR cipher alone on one thread, alternating;
    the ratio is of neighbours.
    """
    words, streams = 40 * BLOCK, 9
    zeros, out, target = (
        bytes(8 * BLOCK),
        bytearray(8 * BLOCK),
        aligned(8 * words).view(np.uint64),
    )  # as `wire.build` makes it
    target.fill(0)

    def cipher() -> None:
        for _ in range(streams):
            context = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
            for _ in range(words // BLOCK):
                context.update_into(zeros, out)

    def masking() -> None:
        apply_masks(target, [(os.urandom(32), True)] * streams, threads=1)

    times: dict[Callable[[], None], list[float]] = {cipher: [], masking: []}
    for _ in range(60):
        for call, found in times.items():
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    rate = {
        call: words * streams * 8 / statistics.median(found) / 1e9 for call, found in times.items()
    }
    ratio = round(
        statistics.median(
            one / other for one, other in zip(times[cipher], times[masking], strict=True)
        ),
        3,
    )
    return Row(
        "masking, of the AES-256-CTR rate",
        round(rate[masking], 2),
        round(rate[cipher], 2),
        "GB/s",
        ratio,
        ">= 0.75",
        ratio >= 0.75,
    )


def _memory(size: int, length: int) -> Row:
    """Peak of a client's allocations during `upload`, the message itself included, over the packed
    vector.
    """
    session, vector = MaskedSession(size, length), _vector(length)
    current = session.server.open(1, "bench", session.parties, bytes(48))
    client = session.clients[session.parties[0]]
    client.begin(current.request, bytes(48))
    contribution = Contribution(vector)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        client.upload(contribution)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    packed = 8 * session.layout.words(size)
    ratio = round(peak / packed, 3)
    case = f"n={size}, d={length // 1_000_000}M: client, peak extra memory"
    return Row(
        case, round(peak / 1e6, 2), round(packed / 1e6, 2), "MB", ratio, "<= 1.5", ratio <= 1.5
    )


def _cohort(size: int) -> Iterator[Row]:
    """A cohort with a tenth of colluders and of drops: bytes against the formula, and time."""
    colluders, minimum, dropped = size // 10, -(-7 * size // 10), size // 10
    session = MaskedSession(size, _COST_VALUES, colluders=colluders, minimum=minimum)
    timed = session.round(_vector(_COST_VALUES), dropped)
    cost = Cost.of(session.layout, size, minimum, colluders, dropped)
    case = f"n={size}, degree {cost.degree}, committee {cost.committee}, {dropped} dropped"
    for what, formula in (
        ("upload", cost.vector + cost.shares),
        ("request", cost.request),
        ("reply", cost.reply),
    ):
        measured = session.sizes[what]
        ratio = round(measured / max(formula, 1), 3)
        yield Row(
            f"{case}: {what}, formula beside",
            measured,
            formula,
            "bytes",
            ratio,
            "0.9..1.1",
            0.9 <= ratio <= 1.1,
        )
    yield Row(f"{case}: client, d={_COST_VALUES}", round(timed.client * 1e3, 2), None, "ms")
    yield Row(f"{case}: server, d={_COST_VALUES}", round(timed.server * 1e3, 2), None, "ms")
    million = Cost.of(
        dataclasses.replace(session.layout, length=1_000_000), size, minimum, colluders, dropped
    )
    yield Row(
        f"{case}: client keystream for d=1M, by formula",
        round(million.client_stream / 1e6, 1),
        None,
        "MB",
    )
    yield Row(
        f"{case}: server keystream for d=1M, by formula",
        round(million.server_stream / 1e6, 1),
        None,
        "MB",
    )


def _main() -> None:
    found: list[dict[str, Any]] = []
    for row in rows():
        found.append(dataclasses.asdict(row))
        print(json.dumps(found[-1]), flush=True)
    print(json.dumps({"bench": "secagg", "machine": machine(), "rows": found}))


if __name__ == "__main__":
    _main()
