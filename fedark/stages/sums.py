"""The sums of the aggregator enclave, as the coordinator has them made: open a round, bring what
the customers sent, have the committee unmask it, close.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedark.foundation.errors import EnclaveFailed, FedarkError, FederationError, StorageError
from fedark.links.hostlink import AggregatorClient
from fedark.stages.parties import Parties
from fedark.v1 import enclave_pb2, stage_pb2

__all__ = ["Sums"]


_ANSWERS: Mapping[str, tuple[Any, enclave_pb2.Submit.Part]] = {
    "endorse": (enclave_pb2.Endorse, enclave_pb2.Submit.ENDORSEMENT),
    "unmask": (enclave_pb2.Unmask, enclave_pb2.Submit.SHARES),
}
"""What a member of the committee is asked, and what its answer is to the aggregator enclave."""


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

    def submit(
        self,
        number: int,
        messages: Mapping[str, bytes],
        part: enclave_pb2.Submit.Part = enclave_pb2.Submit.UPDATE,
    ) -> None:
        """Bring what the customers sent for a round.

        Raises:
            FederationError: too few of it was taken.
        """
        for name, message in messages.items():
            call = enclave_pb2.Call(
                submit=enclave_pb2.Submit(round=number, party=name, protected=message, part=part)
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

    def _ask_committee(self, number: int) -> None:
        """Bring the aggregator enclave what it needs of the committee before it can close the
        round: signatures on the survivors where it asks for them, then shares. Who fails now still
        counts in the sum.
        """
        for endorsed in (False, True):
            survivors = enclave_pb2.Survivors(round=number, endorsed=endorsed)
            asked = self._host.call(enclave_pb2.Call(survivors=survivors)).asked
            stage = "endorse" if asked.endorse and not endorsed else "unmask"
            kind, part = _ANSWERS[stage]
            requests = {
                name: self._parties.request(
                    forward=stage_pb2.ForwardRequest(
                        call=enclave_pb2.Call(**{stage: kind(request=request)})
                    )
                )
                for name, request in getattr(asked, stage).items()
                # a member that did not begin this round could only refuse
                if name in self._parties.customers and name in self._opened_for
            }
            replies = self._parties.exchange(stage, requests, note=str(number), minimum=0)
            for name, reply in replies.items():
                answer = enclave_pb2.Submit(
                    round=number, party=name, protected=reply.forward.protected, part=part
                )
                self.on_behalf(name, stage, enclave_pb2.Call(submit=answer))
            if stage == "unmask":
                return

    def measured(self, number: int, messages: Mapping[str, bytes]) -> enclave_pb2.Closed:
        """Bring the customers' measurements of a global adapter, and end them."""
        self.submit(number, messages, enclave_pb2.Submit.CURVE)
        close = enclave_pb2.Close(round=number, curve=True)
        return self._host.call(enclave_pb2.Call(close=close)).closed

    def close(self, number: int) -> enclave_pb2.Closed:
        """End a round; under masks, unmask its sum before.

        Raises:
            FederationError: too few customers are in it, or answered, with who failed and why.
        """
        close = enclave_pb2.Call(close=enclave_pb2.Close(round=number))
        try:
            if self._masked and number > 0:  # loading brings nothing of a customer
                self._ask_committee(number)
            return self._host.call(close).closed
        except FederationError as error:
            what = "\n".join([error.what, *self._parties.passed_over_lines()])
            raise FederationError(what, safe=error.safe, fix=error.fix) from None
