"""The host's word that an enclave is its own: see `fedark.attestation.evidence`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from fedark.attestation.binding import HOST_LABEL, NONCE_BYTES
from fedark.attestation.evidence import Evidence
from fedark.enclave.session import LeaseConfig, RunConfig
from fedark.foundation.keys import SigningKey
from fedark.v1 import enclave_pb2 as pb

__all__ = ["vouch"]


def vouch(
    call: Callable[[pb.Call], pb.Reply], config: RunConfig | LeaseConfig, signing: SigningKey
) -> None:
    """Sign that the enclave of `call`, which the caller has started with `config`, is the caller's;
    its evidence then says so.

    The enclave names its keys alone; all else that is signed is what the caller started it for.
    Once more changes nothing.
    """
    evidence = call(pb.Call(attest=pb.Attest(nonce=os.urandom(NONCE_BYTES)))).evidence.evidence
    binding = replace(
        Evidence.decode(evidence).binding,
        contract_digest=config.contract.digest(),
        run_id=config.run_id,
        role=config.role,
        party=config.party,
    )
    call(pb.Call(vouch=pb.Vouch(signature=signing.sign(HOST_LABEL, binding.host_statement()))))
