"""The aggregator's side of a job: seven stages over a link, with an enclave that it cannot look
into.

    enrol     contract to all; signatures and nonces back
    attest    everyone's nonce to everyone's enclave; evidence back
    release   trainers' evidence to the provider; wrapped weight keys back
    load      keys to the customers; receipts and first (protected) measurements back
    round     1..R: encrypted global adapter out, protected update back, summed in the aggregator enclave
    evaluate  the final adapter out, protected measurements back
    deliver   adapter to whom the contract names, report to all

Under masks each round and evaluate are followed by two short stages with the committee, whose
answers let the aggregator enclave unmask the sum over the survivors and nothing else:

    endorse   where the contract or a small cohort asks for it: members sign one survivor set
    unmask    members' shares, encrypted to the aggregator enclave

This is untrusted code by design: it relays bytes that it cannot read or forge. It keeps the order,
the deadlines and the report. A customer that fails is passed over while the contract's minimum
cohort allows; otherwise the job is aborted at every party. One that was only not reached may return
with the next round.

It may be killed at any moment. Before each phase the host keeps where it is
(`fedark.stages.progress`); the next coordinator begins that phase again, with the same bytes, and
everybody whom it asks again answers as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from fedark.contract.contract import Contract
from fedark.foundation import canonical
from fedark.foundation.errors import (
    EnclaveFailed,
    FedarkError,
    FederationError,
    ProtocolError,
    Refused,
    StorageError,
    printable,
)
from fedark.links.faults import error_of
from fedark.links.hostlink import AggregatorClient
from fedark.links.link import Link, Superseded, Unavailable
from fedark.stages.node import VERSION
from fedark.stages.progress import Progress, report_of
from fedark.v1 import enclave_pb2, stage_pb2

__all__ = ["DEFAULT_TIMEOUTS", "Coordinator", "coordinate"]

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
_TRAINING = ("round", "evaluate", "endorse", "unmask")
"""Stages that a customer may miss and yet return."""


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
        self._provider = self._contract.provider.name
        self._aggregator_head = opened.log_head
        self._finished = opened.finished
        self._resumed = bool(opened.kept)
        everyone = [party.name for party in self._contract.customers]
        self._at = Progress.decode(opened.kept) if opened.kept else Progress(customers=everyone)
        self._refusal = b""
        self._opened_for: list[str] = []
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run all stages that are left; returns the report, which was also stored and sent to every
        party. {} if the run is over.

        Raises:
            FederationError: the job was aborted, with the reason; every party was told.
        """
        if self._finished:
            return {}
        try:
            if self._resumed:
                self._host.told(
                    f"going on with phase {self._at.phase} {self._at.number or ''}".rstrip()
                )
            while self._at.phase != "deliver":
                {
                    "enrol": self._enrol,
                    "attest": self._attest,
                    "release": self._release,
                    "load": self._load,
                    "round": self._round,
                    "evaluate": self._evaluate,
                }[self._at.phase]()
            return self._deliver()
        except FedarkError as error:
            self._abort(error)
            raise
        except Superseded:
            raise
        except Exception as error:
            # The text of a foreign exception may hold a party's bytes: only its type is told.
            broken = FederationError(
                f"The coordinator failed ({type(error).__name__}).",
                safe="The job was ended everywhere.",
            )
            self._abort(broken)
            raise broken from None

    # -- stages
    # -------------------------------------------------------------------------------------------------------

    def _enrol(self) -> None:
        everyone = [party.name for party in self._contract.customers]
        self._host.told(f"enrol: waiting for {len(everyone) + 1} nodes")
        request = self._request(enrol=stage_pb2.EnrolRequest(contract=self._contract.encode()))
        began = time.monotonic()
        outcome = self._link.broadcast(
            request, expect=len(everyone) + 1, stage="enrol", timeout=self._timeouts["enrol"]
        )
        replies, failed = self._sort("enrol", outcome)
        for name in [
            name for name in replies if not self._nonces_complete(name, replies[name].enrol.nonces)
        ]:
            failed[name] = ProtocolError(f"{name} gave no challenges, or malformed ones.")
            del replies[name]
        self._account("enrol", began, dict.fromkeys(outcome, request), outcome)
        names = (self._provider, *everyone)
        missing = [name for name in names if name not in replies]
        if missing:
            lines = [
                f"{name}: {failed[name].what if name in failed else 'did not answer'}"
                for name in missing
            ]
            raise FederationError(
                "The job cannot begin, not every party signed its contract:\n"
                + "\n".join(f"  - {line}" for line in lines),
                safe="No weight and no record left anyone.",
                fix="Mend what the parties name, then submit the job again.",
            )
        signatures = {name: replies[name].enrol.signature for name in names}
        self._next(
            "attest",
            signatures=signatures,
            nonces={name: dict(replies[name].enrol.nonces) for name in names},
        )

    def _attest(self) -> None:
        signatures, nonces = self._at.inputs["signatures"], self._at.inputs["nonces"]
        replies = self._exchange(
            "attest", self._once(lambda: self._attest_requests(signatures, nonces))
        )
        group_grants: dict[str, bytes] = {}
        for name, reply in replies.items():
            admit = enclave_pb2.AdmitPeer(
                peer=name,
                evidence=reply.attest.aggregator_evidence,
                contract_signatures=signatures,
                collateral=self._collateral,
            )
            admitted = self._on_behalf(name, "attest", enclave_pb2.Call(admit_peer=admit))
            if admitted is not None:
                group_grants[name] = admitted.admitted.group_grant
        self._enough()
        self._next(
            "release",
            signatures=signatures,
            nonce=nonces[self._provider].get("node", b""),
            evidence={name: replies[name].attest.provider_evidence for name in group_grants},
            log_heads={name: reply.attest.log_head for name, reply in replies.items()},
            group_grants=group_grants,
            announced={
                name: replies[name].attest.announced.SerializeToString() for name in group_grants
            },
        )

    def _attest_requests(
        self, signatures: dict[str, bytes], nonces: dict[str, Mapping[str, bytes]]
    ) -> dict[str, bytes]:
        requests = {}
        peers = (
            {name: nonces[name].get("peers", b"") for name in self._customers}
            if self._masked
            else {}
        )
        for name in self._customers:
            challenge = enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer=name))
            requests[name] = self._request(
                attest=stage_pb2.AttestRequest(
                    contract_signatures=signatures,
                    aggregator_evidence={
                        purpose: self._evidence(nonces[name][purpose])
                        for purpose in ("node", "trainer")
                    },
                    provider_nonce=nonces[self._provider].get(f"trainer:{name}", b""),
                    aggregator_nonce=self._host.call(challenge).nonce.nonce,
                    peer_nonces=peers,
                )
            )
        return requests

    def _release(self) -> None:
        inputs = self._at.inputs

        def request() -> dict[str, bytes]:
            release = stage_pb2.ReleaseRequest(
                contract_signatures=inputs["signatures"],
                trainer_evidence=inputs["evidence"],
                aggregator_evidence=self._evidence(inputs["nonce"]),
                log_heads={
                    self._contract.aggregator.name: self._aggregator_head,
                    **inputs["log_heads"],
                },
            )
            return {self._provider: self._request(release=release)}

        replies = self._exchange("release", self._once(request))
        if self._provider not in replies:
            if self._refusal:
                self._host.check_log(self._refusal, refused=True)
            raise FederationError(
                f"The provider released no key: {self._at.passed_over[self._provider]}"
            )
        release = replies[self._provider].release
        self._host.check_log(release.log)
        for name, fault in release.refused.items():
            if name in self._customers:
                self._pass_over(name, "release", error_of(fault))
                told = stage_pb2.AbortRequest(reason=printable(fault.what), refused=fault)
                self._link.exchange(
                    {name: self._request(abort=told)},
                    stage="abort",
                    timeout=self._timeouts["abort"],
                )
        self._enough()
        grants = {name: release.grants[name] for name in self._customers if name in release.grants}
        self._next(
            "load",
            grants={
                name: grant.SerializeToString(deterministic=True) for name, grant in grants.items()
            },
            group_grants=inputs["group_grants"],
            announced=inputs["announced"],
        )

    def _load(self) -> None:
        inputs = self._at.inputs
        grants = {
            name: stage_pb2.Grants.FromString(data) for name, data in inputs["grants"].items()
        }
        announced = {
            name: stage_pb2.PeerAnnouncement.FromString(inputs["announced"][name])
            for name in grants
        }
        fellows = announced if self._masked else {}
        closed = self._already_closed(0)
        if self._masked and closed is None:
            peers = {
                name: enclave_pb2.Announcement(hello=fellow.hello)
                for name, fellow in fellows.items()
            }
            self._host.call(enclave_pb2.Call(join=enclave_pb2.Join(peers=peers)))
        group_grants = inputs["group_grants"]
        requests = {
            name: self._request(
                load=stage_pb2.LoadRequest(
                    grants=grant, group_grant=group_grants[name], announced=fellows
                )
            )
            for name, grant in grants.items()
        }
        replies = self._exchange("load", requests)
        self._at.log_views = {name: reply.load.log_view for name, reply in replies.items()}
        self._at.receipts = {
            name: (
                stage_pb2.Receipts(
                    by_model=reply.load.receipts, ledger_head=reply.load.ledger_head
                ).SerializeToString(deterministic=True)
            )
            for name, reply in replies.items()
        }
        if closed is None:
            self._submit(0, {name: reply.load.protected_metrics for name, reply in replies.items()})
            closed = self._close(0)
        self._measured(closed)
        self._next("round", number=1, state=closed.state)

    def _round(self) -> None:
        number = self._at.number
        closed = self._already_closed(number)
        if closed is None:
            self._welcome_back()
            views = self._at.log_views if not self._at.inputs.get("agreed") else {}
            masked = self._open(number, self._customers)
            request = self._request(
                round=stage_pb2.RoundRequest(
                    round=number, state=self._at.inputs["state"], log_views=views, masked=masked
                )
            )
            replies = self._exchange(
                "round",
                dict.fromkeys(self._customers, request),
                note=f"{number}/{self._contract.rounds}",
            )
            self._submit(
                number, {name: reply.round.protected_update for name, reply in replies.items()}
            )
            closed = self._close(number)
        self._measured(closed)
        last = number == self._contract.rounds
        # A customer who missed the first round has not compared its view of the provider's log yet.
        agreed = not self._at.missed
        self._next(
            "evaluate" if last else "round",
            number=0 if last else number + 1,
            state=closed.state,
            agreed=agreed,
        )

    def _evaluate(self) -> None:
        final = self._contract.rounds + 1
        closed = self._already_closed(final)
        # Figures of all rounds travel together under masks: who missed one has none of it.
        present = [
            name for name in self._customers if not (self._masked and name in self._at.missed)
        ]
        if closed is None and len(present) < self._contract.protection.minimum_cohort:
            self._host.told(
                "too few customers were there in every round: the adapter is delivered without"
                " figures"
            )
        elif closed is None:
            request = self._request(
                evaluate=stage_pb2.EvaluateRequest(
                    state=self._at.inputs["state"], masked=self._open(final, present)
                )
            )
            replies = self._exchange("evaluate", dict.fromkeys(present, request))
            self._submit(
                final, {name: reply.evaluate.protected_metrics for name, reply in replies.items()}
            )
            closed = self._close(final)
        if closed is not None:
            self._measured(closed)
        self._next("deliver")

    def _deliver(self) -> dict[str, Any]:
        signed = self._host.sign(json.dumps(self._report()).encode())
        receipts = {
            name: stage_pb2.Receipts.FromString(data) for name, data in self._at.receipts.items()
        }
        requests = {}
        for name in (self._provider, *self._customers, *self._at.absent):
            delivery = b""
            if name in self._contract.deliver_to:
                delivery = self._host.call(
                    enclave_pb2.Call(deliver=enclave_pb2.Deliver(party=name))
                ).delivery.sealed
            given = receipts if name == self._provider else {}
            requests[name] = self._request(
                deliver=stage_pb2.DeliverRequest(delivery=delivery, receipts=given, **signed)
            )
        self._exchange("deliver", requests, minimum=0)
        report = self._report()
        self._host.outcome(report=json.dumps(report, indent=2).encode())
        return report

    # -- helpers
    # ------------------------------------------------------------------------------------------------------

    @property
    def _customers(self) -> list[str]:
        return self._at.customers

    def _next(self, phase: str, *, number: int = 0, **inputs: Any) -> None:
        """Enter a phase, once the host has kept that."""
        self._at.phase, self._at.number, self._at.inputs, self._at.requests = (
            phase,
            number,
            inputs,
            {},
        )
        self._save()

    def _once(self, make: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
        """This phase's requests, made once: whoever begins the phase again sends the same."""
        if not self._at.requests:
            self._at.requests = make()
            self._save()
        return {
            name: request
            for name, request in self._at.requests.items()
            if name in (self._provider, *self._customers)
        }

    def _save(self) -> None:
        now = time.monotonic()
        self._at.seconds, self._began = self._at.seconds + now - self._began, now
        self._host.keep(self._at.encode())

    def _already_closed(self, number: int) -> enclave_pb2.Closed | None:
        """What a coordinator before this one got for the end of the round, if it came that far."""
        if not self._resumed:
            return None
        self._resumed = False  # from here on this coordinator knows itself what it did
        reply = self._host.done(enclave_pb2.Call(close=enclave_pb2.Close(round=number)))
        return reply.closed if reply is not None else None

    def _welcome_back(self) -> None:
        """Customers who were not reached before, and are there now, take part again."""
        back = [name for name in self._at.absent if name in self._link.present()]
        for name in back:
            self._host.told(f"{name} is back")
            self._at.absent.remove(name)
            del self._at.passed_over[name]
        order = [party.name for party in self._contract.customers]
        self._at.customers = sorted({*self._customers, *back}, key=order.index)

    def _nonces_complete(self, name: str, nonces: Mapping[str, bytes]) -> bool:
        if name == self._provider:
            wanted = {"node", *(f"trainer:{party.name}" for party in self._contract.customers)}
        else:
            wanted = {"node", "trainer", "peers"} if self._masked else {"node", "trainer"}
        return set(nonces) == wanted and all(len(nonce) == 32 for nonce in nonces.values())

    def _evidence(self, nonce: bytes) -> bytes:
        return self._host.call(
            enclave_pb2.Call(attest=enclave_pb2.Attest(nonce=nonce))
        ).evidence.evidence

    def _request(self, **body: Any) -> bytes:
        message = stage_pb2.StageRequest(
            version=VERSION, run_id=self._run_id, contract_digest=self._digest, **body
        )
        # Deterministic: whoever makes the same request again makes the same bytes.
        return bytes(message.SerializeToString(deterministic=True))

    def _exchange(
        self, stage: str, requests: dict[str, bytes], *, note: str = "", minimum: int | None = None
    ) -> dict[str, stage_pb2.StageReply]:
        self._host.told(
            f"{stage} {note}".strip()
            + f": {len(requests)} {'party' if len(requests) == 1 else 'parties'}"
        )
        began = time.monotonic()
        outcome = self._link.exchange(requests, stage=stage, timeout=self._timeouts[stage])
        replies, failed = self._sort(stage, outcome)
        self._account(f"{stage} {note}".strip(), began, requests, outcome)
        for name, error in failed.items():
            self._pass_over(name, stage, error)
            if name == self._provider and isinstance(error, Refused):
                self._refusal = error.proof
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
            elif (reply.version, reply.run_id, reply.party, reply.WhichOneof("body")) != (
                VERSION,
                self._run_id,
                name,
                stage,
            ):
                failed[name] = ProtocolError(f"{name} answered something else than stage {stage}.")
            else:
                replies[name] = reply
        return replies, failed

    def _on_behalf(self, name: str, stage: str, call: enclave_pb2.Call) -> enclave_pb2.Reply | None:
        """The aggregator enclave's answer to what a customer sent. A refusal costs the customer its
        place; what its host or the enclave itself suffers does not, and ends the job."""
        try:
            return self._host.call(call)
        except (EnclaveFailed, StorageError):
            raise
        except FedarkError as error:
            self._pass_over(name, stage, error)
            return None

    def _submit(self, number: int, messages: Mapping[str, bytes]) -> None:
        for name, message in messages.items():
            call = enclave_pb2.Call(
                submit=enclave_pb2.Submit(round=number, party=name, protected=message)
            )
            self._on_behalf(name, "sum", call)
        self._enough()

    def _open(self, number: int, parties: list[str]) -> bytes:
        """Under masks: begin the round at the aggregator enclave, for `parties`."""
        self._enough()
        self._opened_for = parties
        if not self._masked:
            return b""
        call = enclave_pb2.OpenRound(round=number, parties=parties)
        return self._host.call(enclave_pb2.Call(open_round=call)).opened.masked

    def _unmask(self, number: int) -> None:
        """What the aggregator enclave needs of the committee before it can close the round. Who
        fails now still counts in it.
        """
        survivors = enclave_pb2.Call(survivors=enclave_pb2.Survivors(round=number))
        asked = self._host.call(survivors).asked
        if asked.endorse:
            self._committee(number, "endorse", asked.endorse)
            survivors.survivors.endorsed = True
            asked = self._host.call(survivors).asked
        self._committee(number, "unmask", asked.unmask)

    def _committee(self, number: int, stage: str, asked: Mapping[str, bytes]) -> None:
        requests = {}
        for name, request in asked.items():
            if name not in self._customers or name not in self._opened_for:
                continue  # a member that did not begin this round could only refuse
            if stage == "endorse":
                requests[name] = self._request(
                    endorse=stage_pb2.EndorseRequest(round=number, request=request)
                )
            else:
                requests[name] = self._request(
                    unmask=stage_pb2.UnmaskRequest(round=number, request=request)
                )
        replies = self._exchange(stage, requests, note=str(number), minimum=0)
        for name, reply in replies.items():
            answer = (
                reply.endorse.protected_endorsement
                if stage == "endorse"
                else reply.unmask.protected_shares
            )
            part = (
                enclave_pb2.Submit.ENDORSEMENT if stage == "endorse" else enclave_pb2.Submit.SHARES
            )
            call = enclave_pb2.Submit(round=number, party=name, protected=answer, part=part)
            self._on_behalf(name, stage, enclave_pb2.Call(submit=call))

    def _close(self, number: int) -> enclave_pb2.Closed:
        close = enclave_pb2.Call(close=enclave_pb2.Close(round=number))
        try:
            if self._masked and number > 0:  # loading brings nothing of a customer
                self._unmask(number)
            return self._host.call(close).closed
        except FederationError as error:
            what = "\n".join([error.what, *self._passed_over_lines()])
            raise FederationError(what, safe=error.safe, fix=error.fix) from None

    def _measured(self, closed: enclave_pb2.Closed) -> None:
        self._at.metrics += canonical.decode(closed.metrics, max_bytes=_MAX_METRICS)

    def _pass_over(self, name: str, stage: str, error: FedarkError) -> None:
        self._at.passed_over[name] = f"{stage}: {error.what}"
        if name in self._customers:
            self._customers.remove(name)
            if stage in _TRAINING and isinstance(error, Unavailable | EnclaveFailed):
                self._at.absent.append(name)
                self._at.missed.append(name)
        self._host.told(f"{name} is passed over in stage {stage}: {error.what}")

    def _passed_over_lines(self) -> list[str]:
        return [f"  - {name}, {why}" for name, why in self._at.passed_over.items()]

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
        self,
        stage: str,
        began: float,
        requests: Mapping[str, bytes],
        outcome: Mapping[str, bytes | FedarkError],
    ) -> None:
        sent = sum(map(len, requests.values()))
        received = sum(len(answer) for answer in outcome.values() if isinstance(answer, bytes))
        seconds = round(time.monotonic() - began, 2)
        entry = {"stage": stage, "seconds": seconds, "sent": sent, "received": received}
        self._at.stages.append(entry)
        self._host.ended(entry)

    def _report(self) -> dict[str, Any]:
        return report_of(self._contract, self._run_id, self._at, time.monotonic() - self._began)

    def _abort(self, error: FedarkError) -> None:
        self._host.told(f"aborting: {error.what}")
        request = self._request(abort=stage_pb2.AbortRequest(reason=printable(error.what)))
        names: Iterable[str] = (self._provider, *(party.name for party in self._contract.customers))
        try:
            self._link.exchange(
                dict.fromkeys(names, request), stage="abort", timeout=self._timeouts["abort"]
            )
        finally:
            self._host.outcome(failed=error)


def coordinate(link: Link, handle: Callable[[bytes], bytes]) -> dict[str, Any]:
    """Run the waiting job of the aggregator's host over `link`; returns its report.

    Raises:
        FedarkError: the job ended without a report; parties and host were told.
    """
    return Coordinator(link, AggregatorClient(handle)).run()
