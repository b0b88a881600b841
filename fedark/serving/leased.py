"""What answers where the base is a secret: an inference enclave on the customer's premises, under a
lease.

The customer's side: it starts the enclave, has the provider's broker give it a portion of the
lease, brings the sealed weights and its own adapters, and asks. When a portion is used up it asks
for the next one. An enclave that has ended is started anew, under another portion.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedark.contract.contract import ModelTerms
from fedark.contract.lease import SignedLease
from fedark.contract.protection import Figure
from fedark.enclave.host import EnclaveHandle
from fedark.enclave.session import LeaseConfig
from fedark.foundation import canonical
from fedark.foundation.errors import EnclaveFailed, ModelError, Refused
from fedark.foundation.keys import SigningKey
from fedark.records.reading import Record
from fedark.stages.loading import feed
from fedark.tuning.adapter import Adapter
from fedark.tuning.task import Evaluation
from fedark.v1 import enclave_pb2 as pb
from fedark.v1 import stage_pb2
from fedark.vault.bundle import SealedBundle
from fedark.vault.lease import ADAPTER_LABEL, Usage, adapter_statement

__all__ = ["Leased", "LeasedModel", "Portion"]

Portion = Callable[[EnclaveHandle, str, bytes], stage_pb2.Grants]
"""(enclave, run id, usage receipt so far) -> the grants of another portion; by the broker."""
_MAX_ANSWER = 1 << 28
_RECORDS = 1024  # measured by one request


@dataclass
class Leased:
    """An inference enclave under a lease.

    Args:
        start: starts the enclave for a run configuration.
        portion: asks the provider.
        bundle: the sealed base.
        signing: the customer's key.
        say: told when a portion was got.

    Attributes:
        usage: the enclave's last receipt; empty before its first answer.
        lives: how often weights were opened: what was begun before is lost.
    """

    signed: SignedLease
    start: Callable[[bytes], EnclaveHandle]
    portion: Portion
    bundle: SealedBundle
    signing: SigningKey
    say: Callable[[str], None] = lambda text: None
    usage: bytes = b""
    lives: int = 0
    _adapters: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Start an enclave, which knows nothing of one before it."""
        lease = self.signed.contract
        self.usage, self._open = b"", False
        self._run_id = os.urandom(16).hex()
        config = LeaseConfig(lease.customer.name, lease, self._run_id)
        self._enclave = self.start(config.encode())

    def model(self, name: str, adapter: Adapter) -> LeasedModel:
        """The base with that adapter.

        Raises:
            ModelError: it was made on another base than the leased one, or of another form.
        """
        terms = self.signed.contract.terms
        if adapter.terms.weights != terms.weights:
            raise ModelError(
                f"The adapter was trained on other weights than the leased base {terms.name}.",
                safe="Nothing was asked.",
                fix="Use the lease of that base.",
            )
        own = terms.model_copy(update={"bundle": adapter.terms.bundle})
        if own != adapter.terms:
            raise ModelError(
                "The adapter's terms are not those of the lease: another job made it.",
                safe="Nothing was asked.",
                fix="Ask the provider for a lease on that job's model.",
            )
        self._adapters[name] = np.asarray(adapter.flat, dtype="<f4").tobytes()
        if self._open:
            self._bring(name)
        return LeasedModel(self, name, terms)

    def drop(self, name: str) -> None:
        """Bring this adapter to no further enclave."""
        self._adapters.pop(name, None)

    def ask(self, ask: pb.Ask) -> dict[str, object]:
        """An answer of the enclave; see `call`."""
        reply = self.call(pb.Call(ask=ask)).answered
        self.usage = reply.usage
        found: dict[str, object] = canonical.decode(reply.answers, max_bytes=_MAX_ANSWER)
        return found

    def call(self, call: pb.Call, *, again: bool = True) -> pb.Reply:
        """What the enclave replies; with another portion, if the one at hand is used up.

        Args:
            again: one that has ended is asked again once it is started anew.

        Raises:
            EnclaveFailed: it has ended, and another was started.
            FedarkError: the enclave's, or the provider's, why not.
        """
        try:
            return self._called(call)
        except EnclaveFailed:
            self._enclave.close()
            self._begin()
            if not again:
                raise
            return self._called(call)
        except Refused as error:
            if not self._open:
                raise
            self.say(error.what)
            self._renew()
            return self._called(call)

    def _called(self, call: pb.Call) -> pb.Reply:
        if not self._open:
            self._renew()
        return self._enclave.call(call)

    def _renew(self) -> None:
        name = self.signed.contract.terms.name
        grants = self.portion(self._enclave, self._run_id, self.usage)
        grant = pb.Grant(model=name, manifest=grants.manifests[name], grant=grants.by_model[name])
        done = self._enclave.call(pb.Call(grant=grant)).done
        self.usage = done.usage
        if done.weights:
            self.lives += 1
            feed(self._enclave, self.bundle, name)
            for adapter in self._adapters:
                self._bring(adapter)
        self._open = True
        self.say("the provider gave out a portion of the lease")

    def _bring(self, name: str) -> None:
        flat = self._adapters[name]
        statement = adapter_statement(self.signed.digest, self._run_id, name, flat)
        signature = self.signing.sign(ADAPTER_LABEL, statement)
        self._enclave.call(pb.Call(adapter=pb.Adapter(name=name, flat=flat, signature=signature)))

    def figures(self) -> dict[str, float]:
        """What the last receipt says, for metrics."""
        if not self.usage:
            return {}
        usage = Usage.claimed(self.usage)
        return {"tokens left of the portion": usage.left, "portions": usage.portions}

    def told(self) -> str:
        """What the enclave's last receipt says, for people; it is the provider who verifies it."""
        if not self.usage:
            return "nothing"
        usage = Usage.claimed(self.usage)
        read, written = (
            (sum(one) for one in zip(*usage.adapters.values(), strict=True))
            if (usage.adapters)
            else (0, 0)
        )
        return f"{read:,} tokens read, {written:,} written, {usage.left:,} left of this portion"

    def close(self) -> None:
        """End the enclave: what is left of its portion is lost."""
        self._enclave.close()


@dataclass(frozen=True)
class LeasedModel:
    """One adapter inside the enclave; see `fedark.serving.model.Answering`."""

    leased: Leased
    name: str
    terms: ModelTerms

    def probabilities(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        found = self.leased.ask(pb.Ask(adapter=self.name, prompts=prompts))
        flat = np.frombuffer(found["probabilities"], dtype="<f4")  # type: ignore[call-overload]
        likely: npt.NDArray[np.float32] = flat.reshape(len(prompts), len(self.terms.labels))
        return likely

    def answers(
        self, prompts: Sequence[str], *, longest: int | None = None, stop: Sequence[str] = ()
    ) -> list[str]:
        ask = pb.Ask(adapter=self.name, prompts=prompts, longest=longest or 0, stop=stop)
        return list(self.leased.ask(ask)["texts"])  # type: ignore[call-overload,no-any-return]

    def evaluate(self, records: Sequence[Record]) -> tuple[Evaluation, Mapping[str, Figure]]:
        metrics, figures = Evaluation(0, 0, 0.0), dict[str, Figure]()
        for start in range(0, len(records), _RECORDS):
            more, details = self._part(records[start : start + _RECORDS])
            metrics = Evaluation(
                metrics.correct + more.correct,
                metrics.total + more.total,
                metrics.loss_sum + more.loss_sum,
                Counter(metrics.said) + Counter(more.said),
                metrics.right + more.right,
            )
            for key, figure in details.items():
                before = figures.get(key, (0, 0, 0.0))
                figures[key] = (before[0] + figure[0], before[1] + figure[1], before[2] + figure[2])
        return metrics, figures

    def _part(self, records: Sequence[Record]) -> tuple[Evaluation, Mapping[str, Figure]]:
        rows = [pb.Record(prompt=record.prompt, answer=record.answer) for record in records]
        found = self.leased.ask(pb.Ask(adapter=self.name, records=rows))
        match found:
            case {
                "correct": int(correct),
                "total": int(total),
                "loss_sum": float(loss),
                "right": bytes(right),
                "said": list(said),
                "details": dict(details),
            }:
                counts = {(gold, given): count for gold, given, count in said}
                figures: dict[str, Figure] = {key: tuple(one) for key, one in details.items()}
                return Evaluation(correct, total, loss, counts, tuple(map(bool, right))), figures
        raise ModelError("The enclave's figures are malformed.")
