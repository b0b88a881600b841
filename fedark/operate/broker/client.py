"""The side of the enclave's host: bring a challenge to the enclave, its evidence to the broker, and
the grants back.

The host is trusted by nobody here. For its own sake it checks what a customer's node checks in a
run: that the provider's log, which it is shown, goes on from what it remembers, and holds the
admission of its enclave and every key that it got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedark.attestation.evidence import Evidence
from fedark.contract.contract import SignedContract
from fedark.contract.lease import Lease, SignedLease
from fedark.enclave.host import EnclaveHandle
from fedark.enclave.session import LeaseConfig, RunConfig
from fedark.enclave.vouching import vouch
from fedark.foundation.closing import Closing
from fedark.foundation.errors import FedarkError, FederationError, ProtocolError, Refused
from fedark.foundation.keys import SigningKey
from fedark.foundation.proxies import is_loopback
from fedark.links.faults import error_of
from fedark.operate.broker.server import FAULT, LONGEST_DEADLINE, MAX_MESSAGE, SERVICE
from fedark.stages.shown_log import ShownLog
from fedark.translog.memory import HeadMemory
from fedark.v1 import broker_pb2 as pb
from fedark.v1 import broker_pb2_grpc, enclave_pb2, stage_pb2

__all__ = ["BrokerClient"]

_Reply = TypeVar("_Reply")


class BrokerClient(Closing):
    """Calls a key broker.

    Args:
        target: HOST:PORT.
        roots: PEM certificates that the broker's certificate must chain to.
        timeout: seconds for each call, a minute at most.
    """

    def __init__(self, target: str, *, roots: bytes, timeout: float = 30.0) -> None:
        options = [
            ("grpc.enable_http_proxy", int(not is_loopback(target.rpartition(":")[0]))),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
        ]
        self._timeout = min(timeout, LONGEST_DEADLINE)
        self._channel = grpc.secure_channel(
            target, grpc.ssl_channel_credentials(roots), options=options
        )
        self._stub = broker_pb2_grpc.BrokerStub(self._channel)  # type: ignore[no-untyped-call]

    def obtain(
        self,
        enclave: EnclaveHandle,
        signed: SignedContract | SignedLease,
        *,
        run_id: str,
        party: str,
        signing: SigningKey,
        heads: HeadMemory,
        usage: bytes = b"",
    ) -> stage_pb2.Grants:
        """The grants and manifests for a started trainer enclave, one for each model of the
        contract; or one portion of a lease for a started inference enclave.

        Args:
            enclave: was started for `party`, this contract or lease, and this run.
            usage: what an inference enclave has signed of its use, from the second portion on.
            signing: of `party`, which signs that the enclave is its own.
            heads: what `party` remembers of logs.

        Raises:
            Refused: the broker's refusal; `logged` is its index in the log if that was proven, and
                None if it was not.
            FedarkError: what the log does not hold, or how the call failed.
        """
        contract = signed.contract
        provider, key = contract.provider.name, bytes.fromhex(contract.provider.signing_key)
        about = pb.BrokerCase(
            contract=contract.encode(),
            contract_signatures=signed.signatures,
            run_id=run_id,
            party=party,
            lease=isinstance(contract, Lease),
        )
        config = (
            LeaseConfig(party, contract, run_id)
            if isinstance(contract, Lease)
            else RunConfig(role="trainer", party=party, contract=contract, run_id=run_id)
        )
        vouch(enclave.call, config, signing)
        nonce = self.challenge(pb.BrokerChallengeRequest(about=about)).nonce
        attest = enclave_pb2.Attest(peer=provider, nonce=nonce)
        evidence = enclave.call(
            enclave_pb2.Call(attest=attest), timeout=self._timeout
        ).evidence.evidence
        known = heads.last(key, by=provider)
        request = pb.BrokerReleaseRequest(
            about=about,
            evidence=evidence,
            log_head=known.encoded if known is not None else b"",
            usage=usage,
        )
        binding = Evidence.decode(evidence).binding
        shown = ShownLog(
            heads,
            contract,
            party=party,
            run_id=run_id,
            evidence=hashlib.sha384(evidence).digest(),
            asked=known,
        )
        try:
            grants = self.release(request)
        except Refused as error:
            error.logged = shown.refused_at(error.proof)
            raise
        shown.check_grants(grants, signing=binding.signing_public, hpke=binding.hpke_public)
        if set(grants.manifests) != set(grants.by_model):
            raise ProtocolError(
                "The key broker did not bring one manifest with each key.", safe="Nothing was used."
            )
        return grants

    def challenge(self, request: pb.BrokerChallengeRequest) -> pb.BrokerChallengeReply:
        """The call of that name."""
        reply: pb.BrokerChallengeReply = self._call(self._stub.Challenge, request)
        return reply

    def release(self, request: pb.BrokerReleaseRequest) -> stage_pb2.Grants:
        """The call of that name."""
        reply: stage_pb2.Grants = self._call(self._stub.Release, request)
        return reply

    def serving(self) -> bool:
        """Whether the broker says that it serves."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        reply: Any = self._call(stub.Check, health_pb2.HealthCheckRequest(service=SERVICE))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: Callable[..., _Reply], request: Any) -> _Reply:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise _error_of(error, self._timeout) from None


def _error_of(error: Any, timeout: float) -> FedarkError:
    """The error behind a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == FAULT and isinstance(value, bytes):
            with suppress(DecodeError):
                return error_of(stage_pb2.StageFault.FromString(value))
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return FederationError(
                f"The key broker did not answer within {timeout:.3g} s.", fix="Ask again."
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return FederationError(
                "The key broker is busy, or the request was too large.", fix="Ask again later."
            )
        case grpc.StatusCode.UNAVAILABLE:
            return FederationError(
                "The key broker cannot be reached, or is not who its certificate should say.",
                fix="Check address, certificate and network.",
            )
    return FederationError(f"The key broker failed ({error.code().name}).", fix="Ask the provider.")
