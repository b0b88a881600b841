"""The contract of a job file, as whoever hosts its aggregator drafts it: the one place where the
two are put together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from fedark.attestation.terms import SandboxMode
from fedark.contract.contract import Contract, EvaluationTerms, ModelTerms, Party
from fedark.contract.job import Job
from fedark.contract.privacy import claim_problems, futile_problems, solved
from fedark.contract.protection import masked_terms
from fedark.contract.taste import tasted_problems
from fedark.foundation.errors import ContractError
from fedark.measurement import reference_policies

__all__ = ["draft"]


def draft(
    job: Job,
    *,
    parties: Iterable[Party],
    models: Iterable[ModelTerms],
    evaluation: EvaluationTerms,
    sandbox: SandboxMode,
    root: bytes,
    registers: Mapping[str, Mapping[str, bytes]],
    begun: datetime,
) -> Contract:
    """The contract, which nobody has agreed to yet.

    Args:
        models: with their layouts and the digests of their sealed bundles.
        sandbox: the weakest mode that it admits.
        root: the simulated platform's root certificate (DER); not named where that platform is not
            admitted.
        registers: role -> register -> SHA-384, of this release of fedark; those of guest images
            come from the job file.

    Raises:
        ContractError: it cannot be kept, with every problem.
        InputError: no noise gives the epsilon that the job asks for.
    """
    images = {"trainer": job.attestation.trainer, "aggregator": job.attestation.aggregator}
    contract = Contract.build(
        {
            "job": job.name,
            "created": begun.isoformat(timespec="seconds"),
            "expires": (begun + timedelta(days=job.days_valid)).isoformat(timespec="seconds"),
            "seed": job.seed,
            "rounds": job.rounds,
            "parties": tuple(parties),
            "models": tuple(models),
            "attestation": {
                "platforms": job.attestation.platforms,
                "simulated_root": (
                    hashlib.sha256(root).hexdigest()
                    if "simulated" in job.attestation.platforms
                    else ""
                ),
                "sandbox": sandbox,
                "kem": job.attestation.kem,
                "hardware": job.attestation.hardware,
                "policies": reference_policies(sandbox),
                **{
                    role: {name: value.hex() for name, value in own.items()} | images[role]
                    for role, own in registers.items()
                },
            },
            "protection": job.protection,
            "privacy": solved(job.privacy, job.rounds),
            "evaluation": evaluation,
            "curve": job.curve,
            "taste": job.taste,
            "deliver_to": job.deliver_to,
        },
        str(job.path),
    )
    if problems := tasted_problems(contract):  # its models' widths are known only now
        raise ContractError(str(job.path), problems)
    if contract.protection.mode == "masked":
        masked_terms(contract, "")  # and so are the layouts
    if problems := claim_problems(contract) or futile_problems(contract):
        raise ContractError(str(job.path), problems)
    return contract
