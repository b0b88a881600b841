"""Leases as files: the provider makes one, the customer signs it too, the provider revokes it.

The file is canonical CBOR of {"lease": bytes, "signatures": {party: bytes}}; it holds no secret.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedark.attestation.terms import AttestationTerms
from fedark.attestation.trust import SIMULATED_ROOT
from fedark.contract.contract import ModelTerms, Party, now
from fedark.contract.lease import INFERENCE, LEASE_LABEL, Lease, SignedLease
from fedark.foundation import canonical
from fedark.foundation.errors import InputError, ProtocolError, printable
from fedark.foundation.files import disk_errors, private_directory, write_atomic, write_new
from fedark.foundation.keys import PartyKeys
from fedark.measurement import measure_enclave
from fedark.measurement.policies import reference_policies
from fedark.operate.broker.keys import LEASES
from fedark.operate.party import KEYS, PartyConfig, collateral_of
from fedark.stages.roster import read_roster
from fedark.vault.bundle import SealedBundle

__all__ = ["make_lease", "read_lease", "revoke_lease", "sign_lease", "signed_lease"]

_MAX_BYTES = 5 << 20


def make_lease(
    folder: Path,
    out: Path,
    *,
    bundle: Path,
    terms: ModelTerms,
    customer: str,
    job: str,
    days: int,
    seconds: int,
    tokens: int,
    total: int,
) -> Lease:
    """Make and sign a lease of the provider whose folder this is, in the new file `out`.

    Args:
        bundle: sealed under a release policy that names inference enclaves.
        terms: of the adapters that are to be used.
        customer: its name in the provider's roster.

    Raises:
        InputError: the bundle is not of these terms, its policy names no inference enclave, the
            roster has no such customer, or `out` exists.
    """
    keys, config = PartyKeys.load(folder / KEYS), PartyConfig.read(folder)
    manifest = SealedBundle.load(bundle, keys.signing.public).manifest
    found = read_roster(folder).get(customer)
    problems = manifest.policy.role_problems(INFERENCE)
    if manifest.weights().hex() != terms.weights:
        problems.append("the bundle holds other weights than the adapter was trained on")
    if found is None or found.role != "customer":
        problems.append(f"the roster has no customer {printable(customer)!r}")
    if problems or found is None:
        raise InputError(
            "No such lease can be made:\n" + "\n".join(f"  - {problem}" for problem in problems),
            safe="Nothing was signed.",
        )
    begun, kem = now(), config.kem[0]
    registers = measure_enclave(INFERENCE).registers
    lease = Lease(
        job=job,
        created=begun.isoformat(timespec="seconds"),
        expires=(begun + timedelta(days=days)).isoformat(timespec="seconds"),
        seconds=seconds,
        tokens=tokens,
        total=total,
        provider=Party(
            name=config.name,
            role="provider",
            signing_key=keys.signing.public.hex(),
            hpke_key=keys.hpke.public.hex(),
        ),
        customer=found,
        terms=terms.model_copy(update={"bundle": manifest.digest().hex()}),
        attestation=AttestationTerms(
            platforms=("simulated",),
            simulated_root=hashlib.sha256(collateral_of(folder)[SIMULATED_ROOT]).hexdigest(),
            sandbox=config.sandbox,
            kem=kem,
            policies=reference_policies(config.sandbox),
            trainer={},
            aggregator={},
            inference={name: value.hex() for name, value in registers.items()},
        ),
    )
    data = _encoded(lease, {config.name: keys.signing.sign(LEASE_LABEL, lease.digest())})
    write_new(out, lambda file: file.write(data))
    return lease


def read_lease(path: Path) -> tuple[Lease, dict[str, bytes]]:
    """A lease, and who has signed it: unverified.

    Raises:
        InputError: the file cannot be read.
        ProtocolError, ContractError: it is no lease.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    value: Any = canonical.decode(data, max_bytes=_MAX_BYTES)
    match value:
        case {"lease": bytes(lease), "signatures": dict(signatures)} if len(value) == 2:
            if all(type(k) is str and type(v) is bytes for k, v in signatures.items()):
                return Lease.decode(lease), signatures
    raise ProtocolError(f"{path} is not a lease.", safe="Nothing of it was used.")


def sign_lease(folder: Path, path: Path) -> Lease:
    """Add the signature of the lease's customer, whose folder this is.

    Raises:
        InputError: it is another customer's.
        ProtocolError, ContractError, StorageError: it is no lease, or cannot be written.
    """
    lease, signatures = read_lease(path)
    keys = PartyKeys.load(folder / KEYS)
    if keys.signing.public.hex() != lease.customer.signing_key:
        raise InputError(
            f"This lease is one of {printable(lease.customer.name)}, whose folder {folder} is not.",
            safe="Nothing was signed.",
        )
    name = lease.customer.name
    signatures = signatures | {name: keys.signing.sign(LEASE_LABEL, lease.digest())}
    SignedLease.verify(lease, signatures)
    write_atomic(path, _encoded(lease, signatures))
    return lease


def signed_lease(path: Path) -> SignedLease:
    """The lease in a file, which both have signed.

    Raises:
        InputError, ProtocolError, ContractError, Refused: it is none.
    """
    return SignedLease.verify(*read_lease(path))


def revoke_lease(folder: Path, path: Path) -> str:
    """Let the broker of the provider whose folder this is give out no further portion of a lease;
    what is given out already ends with its portion. Returns the lease's digest.
    """
    digest = read_lease(path)[0].digest().hex()
    place = private_directory(folder / LEASES / "revoked") / digest
    with disk_errors(place):
        place.touch(mode=0o600)
    return digest


def _encoded(lease: Lease, signatures: dict[str, bytes]) -> bytes:
    return canonical.encode({"lease": lease.encode(), "signatures": signatures})
