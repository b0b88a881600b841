"""What is audited: a customer's round as the trainer enclave computes it, and the sum of it with
the other customers' noise.

The update comes from `fedark.enclave.private`, from the drawing of records to the noised integers;
nothing is written anew here. The other customers have no records: they add their shares of the
noise, which is all of them that the guarantee counts on. Masks are left out, since they cancel in
what is unmasked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import cast

import numpy as np

from fedark.auditing.canaries import AuditedTask
from fedark.contract.contract import Contract, ModelTerms, PrivacyTerms, ProtectionTerms, now
from fedark.contract.privacy import solved
from fedark.enclave.private import noised_updates, private_updates
from fedark.foundation.errors import InputError
from fedark.records.reading import Record
from fedark.tuning.layout import Flat
from fedark.tuning.task import TaskModel

__all__ = ["NOISELESS", "Release", "audited_contract", "trainer_round"]

Release = Callable[[AuditedTask, Sequence[Record]], Flat]
"""One round: from all records of a customer to the sum of updates that is unmasked, float32
[travelling].
"""

NOISELESS = 1e-9
"""A noise multiplier that stands for none: a mechanism without noise does not exist. Rounding still
has some grid steps of it.
"""


def audited_contract(
    model: ModelTerms,
    privacy: PrivacyTerms,
    *,
    rounds: int,
    records: int,
    protection: ProtectionTerms | None = None,
) -> Contract:
    """The contract of a job of one model, which nobody signs; it fixes what the trainer computes.

    Args:
        privacy: with the noise of the claim, or with 0 to have it solved from epsilon.
        records: of the audited customer; every other one is taken to have as many.
        protection: the job's; by default eight customers, none of whom drops or colludes.

    Raises:
        ContractError, InputError: no such mechanism can be.
    """
    protection = protection or ProtectionTerms(minimum_cohort=8, colluders=0)
    if privacy.mechanism != "example-distributed":
        raise InputError(
            f"An audit looks for single records in noised gradient sums, and {privacy.mechanism!r}"
            " releases none.",
            safe="Nothing was trained.",
            fix=(
                'Name a job with "example-distributed"; clipping, draws and noise of'
                ' "example-local" are the same functions.'
            ),
        )
    count = protection.minimum_cohort
    names = {"provider": "provider", "pool": "aggregator"} | {
        f"customer-{n + 1}": "customer" for n in range(count)
    }
    parties = [
        {"name": name, "role": role, "signing_key": f"{place:064x}", "hpke_key": f"{place:02432x}"}
        for place, (name, role) in enumerate(names.items())
    ]
    registers = {"runtime": "0" * 96}
    begun = now()
    return Contract.build(
        {
            "job": "audit",
            "created": begun.isoformat(),
            "expires": (begun + timedelta(days=1)).isoformat(),
            "rounds": rounds,
            "parties": parties,
            "models": [model],
            "attestation": {
                "platforms": ["simulated"],
                "simulated_root": "0" * 64,
                "sandbox": "none",
                "trainer": registers,
                "aggregator": registers,
            },
            "protection": protection,
            "privacy": solved(privacy.model_copy(update={"records": records * count}), rounds),
            "evaluation": {},
            "deliver_to": ["customer-1"],
        }
    )


def trainer_round(contract: Contract) -> Release:
    """The round of `contract`, with only the noise of those whose share nobody else knows."""
    model = contract.models[0].name
    honest = contract.protection.minimum_cohort - contract.protection.colluders

    def update(task: AuditedTask, records: Sequence[Record]) -> Flat:
        # It has what the trainer asks of a model.
        tasks: Mapping[str, TaskModel] = {model: cast(TaskModel, task)}
        return noised_updates(contract, private_updates(contract, tasks, records))[model]

    def release(task: AuditedTask, records: Sequence[Record]) -> Flat:
        total = update(task, records).astype(np.float64)
        for _ in range(honest - 1):
            total += update(task, [])
        return total.astype(np.float32)

    return release
