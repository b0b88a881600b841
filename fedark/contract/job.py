"""The job file: one TOML that `fedark simulate` and `fedark demo` both run.

A job file says what a contract will say, plus what only one machine knows: where the files are.
`Job.load` checks all of it at the start and reports every problem in one answer, with the line of
the file where it can. `docs/job-file.md` explains each key.
"""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedark.attestation.terms import HardwareTerms, Registers
from fedark.contract.contract import (
    AdapterTerms,
    CurveTerms,
    ModelTerms,
    PersonalTerms,
    Pooling,
    PrivacyTerms,
    ProtectionTerms,
    ServerTerms,
    TasteTerms,
    TrainingTerms,
    dropout_problem,
    mean_problems,
)
from fedark.contract.privacy import privacy_problems
from fedark.contract.protection import protection_problems
from fedark.contract.taste import taste_problems
from fedark.foundation.errors import ContractError, DataError, InputError
from fedark.foundation.keys import HYBRID, Kem
from fedark.foundation.terms import Finite, Name, Terms, explain, explain_at, to_tuples
from fedark.records.reading import Record, alike_labels, read_labels, read_records
from fedark.records.template import Template

__all__ = ["AttestationSpec", "CustomerSpec", "DataSpec", "Job", "ModelSpec", "SplitSpec"]

_MAX_JOB_BYTES = 1 << 20
_ESCAPES = {"unicode-escape", "raw-unicode-escape", "idna", "punycode"}

JobReader = Literal["all", "provider", "host"]


class _JobSection(Terms):
    """The job as a whole.

    Attributes:
        name: what the job is called; reports and contracts carry it.
        seed: of every draw in the job that is not secret: order of batches, initial adapters.
        rounds: how many times the customers train and their updates are summed, at most (`curve`).
        days_valid: days until the contract expires; nothing is released after that.
    """

    name: Name
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    days_valid: Annotated[int, Field(ge=1, le=366)] = 30


class _PartySection(Terms):
    """One of the two parties that every job has besides its customers: the provider, who owns the
    base models, and the aggregator, whose host relays messages.

    Attributes:
        name: the party's name in the contract.
    """

    name: Name


class CustomerSpec(Terms):
    """One customer.

    Attributes:
        name: the party's name in the contract.
        data: its file of records.
        test: its own file of held-out records; without one, `data.test_fraction` of its records
            are held out.
    """

    name: Name
    data: str
    test: str = ""


class SplitSpec(Terms):
    """One file split over `customers` by a Dirichlet draw over the labels (arXiv:1909.06335): for
    simulation and demo.

    Attributes:
        file: the file of all records.
        customers: how many customers share it.
        alpha: concentration; the smaller, the more unlike the customers.
        prefix: their names are this and a number.
    """

    file: str
    customers: Annotated[int, Field(ge=2, le=10_000)]
    alpha: Annotated[Finite, Field(gt=0)]
    prefix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] = "customer"


class DataSpec(Terms):
    """How a record becomes a prompt and an answer.

    Attributes:
        prompt: a template over column names, such as "{desk} desk: {message}".
        answer: the column of the answer (the class, or the text that the model is to give).
        labels, labels_file: the admissible answers, in order; at most one of the two.
        encoding: of files that are not UTF-8, such as "cp1252"; "" refuses them.
        unusable: whether a record that cannot be used, because it is empty or because the model
            fails on it, has its file refused or is left out.
        test_fraction: of each customer's records, held out of training (chosen by hash, so stable).
        group: column by which the acceptance report is split, or "".
    """

    prompt: str
    answer: str
    labels: tuple[str, ...] = ()
    labels_file: str = ""
    encoding: str = ""
    unusable: Literal["refuse", "leave-out"] = "refuse"
    test_fraction: Annotated[Finite, Field(ge=0, le=0.9)] = 0.2
    group: str = ""

    @model_validator(mode="after")
    def _template(self) -> Self:
        try:
            Template.parse(self.prompt)
        except InputError as error:
            raise ValueError(f"{error.what} {error.fix}") from None
        if self.labels and self.labels_file:
            raise ValueError("labels and labels_file are alternatives")
        if self.encoding and not _is_text_encoding(self.encoding):
            raise ValueError(f"Python knows no encoding {self.encoding!r} of texts")
        return self

    def read(
        self,
        path: Path,
        labels: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
        *,
        grouped: bool = False,
    ) -> list[Record]:
        """The records of a file.

        Args:
            labels: the admissible answers, if there are any.
            say: told which records were left out.
            grouped: the file has the column `group` too.

        Raises:
            DataError: see `read_records`.
        """
        leave_out = say if self.unusable == "leave-out" else None
        return read_records(
            path,
            self.prompt,
            self.answer,
            labels,
            group=self.group if grouped else "",
            encoding=self.encoding,
            leave_out=leave_out,
        )


class _ProviderData(Terms):
    """The provider's own records. They are sealed along with the weights.

    Attributes:
        replay: a file of records that training mixes in against forgetting.
        acceptance: a file of records that every model is measured on.
    """

    replay: str = ""
    acceptance: str = ""


class ModelSpec(Terms):
    """One base model: where it comes from and how its adapter is trained.

    Attributes:
        name: what the contract and the reports call the model.
        task: sequence classification, or instruction tuning of a causal language model.
        title: the name of the model in its card.
        licence: the licence in its card.
        source: "package:NAME" (an installed package that carries one), "dir:PATH" or
            "hub:ORG/NAME".
        pooling: as in `ModelTerms`; "auto" goes by the model's files, and the report says how.
        optional: leave the model out, with a notice, where its source is not on this machine.
        start: the folder of an adapter that fedark made, or of a finished run, which the job goes
            on from; "": it starts from the base itself. On the provider's machine alone.
    """

    name: Name
    source: Annotated[str, Field(pattern=r"^(package|dir|hub):.+$")]
    task: Literal["classification", "instruction"]
    pooling: Pooling = "auto"
    optional: bool = False
    start: str = ""
    title: str = ""
    licence: str = "unstated"
    adapter: AdapterTerms = AdapterTerms()
    training: TrainingTerms = TrainingTerms()
    server: ServerTerms = ServerTerms()
    personal: PersonalTerms = PersonalTerms()

    @model_validator(mode="after")
    def _dropped(self) -> Self:
        if problem := dropout_problem(self.adapter, self.training):
            raise ValueError(problem)
        return self


class AttestationSpec(Terms):
    """Which evidence the contract will admit, beyond what is measured on this machine.

    Attributes:
        platforms: by name.
        kem: of every key that something is sealed to.
        hardware: what is asked of each hardware platform among them.
        trainer, aggregator: reference values of guest images, such as "tdx.mrtd".
    """

    platforms: Annotated[tuple[str, ...], Field(min_length=1)] = ("simulated",)
    kem: Kem = HYBRID
    hardware: HardwareTerms = HardwareTerms()
    trainer: Registers = Field(default_factory=dict)
    aggregator: Registers = Field(default_factory=dict)


class _CompareSection(Terms):
    """How `fedark compare` chooses between the models.

    Attributes:
        finalists: how many of the candidates are tuned, the best by the taster.
    """

    finalists: Annotated[int, Field(ge=1, le=1000)] = 1


class _Deliver(Terms):
    """Who gets the adapter. Without this table: the provider and every customer.

    Attributes:
        to: names of parties.
    """

    to: Annotated[tuple[Name, ...], Field(min_length=1)]


class JobFile(Terms):
    job: _JobSection
    provider: _PartySection
    aggregator: _PartySection
    customers: tuple[CustomerSpec, ...] = ()
    split: SplitSpec | None = None
    data: DataSpec
    provider_data: _ProviderData = _ProviderData()
    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    protection: ProtectionTerms = ProtectionTerms()
    privacy: PrivacyTerms = PrivacyTerms()
    attestation: AttestationSpec = AttestationSpec()
    curve: CurveTerms = CurveTerms()
    taste: TasteTerms = TasteTerms()
    compare: _CompareSection = _CompareSection()
    deliver: _Deliver | None = None


class Job:
    """A job file that was read and checked.

    Attributes:
        path: the file; relative paths in it are relative to its folder.
        labels: the admissible answers, in order.
    """

    def __init__(self, path: Path, parsed: JobFile, labels: tuple[str, ...]) -> None:
        self.path = path
        self.name = parsed.job.name
        self.seed = parsed.job.seed
        self.rounds = parsed.job.rounds
        self.days_valid = parsed.job.days_valid
        self.provider = parsed.provider.name
        self.aggregator = parsed.aggregator.name
        self.customers = parsed.customers
        self.split = parsed.split
        self.data = parsed.data
        self.labels = labels
        self.replay = self.resolve(parsed.provider_data.replay)
        self.acceptance = self.resolve(parsed.provider_data.acceptance)
        self.models = parsed.models
        self.protection = parsed.protection
        self.privacy = parsed.privacy
        self.attestation = parsed.attestation
        self.curve = parsed.curve
        self.taste = parsed.taste
        self.compare = parsed.compare
        self.deliver_to = (
            parsed.deliver.to if parsed.deliver else (self.provider, *self.customer_names)
        )

    def only(self, names: Collection[str]) -> Job:
        """This job with some of its models alone."""
        chosen = copy(self)
        chosen.models = tuple(model for model in self.models if model.name in names)
        return chosen

    def tasting(self) -> Job:
        """This job with the taster's round alone: each model's head, in closed form.

        Raises:
            ContractError: with every problem that keeps it from being tasted.
        """
        tasting = copy(self)
        tasting.rounds, tasting.curve = 1, CurveTerms(every=0)
        tasting.taste = self.taste.model_copy(update={"first": True})
        tasting.models = tuple(_head_alone(model) for model in self.models)
        problems = tasting._problems("all")
        if self.acceptance is None and not (
            self.data.test_fraction or any(customer.test for customer in self.customers)
        ):
            problems.append(
                "nothing would be measured: name provider_data.acceptance, or hold records out by"
                " data.test_fraction"
            )
        if problems:
            raise ContractError(str(self.path), problems)
        return tasting

    @property
    def customer_names(self) -> tuple[str, ...]:
        if self.split is not None:
            return tuple(
                f"{self.split.prefix}-{index + 1}" for index in range(self.split.customers)
            )
        return tuple(customer.name for customer in self.customers)

    def resolve(self, name: str) -> Path | None:
        """The path that `name` means in this job file, or None for ""."""
        return (self.path.parent / name).resolve() if name else None

    @classmethod
    def load(
        cls, path: Path | str, overrides: tuple[str, ...] = (), *, role: JobReader = "all"
    ) -> Job:
        """Read and check a job file.

        >>> import fedark
        >>> fedark.Job.load("job.toml").customer_names
        ('north', 'east', 'south')

        Args:
            path: the TOML file.
            overrides: "section.key=value" in TOML's own syntax, applied before the check.
            role: whose files must be on this machine: everybody's, the provider's, or nobody's
                ("host").

        Raises:
            InputError: the file cannot be read.
            ContractError: with every problem found in it.
        """
        path = Path(path)
        source = str(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{source} cannot be read: {error.strerror}.", safe="Nothing was started."
            ) from None
        if len(raw) > _MAX_JOB_BYTES:
            raise ContractError(
                source, [f"it has {len(raw)} bytes, over the limit of {_MAX_JOB_BYTES}"]
            )
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            raise ContractError(source, [f"line {line}: not UTF-8"]) from None
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ContractError(source, [str(error)]) from None
        for override in overrides:
            _override(value, override)
        try:
            parsed = JobFile.model_validate(to_tuples(value))
        except ValidationError as error:
            raise ContractError(
                source, [_at_line(text, where, what) for where, what in explain_at(error)]
            ) from None
        return cls._checked(path, parsed, role)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], folder: Path | str = ".") -> Job:
        """The job that a map describes, with the tables and keys of a job file.

        >>> import fedark, tomllib
        >>> job = fedark.Job.from_dict(tomllib.loads(open("job.toml").read()))
        >>> job.rounds
        2

        Args:
            folder: what relative paths in it are relative to.

        Raises:
            ContractError: with every problem found in it.
        """
        path = Path(folder) / "job"
        try:
            parsed = JobFile.model_validate(to_tuples(dict(value)))
        except ValidationError as error:
            raise ContractError("the job", explain(error)) from None
        return cls._checked(path, parsed, "all")

    @classmethod
    def _checked(cls, path: Path, parsed: JobFile, role: JobReader) -> Job:
        labels, problems = _labels(path, parsed.data)
        job = cls(path, parsed, labels)
        problems += job._problems(role)
        if problems:
            raise ContractError(str(path), problems)
        return job

    def _problems(self, role: JobReader) -> list[str]:
        problems: list[str] = []
        if (self.split is None) == (not self.customers):
            problems.append("exactly one of [[customers]] and [split] must stand in it")
        names = [self.provider, self.aggregator, *self.customer_names]
        problems += [
            f"party {name!r} stands twice"
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        models = [model.name for model in self.models]
        problems += [
            f"model {name!r} stands twice"
            for name in sorted({n for n in models if models.count(n) > 1})
        ]
        if len(self.customer_names) < self.protection.minimum_cohort:
            minimum = self.protection.minimum_cohort
            problems.append(
                f"{len(self.customer_names)} customers are fewer than protection.minimum_cohort ="
                f" {minimum}"
            )
        problems += self.curve.problems(acceptance=self.acceptance is not None)
        problems += taste_problems(
            self.taste,
            self.privacy,
            [(model.name, model.task, model.adapter, model.server) for model in self.models],
        )
        adapters = [(model.name, model.adapter) for model in self.models]
        problems += protection_problems(self.protection, set(self.customer_names), adapters)
        problems += mean_problems(
            self.protection,
            self.privacy,
            len(self.customer_names),
            [(model.name, model.server) for model in self.models],
        )
        problems += privacy_problems(
            self.privacy,
            self.protection,
            [(model.name, model.training) for model in self.models],
            self.rounds,
        )
        problems += [
            f"deliver.to names a stranger: {name!r}"
            for name in self.deliver_to
            if name not in names
        ]
        files = [customer.data for customer in self.customers] + [
            customer.test for customer in self.customers if customer.test
        ]
        files += [self.split.file] if self.split else []
        starts = [self.resolve(model.start) for model in self.models] if role != "host" else []
        problems += [
            f"models.start: there is no folder {path}"
            for path in starts
            if path is not None and not path.is_dir()
        ]
        own = {
            "all": [*map(self.resolve, files), self.replay, self.acceptance],
            "provider": [self.replay, self.acceptance],
        }
        wanted = [path for path in own.get(role, []) if path is not None]
        problems += [f"file {path} does not exist" for path in wanted if not path.is_file()]
        for model in self.models:
            if model.task == "classification" and len(self.labels) < 2:
                problems.append(
                    f"model {model.name!r} classifies, so data.labels or data.labels_file must name"
                    " two or more"
                )
            if model.training.replay > 0 and self.replay is None:
                problems.append(
                    f"model {model.name!r} asks for replay, but provider_data.replay names no file"
                )
        return problems


def _head_alone(model: ModelSpec) -> ModelSpec:
    """The model as it is tasted: nothing but its head, and nothing trained beside it."""
    if model.task != "classification":
        return model  # and the taster refuses it
    own = model.adapter
    adapter = AdapterTerms(
        method="head", head_scale=own.head_scale, head_bias=own.head_bias, head=own.head
    )
    training = model.training.model_copy(update={"baseline_epochs": 0, "lora_dropout": 0.0})
    return model.model_copy(
        update={
            "adapter": adapter,
            "training": training,
            "personal": PersonalTerms(epochs=0),
            "server": ServerTerms(),
            "start": "",  # of another shape than a head alone
        }
    )


def model_terms(
    spec: ModelSpec,
    *,
    bundle: str,
    weights: str,
    prompt: str,
    labels: tuple[str, ...],
    base: Any,
    layout: Any,
    start: str = "",
) -> ModelTerms:
    """The contract's terms for a model of the job, once it is sealed.

    Args:
        base: what it is taken for (`fedark.tuning.base.Base`).
        layout: of its adapter.
        start: digest of the adapter that it starts from.
    """
    public = spec.source.removeprefix("hub:") if spec.source.startswith("hub:") else ""
    return ModelTerms.model_validate(
        {
            "name": spec.name,
            "task": spec.task,
            "bundle": bundle,
            "weights": weights,
            "prompt": prompt,
            "labels": labels,
            "adapter": spec.adapter,
            "training": spec.training,
            "server": spec.server,
            "personal": spec.personal,
            "pooling": base.pooling,
            "pooling_why": base.why,
            "base": public,
            "start": start,
            "layout": layout,
        }
    )


def _labels(path: Path, data: DataSpec) -> tuple[tuple[str, ...], list[str]]:
    if data.labels_file:
        try:
            return read_labels(path.parent / data.labels_file), []
        except DataError as error:
            return (), [f"data.labels_file: {error.what} {error.fix}"]
    if not all(label.strip() for label in data.labels):
        return (), ["data.labels: must be a list of non-empty texts"]
    if alike_labels(data.labels):
        return (), ["data.labels: a label stands twice, or twice but for blanks"]
    return data.labels, []


def _is_text_encoding(name: str) -> bool:
    try:
        "a".encode(name)  # refuses Python's transformations that are no encodings of texts
    except (LookupError, UnicodeError, ValueError):
        return False
    return codecs.lookup(name).name not in _ESCAPES


def _override(value: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    try:
        parsed = tomllib.loads(f"value = {text}")["value"] if separator else None
    except tomllib.TOMLDecodeError:
        parsed = text.strip()
    if not separator or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        raise InputError(
            f"{override!r} is not of the form section.key=value.", safe="Nothing was started."
        )
    target: Any = value
    for part in parts[:-1]:
        if isinstance(target, list):
            target = target[int(part)] if part.isdigit() and int(part) < len(target) else None
        else:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
    if isinstance(target, list) or not isinstance(target, dict):
        raise InputError(f"{override!r} does not name a key.", safe="Nothing was started.")
    target[parts[-1]] = parsed


def _at_line(text: str, where: tuple[Any, ...], what: str) -> str:
    """`what`, with the line of the key if one is found: the nth table of that name, then the key
    below it.
    """
    tables = [part for part in where if isinstance(part, str)]
    lines = text.split("\n")
    position = 0
    for depth, part in enumerate(where):
        if not isinstance(part, str):
            continue
        index = (
            where[depth + 1] if depth + 1 < len(where) and isinstance(where[depth + 1], int) else 0
        )
        name = re.escape(".".join(tables[: tables.index(part) + 1]))
        headers = [
            n for n in range(position, len(lines)) if re.match(rf"\s*\[+\s*{name}\s*\]+", lines[n])
        ]
        if len(headers) > index:
            position = headers[index]
            continue
        keys = [
            n
            for n in range(position, len(lines))
            if re.match(rf"\s*[\"']?{re.escape(part)}[\"']?\s*=", lines[n])
        ]
        if keys:
            position = keys[0]
            break
    label = ".".join(str(part) for part in where)
    prefix = (
        f"line {position + 1}: "
        if position or (where and re.match(r"\s*\[", lines[0] or ""))
        else ""
    )
    return f"{prefix}{label}: {what}" if label else f"{prefix}{what}"
