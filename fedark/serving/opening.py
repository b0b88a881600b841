"""A lease in use, from one TOML file that says where its parts are:

    lease  = "grid.lease"              # signed by provider and customer
    party  = "north"                   # this customer's folder
    bundle = "catalogue/grid.fedark"   # the sealed base
    broker = "keys.example:8443"       # the provider's
    roots  = "broker.pem"              # what the broker's certificate chains to

Paths count from the file's own folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from fedark.contract.lease import INFERENCE
from fedark.enclave.host import EnclaveHandle
from fedark.foundation.errors import ContractError, InputError
from fedark.foundation.keys import PartyKeys
from fedark.foundation.terms import Terms, explain
from fedark.operate.broker.client import BrokerClient
from fedark.operate.daemon import enclaves
from fedark.operate.leases import signed_lease
from fedark.operate.party import KEYS
from fedark.serving.leased import Leased
from fedark.stages.node import SEEN_LOGS
from fedark.translog.memory import HeadMemory
from fedark.v1 import stage_pb2
from fedark.vault.bundle import SealedBundle

__all__ = ["open_lease"]


class _Use(Terms):
    lease: str
    party: str
    bundle: str
    broker: str
    roots: str


def open_lease(path: Path, say: Callable[[str], None]) -> Leased:
    """Start the inference enclave of a lease; the first request asks the broker for a portion.

    Raises:
        InputError, ContractError: the file, or what it names, cannot be used.
        FedarkError: the enclave did not start, or the lease does not hold.
    """
    use, at = _read(path), path.resolve().parent
    signed, party = signed_lease(at / use.lease), at / use.party
    keys, customer = PartyKeys.load(party / KEYS), signed.contract.customer.name
    provider = bytes.fromhex(signed.contract.provider.signing_key)
    client = BrokerClient(use.broker, roots=_content(at / use.roots))
    heads, start = HeadMemory(party / SEEN_LOGS), enclaves(party)

    def portion(enclave: EnclaveHandle, run_id: str, usage: bytes) -> stage_pb2.Grants:
        return client.obtain(
            enclave,
            signed,
            run_id=run_id,
            party=customer,
            signing=keys.signing,
            heads=heads,
            usage=usage,
        )

    return Leased(
        signed,
        lambda config: start(INFERENCE, config, b""),
        portion,
        SealedBundle.load(at / use.bundle, provider),
        keys.signing,
        say,
    )


def _read(path: Path) -> _Use:
    try:
        return _Use.model_validate(tomllib.loads(_content(path).decode()))
    except ValidationError as error:
        raise ContractError(str(path), explain(error)) from None
    except ValueError:
        raise InputError(f"{path} is not TOML in UTF-8.", safe="Nothing was started.") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
