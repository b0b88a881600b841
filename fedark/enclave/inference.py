"""The inference enclave: a provider's base answers with its customer's adapters, under a lease.

The order of its calls stands in `fedark.enclave.order`. Nothing but answers, figures, evidence and
receipts leaves; weights and prompts are in this process's memory only.

It writes no checkpoint. One that ended has forgotten its keys, so no grant opens for it again: a
new one proves itself anew, and its portion of the lease is counted anew by the provider's log. So
there is no state that a host could roll back to get tokens twice.

When its lease ends it forgets the weights. Three things end it:

- tokens: each request is charged before it is computed, and what it did not write is given back
  after. This needs no clock and no trust in the host beyond what keeps the enclave confined.
- the time since the grant was accepted, by the kernel's clock since boot, which setting the time
  does not change;
- the wall clock of its host: past the end, or set back behind what this enclave has seen.

Both clocks are the host's, or on a confidential machine its hypervisor's, which can slow or stop
them. Only the tokens bound what such a host gets from one portion.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from fedark.contract.contract import now
from fedark.contract.lease import INFERENCE
from fedark.enclave.order import TABLES, If, find, name_of, start
from fedark.enclave.session import LeaseConfig, ProgressSink, Quote, prove, reply_done
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, InputError, ModelError, ProtocolError, Refused
from fedark.foundation.keys import HpkeKey, SigningKey, verify_signature
from fedark.records.reading import Record
from fedark.tuning.judged import details
from fedark.tuning.layout import Flat
from fedark.tuning.mixed import Asked, Mixed
from fedark.tuning.task import TaskModel
from fedark.tuning.writing import Piece, Wish, Writer
from fedark.v1 import enclave_pb2 as pb
from fedark.vault.lease import ADAPTER_LABEL, Usage, adapter_statement
from fedark.vault.manifest import Manifest
from fedark.vault.opener import Collector, Opener
from fedark.vault.release import Accepted, Receipt, accept

__all__ = ["InferenceSession"]

_BACK = 2.0  # seconds by which a wall clock may be corrected
_MAX_PROMPTS = 4096
_MAX_CHARACTERS = 1 << 20
_MAX_STOPS = 16
_MAX_ADAPTERS = 64
_MAX_TEXTS = 1024
_MAX_STEPS = 64
_MAX_TEMPERATURE = 2.0


@dataclass
class _Portion:
    """What was granted, and what is left of it.

    Attributes:
        ends: by the wall clock, seconds since 1970; boot: by the clock since boot.
    """

    ends: float
    boot: float
    tokens: int


@dataclass
class _Begun:
    """A text that is being written, and what was charged for it.

    Attributes:
        adapter: digest.
        read, longest: tokens that were charged; written: so far.
    """

    wish: Wish
    adapter: bytes
    read: int
    longest: int
    written: int = 0


@dataclass(frozen=True)
class _Opening:
    accepted: Accepted
    opener: Opener
    collector: Collector


class InferenceSession:
    """See the module's docstring.

    Attributes:
        message_bytes: the largest frame that its lease needs.
    """

    def __init__(self, config: LeaseConfig, quote: Quote) -> None:
        self.config, self.lease = config, config.contract
        self.message_bytes = config.message_bytes
        self._table = TABLES[INFERENCE, "leased"]
        self._at = start(self._table)
        self._quote = quote
        self._hpke, self._signing = HpkeKey(kem=self.lease.attestation.kem), SigningKey()
        self._host = self._nonce = self._evidence = b""
        self._granted: set[bytes] = set()
        self._portion: _Portion | None = None
        self._opening: _Opening | None = None
        self._task: TaskModel | None = None
        self._mixed: Mixed | None = None
        self._writer: Writer | None = None
        self._adapters: dict[str, tuple[bytes, Flat]] = {}
        self._begun: dict[int, _Begun] = {}
        self._used: dict[bytes, list[int]] = {}
        self._seen = 0.0

    def handle(self, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        """Answer one call; see `Session.handle`."""
        over = self._over(now())
        if over:
            self._forget()
        name = name_of(call)
        if over and name in ("adapter", "ask", "write", "sealed"):
            raise Refused(
                over,
                safe="Nothing was answered, and the enclave has forgotten the weights.",
                fix="Ask the provider's broker for another portion, then bring the weights again.",
            )
        steps = find(self._table, self._at, name, role=self.config.role, number=0, round=0)
        body = getattr(call, name)
        for region, step in steps.items():
            reply: pb.Reply = getattr(self, step.handler)(body)
            if isinstance(step.next, If):
                met = self._task is not None
                self._at[region] = step.next.then if met else step.next.otherwise
        return reply

    # -- who it is

    def _start(self, call: pb.Start) -> pb.Reply:
        if call.run_config != self.config.encode():
            raise ProtocolError("An enclave takes one run configuration, once.")
        return pb.Reply(
            hello=pb.Hello(hpke_public=self._hpke.public, signing_public=self._signing.public)
        )

    def _attest(self, call: pb.Attest) -> pb.Reply:
        evidence = prove(
            self._quote, call.nonce, self._hpke, self._signing, self.config, self._host
        )
        if call.peer == self.lease.provider.name:
            self._nonce, self._evidence = call.nonce, evidence.digest()
        return pb.Reply(evidence=pb.Evidence(evidence=evidence.encode()))

    def _vouch(self, call: pb.Vouch) -> pb.Reply:
        self._host = call.signature
        return reply_done()

    # -- the lease

    def _grant(self, call: pb.Grant) -> pb.Reply:
        accepted, manifest = self._accept(call)
        collector = Collector(manifest)
        self._opening = _Opening(accepted, Opener(manifest, accepted.key, collector), collector)
        self._begin(accepted)
        return pb.Reply(done=pb.Done(weights=True, usage=self._receipt()))

    def _renew(self, call: pb.Grant) -> pb.Reply:
        """Another portion while the weights are open: what is left of the last one stays."""
        accepted, _ = self._accept(call)
        accepted.key.wipe()
        left = self._portion.tokens if self._portion is not None else 0
        self._begin(accepted, left)
        return pb.Reply(done=pb.Done(usage=self._receipt()))

    def _accept(self, call: pb.Grant) -> tuple[Accepted, Any]:
        name = hashlib.sha384(call.grant).digest()
        if name in self._granted:
            raise Refused(
                "This grant was taken by this enclave already.",
                safe="No token was added.",
                fix="Ask the provider's broker for another portion.",
            )
        terms = self.lease.model(call.model)
        if terms is None:
            raise ProtocolError("A grant names a model that the lease has not.")
        manifest = Manifest.verify(call.manifest, bytes.fromhex(self.lease.provider.signing_key))
        accepted = accept(
            call.grant,
            hpke=self._hpke,
            manifest=manifest,
            contract=self.lease,
            model=terms.name,
            run_id=self.config.run_id,
            party=self.config.party,
            nonce=self._nonce,
            evidence=self._evidence,
            now=now(),
        )
        self._granted.add(name)
        return accepted, manifest

    def _begin(self, accepted: Accepted, left: int = 0) -> None:
        terms, at = accepted.terms, now().timestamp()
        lasts = min(terms.expires - terms.logged, terms.expires - at)
        self._seen = max(self._seen, at)
        self._portion = _Portion(terms.expires, _boot() + lasts, left + terms.tokens)

    def _over(self, at: datetime) -> str:
        """Why the lease is over, or "" while it is good, or where none has begun."""
        portion, wall = self._portion, at.timestamp()
        if portion is None:
            return ""
        if wall < self._seen - _BACK:
            return "The clock of this enclave's host was set back: the lease is taken for ended."
        self._seen = max(self._seen, wall)
        if wall >= portion.ends or _boot() >= portion.boot or self.lease.expired(at):
            return f"The lease of {self.lease.customer.name} on {self.lease.terms.name} has ended."
        return ""

    def _forget(self) -> None:
        self._task = self._opening = self._portion = self._mixed = self._writer = None
        self._adapters.clear()
        self._begun.clear()
        self._at = start(self._table)

    # -- the weights

    def _sealed(self, call: pb.Sealed) -> pb.Reply:
        opening = self._opening
        if opening is None or call.model != self.lease.terms.name:
            raise ProtocolError("Sealed bytes came for a model without a grant.")
        opening.opener.feed(call.data)
        if not call.last:
            return reply_done()
        self._opening = None
        opened = opening.opener.finish()
        opening.accepted.key.wipe()
        task = TaskModel.load(opening.collector.files, self.lease.terms)
        self._mixed = task.mixed()
        if task.causal and not task.terms.labels:
            self._writer = Writer(self._mixed)
        self._task = task
        receipt = Receipt.make(opening.accepted, opened, self._signing, now=now())
        return pb.Reply(receipt=pb.Receipt(receipt=receipt))

    def _open(self) -> TaskModel:
        assert self._task is not None  # before, the table refuses whatever needs it
        return self._task

    # -- adapters and answers

    def _adapter(self, call: pb.Adapter) -> pb.Reply:
        """Take an adapter that this lease's customer has signed for this very enclave."""
        owner = self.lease.customer
        statement = adapter_statement(self.lease.digest(), self.config.run_id, call.name, call.flat)
        try:
            verify_signature(
                bytes.fromhex(owner.signing_key),
                ADAPTER_LABEL,
                statement,
                call.signature,
                by=owner.name,
            )
        except Refused:
            raise Refused(
                f"This adapter was not given by {owner.name}, to whom the base is leased, for this"
                " enclave.",
                safe="It was not loaded.",
                fix="Bring an adapter from the node of the lease's own customer.",
            ) from None
        if len(self._adapters) >= _MAX_ADAPTERS and call.name not in self._adapters:
            raise InputError(f"An enclave holds {_MAX_ADAPTERS} adapters at most.")
        if len(call.flat) != 4 * self.lease.terms.travelling:
            raise ProtocolError("An adapter has not the shape that the lease fixes.")
        flat = np.frombuffer(call.flat, dtype="<f4").astype(np.float32)
        assert self._mixed is not None  # as in `_open`
        self._mixed.put(call.name, flat)  # refuses another shape, and what is not finite
        for number in self._writer.forget(call.name) if self._writer is not None else ():
            self._end(number)
        self._adapters[call.name] = (hashlib.sha384(call.flat).digest(), flat)
        return reply_done()

    def _ask(self, call: pb.Ask) -> pb.Reply:
        _check(call)
        if call.adapters:
            return self._label(call)
        task, (digest, flat) = self._open(), self._known(call.adapter)
        task.set_flat(flat)
        prompts = [record.prompt for record in call.records] or list(call.prompts)
        given = [record.answer for record in call.records]
        reserved = (
            task.read_tokens(prompts) + task.written_tokens(given),
            task.most_written(len(prompts), call.longest or None),
        )
        self._charge({digest: reserved})
        with _failing_model("It was charged."):
            answers, written = _answered(task, call, prompts)
        if written:
            unused = min(task.written_tokens(written), reserved[1]) - reserved[1]
            self._charge({digest: (0, unused)})
        encoded = canonical.encode(answers)
        return pb.Reply(answered=pb.Answered(answers=encoded, usage=self._receipt()))

    def _label(self, call: pb.Ask) -> pb.Reply:
        """Prompts, each for an adapter of its own."""
        task, mixed = self._open(), self._mixed
        assert mixed is not None  # as in `_open`
        asked = [Asked(*pair) for pair in zip(call.adapters, call.prompts, strict=True)]
        read = [task.read_tokens([one.prompt]) for one in asked]
        digests = [self._known(one.adapter)[0] for one in asked]
        self._charge(_summed((d, n, 0) for d, n in zip(digests, read, strict=True)))
        with _failing_model("It was charged."):
            found = mixed.label(asked)
        values = {
            "probabilities": np.stack([one.values for one in found]).astype("<f4").tobytes(),
            "read": [one.tokens for one in found],
            "cut": [one.cut for one in found],
        }
        encoded = canonical.encode(values)
        return pb.Reply(answered=pb.Answered(answers=encoded, usage=self._receipt()))

    def _write(self, call: pb.Write) -> pb.Reply:
        """Texts are charged when they begin, at their longest; what was not written is given back
        when they end.
        """
        writer = self._writer
        if writer is None:
            raise InputError("This model writes no text: it has labels.")
        wishes = self._wished(call, writer)
        self._charge(_summed((one.adapter, one.read, one.longest) for one in wishes.values()))
        for number in call.drop:
            writer.drop(number)
            self._end(number)
        for number, one in wishes.items():
            writer.add(number, one.wish)
            self._begun[number] = one
        pieces: list[Piece] = []
        with _failing_model("It was charged."):
            for _ in range(min(call.steps, _MAX_STEPS)):
                pieces += writer.step()
        ended = [piece for piece in pieces if piece.end]
        for piece in pieces:
            if piece.id in self._begun:
                self._begun[piece.id].written = piece.written
        for piece in ended:
            self._end(piece.id, unread=piece.end == "too long")
        encoded = canonical.encode([list(piece.plain()) for piece in pieces])
        usage = self._receipt() if ended or call.drop else b""
        return pb.Reply(written=pb.Written(pieces=encoded, usage=usage))

    def _wished(self, call: pb.Write, writer: Writer) -> dict[int, _Begun]:
        """What is to be begun, with what it may cost; nothing has been changed yet."""
        found: dict[int, _Begun] = {}
        for one in call.begin:
            if one.id in found or one.id in self._begun:
                raise ProtocolError("Two texts of a request have the same number.")
            if not 1 <= one.longest < self.lease.terms.training.max_length:
                raise InputError("A text is to have no tokens, or more than the model reads.")
            if not (0 <= one.temperature <= _MAX_TEMPERATURE and 0 < one.top_p <= 1):
                raise InputError("A temperature or top_p is out of its range.")
            _check(pb.Ask(prompts=[one.prompt], stop=one.stop))
            digest, _ = self._known(one.adapter)
            settings = (tuple(one.stop), one.temperature, one.top_p, one.seed)
            wish = Wish(one.adapter, one.prompt, one.longest, *settings)
            found[one.id] = _Begun(wish, digest, writer.read_tokens(wish), one.longest)
        if len(found) + len(self._begun) > _MAX_TEXTS:
            raise InputError(f"An enclave writes {_MAX_TEXTS} texts at once, at most.")
        return found

    def _end(self, number: int, *, unread: bool = False) -> None:
        """Give back what a text did not use."""
        one = self._begun.pop(number, None)
        if one is not None:
            self._charge({one.adapter: (-one.read if unread else 0, one.written - one.longest)})

    def _known(self, name: str) -> tuple[bytes, Flat]:
        found = self._adapters.get(name)
        if found is None:
            raise InputError("This enclave has no adapter of that name.", safe="Nothing was asked.")
        return found

    def _charge(self, costs: Mapping[bytes, tuple[int, int]]) -> None:
        """Charge tokens read and written with each adapter, or none of them."""
        portion = self._portion
        assert portion is not None  # weights are open under one alone
        tokens = sum(map(sum, costs.values()))
        if tokens > portion.tokens:
            raise Refused(
                f"The request may take {tokens:,} tokens, and {portion.tokens:,} are left"
                " of this portion of the lease.",
                safe="Nothing was answered or charged.",
                fix="Ask the provider's broker for another portion.",
            )
        portion.tokens -= tokens
        for adapter, (read, written) in costs.items():
            counts = self._used.setdefault(adapter, [0, 0])
            counts[0], counts[1] = counts[0] + read, counts[1] + written

    def _receipt(self) -> bytes:
        assert self._portion is not None  # answers are given under one alone
        usage = Usage(
            lease=self.lease.digest(),
            run_id=self.config.run_id,
            party=self.config.party,
            portions=len(self._granted),
            left=self._portion.tokens,
            at=int(self._seen),
            adapters={digest: (one[0], one[1]) for digest, one in self._used.items()},
        )
        return usage.sign(self._signing)


@contextmanager
def _failing_model(safe: str) -> Iterator[None]:
    """What the library says of a text may hold the text."""
    try:
        yield
    except FedarkError:
        raise
    except Exception as error:
        raise ModelError(
            f"The model fails on a prompt ({type(error).__name__}).", safe=safe
        ) from None


def _summed(costs: Iterable[tuple[bytes, int, int]]) -> dict[bytes, tuple[int, int]]:
    total: dict[bytes, tuple[int, int]] = {}
    for adapter, read, written in costs:
        before = total.get(adapter, (0, 0))
        total[adapter] = (before[0] + read, before[1] + written)
    return total


def _check(call: pb.Ask) -> None:
    texts = [*call.prompts, *call.stop]
    texts += [text for record in call.records for text in (record.prompt, record.answer)]
    if bool(call.prompts) == bool(call.records):
        raise InputError("A request has prompts to answer, or records to measure.")
    if call.adapters and len(call.adapters) != len(call.prompts):
        raise InputError("A request has not one adapter for each of its prompts.")
    if len(call.prompts) + len(call.records) > _MAX_PROMPTS or len(call.stop) > _MAX_STOPS:
        raise InputError(
            f"A request has {_MAX_PROMPTS} prompts and {_MAX_STOPS} texts to stop at, at most."
        )
    if any(len(text) > _MAX_CHARACTERS for text in texts) or not all(call.stop):
        raise InputError(f"A text is empty or has more than {_MAX_CHARACTERS:,} characters.")


def _answered(
    task: TaskModel, call: pb.Ask, prompts: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The answers, and the texts that were written for them."""
    if call.records:
        records = [Record(record.prompt, record.answer) for record in call.records]
        measured = task.evaluate(records)
        figures = details(task, records, measured.said)
        return {
            "correct": measured.correct,
            "total": measured.total,
            "loss_sum": measured.loss_sum,
            "right": bytes(measured.right),
            "said": [[*pair, count] for pair, count in sorted(measured.said.items())],
            "details": {key: list(value) for key, value in figures.items()},
        }, []
    if task.terms.labels:
        likely = task.probabilities(prompts)
        return {"probabilities": likely.astype("<f4").tobytes()}, []
    texts = task.answers(prompts, longest=call.longest or None, stop=tuple(call.stop))
    return {"texts": texts}, texts


def _boot() -> float:
    """Seconds since boot, suspended ones too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
