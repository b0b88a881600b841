"""What `import fedark` offers: a job run in this process, and the single steps that a provider, a
customer or an auditor does by hand.

Nothing here is needed by an enclave, and nothing heavy is imported until it is called.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedark.contract.contract import now as present
from fedark.contract.job import Job
from fedark.foundation.errors import EvidenceRefused, InputError, ProtocolError

if TYPE_CHECKING:
    from rich.console import Console

    from fedark.attestation.claims import Claims
    from fedark.auditing.one_run import AuditReport
    from fedark.contract.plan import Plan
    from fedark.mall.compare import Comparison
    from fedark.report.verify import Verified
    from fedark.vault.manifest import VerifiedManifest

__all__ = [
    "Job",
    "Result",
    "audit",
    "compare",
    "plan",
    "seal",
    "simulate",
    "taste",
    "verify_dossier",
    "verify_evidence",
]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a job brought. A notebook shows its tables, `print` too.

    Attributes:
        report: the aggregator's own, of sums over the customers.
        local: each customer's figures: customer -> model -> measurement -> [right, records, loss].
        adapters: model -> folder of its adapter, in the form that `peft` loads.
        dossier: the file that proves the run (`verify_dossier`).
    """

    report: Mapping[str, Any]
    local: Mapping[str, Mapping[str, Mapping[str, list[float]]]]
    adapters: Mapping[str, Path]
    dossier: Path

    @cached_property
    def figures(self) -> dict[str, dict[str, float]]:
        """Model -> percent right on the acceptance set: "before" and "together", and "alone" and
        "personal" (means over the customers) where the job trained these.
        """
        names = {
            "before": "before",
            "local": "alone",
            "federated": "together",
            "personal": "personal",
        }
        found: dict[str, dict[str, float]] = {}
        for model, value in self.report["models"].items():
            found[model] = {}
            for key, name in names.items():
                entries = [
                    entry
                    for place, entry in value["metrics"].items()
                    if place.startswith(f"{key}/acceptance/")
                ]
                if total := sum(entry["total"] for entry in entries):
                    right = sum(entry["correct"] for entry in entries)
                    found[model][name] = 100 * right / total
        return found

    @cached_property
    def learning(self) -> dict[str, list[tuple[int, float, float]]]:
        """Model -> (round, percent right on the acceptance set, loss in nats a record) of each
        measured round.
        """
        points = (self.report.get("curve") or {}).get("points", [])
        return {
            model: [
                (point["round"], 100 * found["accuracy"], found["loss"])
                for point in points
                if (found := point["models"][model])["records"]
            ]
            for model in self.report["models"]
        }

    @cached_property
    def curves(self) -> dict[str, list[float]]:
        """Model -> mean training loss of each round; empty under a privacy mechanism, which lets
        none leave.
        """
        return {
            name: list(model.get("train_loss") or [])
            for name, model in self.report["models"].items()
        }

    def __str__(self) -> str:
        return self._shown().export_text()

    def _repr_html_(self) -> str:
        return self._shown().export_html(
            inline_styles=True, code_format="<pre style='line-height: 1.2'>{code}</pre>"
        )

    def _shown(self) -> Console:
        from rich.console import Console

        from fedark.report.outcome import render

        console = Console(record=True, file=io.StringIO(), width=100)
        console.print(render(self.report, self.local))
        return console


def simulate(
    job: Job | Path | str,
    work: Path | str = "fedark-work",
    *,
    say: Say = lambda text: None,
    drop: Mapping[str, int] | None = None,
) -> Result:
    """Run a job with all its parties in this process: the same stages, messages and enclave code as
    between companies, without sandbox and network.

    >>> import fedark
    >>> result = fedark.simulate("job.toml")
    >>> sorted(result.figures["tiny"])
    ['alone', 'before', 'personal', 'together']
    >>> len(result.curves["tiny"])
    2

    Args:
        job: a job, or the path of a job file.
        work: folder for keys, sealed models, adapters and reports; former runs in it stay.
        say: told of what goes on.
        drop: customer -> the round from which on it answers nothing.

    Raises:
        FedarkError: what is wrong, with what to do.
    """
    from fedark.report.outcome import local_reports
    from fedark.simulation import simulate as simulation
    from fedark.stages.dossier import DOSSIER

    job = job if isinstance(job, Job) else Job.load(Path(job))
    with simulation(job, Path(work), say=say, drop=drop or {}) as running:
        report = running.run()
        contract = running.federation.contract
        own = Path(work) / "parties" / contract.provider.name / "runs" / report["run_id"]
        adapters = {
            model: own / f"adapter-{model}"
            for model in report["models"]
            if (own / f"adapter-{model}").is_dir()
        }
        local = local_reports(contract, Path(work), report["run_id"])
        return Result(report, local, adapters, own / DOSSIER)


def taste(
    job: Job | Path | str, work: Path | str = "fedark-work", *, say: Say = lambda text: None
) -> Result:
    """Judge every base model of a job before anything is tuned, in one round: the head that follows
    in closed form from sums over all customers' records, and its figures.

    >>> import fedark
    >>> result = fedark.taste("job.toml")
    >>> sorted(result.figures["tiny"])
    ['before', 'together']

    Args:
        job: a job, or the path of a job file; of its terms of training none counts.
        work, say: as `simulate` takes them.

    Raises:
        FedarkError: what is wrong, with what to do.
    """
    job = job if isinstance(job, Job) else Job.load(Path(job))
    return simulate(job.tasting(), work, say=say)


def compare(
    job: Job | Path | str,
    work: Path | str = "fedark-work",
    *,
    models: Sequence[str] = (),
    finalists: int = 0,
    say: Say = lambda text: None,
) -> Comparison:
    """Taste every base model of a job, tune the best of them, and say which is the one and why.

    What was found is kept in `work`: a comparison that was killed goes on there.

    >>> import fedark
    >>> found = fedark.compare("job.toml")
    >>> [(one.name, one.stage) for one in found.candidates]
    [('tiny', 'tuned')]

    Args:
        job: a job, or the path of a job file.
        work, say: as `simulate` takes them.
        models: names of the candidates; all of the job's where none are named.
        finalists: how many are tuned; as the job file says where it is 0.

    Raises:
        FedarkError: what cannot be compared; a candidate that fails is named in what is returned.
    """
    from fedark.mall.compare import compare as comparison

    job = job if isinstance(job, Job) else Job.load(Path(job))
    return comparison(job, Path(work), models=models, finalists=finalists, say=say)


def plan(
    job: Job | Path | str | None = None, *, override: tuple[str, ...] = (), **terms: Any
) -> Plan:
    """Terms for a private job: rounds, sampling rate, clip norm and learning rate for an epsilon,
    with what noise leaves of the job. Nothing is started.

    >>> import fedark
    >>> found = fedark.plan(records=10_000, customers=8, values=29_568, epsilon=3.0)
    >>> found.rounds, found.learning_rate
    (200, 82.0)

    Args:
        job: its records, customers, adapters and privacy count where `terms` say nothing else.
        override: as `Job.load` takes them.
        terms: as `fedark.contract.plan.plan` takes them; epsilon 3 where nothing says more.

    Raises:
        ContractError: no such job can be, with every problem.
    """
    from fedark.contract.plan import plan as propose

    if job is None:
        return propose(**{"epsilon": 3.0} | terms)
    from fedark.simulation.check import planned

    read = job if isinstance(job, Job) else Job.load(Path(job), override)
    return propose(**planned(read) | terms)


def seal(
    source: Path | str,
    bundle: Path | str,
    *,
    key: Path | str,
    name: str,
    licence: str,
    task: str = "classification",
    platforms: tuple[str, ...] = ("simulated",),
    sandbox: str = "landlock",
    days: int = 365,
) -> VerifiedManifest:
    """Encrypt a base model for release to attested enclaves alone.

    >>> import fedark
    >>> manifest = fedark.seal("base", "tiny.fedark", key="maker.keys", name="tiny", licence="MIT")
    >>> manifest.card.name
    'tiny'

    Args:
        source: the model's folder: config.json, safetensors, tokenizer.
        bundle: the folder to make, NAME.fedark.
        key: the provider's key file; one is made where there is none. The weight key is kept beside
            it, in `weight-keys/`: without it nobody can open the bundle.
        name: of the model, in its card.
        licence: in its card.
        task: in its card: "classification" or "instruction".
        platforms: whose evidence the release policy admits.
        sandbox: the weakest sandbox mode that it admits.
        days: until the release policy expires.

    Raises:
        FedarkError: what is wrong, with every problem; nothing was written.
    """
    from pydantic import ValidationError

    from fedark.foundation.keys import PartyKeys
    from fedark.foundation.terms import explain
    from fedark.vault.bundle import seal as seal_bundle
    from fedark.vault.bundle import select
    from fedark.vault.manifest import ModelCard, ReleasePolicy
    from fedark.vault.weightkey import KeyStore

    source, bundle, key = Path(source), Path(bundle), Path(key)
    try:
        card = ModelCard.model_validate(
            {"name": name, "title": name, "licence": licence, "task": task}
        )
        expires = (present() + timedelta(days=days)).isoformat(timespec="seconds")
        policy = ReleasePolicy.model_validate(
            {"expires": expires, "platforms": platforms, "sandbox": sandbox}
        )
    except ValidationError as error:
        problems = "\n".join(f"  - {problem}" for problem in explain(error))
        raise InputError(f"This does not fit:\n{problems}", safe="Nothing was written.") from None
    select(source)  # no key is made for a folder that cannot be sealed
    if not key.exists():
        PartyKeys().save(key)
    signing = PartyKeys.load(key).signing
    manifest, weight_key = seal_bundle(source, bundle, provider=signing, card=card, policy=policy)
    try:
        KeyStore(key.parent / "weight-keys").put(manifest, weight_key)
    except BaseException:
        shutil.rmtree(bundle)  # nobody could ever open it
        raise
    return manifest


def audit(
    job: Job | Path | str | None = None,
    *,
    epsilon: float | None = None,
    rounds: int | None = None,
    canaries: int = 1000,
    records: int = 2000,
    model: str = "",
    say: Say = lambda text: None,
) -> AuditReport:
    """Attack a privacy claim with one training run: a measured lower bound on epsilon beside the
    claimed one.

    >>> import fedark
    >>> report = fedark.audit(rounds=2, canaries=20)
    >>> report.claimed
    3.0

    Args:
        job: with a privacy mechanism; None for a small embedded task at epsilon 3.
        epsilon: the claim, if not the job's; infinite trains without noise.
        rounds: claimed and trained, if not the job's (60).
        canaries: Dirac canaries.
        records: at most so many of the job's records, and half as many flipped ones.
        model: which of the job's models; by default the first.
        say: told of what goes on.
    """
    from fedark.auditing.claims import audit_claim

    read = job if job is None or isinstance(job, Job) else Job.load(Path(job))
    return audit_claim(
        read,
        model=model,
        epsilon=epsilon,
        rounds=rounds,
        canaries=canaries,
        records=records,
        say=say,
    )


def verify_dossier(
    dossier: Path | str, *, root: str = "", adapters: Iterable[Path | str] = ()
) -> Verified:
    """What a run's dossier proves: contract, enclaves, releases, sums, figures, epsilon, adapters.

    >>> import fedark
    >>> result = fedark.simulate("job.toml")
    >>> verified = fedark.verify_dossier(result.dossier, adapters=result.adapters.values())
    >>> verified.proven[0].by
    'the provider and 3 customers'

    Args:
        dossier: the file.
        root: SHA-256 (hex) of the simulated platform's root, as you know it.
        adapters: folders that shall be this job's.

    Raises:
        DossierRefused: with every reason why it does not hold.
        InputError, ModelError: a file cannot be read, or a folder holds no adapter.
    """
    from fedark.report.verify import read_dossier, verify_dossier
    from fedark.tuning.adapter import adapter_digest

    digests = dict(adapter_digest(Path(folder)) for folder in adapters)
    return verify_dossier(read_dossier(Path(dossier)), root=root, adapters=digests)


def verify_evidence(
    evidence: bytes,
    policy: Path | str,
    *,
    role: str = "trainer",
    collateral: Mapping[str, bytes] | None = None,
    nonce: bytes | None = None,
    now: datetime | None = None,
) -> Claims:
    """The claims of an enclave's evidence, if it holds: signature and chain of its platform, the
    binding to its keys, and everything that an appraisal policy asks for.

    >>> import fedark
    >>> claims = fedark.verify_evidence(evidence, "policy.toml", collateral=collateral)
    >>> claims.sandbox
    'none'

    Args:
        evidence: as an enclave sends it.
        policy: a `policy.toml` (`fedark.attestation.appraisal`).
        role: "trainer" or "aggregator".
        collateral: roots, revocation lists and vendors' statements by name
            (`fedark.attestation.trust`).
        nonce: the challenge that it must answer; without one nothing says that it is fresh.
        now: the time to verify at; the present by default.

    Raises:
        EvidenceRefused: with every reason.
    """
    from fedark.attestation import policy as checks
    from fedark.attestation.appraisal import AppraisalPolicy
    from fedark.attestation.evidence import Evidence
    from fedark.attestation.terms import AttestationTerms, HardwareTerms
    from fedark.attestation.trust import verifiers

    at, subject = now or present(), f"the {role}"
    own = AppraisalPolicy.read(Path(policy), now=at)
    platforms = own.rules.platforms
    terms = AttestationTerms(
        platforms=own.platforms,
        simulated_root=platforms.simulated.root if platforms.simulated is not None else "",
        sandbox="none",  # what the policy asks for counts, below
        hardware=HardwareTerms(**{k: getattr(platforms, k) for k in HardwareTerms.model_fields}),
        trainer={},
        aggregator={},
    )
    try:
        decoded = Evidence.decode(evidence)
    except ProtocolError as error:
        raise EvidenceRefused(subject, [error.what]) from None
    verifier = verifiers(terms, collateral or {}, own).get(decoded.platform)
    if verifier is None:
        raise EvidenceRefused(
            subject, ["the policy does not admit its platform, or its collateral is missing"]
        )
    claims = verifier.verify(decoded.token, now=at)
    binding = decoded.binding
    demands = checks.AllOf((checks.BoundTo(binding), own.check(role, claims.platform)))
    reasons = list(demands.reasons(claims, now=at))
    if binding.role != role:
        reasons.append(f"its role is {binding.role}")
    if nonce is not None and binding.nonce != nonce:
        reasons.append("it answers another challenge")
    if reasons:
        raise EvidenceRefused(subject, dict.fromkeys(reasons))
    return claims
