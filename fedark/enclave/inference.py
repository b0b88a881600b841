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
from collections.abc import Sequence
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
from fedark.tuning.task import TaskModel
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


@dataclass
class _Portion:
    """What was granted, and what is left of it.

    Attributes:
        ends: by the wall clock, seconds since 1970; boot: by the clock since boot.
    """

    ends: float
    boot: float
    tokens: int


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
        self._adapters: dict[str, tuple[bytes, Flat]] = {}
        self._used: dict[bytes, list[int]] = {}
        self._seen = 0.0

    def handle(self, call: pb.Call, progress: ProgressSink) -> pb.Reply:
        """Answer one call; see `Session.handle`."""
        over = self._over(now())
        if over:
            self._forget()
        name = name_of(call)
        if over and name in ("adapter", "ask", "sealed"):
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
        self._task = self._opening = self._portion = None
        self._adapters.clear()
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
        self._task = TaskModel.load(opening.collector.files, self.lease.terms)
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
        self._open().set_flat(flat)  # refuses another shape, and what is not finite
        self._adapters[call.name] = (hashlib.sha384(call.flat).digest(), flat)
        return reply_done()

    def _ask(self, call: pb.Ask) -> pb.Reply:
        task, (digest, flat) = self._open(), self._known(call.adapter)
        _check(call)
        task.set_flat(flat)
        prompts = [record.prompt for record in call.records] or list(call.prompts)
        given = [record.answer for record in call.records]
        reserved = (
            task.read_tokens(prompts) + task.written_tokens(given),
            task.most_written(len(prompts), call.longest or None),
        )
        self._charge(digest, *reserved)
        try:
            answers, written = _answered(task, call, prompts)
        except FedarkError:
            raise
        except Exception as error:  # from the library, at a text; its words may hold the text
            raise ModelError(
                f"The model fails on a prompt ({type(error).__name__}).", safe="It was charged."
            ) from None
        if written:
            self._charge(digest, 0, min(task.written_tokens(written), reserved[1]) - reserved[1])
        encoded = canonical.encode(answers)
        return pb.Reply(answered=pb.Answered(answers=encoded, usage=self._receipt()))

    def _known(self, name: str) -> tuple[bytes, Flat]:
        found = self._adapters.get(name)
        if found is None:
            raise InputError("This enclave has no adapter of that name.", safe="Nothing was asked.")
        return found

    def _charge(self, adapter: bytes, read: int, written: int) -> None:
        portion = self._portion
        assert portion is not None  # weights are open under one alone
        if read + written > portion.tokens:
            raise Refused(
                f"The request may take {read + written:,} tokens, and {portion.tokens:,} are left"
                " of this portion of the lease.",
                safe="Nothing was answered or charged.",
                fix="Ask the provider's broker for another portion.",
            )
        portion.tokens -= read + written
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


def _check(call: pb.Ask) -> None:
    texts = [*call.prompts, *call.stop]
    texts += [text for record in call.records for text in (record.prompt, record.answer)]
    if bool(call.prompts) == bool(call.records):
        raise InputError("A request has prompts to answer, or records to measure.")
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
