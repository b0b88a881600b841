"""Targets of secure aggregation: every message of a session, by itself."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import Target

from fedark.foundation import canonical
from fedark.secagg import wire
from fedark.secagg.directory import Directory

__all__ = ["sum_messages"]


def sum_messages() -> Iterator[Target]:
    path = Path(__file__).parents[1] / "secagg" / "conftest.py"
    spec = importlib.util.spec_from_file_location("secagg_lab", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["secagg_lab"] = module
    spec.loader.exec_module(module)
    lab = module.Lab(size=4, length=5, agreement=True)

    hellos = dict(lab.hellos)

    def joined(data: bytes) -> Any:
        return Directory.verify(
            lab.terms, lab.identities, [*(hello for p, hello in hellos.items() if p != "c0"), data]
        )

    first = next(iter(hellos))
    joined_first = functools.partial(_with_first, lab, hellos, first, Directory)
    yield Target("secagg hello", [bytes(hellos[first])], joined_first, "closed", structure=False)
    header = wire.parse(hellos[first], 1 << 20).header
    inner = canonical.decode(header)[0]

    def resigned(data: bytes) -> Any:
        signature = lab.signing[first].sign(wire.label("hello"), data)
        return joined_first(wire.message(canonical.encode([data, signature])))

    yield Target("secagg hello, signed", [inner], resigned, "open")
    current = lab.open()
    request, model = bytes(current.request), lab.number.to_bytes(48, "big")
    fresh = module.Lab(size=4, length=5)
    opened = fresh.server.open(1, "m/update", list(fresh.parties), (1).to_bytes(48, "big"))
    yield Target(
        "secagg round",
        [bytes(opened.request)],
        lambda data: fresh.clients[fresh.parties[0]].begin(data, (1).to_bytes(48, "big")),
        "open",  # it is the aggregator's word: a round that the policy admits may be begun
        structure=False,
    )
    del request, model
    uploads = {
        party: bytes(lab.clients[party].upload(contribution))
        for party, contribution in lab.inputs().items()
    }
    parties = list(lab.parties)
    for party in parties[1:]:
        current.receive(uploads[party], party)

    def receive(data: bytes) -> None:
        current._uploads.pop(0, None)
        current._pending = current._pending[: len(parties) - 1]
        current.receive(data, parties[0])

    yield Target("secagg upload", [uploads[parties[0]]], receive, "open", structure=False)
    second = lab.open()
    for party, contribution in lab.inputs().items():
        second.receive(lab.clients[party].upload(contribution), party)
    second.close()
    asked = second.endorsement_request()
    endorsements = {party: bytes(lab.clients[party].endorse(asked)) for party in second.committee}
    member = second.committee[0]
    yield Target(
        "secagg endorsement",
        [endorsements[member]],
        lambda data: second.endorse(data, member),
        "closed",
        structure=False,
    )
    for party in second.committee:
        second.endorse(endorsements[party], party)
    requests = second.unmask_requests()
    before = {party: copy.copy(lab.clients[party]._round) for party in second.committee}
    answers = {
        party: bytes(lab.clients[party].unmask(requests[party])) for party in second.committee
    }
    one = second.committee[0]

    def unmask(data: bytes) -> None:
        with _unanswered(lab.clients[one], before[one]) as client:
            client.unmask(data)

    def endorse(data: bytes) -> None:
        with _unanswered(lab.clients[one], before[one]) as client:
            client._round.endorsed = None
            client.endorse(data)

    unmask(bytes(requests[one]))
    survivors = wire.parse(asked, 1 << 20).header
    endorse(wire.message(survivors))
    # What they may not do is answer for two sets (tests/secagg).
    yield Target("secagg unmask request", [bytes(requests[one])], unmask, "open", structure=False)
    yield Target("secagg survivors", [survivors], lambda data: endorse(wire.message(data)), "open")

    def accept(data: bytes) -> None:
        second._answers.clear()
        second.accept(data, one)

    yield Target("secagg shares", [answers[one]], accept, "open", structure=False)


@contextmanager
def _unanswered(client: Any, before: Any) -> Iterator[Any]:
    """A committee's member as it was before it answered."""
    client._round = copy.copy(before)
    client._releases.done.clear()
    yield client


def _with_first(lab: Any, hellos: dict[str, bytes], first: str, directory: Any, data: bytes) -> Any:
    rest = [hello for party, hello in hellos.items() if party != first]
    return directory.verify(lab.terms, lab.identities, [data, *rest])
