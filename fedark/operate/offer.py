"""A provider's offer for a job: which models it has sealed for it, and the terms of each, signed.

The provider seals with its own replay and acceptance records, and computes the adapter's layout:
both need the weights, which nobody else has. Host and customers check the signature against the
roster; what is in the contract is compared by everyone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedark.contract.contract import EvaluationTerms, ModelTerms, now
from fedark.contract.job import DataSpec, Job, ModelSpec, model_terms
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, DataError, InputError, ModelError, ProtocolError
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import PartyKeys, SigningKey, verify_signature
from fedark.foundation.modelfolder import read_folder, shortened
from fedark.foundation.terms import Name, Terms, explain, to_tuples
from fedark.operate.party import WEIGHT_KEYS, PartyConfig
from fedark.sandbox.confine import Mode
from fedark.tuning.layout import base_shapes
from fedark.tuning.sources import model_files, resolve
from fedark.tuning.start import START, Start, read_start
from fedark.vault.bundle import seal
from fedark.vault.manifest import ModelCard, ReleasePolicy, VerifiedManifest, weights_digest
from fedark.vault.weightkey import KeyStore

__all__ = [
    "Offer",
    "groups_of",
    "model_sources",
    "rows",
    "seal_for_job",
    "start_of",
    "terms_problems",
]

OFFER_LABEL = "fedark/offer/1"
_MAX_OFFER = 4 << 20


class Offer(Terms):
    """See the module's docstring. `evaluation.own` is for the host to set."""

    version: Literal[1] = 1
    job: Name
    provider: Name
    created: str
    models: Annotated[tuple[ModelTerms, ...], Field(min_length=1)]
    evaluation: EvaluationTerms

    def sign(self, key: SigningKey) -> bytes:
        """The signed form: canonical CBOR of [body, signature]."""
        body = canonical.encode(self.model_dump())
        return canonical.encode([body, key.sign(OFFER_LABEL, body)])

    @classmethod
    def verify(cls, data: bytes, public: bytes, *, by: str) -> Offer:
        """Read a signed offer of the provider with this signing key.

        Raises:
            ProtocolError: malformed.
            Refused: somebody else signed it.
            ContractError: with every problem in it.
        """
        value = canonical.decode(data, max_bytes=_MAX_OFFER)
        if not (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(part, bytes) for part in value)
        ):
            raise ProtocolError("An offer is malformed.")
        body, signature = value
        verify_signature(public, OFFER_LABEL, body, signature, by=by)
        try:
            offer = cls.model_validate(to_tuples(canonical.decode(body, max_bytes=_MAX_OFFER)))
        except ValidationError as error:
            raise ContractError(f"offer of {by}", explain(error)) from None
        if offer.provider != by:
            raise ProtocolError(f"An offer that {by} signed names another provider.")
        return offer


def terms_problems(offer: Offer, job: Job) -> list[str]:
    """Where an offer and a job file disagree."""
    specs = {spec.name: spec for spec in job.models}
    found = {terms.name: terms for terms in offer.models}
    problems = (
        []
        if offer.provider == job.provider
        else [f"the offer is {offer.provider}'s, the job names {job.provider}"]
    )
    problems += [
        f"model {name}: not in the offer"
        for name, spec in specs.items()
        if name not in found and not spec.optional
    ]
    for name, terms in found.items():
        spec = specs.get(name)
        if spec is None:
            problems.append(f"model {name}: offered, but not in the job file")
            continue
        for key in ("task", "adapter", "training", "server", "personal"):
            if getattr(spec, key) != getattr(terms, key):
                problems.append(f"model {name}: the offer and the job file differ in {key}")
        if spec.pooling not in ("auto", terms.pooling):
            problems.append(f"model {name}: the offer and the job file differ in pooling")
        if terms.labels != job.labels:
            problems.append(f"model {name}: the offer and the job file differ in the labels")
        if bool(spec.start) != bool(terms.start):
            problems.append(
                f"model {name}: the offer and the job file differ in what it starts from"
            )
        if terms.prompt != job.data.prompt:
            problems.append(f"model {name}: the offer and the job file differ in data.prompt")
    return problems


def model_sources(job: Job) -> tuple[list[tuple[ModelSpec, Path]], dict[str, str]]:
    """The job's models that are on this machine with their folders, and the optional ones that are
    not, with the reason.

    Raises:
        ContractError: one that is not optional is missing, or all are.
    """
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
            else:
                problems.append(f"model {spec.name}: {error.told}")
    if not found and not problems:
        problems.append("none of its models is on this machine")
    if problems:
        raise ContractError(str(job.path), problems)
    return found, left_out


def seal_for_job(
    job: Job,
    spec: ModelSpec,
    source: Path,
    bundle: Path,
    *,
    extra: Mapping[str, Path],
    keys: PartyKeys,
    store: KeyStore,
    sandbox: Mode | Literal["none"],
    say: Callable[[str], None],
) -> tuple[VerifiedManifest, ModelTerms]:
    """Seal one model of a job with the provider's own records, and keep its key.

    `say` is told what of the folder is not sealed, and what kind of model it is taken for.
    """
    if left_out := read_folder(source).left_out:
        say(f"model {spec.name}: not part of the model, so not sealed: {shortened(left_out)}")
    base = base_shapes(source, spec.task, job.labels, spec.pooling)
    if job.privacy.mechanism in ("example-distributed", "example-local"):
        from fedark.tuning.separable import require_separable  # torch: not for a host

        require_separable(base.model.config.to_dict())  # type: ignore[operator,union-attr]
    termed = partial(
        model_terms,
        spec,
        prompt=job.data.prompt,
        labels=job.labels,
        base=base,
        layout=base.layout(spec.adapter),
    )
    start = start_of(job, spec, termed(bundle="0" * 96, weights="0" * 96), source)
    card = {
        "name": spec.name,
        "title": spec.title or spec.name,
        "licence": spec.licence,
        "task": spec.task,
        "base": spec.source,
    }
    with tempfile.TemporaryDirectory() as scratch:
        sealed = dict(extra)
        if start is not None:
            sealed[START] = Path(scratch) / START
            sealed[START].write_bytes(start.values)
        manifest, key = seal(
            source,
            bundle,
            provider=keys.signing,
            card=ModelCard.model_validate(card),
            policy=ReleasePolicy(
                expires=(now() + timedelta(days=job.days_valid)).isoformat(timespec="seconds"),
                platforms=job.attestation.platforms,
                sandbox=sandbox,
                minimum_cohort=job.protection.minimum_cohort,
                kem=(job.attestation.kem,),
            ),
            extra=sealed,
        )
    store.put(manifest, key)
    terms = termed(
        bundle=manifest.digest().hex(),
        weights=manifest.weights().hex(),
        start=start.digest if start is not None else "",
    )
    say(f"model {spec.name}: {terms.taken}")
    _try_own_records(job, terms, source)
    return manifest, terms


def start_of(job: Job, spec: ModelSpec, terms: ModelTerms, source: Path) -> Start | None:
    """The adapter that a model of the job starts from, if it starts from one.

    Args:
        terms: the model's; its `weights` are put in here.
        source: the base's folder.

    Raises:
        ModelError: it does not fit, with every reason.
    """
    folder = job.resolve(spec.start)
    if folder is None:
        return None
    digests = {}
    for name, path in model_files(source).items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha384").digest()
    return read_start(folder, terms.model_copy(update={"weights": weights_digest(digests).hex()}))


def _try_own_records(job: Job, terms: ModelTerms, source: Path) -> None:
    """Run the model on the provider's replay and acceptance records, before a customer has to.

    Raises:
        DataError: it fails on one.
    """
    own = [path for path in (job.replay, job.acceptance) if path is not None]
    if not own:
        return
    from fedark.tuning.task import TaskModel  # torch: not for a host
    from fedark.tuning.trial import unusable

    files = {name: bytearray(path.read_bytes()) for name, path in model_files(source).items()}
    task = TaskModel.load(files, terms)
    for path in own:
        records = job.data.read(path, job.labels)
        if failing := unusable(task, records):
            what = f"the model {terms.name} or its tokenizer fails on {len(failing)} records."
            raise DataError(str(path), records[failing[0]].line, what, fix="Remove them.")


def make_offer(folder: Path, job: Job, say: Callable[[str], None]) -> tuple[bytes, dict[str, str]]:
    """Seal a job's models in a provider's folder and sign the offer; returns it, and the models
    left out with the reason. `say` is told of each model.

    Raises:
        InputError: `folder` is no provider's, or the job names another provider.
        ContractError: models or records are missing, with every problem.
    """
    config = PartyConfig.read(folder)
    if config.role != "provider" or config.name != job.provider:
        raise InputError(
            f"{folder} is not the folder of {job.provider}, whom the job file names as provider."
        )
    sources, left_out = model_sources(job)
    keys, store = PartyKeys.load(folder / "party.keys"), KeyStore(folder / WEIGHT_KEYS)
    extra = {}
    for name, path in (("replay", job.replay), ("acceptance", job.acceptance)):
        if path is not None:
            extra[f"{name}.jsonl"] = folder / f"{name}.jsonl"
            write_atomic(extra[f"{name}.jsonl"], rows(path, job.data, job.labels), mode=0o600)
    catalogue = (folder / config.catalogue).resolve()
    catalogue.mkdir(mode=0o700, parents=True, exist_ok=True)
    models = []
    stamp = now()
    for spec, source in sources:
        bundle = catalogue / f"{spec.name}-{stamp:%Y%m%dT%H%M%S%f}.fedark"
        sealed = seal_for_job(
            job,
            spec,
            source,
            bundle,
            extra=extra,
            keys=keys,
            store=store,
            sandbox=config.sandbox,
            say=say,
        )
        models.append(sealed[1])
    offer = Offer(
        job=job.name,
        provider=config.name,
        created=stamp.isoformat(timespec="seconds"),
        models=tuple(models),
        evaluation=EvaluationTerms(
            acceptance="extra/acceptance.jsonl" if job.acceptance else "", groups=groups_of(job)
        ),
    )
    return offer.sign(keys.signing), left_out


def rows(path: Path, spec: DataSpec, labels: tuple[str, ...]) -> bytes:
    """The provider's records as the enclave reads them: JSON lines of prompt, answer and group."""
    values: list[dict[str, Any]] = [
        {"prompt": record.prompt, "answer": record.answer, "group": record.group or "all"}
        for record in spec.read(path, labels, grouped=True)
    ]
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def groups_of(job: Job) -> tuple[str, ...]:
    """The groups of the acceptance set's records."""
    if job.acceptance is None:
        return ()
    return tuple(
        sorted(
            {
                json.loads(row)["group"]
                for row in rows(job.acceptance, job.data, job.labels).splitlines()
            }
        )
    )
