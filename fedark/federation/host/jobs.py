"""Contracts, made at the host of a job file, the provider's offer and the approved nodes' keys; and what people see of jobs.

Each party compares the contract with what it knows itself; the host can propose anything and force nothing.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

from fedark.attestation.trust import SIMULATED_ROOT
from fedark.contract import Contract, now
from fedark.errors import ContractError, InputError
from fedark.federation.host.admission import approved_parties
from fedark.federation.host.folder import HostFolder
from fedark.federation.host.store import HostStore, JobRecord
from fedark.federation.offer import Offer, terms_problems
from fedark.federation.party import PartyConfig, collateral_of, reference_values
from fedark.job import Job
from fedark.masking import masked_policy
from fedark.measurement import reference_policies
from fedark.mechanism import solved

__all__ = ["find_job", "make_contract", "propose"]


def make_contract(host: HostFolder, job: Job) -> Contract:
    """The contract of a job.

    Raises:
        ContractError: parties have not joined, the offer is missing or differs, with every problem at once.
    """
    parties = approved_parties(host)
    problems = []
    if job.aggregator != host.config.name:
        problems.append(f"the job names {job.aggregator} as aggregator; this host is {host.config.name}")
    roles = {job.provider: "provider", **dict.fromkeys(job.customer_names, "customer")}
    for name, role in roles.items():
        party = parties.get(name)
        if party is None:
            problems.append(f"{name} has not joined, or was not approved")
        elif party.role != role:
            problems.append(f"{name} has joined as a {party.role}, the job needs a {role}")
    data = host.store.offer(job.name)
    offer = None
    if data is None:
        problems.append(f"the provider has made no offer for job {job.name}: fedark node offer")
    elif job.provider in parties:
        offer = Offer.verify(data, bytes.fromhex(parties[job.provider].signing_key), by=job.provider)
        problems += terms_problems(offer, job)
    if problems or offer is None:
        raise ContractError(str(job.path), problems, safe="Nothing was proposed.")
    begun = now()
    config = PartyConfig.read(host.party_folder)
    root = collateral_of(host.party_folder)[SIMULATED_ROOT]
    images = {"trainer": job.attestation.trainer, "aggregator": job.attestation.aggregator}
    measured = {
        role: {name: value.hex() for name, value in registers.items()} | images[role]
        for role, registers in reference_values().items()
    }
    contract = Contract.build(
        {
            "job": job.name,
            "created": begun.isoformat(timespec="seconds"),
            "expires": (begun + timedelta(days=job.days_valid)).isoformat(timespec="seconds"),
            "seed": job.seed,
            "rounds": job.rounds,
            "parties": [parties[name] for name in (job.provider, job.aggregator, *job.customer_names)],
            "models": offer.models,
            "attestation": {
                "platforms": job.attestation.platforms,
                "simulated_root": hashlib.sha256(root).hexdigest() if "simulated" in job.attestation.platforms else "",
                "sandbox": config.sandbox,
                "kem": job.attestation.kem,
                "hardware": job.attestation.hardware,
                "policies": reference_policies(config.sandbox),
                **measured,
            },
            "protection": job.protection,
            "privacy": solved(job.privacy, job.rounds),
            "evaluation": offer.evaluation.model_copy(update={"own": job.data.test_fraction > 0}),
            "deliver_to": job.deliver_to,
        },
        str(job.path),
    )
    if contract.protection.mode == "masked":
        masked_policy(contract, "")
    return contract


def propose(host: HostFolder, path: Path) -> Contract:
    """Read a job file, make its contract and put it before all parties.

    Raises:
        ContractError: with every problem.
    """
    contract = make_contract(host, Job.load(path, role="host"))
    names = [party.name for party in contract.parties]
    host.store.propose(contract.digest().hex(), contract.job, contract.encode(), names)
    return contract


def find_job(store: HostStore, name: str) -> JobRecord:
    """The latest job of that name, or the one whose contract's digest begins so.

    Raises:
        InputError: there is none, or several begin so.
    """
    jobs = store.jobs()
    named = [job for job in jobs if job.name == name]
    if named:
        return named[-1]
    found = [job for job in jobs if len(name) >= 8 and job.digest.startswith(name)]
    if len(found) != 1:
        raise InputError(f"{'Several jobs begin' if found else 'No job is named or begins'} with {name!r}.")
    return found[0]
