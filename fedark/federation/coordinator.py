"""The aggregator's side of a job: seven stages over a link, with an enclave that it cannot look into.

    enrol     contract to all; signatures and nonces back
    attest    everyone's nonce to everyone's enclave; evidence back
    release   trainers' evidence to the provider; wrapped weight keys back
    load      keys to the customers; receipts and first (protected) measurements back
    round     1..R: encrypted global adapter out, protected update back, summed in the aggregator enclave
    evaluate  the final adapter out, protected measurements back
    deliver   adapter to whom the contract names, report to all

Under masks each round and evaluate are followed by two short stages with the committee, whose answers let the aggregator enclave
unmask the sum over the survivors and nothing else:

    endorse   where the contract or a small cohort asks for it: members sign one survivor set
    unmask    members' shares, encrypted to the aggregator enclave

This is untrusted code by design: it relays bytes that it cannot read or forge. It keeps the order, the deadlines and the report.
A customer that fails is passed over while the contract's minimum cohort allows; otherwise the job is aborted at every party.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from fedark import canonical
from fedark.contract import Contract
from fedark.errors import FedarkError, FederationError, ProtocolError, printable, restore
from fedark.federation.link import Handler, Link
from fedark.federation.node import VERSION, fault_of
from fedark.masking import UPDATE, bytes_per_value, masked_policy
from fedark.mechanism import guarantees
from fedark.v1 import enclave_pb2, node_pb2, stage_pb2

__all__ = ["DEFAULT_TIMEOUTS", "AggregatorClient", "Coordinator", "coordinate", "error_of"]

_MAX_METRICS = 8 << 20

DEFAULT_TIMEOUTS: Mapping[str, float] = {
    "enrol": 300,
    "attest": 180,
    "release": 180,
    "load": 1800,
    "round": 1800,
    "evaluate": 1800,
    "endorse": 180,
    "unmask": 180,
    "deliver": 180,
    "abort": 15,
}
"""Seconds that a stage may take until its last reply."""


def error_of(fault: stage_pb2.StageFault) -> FedarkError:
    """The error that a fault stands for."""
    return restore(fault.code, fault.what, safe=fault.safe, fix=fault.fix, reasons=fault.reasons)


class AggregatorClient:
    """The ServerApp's way to the aggregator's host.

    Args:
        handle: takes a serialised AggregatorRequest, gives a serialised AggregatorReply.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._run_id = ""

    def open(self) -> node_pb2.OpenedRun:
        """Start the aggregator enclave for the waiting job."""
        opened = self._send(node_pb2.AggregatorRequest(open=node_pb2.OpenRun())).opened
        self._run_id = opened.run_id
        return opened

    def call(self, call: enclave_pb2.Call) -> enclave_pb2.Reply:
        """One call of the aggregator enclave."""
        return self._send(node_pb2.AggregatorRequest(run_id=self._run_id, call=call)).reply

    def check_log(self, update: bytes) -> None:
        """Whether the provider's log holds what it must of the aggregator's enclave; raises where it does not."""
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, log=node_pb2.ShownLog(update=update)))

    def told(self, text: str) -> None:
        """A line for people."""
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, progress=node_pb2.Told(text=text)))

    def outcome(self, *, report: bytes = b"", failed: FedarkError | None = None) -> None:
        """How the job ended."""
        outcome = node_pb2.Outcome(report=report, failed=fault_of(failed) if failed else None)
        self._send(node_pb2.AggregatorRequest(run_id=self._run_id, outcome=outcome))

    def _send(self, request: node_pb2.AggregatorRequest) -> node_pb2.AggregatorReply:
        reply = node_pb2.AggregatorReply()
        try:
            reply.ParseFromString(self._handle(request.SerializeToString()))
        except DecodeError:
            raise ProtocolError("The aggregator's host gave a malformed answer.") from None
        if reply.HasField("fault"):
            raise error_of(reply.fault)
        return reply


@dataclass
class _Progress:
    """What the report will say."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, dict[str, list[float]]]] = field(default_factory=list)


class Coordinator:
    """One run of one job. `run` is all there is to call."""

    def __init__(self, link: Link, host: AggregatorClient) -> None:
        self._link = link
        self._host = host
        opened = host.open()
        self._contract = Contract.decode(opened.contract)
        self._digest = self._contract.digest()
        self._run_id = opened.run_id
        self._collateral = dict(opened.collateral)
        self._timeouts = {**DEFAULT_TIMEOUTS, **dict(opened.timeouts)}
        self._masked = self._contract.protection.mode == "masked"
        self._customers = [party.name for party in self._contract.customers]
        self._provider = self._contract.provider.name
        self._progress = _Progress()
        self._log_heads = {self._contract.aggregator.name: opened.log_head}
        self._log_views: dict[str, bytes] = {}
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run all stages; returns the report, which was also stored and sent to every party.

        Raises:
            FederationError: the job was aborted, with the reason; every party was told.
        """
        try:
            signatures, nonces = self._enrol()
            evidence, group_grants, announced = self._attest(signatures, nonces)
            grants = self._release(signatures, nonces, evidence)
            receipts = self._load(grants, group_grants, announced)
            state = self._close(0)
            for number in range(1, self._contract.rounds + 1):
                state = self._round(number, state)
            self._evaluate(state)
            return self._deliver(receipts)
        except FedarkError as error:
            self._abort(error)
            raise
        except Exception as error:
            # The text of a foreign exception may hold a party's bytes: only its type is told.
            broken = FederationError(f"The coordinator failed ({type(error).__name__}).", safe="The job was ended everywhere.")
            self._abort(broken)
            raise broken from None

    # -- stages -------------------------------------------------------------------------------------------------------

    def _enrol(self) -> tuple[dict[str, bytes], dict[str, Mapping[str, bytes]]]:
        self._host.told(f"enrol: waiting for {len(self._customers) + 1} nodes")
        request = self._request(enrol=stage_pb2.EnrolRequest(contract=self._contract.encode()))
        began = time.monotonic()
        expected = len(self._customers) + 1
        outcome = self._link.broadcast(request, expect=expected, stage="enrol", timeout=self._timeouts["enrol"])
        replies, failed = self._sort("enrol", outcome)
        for name in [name for name in replies if not self._nonces_complete(name, replies[name].enrol.nonces)]:
            failed[name] = ProtocolError(f"{name} gave no challenges, or malformed ones.")
            del replies[name]
        self._account("enrol", began, dict.fromkeys(outcome, request), outcome)
        missing = [name for name in (self._provider, *self._customers) if name not in replies]
        if missing:
            lines = [f"{name}: {failed[name].what if name in failed else 'did not answer'}" for name in missing]
            raise FederationError(
                "The job cannot begin, not every party signed its contract:\n" + "\n".join(f"  - {line}" for line in lines),
                safe="No weight and no record left anyone.",
                fix="Mend what the parties name, then submit the job again.",
            )
        names = (self._provider, *self._customers)
        return (
            {name: replies[name].enrol.signature for name in names},
            {name: dict(replies[name].enrol.nonces) for name in names},
        )

    def _attest(
        self, signatures: dict[str, bytes], nonces: dict[str, Mapping[str, bytes]]
    ) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, stage_pb2.PeerAnnouncement]]:
        requests = {}
        peers = {name: nonces[name].get("peers", b"") for name in self._customers} if self._masked else {}
        for name in self._customers:
            challenge = enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer=name))
            requests[name] = self._request(
                attest=stage_pb2.AttestRequest(
                    contract_signatures=signatures,
                    aggregator_evidence={purpose: self._evidence(nonces[name][purpose]) for purpose in ("node", "trainer")},
                    provider_nonce=nonces[self._provider].get(f"trainer:{name}", b""),
                    aggregator_nonce=self._host.call(challenge).nonce.nonce,
                    peer_nonces=peers,
                )
            )
        replies = self._exchange("attest", requests)
        group_grants: dict[str, bytes] = {}
        self._log_heads |= {name: reply.attest.log_head for name, reply in replies.items()}
        for name, reply in replies.items():
            admit = enclave_pb2.AdmitPeer(
                peer=name,
                evidence=reply.attest.aggregator_evidence,
                contract_signatures=signatures,
                collateral=self._collateral,
            )
            try:
                group_grants[name] = self._host.call(enclave_pb2.Call(admit_peer=admit)).admitted.group_grant
            except FedarkError as error:
                self._pass_over(name, "attest", error)
        self._enough()
        announced = {name: replies[name].attest.announced for name in group_grants}
        return {name: replies[name].attest.provider_evidence for name in group_grants}, group_grants, announced

    def _release(
        self, signatures: dict[str, bytes], nonces: dict[str, Mapping[str, bytes]], evidence: dict[str, bytes]
    ) -> dict[str, stage_pb2.Grants]:
        request = stage_pb2.ReleaseRequest(
            contract_signatures=signatures,
            trainer_evidence=evidence,
            aggregator_evidence=self._evidence(nonces[self._provider].get("node", b"")),
            log_heads=self._log_heads,
        )
        replies = self._exchange("release", {self._provider: self._request(release=request)})
        if self._provider not in replies:
            raise FederationError(f"The provider released no key: {self._progress.passed_over[self._provider]}")
        release = replies[self._provider].release
        self._host.check_log(release.log)
        for name, fault in release.refused.items():
            if name in self._customers:
                self._pass_over(name, "release", error_of(fault))
        self._enough()
        return {name: release.grants[name] for name in self._customers if name in release.grants}

    def _load(
        self,
        grants: dict[str, stage_pb2.Grants],
        group_grants: dict[str, bytes],
        announced: dict[str, stage_pb2.PeerAnnouncement],
    ) -> dict[str, stage_pb2.Receipts]:
        fellows = {name: announced[name] for name in grants} if self._masked else {}
        if self._masked:
            peers = {name: enclave_pb2.Announcement(hello=fellow.hello) for name, fellow in fellows.items()}
            self._host.call(enclave_pb2.Call(join=enclave_pb2.Join(peers=peers)))
        requests = {
            name: self._request(load=stage_pb2.LoadRequest(grants=grant, group_grant=group_grants[name], announced=fellows))
            for name, grant in grants.items()
        }
        replies = self._exchange("load", requests)
        self._log_views = {name: reply.load.log_view for name, reply in replies.items()}
        self._submit(0, {name: reply.load.protected_metrics for name, reply in replies.items()})
        return {name: stage_pb2.Receipts(by_model=reply.load.receipts) for name, reply in replies.items()}

    def _round(self, number: int, state: bytes) -> bytes:
        views = self._log_views if number == 1 else {}
        masked = self._open(number)
        request = self._request(round=stage_pb2.RoundRequest(round=number, state=state, log_views=views, masked=masked))
        replies = self._exchange("round", dict.fromkeys(self._customers, request), note=f"{number}/{self._contract.rounds}")
        self._submit(number, {name: reply.round.protected_update for name, reply in replies.items()})
        return self._close(number)

    def _evaluate(self, state: bytes) -> None:
        final = self._contract.rounds + 1
        request = self._request(evaluate=stage_pb2.EvaluateRequest(state=state, masked=self._open(final)))
        replies = self._exchange("evaluate", dict.fromkeys(self._customers, request))
        self._submit(final, {name: reply.evaluate.protected_metrics for name, reply in replies.items()})
        self._close(final)

    def _deliver(self, receipts: dict[str, stage_pb2.Receipts]) -> dict[str, Any]:
        report = self._report()
        encoded = json.dumps(report).encode()
        requests = {}
        for name in (self._provider, *self._customers):
            delivery = b""
            if name in self._contract.deliver_to:
                delivery = self._host.call(enclave_pb2.Call(deliver=enclave_pb2.Deliver(party=name))).delivery.sealed
            given = receipts if name == self._provider else {}
            requests[name] = self._request(deliver=stage_pb2.DeliverRequest(delivery=delivery, report=encoded, receipts=given))
        self._exchange("deliver", requests, minimum=0)
        report = self._report()
        self._host.outcome(report=json.dumps(report, indent=2).encode())
        return report

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _nonces_complete(self, name: str, nonces: Mapping[str, bytes]) -> bool:
        if name == self._provider:
            wanted = {"node", *(f"trainer:{party.name}" for party in self._contract.customers)}
        else:
            wanted = {"node", "trainer", "peers"} if self._masked else {"node", "trainer"}
        return set(nonces) == wanted and all(len(nonce) == 32 for nonce in nonces.values())

    def _evidence(self, nonce: bytes) -> bytes:
        return self._host.call(enclave_pb2.Call(attest=enclave_pb2.Attest(nonce=nonce))).evidence.evidence

    def _request(self, **body: Any) -> bytes:
        message = stage_pb2.StageRequest(version=VERSION, run_id=self._run_id, contract_digest=self._digest, **body)
        return bytes(message.SerializeToString())

    def _exchange(
        self, stage: str, requests: dict[str, bytes], *, note: str = "", minimum: int | None = None
    ) -> dict[str, stage_pb2.StageReply]:
        self._host.told(f"{stage} {note}".strip() + f": {len(requests)} {'party' if len(requests) == 1 else 'parties'}")
        began = time.monotonic()
        outcome = self._link.exchange(requests, stage=stage, timeout=self._timeouts[stage])
        replies, failed = self._sort(stage, outcome)
        self._account(f"{stage} {note}".strip(), began, requests, outcome)
        for name, error in failed.items():
            self._pass_over(name, stage, error)
        if minimum is None:
            self._enough()
        return replies

    def _sort(
        self, stage: str, outcome: Mapping[str, bytes | FedarkError]
    ) -> tuple[dict[str, stage_pb2.StageReply], dict[str, FedarkError]]:
        """Replies of the stage that was asked for, and errors, by party."""
        replies: dict[str, stage_pb2.StageReply] = {}
        failed: dict[str, FedarkError] = {}
        for name, answer in outcome.items():
            if not isinstance(answer, bytes):
                failed[name] = answer
                continue
            reply = stage_pb2.StageReply()
            try:
                reply.ParseFromString(answer)
            except DecodeError:
                failed[name] = ProtocolError(f"{name} gave a malformed answer.")
                continue
            if reply.HasField("fault"):
                failed[name] = error_of(reply.fault)
            elif (reply.version, reply.run_id, reply.party, reply.WhichOneof("body")) != (VERSION, self._run_id, name, stage):
                failed[name] = ProtocolError(f"{name} answered something else than stage {stage}.")
            else:
                replies[name] = reply
        return replies, failed

    def _submit(self, number: int, messages: Mapping[str, bytes]) -> None:
        for name, message in messages.items():
            call = enclave_pb2.Call(submit=enclave_pb2.Submit(round=number, party=name, protected=message))
            try:
                self._host.call(call)
            except FedarkError as error:
                self._pass_over(name, "sum", error)
        self._enough()

    def _open(self, number: int) -> bytes:
        """Under masks: begin the round at the aggregator enclave, for all who are left."""
        self._enough()
        if not self._masked:
            return b""
        call = enclave_pb2.OpenRound(round=number, parties=self._customers)
        return self._host.call(enclave_pb2.Call(open_round=call)).opened.masked

    def _unmask(self, number: int) -> None:
        """What the aggregator enclave needs of the committee before it can close the round. Who fails now still counts in it."""
        survivors = enclave_pb2.Call(survivors=enclave_pb2.Survivors(round=number))
        asked = self._host.call(survivors).asked
        if asked.endorse:
            self._committee(number, "endorse", asked.endorse)
            asked = self._host.call(survivors).asked
        self._committee(number, "unmask", asked.unmask)

    def _committee(self, number: int, stage: str, asked: Mapping[str, bytes]) -> None:
        requests = {}
        for name, request in asked.items():
            if name not in self._customers:
                continue
            if stage == "endorse":
                requests[name] = self._request(endorse=stage_pb2.EndorseRequest(round=number, request=request))
            else:
                requests[name] = self._request(unmask=stage_pb2.UnmaskRequest(round=number, request=request))
        replies = self._exchange(stage, requests, note=str(number), minimum=0)
        for name, reply in replies.items():
            answer = reply.endorse.protected_endorsement if stage == "endorse" else reply.unmask.protected_shares
            part = enclave_pb2.Submit.ENDORSEMENT if stage == "endorse" else enclave_pb2.Submit.SHARES
            call = enclave_pb2.Submit(round=number, party=name, protected=answer, part=part)
            try:
                self._host.call(enclave_pb2.Call(submit=call))
            except FedarkError as error:
                self._pass_over(name, stage, error)

    def _close(self, number: int) -> bytes:
        close = enclave_pb2.Call(close=enclave_pb2.Close(round=number))
        try:
            if self._masked and number > 0:  # loading brings nothing of a customer
                self._unmask(number)
            closed = self._host.call(close).closed
        except FederationError as error:
            what = "\n".join([error.what, *self._passed_over_lines()])
            raise FederationError(what, safe=error.safe, fix=error.fix) from None
        self._progress.metrics += canonical.decode(closed.metrics, max_bytes=_MAX_METRICS)
        return closed.state

    def _pass_over(self, name: str, stage: str, error: FedarkError) -> None:
        self._progress.passed_over[name] = f"{stage}: {error.what}"
        if name in self._customers:
            self._customers.remove(name)
        self._host.told(f"{name} is passed over in stage {stage}: {error.what}")

    def _passed_over_lines(self) -> list[str]:
        return [f"  - {name}, {why}" for name, why in self._progress.passed_over.items()]

    def _enough(self) -> None:
        minimum = self._contract.protection.minimum_cohort
        if len(self._customers) < minimum:
            head = f"{len(self._customers)} customers are left, the contract asks for {minimum}:"
            raise FederationError(
                "\n".join([head, *self._passed_over_lines()]),
                safe="The job was ended at every party; no adapter was delivered.",
                fix="Mend what the parties name, then submit the job again.",
            )

    def _account(
        self, stage: str, began: float, requests: Mapping[str, bytes], outcome: Mapping[str, bytes | FedarkError]
    ) -> None:
        sent = sum(map(len, requests.values()))
        received = sum(len(answer) for answer in outcome.values() if isinstance(answer, bytes))
        seconds = round(time.monotonic() - began, 2)
        self._progress.stages.append({"stage": stage, "seconds": seconds, "sent": sent, "received": received})

    def _report(self) -> dict[str, Any]:
        """Sums over the cohort only; a customer's own figures stay at its node."""
        models: dict[str, Any] = {}
        for terms in self._contract.models:
            measured: dict[str, Any] = {}
            losses: list[float] = []
            for entry in self._progress.metrics:
                for key, (correct, total, loss) in entry[terms.name].items():
                    if key == "train":
                        losses.append(loss / total if total else 0.0)
                    elif total:
                        measured[key] = {"correct": correct, "total": total, "accuracy": correct / total, "loss": loss / total}
            models[terms.name] = {
                "task": terms.task,
                "method": terms.adapter.method,
                "values": terms.travelling,
                "train_loss": losses,
                "metrics": measured,
            }
        return {
            "job": self._contract.job,
            "run_id": self._run_id,
            "contract": self._digest.hex(),
            "rounds": self._contract.rounds,
            "protection": self._protection(),
            "privacy": self._privacy(),
            "customers": list(self._customers),
            "passed_over": self._progress.passed_over,
            "seconds": round(time.monotonic() - self._began, 2),
            "stages": self._progress.stages,
            "models": models,
        }

    def _protection(self) -> dict[str, Any]:
        protection = self._contract.protection
        said: dict[str, Any] = {"mode": protection.mode, "minimum_cohort": protection.minimum_cohort}
        if self._masked:
            policy = masked_policy(self._contract, self._run_id)
            said |= {"bits": policy.by_name[UPDATE].bits, "bytes_per_value": round(bytes_per_value(policy), 2)}
        return said

    def _privacy(self) -> dict[str, Any]:
        terms = self._contract.privacy
        if terms.mechanism == "none":
            return {"mechanism": "none"}
        return {**terms.model_dump(), "guarantees": [guarantee.to_dict() for guarantee in guarantees(self._contract)]}

    def _abort(self, error: FedarkError) -> None:
        self._host.told(f"aborting: {error.what}")
        request = self._request(abort=stage_pb2.AbortRequest(reason=printable(error.what)))
        names: Iterable[str] = (self._provider, *(party.name for party in self._contract.customers))
        try:
            self._link.exchange(dict.fromkeys(names, request), stage="abort", timeout=self._timeouts["abort"])
        finally:
            self._host.outcome(failed=error)


def coordinate(link: Link, handle: Callable[[bytes], bytes]) -> dict[str, Any]:
    """Run the waiting job of the aggregator's host over `link`; returns its report.

    Raises:
        FedarkError: the job ended without a report; parties and host were told.
    """
    return Coordinator(link, AggregatorClient(handle)).run()
