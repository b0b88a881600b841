"""The sums of the aggregator enclave, as the coordinator has them made: open a round, bring what the
customers sent, have the committee unmask it, close.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedark.foundation.errors import EnclaveFailed, FedarkError, FederationError, StorageError
from fedark.links.hostlink import AggregatorClient
from fedark.stages.parties import Parties
from fedark.v1 import enclave_pb2, stage_pb2

__all__ = ["Sums"]


class Sums:
    """The rounds of one run at the aggregator enclave."""

    def __init__(self, host: AggregatorClient, parties: Parties, *, masked: bool) -> None:
        self._host, self._parties, self._masked = host, parties, masked
        self._opened_for: list[str] = []

    def on_behalf(self, name: str, stage: str, call: enclave_pb2.Call) -> enclave_pb2.Reply | None:
        """The aggregator enclave's answer to what a customer sent. A refusal costs the customer its
        place; what its host or the enclave itself suffers does not, and ends the job."""
        try:
            return self._host.call(call)
        except (EnclaveFailed, StorageError):
            raise
        except FedarkError as error:
            self._parties.pass_over(name, stage, error)
            return None

    def submit(self, number: int, messages: Mapping[str, bytes]) -> None:
        """Bring what the customers sent for a round.

        Raises:
            FederationError: too few of it was taken.
        """
        for name, message in messages.items():
            call = enclave_pb2.Call(
                submit=enclave_pb2.Submit(round=number, party=name, protected=message)
            )
            self.on_behalf(name, "sum", call)
        self._parties.enough()

    def open(self, number: int, parties: list[str]) -> bytes:
        """Under masks: begin the round at the aggregator enclave, for `parties`."""
        self._parties.enough()
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
            calls = {
                name: enclave_pb2.Call(endorse=enclave_pb2.Endorse(request=request))
                for name, request in asked.endorse.items()
            }
            self._committee(number, "endorse", enclave_pb2.Submit.ENDORSEMENT, calls)
            survivors.survivors.endorsed = True
            asked = self._host.call(survivors).asked
        calls = {
            name: enclave_pb2.Call(unmask=enclave_pb2.Unmask(request=request))
            for name, request in asked.unmask.items()
        }
        self._committee(number, "unmask", enclave_pb2.Submit.SHARES, calls)

    def _committee(
        self,
        number: int,
        stage: str,
        part: enclave_pb2.Submit.Part,
        calls: Mapping[str, enclave_pb2.Call],
    ) -> None:
        """Have the members' trainer enclaves answer the aggregator enclave."""
        requests = {
            name: self._parties.request(forward=stage_pb2.ForwardRequest(call=call))
            for name, call in calls.items()
            # a member that did not begin this round could only refuse
            if name in self._parties.customers and name in self._opened_for
        }
        replies = self._parties.exchange(stage, requests, note=str(number), minimum=0)
        for name, reply in replies.items():
            answer = enclave_pb2.Submit(
                round=number, party=name, protected=reply.forward.protected, part=part
            )
            self.on_behalf(name, stage, enclave_pb2.Call(submit=answer))

    def close(self, number: int) -> enclave_pb2.Closed:
        """End a round; under masks, unmask its sum before.

        Raises:
            FederationError: too few customers are in it, or answered, with who failed and why.
        """
        close = enclave_pb2.Call(close=enclave_pb2.Close(round=number))
        try:
            if self._masked and number > 0:  # loading brings nothing of a customer
                self._unmask(number)
            return self._host.call(close).closed
        except FederationError as error:
            what = "\n".join([error.what, *self._parties.passed_over_lines()])
            raise FederationError(what, safe=error.safe, fix=error.fix) from None
