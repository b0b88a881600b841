"""What a customer's node brings into its trainer enclave: sealed weights, and its own records.

Both are brought once more to an enclave that goes on from a checkpoint, which compares them with
what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedark.attestation.gate import AttestedPeer
from fedark.contract.contract import Contract, ModelTerms, now
from fedark.contract.job import DataSpec
from fedark.enclave.durable import DurableEnclave
from fedark.enclave.host import EnclaveHandle
from fedark.foundation.errors import BudgetExceeded, DataError, FedarkError, FederationError
from fedark.privacy.ledger import ChargeReceipt
from fedark.records.reading import Record
from fedark.records.splits import split_train_test
from fedark.records.template import Template
from fedark.stages.budget import charge
from fedark.stages.node import NodeRun, Proof
from fedark.stages.settings import NodeSettings
from fedark.translog.head import TreeHead
from fedark.v1 import enclave_pb2, stage_pb2
from fedark.vault.bundle import SealedBundle, find_bundle

__all__ = ["CustomerData", "CustomerRun", "Loader", "feed"]

_PIECE = 4 << 20
_BATCH = 2000
_LISTED = 20


@dataclass(frozen=True)
class CustomerData:
    """Where a customer's records are and how they are read.

    Attributes:
        file: CSV or JSON lines.
        test: a file of held-out records, or None to hold out `spec.test_fraction` of `file`.
        spec: columns and template.
        template: that the prompts are made by: `spec.prompt`, or what was used to write `file`.
    """

    file: Path
    test: Path | None
    spec: DataSpec
    template: str

    def read(
        self, labels: tuple[str, ...], say: Callable[[str], None]
    ) -> tuple[list[Record], list[Record]]:
        """The records to train on and those that are held out; `say` is told of what was left out.

        Raises:
            DataError: with file and line.
        """
        spec = self.spec
        records = spec.read(self.file, labels, say)
        if self.test is not None:
            return records, spec.read(self.test, labels, say)
        train, test = split_train_test(records, spec.test_fraction)
        return (train, test) if train else (records, [])


@dataclass(kw_only=True)
class CustomerRun(NodeRun):
    """One run of a job at this customer.

    Attributes:
        evidence: SHA-384 of what the trainer enclave proved to the provider.
        asked: the head of the provider's log that was sent along with it; not kept.
        log_head, log_agreed: the head that the provider showed, and whether the other customers saw
            the same log.
        number, base: the round, and SHA-384 of the global state that it began with.
        local: figures for this node's own people.
        own: the trainer enclave's statement of them.
    """

    enclave: DurableEnclave
    trainer: AttestedPeer | None = None
    evidence: bytes = b""
    asked: TreeHead | None = None
    log_head: TreeHead | None = None
    log_agreed: bool = False
    charge: ChargeReceipt | None = None
    loaded: bool = False
    number: int = 0
    base: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)
    own: bytes = b""

    def state(self, proof: Proof) -> dict[str, Any]:
        return super().state(proof) | {
            "trainer": proof(self.trainer),
            "evidence": self.evidence,
            "log_head": self.log_head.encoded if self.log_head is not None else None,
            "log_agreed": self.log_agreed,
            "loaded": self.loaded,
            "number": self.number,
            "base": self.base,
            "local": self.local,
            "own": self.own,
        }


class Loader:
    """Brings weights and records to the trainer enclaves of one customer."""

    def __init__(self, settings: NodeSettings, data: CustomerData) -> None:
        self._settings, self._data = settings, data

    def read(
        self, contract: Contract, say: Callable[[str], None] = lambda text: None
    ) -> tuple[list[Record], list[Record]]:
        """The records to train on and those that are held out.

        Raises:
            FederationError: they do not fit the contract; this node's own people were told why.
        """
        with self._private():
            return self._data.read(contract.models[0].labels, say)

    def bundle_problems(self, contract: Contract) -> list[str]:
        """Why the contract's sealed bundles cannot be used here."""
        problems = []
        for terms in contract.models:
            try:
                bundle = self._bundle(contract, terms)
                bundle.check_payload()
                if bundle.manifest.weights().hex() != terms.weights:
                    problems.append(f"the bundle of model {terms.name} holds other weights")
            except FedarkError as error:
                problems.append(error.told)
            if Template.parse(terms.prompt) != Template.parse(self._data.template):
                self._settings.on_progress(
                    f"The job makes its prompts by {terms.prompt!r}, this node by"
                    f" {self._data.template!r}."
                )
                problems.append(
                    f"model {terms.name}: its prompts are made by {terms.prompt!r}, and"
                    f" {self._settings.party} makes them by another template\n    The node's"
                    " operator sets data.spec.prompt in party.toml, or names its columns so."
                )
        if len({terms.labels for terms in contract.models}) > 1:
            problems.append("its models have different labels")
        return problems

    def fill(
        self,
        run: CustomerRun,
        request: stage_pb2.LoadRequest,
        on_progress: Callable[[enclave_pb2.Progress], None],
    ) -> tuple[dict[str, bytes], enclave_pb2.Measured]:
        """Weights and records into the enclave, and the first measurement out; brought anew to an
        enclave that dies here.
        """
        if run.contract.protection.mode == "masked":
            self._join(run, request)
        receipts: dict[str, bytes] = {}
        for terms in run.contract.models:
            bundle = self._bundle(run.contract, terms)
            run.enclave.call(
                enclave_pb2.Call(
                    grant=enclave_pb2.Grant(
                        model=terms.name,
                        manifest=bundle.manifest.encode(),
                        grant=request.grants.by_model[terms.name],
                        group_grant=request.group_grant,
                    )
                )
            )
            receipts[terms.name] = feed(run.enclave, bundle, terms.name)
        train, test = self.read(run.contract)
        self.charge(run, train)
        if run.charge is not None:
            spent = run.charge.spent
            self._settings.on_progress(
                f"charged: its records have spent epsilon {spent.epsilon:.3g} at delta"
                f" {spent.delta:g}"
            )
        self._open(run.enclave, train, test)
        self._settings.on_progress("weights and records are in the enclave; measuring before")
        begin = enclave_pb2.Call(begin=enclave_pb2.Begin())
        return receipts, run.enclave.call(begin, on_progress=on_progress, restart=False).measured

    def charge(self, run: CustomerRun, records: list[Record]) -> None:
        """Charge the job to these records, once however often this is called."""
        with self._private():
            run.charge = charge(
                self._settings.state,
                run.contract,
                run.run_id,
                records,
                self._settings.budget,
                now=now(),
            )

    def _join(self, run: CustomerRun, request: stage_pb2.LoadRequest) -> None:
        """Have the trainer admit its fellows and agree keys with them, before a record is opened to
        it.
        """
        peers = {
            name: enclave_pb2.Announcement(evidence=announced.evidence, hello=announced.hello)
            for name, announced in request.announced.items()
        }
        run.enclave.call(
            enclave_pb2.Call(
                join=enclave_pb2.Join(
                    peers=peers, collateral=dict(self._settings.collateral.items())
                )
            )
        )
        self._settings.on_progress(
            f"keys agreed with {len(peers) - 1} other trainer enclaves, each proven"
        )

    def refeed(self, run: CustomerRun | None, enclave: EnclaveHandle) -> None:
        """Bring weights and records to an enclave that has gone on from a checkpoint; it compares
        them with what it had.
        """
        if run is None or not run.loaded:
            return  # the stage brings them itself
        for terms in run.contract.models:
            enclave.call(enclave_pb2.Call(reopen=enclave_pb2.Reopen(model=terms.name)))
            feed(enclave, self._bundle(run.contract, terms), terms.name)
        self._open(enclave, *self.read(run.contract))

    def _open(self, enclave: EnclaveHandle, train: list[Record], test: list[Record]) -> None:
        """Open the records to the enclave; without those that its models fail on, where the data
        settings say so.

        Raises:
            FederationError: they are not to be left out, or nothing is left.
        """
        with self._private():
            failing = _open_records(enclave, train, test)
            if failing is None:
                return
            file = self._data.file
            self._leave_out(file, [train[index].line for index in failing.train])
            self._leave_out(self._data.test or file, [test[index].line for index in failing.test])
            left = [
                [record for index, record in enumerate(records) if index not in set(gone)]
                for records, gone in ((train, failing.train), (test, failing.test))
            ]
            if not left[0] or (test and not left[1]):
                part = "training" if not left[0] else "held-out"
                raise DataError(
                    str(file), None, f"no {part} record is left.", fix="Give other records."
                )
            if _open_records(enclave, *left) is not None:
                raise DataError(
                    str(file), None, "the model fails on it.", fix="Use another base model."
                )

    def _leave_out(self, file: Path, lines: list[int]) -> None:
        """Say on which records a model fails.

        Raises:
            DataError: they are not to be left out.
        """
        if not lines:
            return
        lines = sorted(lines)
        listed = ", ".join(map(str, lines[:_LISTED])) + (", ..." if len(lines) > _LISTED else "")
        what = f"the model or its tokenizer fails on {len(lines)} records (lines {listed})."
        if self._data.spec.unusable == "refuse":
            raise DataError(
                str(file),
                lines[0],
                what,
                fix='Change or remove them, or have them left out: data.unusable = "leave-out".',
            )
        self._settings.on_progress(f"warning: {file}: {what} They were left out.")

    def _bundle(self, contract: Contract, terms: ModelTerms) -> SealedBundle:
        bundle = find_bundle(
            self._settings.catalogue, terms.bundle, bytes.fromhex(contract.provider.signing_key)
        )
        if bundle is None:
            raise FederationError(
                f"The sealed bundle of model {terms.name} ({terms.bundle[:16]}...) is not in the"
                f" catalogue of {self._settings.party}.",
                fix=(
                    "Its operator copies it there from the provider; it is encrypted, any way will"
                    " do."
                ),
            )
        return bundle

    @contextmanager
    def _private(self) -> Iterator[None]:
        """What is wrong with the records, or is left of their budget, is for this node's own
        people; the others learn that it cannot take part."""
        try:
            yield
        except DataError as error:
            self._settings.on_progress(str(error))
            raise FederationError(
                f"The records of {self._settings.party} do not fit this contract; its own log says"
                " where.",
                safe="Nothing was trained on them as they are now.",
            ) from None
        except BudgetExceeded as error:
            self._settings.on_progress(str(error))
            raise BudgetExceeded(
                f"The privacy budget of {self._settings.party} does not allow this job; its log"
                " says more.",
                safe=error.safe,
            ) from None


def feed(enclave: EnclaveHandle, bundle: SealedBundle, model: str) -> bytes:
    """Bring the sealed bytes of a model whose grant the enclave accepted; returns its receipt."""
    pieces: Iterator[tuple[bytes, bool]] = _with_last(bundle.payload(_PIECE))
    for data, last in pieces:
        sealed = enclave_pb2.Sealed(model=model, data=data, last=last)
        reply = enclave.call(enclave_pb2.Call(sealed=sealed))
    return bytes(reply.receipt.receipt)


def _open_records(
    enclave: EnclaveHandle, train: list[Record], test: list[Record]
) -> enclave_pb2.Unusable | None:
    """Open the customer's records to the enclave; returns those that its models fail on, for which
    it has kept none of them.

    Raises:
        DataError: the enclave cannot use one.
    """
    batches = [(enclave_pb2.Records.TRAIN, batch) for batch in _batches(train)]
    batches += [(enclave_pb2.Records.TEST, batch) for batch in _batches(test)]
    for index, (split, batch) in enumerate(batches):
        records = [
            enclave_pb2.Record(prompt=record.prompt, answer=record.answer) for record in batch
        ]
        call = enclave_pb2.Records(split=split, records=records, last=index == len(batches) - 1)
        reply = enclave.call(enclave_pb2.Call(records=call))
    return reply.unusable if reply.HasField("unusable") else None


def _with_last(pieces: Iterator[memoryview]) -> Iterator[tuple[bytes, bool]]:
    held: bytes | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = bytes(piece)
    yield held or b"", True


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    for start in range(0, len(records), _BATCH):
        yield records[start : start + _BATCH]
