"""The aggregator's host: it starts the aggregator enclave, keeps the jobs, and answers the
ServerApp beside it.

The ServerApp process may come and go; this one holds the enclave and therefore the run. It can read
nothing of what it relays. It may be killed too. What lasts is in its folder, and the next one goes
on from there:

    run                     which run is under way, of which contract
    runs/ID/enclave/        the enclave (`fedark.enclave.durable`)
    runs/ID/coordinator     where the coordinator is (`fedark.stages.parties`)
    runs/ID/stages.jsonl    the stages that ended: for the host's metrics, which may lose one
    runs/ID/evidence        digests of all evidence that the enclave gave
    runs/ID/dossier.fedark  what proves the run to anybody (`fedark.stages.dossier`)
    runs/ID/report.json or failed.json    the outcome: the run is over
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract
from fedark.enclave.durable import DurableEnclave
from fedark.enclave.session import RunConfig
from fedark.enclave.usage import peak_mib
from fedark.enclave.vouching import vouch
from fedark.foundation.errors import FedarkError, LogRefused, ProtocolError, StorageError
from fedark.foundation.files import disk_errors, write_atomic
from fedark.foundation.keys import SigningKey
from fedark.foundation.logs import explain, of_run, working_on
from fedark.links.faults import fault_of
from fedark.stages.dossier import DOSSIER, sign_dossier
from fedark.stages.node import SEEN_LOGS
from fedark.stages.report import sign_report
from fedark.stages.runs import MEMORY
from fedark.stages.settings import EnclaveFactory
from fedark.translog.memory import HeadMemory
from fedark.v1 import node_pb2, stage_pb2

__all__ = ["STAGES", "AggregatorHost", "run_of"]

_log = logging.getLogger(__name__)

STAGES = "stages.jsonl"

_RUN, _ENCLAVE, _COORDINATOR, _EVIDENCE = "run", "enclave", "coordinator", "evidence"
_REPORT, _FAILED = "report.json", "failed.json"
_VERSION = "1"


def run_of(folder: Path, digest: str) -> str:
    """The id of the run of a contract that the aggregator with this folder is at, or ""."""
    with suppress(OSError, ValueError):
        _, run_id, contract = (folder / _RUN).read_text(encoding="ascii").split()
        return run_id if contract == digest else ""
    return ""


class AggregatorHost:
    """Holds one job, its run and its enclave.

    Args:
        contract: of the job to run.
        state: folder for the report.
        collateral: for the evidence of trainers.
        signing: the aggregator's own key: signs the report.
        start_enclave: starts the aggregator enclave.
        timeouts: stage -> seconds, where the default is not meant.
    """

    role = "aggregator"

    def __init__(
        self,
        contract: Contract,
        state: Path,
        collateral: Mapping[str, bytes],
        signing: SigningKey,
        start_enclave: EnclaveFactory,
        timeouts: Mapping[str, float] | None = None,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.party = contract.aggregator.name
        self.contract = contract
        self.report: bytes | None = None
        self.failed: stage_pb2.StageFault | None = None
        self._state = state
        self._collateral = dict(collateral)
        self._signing = signing
        self._start_enclave = start_enclave
        self._timeouts = dict(timeouts or {})
        self._on_progress = on_progress
        self._enclave: DurableEnclave | None = None
        self._starting = threading.Lock()
        with disk_errors(state):
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.run_id = self._under_way() or secrets.token_hex(16)
        self._heads = HeadMemory(state / SEEN_LOGS)

    def handle(self, request: bytes) -> bytes:
        """Answer one serialised AggregatorRequest with one serialised AggregatorReply."""
        with working_on(**of_run(self.contract.digest(), self.run_id)):
            return self._answer(request)

    def _answer(self, request: bytes) -> bytes:
        try:
            message = node_pb2.AggregatorRequest()
            try:
                message.ParseFromString(request)
            except DecodeError:
                raise ProtocolError("A request to the aggregator's host is malformed.") from None
            reply = self._dispatch(message)
        except FedarkError as error:
            _log.error("refused: %s", error.what)
            reply = node_pb2.AggregatorReply(fault=fault_of(error))
        except Exception as error:
            _log.error("a request failed: %s", explain(error))
            what = f"The aggregator's host failed ({type(error).__name__})."
            reply = node_pb2.AggregatorReply(
                fault=stage_pb2.StageFault(code="FederationError", what=what)
            )
        return bytes(reply.SerializeToString())

    def wake(self) -> None:
        """After a restart: have the enclave of the run that is under way ready for the next
        request.
        """
        if self._under_way() and not self._over():
            self._started(self.run_id).wake()

    def close(self) -> None:
        """End the enclave; the run can be gone on with."""
        if self._enclave is not None:
            self._enclave.close()
            self._enclave = None

    @property
    def _folder(self) -> Path:
        return self._state / "runs" / self.run_id

    def _under_way(self) -> str:
        """The run of this contract that was begun and has no outcome yet, or has one that its
        coordinator was not told of; or "".
        """
        path = self._state / _RUN
        if not path.exists():
            return ""
        try:
            version, run_id, digest = path.read_text(encoding="ascii").split()
        except (OSError, ValueError):
            raise StorageError(
                f"{path} is damaged.",
                safe="No run was gone on with.",
                fix="Remove it to begin the job anew, under a new contract.",
            ) from None
        if version != _VERSION:
            raise StorageError(
                f"{path} is of version {version}, this release writes {_VERSION}.",
                safe="No run was gone on with.",
                fix="End the run with the release that it began with.",
            )
        return run_id if digest == self.contract.digest().hex() else ""

    def _over(self) -> bool:
        return any((self._folder / name).exists() for name in (_REPORT, _FAILED))

    def _dispatch(self, message: node_pb2.AggregatorRequest) -> node_pb2.AggregatorReply:
        match message.WhichOneof("body"):
            case "open":
                return node_pb2.AggregatorReply(opened=self._open())
            case "call":
                enclave = self._started(message.run_id)
                if message.only_if_done:
                    done = enclave.done(message.call)
                    if done is None:
                        return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
                    return node_pb2.AggregatorReply(reply=done)
                reply = enclave.call(message.call)
                if reply.HasField("evidence"):
                    self._note_evidence(reply.evidence.evidence)
                return node_pb2.AggregatorReply(reply=reply)
            case "keep":
                self._started(message.run_id)
                write_atomic(self._folder / _COORDINATOR, message.keep.state, mode=0o600)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
            case "log":
                self._check_log(
                    message.log.update, "refusal" if message.log.refused else "attestation"
                )
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
            case "sign":
                return node_pb2.AggregatorReply(signed=self._sign(message))
            case "outcome":
                self._outcome(message.outcome)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
            case "progress":
                if message.progress.HasField("ended"):
                    self._note_stage(message.progress.ended)
                else:
                    self._on_progress(message.progress.text)
                return node_pb2.AggregatorReply(stored=node_pb2.OutcomeStored())
        raise ProtocolError("A request to the aggregator's host is empty.")

    def _open(self) -> node_pb2.OpenedRun:
        finished = bool(self._under_way()) and self._over()
        if not finished:
            if not self._under_way():
                line = f"{_VERSION} {self.run_id} {self.contract.digest().hex()}"
                write_atomic(self._state / _RUN, line.encode(), mode=0o600)
            self._started(self.run_id).wake()
        kept = self._folder / _COORDINATOR
        if not finished and not kept.exists():
            vouch(self._started(self.run_id).call, self._config(), self._signing)
        provider = self.contract.provider
        seen = self._heads.last(bytes.fromhex(provider.signing_key), by=provider.name)
        return node_pb2.OpenedRun(
            run_id=self.run_id,
            contract=self.contract.encode(),
            collateral=self._collateral,
            timeouts=self._timeouts,
            log_head=seen.encoded if seen is not None else b"",
            kept=kept.read_bytes() if kept.exists() and not finished else b"",
            finished=finished,
        )

    def _sign(self, message: node_pb2.AggregatorRequest) -> node_pb2.SignedReport:
        self._started(message.run_id)
        key, asked, contract = self._signing, message.sign, self.contract
        if asked.dossier:
            dossier = sign_dossier(key, asked.dossier, contract.encode(), self.run_id)
            return node_pb2.SignedReport(dossier=dossier)
        signature = sign_report(key, asked.report, contract.digest(), self.run_id)
        return node_pb2.SignedReport(signature=signature)

    def _note_stage(self, ended: node_pb2.StageEnd) -> None:
        entry = {
            "stage": ended.stage,
            "seconds": ended.seconds,
            "sent": ended.sent,
            "received": ended.received,
        }
        with suppress(OSError), (self._folder / STAGES).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _note_evidence(self, evidence: bytes) -> None:
        path = self._folder / _EVIDENCE
        known = path.read_bytes() if path.exists() else b""
        write_atomic(path, known + hashlib.sha384(evidence).digest(), mode=0o600)

    def _check_log(self, update: bytes, kind: str) -> None:
        """The provider's log holds that it admitted, or refused, this enclave, and goes on from
        what was seen before.
        """
        provider = self.contract.provider
        witnessed = self._heads.take(
            update,
            bytes.fromhex(provider.signing_key),
            by=provider.name,
            party=self.party,
            run_id=self.run_id,
        )
        index, entry = witnessed.find(
            kind, party=self.party, run_id=self.run_id, contract=self.contract.digest()
        )
        path = self._folder / _EVIDENCE
        given = path.read_bytes() if path.exists() else b""
        if entry.facts["evidence"] not in [given[at : at + 48] for at in range(0, len(given), 48)]:
            raise LogRefused(
                f"The log of {provider.name} names evidence that the aggregator enclave never gave."
            )
        if kind == "refusal":
            self._on_progress(
                f"{provider.name} refused the aggregator enclave; entry {index} of its log says so"
            )

    def _started(self, run_id: str) -> DurableEnclave:
        if run_id != self.run_id or not self._under_way() or self._over():
            raise ProtocolError("No such run is open.", safe="The aggregator enclave did nothing.")
        with self._starting:
            return self._enclave_of_run()

    def _enclave_of_run(self) -> DurableEnclave:
        if self._enclave is None:
            config = self._config().encode()
            self._enclave = DurableEnclave(
                lambda checkpoint: self._start_enclave("aggregator", config, checkpoint),
                self._folder / _ENCLAVE,
                journal=frozenset({"submit"}),
                ends="close",
                say=self._on_progress,
            )
        return self._enclave

    def _config(self) -> RunConfig:
        return RunConfig(
            role="aggregator", party=self.party, contract=self.contract, run_id=self.run_id
        )

    def _outcome(self, outcome: node_pb2.Outcome) -> None:
        folder = self._folder
        if outcome.HasField("failed"):
            self.failed = outcome.failed
            failed = outcome.failed
            text = {
                "code": failed.code,
                "what": failed.what,
                "safe": failed.safe,
                "fix": failed.fix,
            }
            text["contract"] = self.contract.digest().hex()
            write_atomic(folder / _FAILED, json.dumps(text, indent=2).encode())
        else:
            self.report = outcome.report
            write_atomic(folder / DOSSIER, outcome.dossier)
            write_atomic(folder / _REPORT, outcome.report)
        if self._enclave is not None:
            memory = {"host": round(peak_mib(), 1), "enclave": round(self._enclave.peak_mib(), 1)}
            write_atomic(folder / MEMORY, json.dumps({"peak_mib": memory}).encode())
            self._enclave.discard()
            self._enclave = None
        (folder / _COORDINATOR).unlink(missing_ok=True)
