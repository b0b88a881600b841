"""Contracts, made at the host of a job file, the provider's offer and the approved nodes' keys; and
what people see of jobs.

Each party compares the contract with what it knows itself; the host can propose anything and force
nothing.
"""

from __future__ import annotations

from fedark.attestation.trust import SIMULATED_ROOT
from fedark.contract.contract import Contract, now
from fedark.contract.draft import draft
from fedark.contract.job import Job
from fedark.foundation.errors import ContractError, InputError
from fedark.operate.host.admission import approved_parties
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.store import JOB_ENDS, HostStore, JobRecord
from fedark.operate.offer import Offer, terms_problems
from fedark.operate.party import PartyConfig, collateral_of, reference_values

__all__ = ["find_job", "make_contract", "propose"]


def make_contract(host: HostFolder, job: Job) -> Contract:
    """The contract of a job.

    Raises:
        ContractError: parties have not joined, the offer is missing or differs, with every problem
            at once.
    """
    parties = approved_parties(host)
    problems = []
    if job.aggregator != host.config.name:
        problems.append(
            f"the job names {job.aggregator} as aggregator; this host is {host.config.name}"
        )
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
        offer = Offer.verify(
            data, bytes.fromhex(parties[job.provider].signing_key), by=job.provider
        )
        problems += terms_problems(offer, job)
    if problems or offer is None:
        raise ContractError(str(job.path), problems, safe="Nothing was proposed.")
    return draft(
        job,
        parties=[parties[name] for name in (job.provider, job.aggregator, *job.customer_names)],
        models=offer.models,
        evaluation=offer.evaluation.model_copy(update={"own": job.data.test_fraction > 0}),
        sandbox=PartyConfig.read(host.party_folder).sandbox,
        root=collateral_of(host.party_folder)[SIMULATED_ROOT],
        registers=reference_values(),
        begun=now(),
    )


def propose(host: HostFolder, job: Job) -> Contract:
    """Make a job's contract and put it before all parties.

    Raises:
        ContractError: with every problem.
    """
    contract = make_contract(host, job)
    names = [party.name for party in contract.parties]
    host.store.propose(contract.digest().hex(), contract.job, contract.encode(), names)
    return contract


def find_job(store: HostStore, name: str, *, to_stop: bool = False) -> JobRecord:
    """The one job of that name, or whose contract's digest begins so.

    Args:
        to_stop: of several, one that has not ended is meant.

    Raises:
        InputError: there is none, or there are several: they are listed.
    """
    found = [
        job
        for job in store.jobs()
        if job.name == name or (len(name) >= 8 and job.digest.startswith(name))
    ]
    if to_stop:
        found = [job for job in found if job.status not in JOB_ENDS] or found
    if not found:
        raise InputError(f"No job is named or begins with {name!r}.", safe="Nothing was done.")
    if len(found) > 1:
        listed = ", ".join(
            f"{job.digest[:16]} ({job.status}, of {job.created[:16]})" for job in found[-20:]
        )
        raise InputError(
            f"{len(found)} jobs are named or begin with {name!r}: {listed}.",
            safe="None was chosen, and nothing was done.",
            fix="Give the beginning of the contract's digest instead.",
        )
    return found[0]
