"""The aggregator's side of a job: seven stages over a link, with an enclave that it cannot look
into.

    enrol     contract to all; signatures and nonces back
    attest    everyone's nonce to everyone's enclave; evidence back
    release   trainers' evidence to the provider; wrapped weight keys back
    load      keys to the customers; receipts and first (protected) measurements back
    round     1..R: encrypted global adapter out, protected update back, summed in the enclave; the
              first may be the taster's, in which moments come back (`fedark.enclave.taste`)
    measure   between two rounds, where the contract asks for it: the new global adapter's figures
              on the acceptance set, after which the aggregator enclave goes on or ends the rounds
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
(`fedark.stages.parties`); the next coordinator begins that phase again, with the same bytes, and
everybody whom it asks again answers as before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedark.attestation.trust import unread
from fedark.contract.contract import Contract
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, FederationError, ProtocolError, printable
from fedark.foundation.logs import of_run, working_on
from fedark.links.faults import error_of
from fedark.links.hostlink import AggregatorClient
from fedark.links.link import Link, Superseded
from fedark.stages.dossier import Dossier, Proofs
from fedark.stages.parties import CoordinatorState, Parties
from fedark.stages.report import curve_lines, curve_of, make_report
from fedark.stages.sums import Sums
from fedark.v1 import enclave_pb2, stage_pb2

__all__ = ["DEFAULT_TIMEOUTS", "Coordinator", "coordinate"]

_MAX_METRICS = 8 << 20

DEFAULT_TIMEOUTS: Mapping[str, float] = {
    "enrol": 300,
    "attest": 180,
    "release": 180,
    "load": 1800,
    "round": 1800,
    "measure": 1800,
    "evaluate": 1800,
    "endorse": 180,
    "unmask": 180,
    "deliver": 180,
    "abort": 15,
}
"""Seconds that a stage may take until its last reply."""


class Coordinator:
    """One run of one job. `run` is all there is to call."""

    def __init__(self, link: Link, host: AggregatorClient) -> None:
        self._link = link
        self._host = host
        opened = host.open()
        self._contract = Contract.decode(opened.contract)
        self._run_id = opened.run_id
        self._collateral = dict(opened.collateral)
        self._timeouts = {**DEFAULT_TIMEOUTS, **dict(opened.timeouts)}
        self._masked = self._contract.protection.mode == "masked"
        self._provider = self._contract.provider.name
        self._aggregator_head = opened.log_head
        self._finished = opened.finished
        self._resumed = bool(opened.kept)
        everyone = [party.name for party in self._contract.customers]
        state = (
            CoordinatorState.decode(opened.kept)
            if opened.kept
            else CoordinatorState(customers=everyone)
        )
        self._parties = Parties(link, host, self._contract, self._run_id, state, self._timeouts)
        self._sums = Sums(host, self._parties, masked=self._masked)
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run all stages that are left; returns the report, which was also stored and sent to every
        party. {} if the run is over.

        Raises:
            FederationError: the job was aborted, with the reason; every party was told.
        """
        if self._finished:
            return {}
        with working_on(**of_run(self._contract.digest(), self._run_id)):
            return self._run()

    def _run(self) -> dict[str, Any]:
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
                    "measure": self._measure,
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

    @property
    def _at(self) -> CoordinatorState:
        return self._parties.state

    # -- stages

    def _enrol(self) -> None:
        everyone = [party.name for party in self._contract.customers]
        self._host.told(f"enrol: waiting for {len(everyone) + 1} nodes")
        request = self._parties.request(
            enrol=stage_pb2.EnrolRequest(contract=self._contract.encode())
        )
        began = time.monotonic()
        outcome = self._link.broadcast(
            request, expect=len(everyone) + 1, stage="enrol", timeout=self._timeouts["enrol"]
        )
        replies, failed = self._parties.sort("enrol", outcome)
        for name in [
            name for name in replies if not self._nonces_complete(name, replies[name].enrol.nonces)
        ]:
            failed[name] = ProtocolError(f"{name} gave no challenges, or malformed ones.")
            del replies[name]
        self._parties.account("enrol", began, dict.fromkeys(outcome, request), outcome)
        names = (self._provider, *everyone)
        missing = [name for name in names if name not in replies]
        if missing:
            lines = [
                f"{name}: {failed[name].told if name in failed else 'did not answer'}"
                for name in missing
            ]
            raise FederationError(
                "The job cannot begin, not every party signed its contract:\n"
                + "\n".join(f"  - {line}" for line in lines),
                safe="No weight and no record left anyone.",
                fix="Mend what the parties name, then submit the job again.",
            )
        signatures = {name: replies[name].enrol.signature for name in names}
        self._at.proofs["signatures"] = signatures
        self._next(
            "attest",
            signatures=signatures,
            nonces={name: dict(replies[name].enrol.nonces) for name in names},
        )

    def _attest(self) -> None:
        signatures, nonces = self._at.inputs["signatures"], self._at.inputs["nonces"]
        replies = self._parties.exchange(
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
            admitted = self._sums.on_behalf(name, "attest", enclave_pb2.Call(admit_peer=admit))
            if admitted is not None:
                group_grants[name] = admitted.admitted.group_grant
        self._parties.enough()
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
            {name: nonces[name].get("peers", b"") for name in self._parties.customers}
            if self._masked
            else {}
        )
        for name in self._parties.customers:
            challenge = enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer=name))
            requests[name] = self._parties.request(
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
            return {self._provider: self._parties.request(release=release)}

        requests = self._once(request)
        replies = self._parties.exchange("release", requests)
        if self._provider not in replies:
            if self._parties.refusal:
                self._host.check_log(self._parties.refusal, refused=True)
            raise FederationError(
                f"The provider released no key: {self._at.passed_over[self._provider]}"
            )
        release = replies[self._provider].release
        self._host.check_log(release.log)
        for name, fault in release.refused.items():
            if name in self._parties.customers:
                self._parties.pass_over(name, "release", error_of(fault))
                told = stage_pb2.AbortRequest(reason=printable(fault.what), refused=fault)
                self._link.exchange(
                    {name: self._parties.request(abort=told)},
                    stage="abort",
                    timeout=self._timeouts["abort"],
                )
        self._keep_release(release, requests[self._provider])
        self._parties.enough()
        grants = {
            name: release.grants[name] for name in self._parties.customers if name in release.grants
        }
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
            name: self._parties.request(
                load=stage_pb2.LoadRequest(
                    grants=grant, group_grant=group_grants[name], announced=fellows
                )
            )
            for name, grant in grants.items()
        }
        replies = self._parties.exchange("load", requests)
        self._at.log_views = {name: reply.load.log_view for name, reply in replies.items()}
        self._at.receipts = {
            name: (
                stage_pb2.Receipts(
                    by_model=reply.load.receipts, ledger_head=reply.load.ledger_head
                ).SerializeToString(deterministic=True)
            )
            for name, reply in replies.items()
        }
        self._at.proofs |= {
            "views": self._at.log_views,
            "receipts": {name: dict(reply.load.receipts) for name, reply in replies.items()},
            "ledger_heads": {
                name: reply.load.ledger_head
                for name, reply in replies.items()
                if reply.load.ledger_head
            },
        }
        if closed is None:
            self._sums.submit(
                0, {name: reply.load.protected_metrics for name, reply in replies.items()}
            )
            closed = self._sums.close(0)
        self._measured(closed)
        self._next("round", number=1, state=closed.state)

    def _round(self) -> None:
        number = self._at.number
        closed = self._already_closed(number)
        if closed is None:
            self._parties.welcome_back()
            views = self._at.log_views if not self._at.inputs.get("agreed") else {}
            masked = self._sums.open(number, self._parties.customers)
            request = self._parties.request(
                round=stage_pb2.RoundRequest(
                    round=number, state=self._at.inputs["state"], log_views=views, masked=masked
                )
            )
            replies = self._parties.exchange(
                "round",
                dict.fromkeys(self._parties.customers, request),
                note=f"{number}/{self._contract.rounds}",
            )
            self._sums.submit(
                number, {name: reply.round.protected_update for name, reply in replies.items()}
            )
            closed = self._sums.close(number)
        self._measured(closed)
        # A customer who missed the first round has not compared its view of the provider's log yet.
        agreed = not self._at.missed
        following = "evaluate" if closed.ended else "round"
        if not closed.ended and self._contract.measures(number):
            following = "measure"
        self._next(following, number=number + 1, state=closed.state, agreed=agreed)

    def _measure(self) -> None:
        number, inputs = self._at.number, self._at.inputs
        closed = self._already_closed(number, curve=True)
        if closed is None:
            measure = enclave_pb2.Measure(round=number, state=inputs["state"])
            request = self._parties.request(
                forward=stage_pb2.ForwardRequest(call=enclave_pb2.Call(measure=measure))
            )
            replies = self._parties.exchange(
                "measure", dict.fromkeys(self._parties.customers, request), note=str(number - 1)
            )
            closed = self._sums.measured(
                number, {name: reply.forward.protected for name, reply in replies.items()}
            )
        self._at.curve = closed.curve
        for line in curve_lines(curve_of(closed.curve)):
            self._host.told(line)
        self._next(
            "evaluate" if closed.ended else "round",
            number=number,
            state=closed.state if closed.ended else inputs["state"],
            agreed=inputs["agreed"],
        )

    def _evaluate(self) -> None:
        final = self._at.number
        closed = self._already_closed(final)
        # Figures of all rounds travel together under masks: who missed one has none of it.
        present = [
            name
            for name in self._parties.customers
            if not (self._masked and name in self._at.missed)
        ]
        if closed is None and len(present) < self._contract.protection.minimum_cohort:
            self._host.told(
                "too few customers were there in every round: the adapter is delivered without"
                " figures"
            )
        elif closed is None:
            request = self._parties.request(
                evaluate=stage_pb2.EvaluateRequest(
                    round=final,
                    state=self._at.inputs["state"],
                    masked=self._sums.open(final, present),
                )
            )
            replies = self._parties.exchange("evaluate", dict.fromkeys(present, request))
            self._sums.submit(
                final, {name: reply.evaluate.protected_metrics for name, reply in replies.items()}
            )
            closed = self._sums.close(final)
        if closed is not None:
            self._measured(closed)
        self._next("deliver")

    def _deliver(self) -> dict[str, Any]:
        report = self._report()
        signed = self._host.sign(json.dumps(report).encode())
        receipts = {
            name: stage_pb2.Receipts.FromString(data) for name, data in self._at.receipts.items()
        }
        deliveries = {
            name: self._host.call(
                enclave_pb2.Call(deliver=enclave_pb2.Deliver(party=name))
            ).delivery
            for name in self._contract.deliver_to
        }
        said = deliveries[self._contract.deliver_to[0]].statement
        idle = unread(self._collateral, self._contract.attestation.platforms)
        dossier = self._host.sign_dossier(
            Dossier(
                proofs=Proofs.model_validate(self._at.proofs),
                contract=self._contract.encode(),
                run_id=self._run_id,
                collateral={k: v for k, v in self._collateral.items() if k not in idle},
                delivered=said,
                **signed,
            ).encode()
        )
        requests = {}
        for name in (self._provider, *self._parties.customers, *self._at.absent):
            delivery = deliveries[name].sealed if name in deliveries else b""
            given = receipts if name == self._provider else {}
            requests[name] = self._parties.request(
                deliver=stage_pb2.DeliverRequest(
                    delivery=delivery, receipts=given, dossier=dossier, **signed
                )
            )
        self._parties.exchange("deliver", requests, minimum=0)
        report = self._report()
        self._host.outcome(report=json.dumps(report, indent=2).encode(), dossier=dossier)
        return report

    # -- helpers

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
            if name in (self._provider, *self._parties.customers)
        }

    def _save(self) -> None:
        now = time.monotonic()
        self._at.seconds, self._began = self._at.seconds + now - self._began, now
        self._host.keep(self._at.encode())

    def _already_closed(self, number: int, *, curve: bool = False) -> enclave_pb2.Closed | None:
        """What a coordinator before this one got for the end of the round, if it came that far."""
        if not self._resumed:
            return None
        self._resumed = False  # from here on this coordinator knows itself what it did
        close = enclave_pb2.Close(round=number, curve=curve)
        reply = self._host.done(enclave_pb2.Call(close=close))
        return reply.closed if reply is not None else None

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

    def _keep_release(self, release: stage_pb2.ReleaseReply, request: bytes) -> None:
        """What proves to others whom the provider released keys to, and whom not."""
        asked = stage_pb2.StageRequest.FromString(request).release
        aggregator = self._contract.aggregator.name
        manifests: dict[str, bytes] = {}
        for grants in release.grants.values():
            manifests |= grants.manifests
        self._at.proofs |= {
            "evidence": {name: asked.trainer_evidence[name] for name in release.grants}
            | {aggregator: asked.aggregator_evidence},
            "log": {name: grants.log for name, grants in release.grants.items()}
            | {aggregator: release.log},
            "manifests": manifests,
            "refused": {name: fault.log for name, fault in release.refused.items()},
        }

    def _measured(self, closed: enclave_pb2.Closed) -> None:
        self._at.proofs["sums"].append(closed.statement)
        self._at.metrics += canonical.decode(closed.metrics, max_bytes=_MAX_METRICS)
        self._at.curve = closed.curve or self._at.curve

    def _report(self) -> dict[str, Any]:
        return make_report(self._contract, self._run_id, self._at, time.monotonic() - self._began)

    def _abort(self, error: FedarkError) -> None:
        self._host.told(f"aborting: {error.what}")
        request = self._parties.request(abort=stage_pb2.AbortRequest(reason=printable(error.what)))
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
