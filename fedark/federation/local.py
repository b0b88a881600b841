"""A whole federation on one machine: made from a job file, for `fedark simulate` and `fedark demo` alike.

    WORK/catalogue/NAME.fedark/   sealed bundles
    WORK/parties/NAME/            one folder a party (`fedark.federation.party`)
    WORK/contract.cbor            what they will be asked to sign

On one machine one person plays all parties, and here one function hands out their keys and rosters. Between companies each
party makes its own folder; that only the public halves are exchanged is the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.contract import Contract, Party, now
from fedark.errors import ContractError, FedarkError, InputError, ModelError
from fedark.federation.consent import Consent
from fedark.federation.party import WEIGHT_KEYS, DataConfig, PartyConfig, write_party
from fedark.files import write_atomic
from fedark.job import DataSpec, Job, ModelSpec, model_terms
from fedark.keys import PartyKeys
from fedark.masking import masked_policy, protection_warnings
from fedark.measurement import measure_enclave
from fedark.mechanism import solved
from fedark.tuning.data import Record, dirichlet_split, read_records, split_train_test
from fedark.tuning.layout import adapter_layout
from fedark.tuning.sources import resolve
from fedark.vault.bundle import seal
from fedark.vault.manifest import ModelCard, ReleasePolicy
from fedark.vault.weightkey import KeyStore

__all__ = ["Federation", "prepare"]

Sandbox = Literal["namespaces", "landlock", "none"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Federation:
    """What `prepare` made.

    Attributes:
        work: the folder of everything.
        contract: what the parties will sign.
        left_out: optional models that are not on this machine, with the reason.
    """

    work: Path
    contract: Contract
    left_out: dict[str, str]

    def folder(self, party: str) -> Path:
        """The folder of a party."""
        return self.work / "parties" / party


def prepare(job: Job, work: Path, *, sandbox: Sandbox, say: Say = lambda text: None) -> Federation:
    """Make keys, rosters, a simulated platform, sealed bundles and the contract for a job.

    Args:
        job: checked already.
        work: an empty or missing folder; a former one of `prepare` is replaced.
        sandbox: the weakest mode that the contract admits.
        say: told of what goes on.

    Raises:
        ContractError: records, labels or models do not fit, with every problem at once; nothing was written.
        InputError: `work` is something else.
        StorageError: the disk is full.
    """
    sources, left_out = _sources(job, say)
    records, own = _checked_records(job)
    for line in protection_warnings(job.protection, [(spec.name, spec.adapter) for spec, _ in sources]):
        say(line)
    _fresh(work)
    begun = now()
    root = SimulatedRoot(now=begun)
    collateral = {SIMULATED_ROOT: root.certificate, SIMULATED_CRL: root.crl(now=begun)}
    keys = {name: PartyKeys() for name in (job.provider, job.aggregator, *job.customer_names)}
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
        for name, key in keys.items()
    ]
    for party in roster:
        write_party(
            work / "parties" / party.name,
            PartyConfig(
                name=party.name,
                role=party.role,
                catalogue="../../catalogue",
                sandbox=sandbox,
                minimum_cohort=job.protection.minimum_cohort,
                data=_data(job, party.name, records, work) if party.role == "customer" else None,
            ),
            keys=keys[party.name],
            roster=roster,
            collateral=collateral,
            device=root.issue(now=begun) if party.role != "provider" else None,
        )
    models = [
        model_terms(
            spec,
            bundle=_seal(job, spec, folder, work, keys[job.provider], sandbox, say),
            labels=job.labels,
            layout=adapter_layout(folder, spec.task, job.labels, spec.adapter),
        )
        for spec, folder in sources
    ]
    say("measuring the enclaves")
    measured = {
        role: {name: value.hex() for name, value in measure_enclave(role).registers.items()}
        for role in ("trainer", "aggregator")
    }
    contract = Contract.build(
        {
            "job": job.name,
            "created": begun.isoformat(timespec="seconds"),
            "expires": (begun + timedelta(days=job.days_valid)).isoformat(timespec="seconds"),
            "seed": job.seed,
            "rounds": job.rounds,
            "parties": roster,
            "models": models,
            "attestation": {
                "platforms": ["simulated"],
                "simulated_root": root.sha256,
                "sandbox": sandbox,
                **measured,
            },
            "protection": job.protection,
            "privacy": solved(job.privacy, job.rounds),
            "evaluation": {
                "acceptance": "extra/acceptance.jsonl" if job.acceptance else "",
                "groups": _groups(job),
                "own": own,
            },
            "deliver_to": job.deliver_to,
        },
        str(job.path),
    )
    if contract.protection.mode == "masked":
        masked_policy(contract, "")  # the layouts are known only now
    write_atomic(work / "contract.cbor", contract.encode())
    for party in (contract.provider, *contract.customers):
        Consent(work / "parties" / party.name).approve(contract)  # whoever runs all of it here has agreed to it
    return Federation(work, contract, left_out)


def _sources(job: Job, say: Say) -> tuple[list[tuple[ModelSpec, Path]], dict[str, str]]:
    found, left_out, problems = [], {}, []
    for spec in job.models:
        source = spec.source
        if source.startswith("dir:"):
            source = f"dir:{job.resolve(source.removeprefix('dir:'))}"
        try:
            found.append((spec, resolve(source)))
        except ModelError as error:
            if spec.optional:
                left_out[spec.name] = error.what
                say(f"model {spec.name} is left out: {error.what}")
            else:
                problems.append(f"model {spec.name}: {error.what}")
    if not found and not problems:
        problems.append("none of its models is on this machine")
    if problems:
        raise ContractError(str(job.path), problems)
    return found, left_out


def _checked_records(job: Job) -> tuple[dict[str, list[Record]], bool]:
    """Read every data file of the job, so that all problems are found now.

    Returns:
        The split's parts, if there is one; and whether every customer holds records out.
    """
    problems: list[str] = []
    held_out: list[bool] = []
    parts: dict[str, list[Record]] = {}
    spec = job.data

    def read(path: Path | None) -> list[Record]:
        try:
            return read_records(path, spec.prompt, spec.answer, job.labels) if path is not None else []
        except FedarkError as error:
            problems.append(error.what)
            return []

    def split(records: list[Record]) -> None:
        train, test = split_train_test(records, spec.test_fraction)
        held_out.append(bool(train and test))

    for customer in job.customers:
        mine, test = read(job.resolve(customer.data)), read(job.resolve(customer.test))
        if customer.test:
            held_out.append(bool(test))
        else:
            split(mine)
    for path in (job.replay, job.acceptance):
        read(path)
    if job.split is not None and (records := read(job.resolve(job.split.file))):
        try:
            dealt = dirichlet_split(records, job.split.customers, job.split.alpha, job.seed)
            parts = dict(zip(job.customer_names, dealt, strict=True))
            for part in dealt:
                split(part)
        except InputError as error:
            problems.append(error.what)
    if problems:
        raise ContractError(str(job.path), problems)
    return parts, all(held_out)


def _groups(job: Job) -> tuple[str, ...]:
    """The groups of the acceptance set's records."""
    if job.acceptance is None:
        return ()
    return tuple(sorted({json.loads(row)["group"] for row in _rows(job.acceptance, job.data, job.labels).splitlines()}))


def _fresh(work: Path) -> None:
    if work.exists() and any(work.iterdir()):
        if not (work / "parties").is_dir():
            raise InputError(f"{work} is not empty and not a former federation.", safe="It was left as it is.")
        for name in ("parties", "catalogue"):
            shutil.rmtree(work / name, ignore_errors=True)
    (work / "catalogue").mkdir(parents=True, exist_ok=True)
    (work / "parties").mkdir(mode=0o700, exist_ok=True)


def _data(job: Job, name: str, parts: dict[str, list[Record]], work: Path) -> DataConfig:
    if job.split is not None:
        # A split's parts are written in the customer's own folder: from there on it is a customer like any other.
        rows = "".join(json.dumps({"prompt": r.prompt, "answer": r.answer}, ensure_ascii=False) + "\n" for r in parts[name])
        write_atomic(work / "parties" / name / "records.jsonl", rows.encode())
        spec = job.data.model_copy(update={"prompt": "{prompt}", "answer": "answer", "labels": (), "labels_file": ""})
        return DataConfig(file="records.jsonl", spec=spec)
    customer = next(customer for customer in job.customers if customer.name == name)
    spec = job.data.model_copy(update={"labels": (), "labels_file": ""})
    test = str(job.resolve(customer.test)) if customer.test else ""
    return DataConfig(file=str(job.resolve(customer.data)), test=test, spec=spec)


def _seal(job: Job, spec: ModelSpec, folder: Path, work: Path, keys: PartyKeys, sandbox: Sandbox, say: Say) -> str:
    """Seal one model with the provider's own records; returns the bundle's digest in hex."""
    say(f"sealing {spec.name}")
    provider = work / "parties" / job.provider
    extra = {}
    for name, path in (("replay", job.replay), ("acceptance", job.acceptance)):
        if path is not None:
            extra[f"{name}.jsonl"] = provider / f"{name}.jsonl"
            write_atomic(extra[f"{name}.jsonl"], _rows(path, job.data, job.labels))
    manifest, key = seal(
        folder,
        work / "catalogue" / f"{spec.name}.fedark",
        provider=keys.signing,
        card=ModelCard.model_validate(
            {
                "name": spec.name,
                "title": spec.title or spec.name,
                "licence": spec.licence,
                "task": spec.task,
                "base": spec.source,
            }
        ),
        policy=ReleasePolicy(
            expires=(now() + timedelta(days=job.days_valid)).isoformat(timespec="seconds"),
            platforms=("simulated",),
            sandbox=sandbox,
            minimum_cohort=job.protection.minimum_cohort,
        ),
        extra=extra,
    )
    KeyStore(provider / WEIGHT_KEYS).put(manifest, key)
    return manifest.digest().hex()


def _rows(path: Path, spec: DataSpec, labels: tuple[str, ...]) -> bytes:
    """The provider's records as the enclave reads them: JSON lines of prompt, answer and group."""
    records = read_records(path, spec.prompt, spec.answer, labels)
    groups = read_records(path, f"{{{spec.group}}}", spec.answer) if spec.group else []
    rows: list[dict[str, Any]] = [
        {"prompt": record.prompt, "answer": record.answer, "group": groups[index].prompt if groups else "all"}
        for index, record in enumerate(records)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
