"""A whole federation in one process, made from a job file, for `fedark simulate`.

    WORK/catalogue/NAME.fedark/   sealed bundles
    WORK/parties/NAME/            one folder a party (`fedark.operate.party`)
    WORK/contract.cbor            what they will be asked to sign

A folder can be used for many jobs, one after the other. Every party keeps its keys, its logs, its
privacy ledger and what former runs left; only the configuration, the simulated device and the
contract are those of the latest job. Nothing that a former run or somebody else put there is
deleted.

On one machine one person plays all parties, and here one function hands out their keys and rosters.
Between companies each party makes its own folder; that only the public halves are exchanged is the
same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tomli_w

from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.contract.contract import Contract, EvaluationTerms, Party, now
from fedark.contract.draft import draft
from fedark.contract.job import Job
from fedark.contract.privacy import learning_lines, strongest_spend
from fedark.contract.protection import protection_warnings
from fedark.foundation.errors import ContractError, FedarkError, InputError
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import HpkeKey, Kem, PartyKeys
from fedark.operate.offer import groups_of, model_sources, rows, seal_for_job
from fedark.operate.party import (
    DEVICE,
    KEYS,
    POLICY,
    WEIGHT_KEYS,
    BudgetConfig,
    DataConfig,
    PartyConfig,
    reference_values,
    write_party,
)
from fedark.operate.state import locked
from fedark.privacy.accounting import Spend, cost
from fedark.privacy.ledger import LEDGER, Ledger
from fedark.records.reading import Record
from fedark.records.splits import dirichlet_split, split_train_test
from fedark.stages.consent import Consent
from fedark.vault.weightkey import KeyStore

__all__ = [
    "CheckedRecords",
    "Federation",
    "checked_records",
    "customer_data",
    "policy_of",
    "prepare",
]

Sandbox = Literal["namespaces", "landlock", "none"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Federation:
    """What `prepare` made.

    Attributes:
        work: the folder of everything.
        contract: what the parties will sign.
        left_out: optional models that are not on this machine, with the reason.
        spent: a sentence on what this job and the earlier ones in this folder spend together, or
            "" where no earlier job had a privacy mechanism.
    """

    work: Path
    contract: Contract
    left_out: dict[str, str]
    spent: str = ""

    def folder(self, party: str) -> Path:
        """The folder of a party."""
        return self.work / "parties" / party


def prepare(
    job: Job,
    work: Path,
    *,
    sandbox: Sandbox,
    say: Say = lambda text: None,
    hold: ExitStack | None = None,
) -> Federation:
    """Make keys, rosters, a simulated platform, sealed bundles and the contract for a job.

    Args:
        job: checked already.
        work: an empty or missing folder, or one that `prepare` has used before.
        sandbox: the weakest mode that the contract admits.
        say: told of what goes on.
        hold: keeps the folder for this process until it is closed.

    Raises:
        ContractError: records, labels or models do not fit, with every problem at once; nothing was
            written.
        FederationError: another process holds the folder.
        InputError: `work` is something else, or its parties have keys of another KEM.
        StorageError: the disk is full.
    """
    sources, left_out = model_sources(job)
    for name, why in left_out.items():
        say(f"model {name} is left out: {why}")
    checked = checked_records(job)
    records, own = checked.dealt, checked.own
    for line in protection_warnings(
        job.protection, [(spec.name, spec.adapter) for spec, _ in sources]
    ):
        say(line)
    _require_ours(work)
    if hold is not None:
        hold.enter_context(locked(work / "parties", fix="Wait for it, or name another by --work."))
    begun = now()
    root = SimulatedRoot(now=begun)
    collateral = {SIMULATED_ROOT: root.certificate, SIMULATED_CRL: root.crl(now=begun)}
    names = (job.provider, job.aggregator, *job.customer_names)
    keys = {name: _kept_keys(work / "parties" / name, job.attestation.kem) for name in names}
    new = {
        name: PartyKeys(hpke=HpkeKey(kem=job.attestation.kem))
        for name, kept in keys.items()
        if kept is None
    }
    own_keys = {name: kept or new[name] for name, kept in keys.items()}
    roles = {job.provider: "provider", job.aggregator: "aggregator"}
    roster = [
        Party.model_validate(
            {
                "name": name,
                "role": roles.get(name, "customer"),
                "signing_key": key.signing.public.hex(),
                "hpke_key": key.hpke.public.hex(),
            }
        )
        for name, key in own_keys.items()
    ]
    provider = work / "parties" / job.provider
    provider.mkdir(mode=0o700, exist_ok=True)
    store = KeyStore(provider / WEIGHT_KEYS)
    extra = {}
    for name, path in (("replay", job.replay), ("acceptance", job.acceptance)):
        if path is not None:
            extra[f"{name}.jsonl"] = provider / f"{name}.jsonl"
            write_atomic(extra[f"{name}.jsonl"], rows(path, job.data, job.labels))
    models = []
    for spec, folder in sources:
        say(f"sealing {spec.name}")
        bundle = _unused(work / "catalogue", spec.name)
        models.append(
            seal_for_job(
                job,
                spec,
                folder,
                bundle,
                extra=extra,
                keys=own_keys[job.provider],
                store=store,
                sandbox=sandbox,
                say=say,
            )[1]
        )
    say("measuring the enclaves")
    contract = draft(
        job,
        parties=roster,
        models=models,
        evaluation=EvaluationTerms(
            acceptance="extra/acceptance.jsonl" if job.acceptance else "",
            groups=groups_of(job),
            own=own,
        ),
        sandbox=sandbox,
        root=root.certificate,
        registers=reference_values(),
        begun=begun,
    )
    spent = {party.name: _spent(work / "parties" / party.name, contract) for party in roster}
    for party in roster:
        folder = work / "parties" / party.name
        device = root.issue(now=begun) if party.role != "provider" else None
        if device is not None:  # that of a former job belongs to another simulated platform
            for path in (folder / DEVICE).glob("device.*"):
                path.unlink()
        write_party(
            folder,
            PartyConfig(
                name=party.name,
                role=party.role,
                catalogue="../../catalogue",
                sandbox=sandbox,
                minimum_cohort=job.protection.minimum_cohort,
                # Whoever runs all parties on one machine has agreed to what his jobs spend; what
                # they spent in all is in the ledgers, and is said.
                budget=BudgetConfig(
                    epsilon=min(max(job.privacy.epsilon, spent[party.name][1]) * (1 + 1e-6), 1e9),
                    delta=job.privacy.delta,
                ),
                platforms=job.attestation.platforms,
                kem=(job.attestation.kem,),
                data=(
                    customer_data(job, party.name, records, folder / "records.jsonl")
                    if party.role == "customer"
                    else None
                ),
            ),
            keys=new.get(party.name),
            roster=roster,
            collateral=collateral,
            device=device,
        )
    for line in learning_lines(contract):
        say(line)
    write_atomic(work / "contract.cbor", contract.encode())
    for party in (contract.provider, *contract.customers):
        policy = work / "parties" / party.name / POLICY
        # What this machine measures of itself says nothing of a guest's image.
        if job.attestation.hardware.tables() or policy.exists():
            write_atomic(policy, policy_of(contract))
        Consent(work / "parties" / party.name).approve(
            contract
        )  # whoever runs all of it here has agreed to it
    jobs, epsilon = max(spent.values())
    said = (
        f"With {jobs} earlier private jobs in {work}, their records may have spent epsilon"
        f" {epsilon:.3g} at delta {job.privacy.delta:g} in all; the ledgers say more."
    )
    return Federation(work, contract, left_out, said if jobs else "")


@dataclass(frozen=True)
class CheckedRecords:
    """The records of a job's customers.

    Attributes:
        parts: customer -> records to train on, records held out.
        dealt: the same as they were dealt, where one file was split; else empty.
        own: whether every customer holds records out.
    """

    parts: dict[str, tuple[list[Record], list[Record]]]
    dealt: dict[str, list[Record]]

    @property
    def own(self) -> bool:
        return all(test for _, test in self.parts.values())


def checked_records(job: Job, say: Say = lambda text: None) -> CheckedRecords:
    """Read every data file of the job, so that all problems are found now; `say` is told which
    records are left out.

    Raises:
        ContractError: with every problem, each with what to do.
    """
    problems: list[str] = []
    parts: dict[str, tuple[list[Record], list[Record]]] = {}
    dealt: dict[str, list[Record]] = {}
    spec = job.data

    def read(path: Path | None) -> list[Record]:
        try:
            return spec.read(path, job.labels, say) if path is not None else []
        except FedarkError as error:
            problems.append(f"{error.what} {error.fix}")
            return []

    def split(records: list[Record]) -> tuple[list[Record], list[Record]]:
        train, test = split_train_test(records, spec.test_fraction)
        return (train, test) if train else (records, [])

    for customer in job.customers:
        mine, test = read(job.resolve(customer.data)), read(job.resolve(customer.test))
        parts[customer.name] = (mine, test) if customer.test else split(mine)
    for path in (job.replay, job.acceptance):
        read(path)
    if job.split is not None and (records := read(job.resolve(job.split.file))):
        try:
            shares = dirichlet_split(records, job.split.customers, job.split.alpha, job.seed)
            dealt = dict(zip(job.customer_names, shares, strict=True))
            parts = {name: split(share) for name, share in dealt.items()}
        except InputError as error:
            problems.append(f"{error.what} {error.fix}")
    if problems:
        raise ContractError(str(job.path), problems)
    return CheckedRecords(parts, dealt)


def _require_ours(work: Path) -> None:
    if work.exists() and any(work.iterdir()) and not (work / "parties").is_dir():
        raise InputError(
            f"{work} is not empty and not a former federation.",
            safe="It was left as it is.",
            fix="Name another folder by --work.",
        )
    (work / "catalogue").mkdir(parents=True, exist_ok=True)
    (work / "parties").mkdir(mode=0o700, exist_ok=True)


def _kept_keys(folder: Path, kem: Kem) -> PartyKeys | None:
    """The keys that a party has from a former job, or None."""
    if not (folder / KEYS).exists():
        return None
    keys = PartyKeys.load(folder / KEYS)
    if keys.hpke.kem != kem:
        raise InputError(
            f"{folder} has keys for {keys.hpke.kem}, and this job asks for {kem}.",
            safe="It was left as it is.",
            fix="Name another folder by --work.",
        )
    return keys


def _unused(catalogue: Path, name: str) -> Path:
    """Where the next bundle of this model goes: beside those of former jobs."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (catalogue / f"{name}{number}.fedark" for number in numbers)
    return next(path for path in paths if not path.exists())


def _spent(folder: Path, contract: Contract) -> tuple[int, float]:
    """How many jobs a party's ledger holds, and what one record (or the customer) may have spent
    after this job too: epsilon at this job's delta; (0, 0) without a ledger or a mechanism.
    """
    spend = strongest_spend(contract)
    if spend is None or not (folder / LEDGER).exists():
        return 0, 0.0
    with Ledger.open(folder / LEDGER) as ledger:
        before = [
            Spend.from_dict(entry["spend"])
            for entry in ledger.entries()
            if entry["kind"] == "charge"
        ]
    alike = [
        past.of_record() if spend.unit == "record" else past
        for past in before
        if spend.unit in ("record", past.unit)
    ]
    return len(before), cost([*alike, spend], contract.privacy.delta)[0]


def customer_data(job: Job, name: str, parts: dict[str, list[Record]], dealt: Path) -> DataConfig:
    """Where a customer's records are; its part of a split is written to `dealt`."""
    if job.split is not None:
        rows = "".join(
            json.dumps({"prompt": r.prompt, "answer": r.answer}, ensure_ascii=False) + "\n"
            for r in parts[name]
        )
        write_atomic(dealt, rows.encode(), mode=0o600)
        spec = job.data.model_copy(
            update={
                "prompt": "{prompt}",
                "answer": "answer",
                "labels": (),
                "labels_file": "",
                "encoding": "",
            }
        )
        return DataConfig(file=str(dealt.resolve()), template=job.data.prompt, spec=spec)
    customer = next(customer for customer in job.customers if customer.name == name)
    spec = job.data.model_copy(update={"labels": (), "labels_file": ""})
    test = str(job.resolve(customer.test)) if customer.test else ""
    return DataConfig(file=str(job.resolve(customer.data)), test=test, spec=spec)


def policy_of(contract: Contract) -> bytes:
    """An appraisal policy that admits exactly what the contract does."""
    terms = contract.attestation
    platforms = terms.hardware.model_dump(mode="json", exclude_none=True)
    if "simulated" in terms.platforms:
        platforms["simulated"] = {
            "root": terms.simulated_root,
            "minimum_svn": terms.minimum_svn,
            "sandbox": terms.sandbox,
        }
    policies = {mode: policies.model_dump(mode="json") for mode, policies in terms.policies.items()}
    value = {"version": 1, "platforms": platforms, "policies": policies}
    return tomli_w.dumps(
        {**value, "trainer": terms.trainer, "aggregator": terms.aggregator}
    ).encode()
