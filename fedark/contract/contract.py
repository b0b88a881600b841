"""The job contract: what every party signs, and what every enclave is bound to.

A contract fixes the models (by the digest of their sealed bundles), the shape and training of their
adapters, the cohort, the measurements of the enclaves that may take part, how updates are
protected, who gets the result, and when it ends. Its digest is in the report data of every piece of
evidence, so nobody can run another job under this contract's name.

A contract is made from a job file (`fedark.contract.job`) by the host of the aggregator; provider
and customers compare it with what they know themselves before they sign. Whatever is not in it is
refused by all sides.

Form: canonical CBOR of `Contract.to_map()`; digest: SHA-384 of it; signature: Ed25519 with the
label `CONTRACT_LABEL`.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from fedark.attestation.terms import AttestationTerms
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, InputError
from fedark.foundation.keys import public_bytes, verify_signature
from fedark.foundation.terms import Finite, Hex32, Hex48, Name, Terms, explain, to_tuples
from fedark.privacy.kinds import MechanismName
from fedark.records.template import Template

__all__ = [
    "CONTRACT_LABEL",
    "AdapterTerms",
    "AttestationTerms",
    "Contract",
    "CurveTerms",
    "EvaluationTerms",
    "ModelTerms",
    "Party",
    "PersonalTerms",
    "Pooling",
    "PrivacyTerms",
    "ProtectionTerms",
    "ServerTerms",
    "SignedContract",
    "TasteTerms",
    "TensorSpec",
    "Terms",
    "TrainingTerms",
    "fingerprint",
    "now",
]

CONTRACT_LABEL = "fedark/contract/1"
MAX_TRAVELLING = 25_000_000
"""Values of one update of all models, four bytes each: 100 MB."""
MOST_EPSILON = 30.0
"""The precision of the noise sampler supports no larger claim for most jobs; beyond it a guarantee
says nothing."""
_MAX_CONTRACT_BYTES = 4 << 20

# A run reads the same bytes again and again; in a simulation every party does. One object serves
# all, since a contract cannot be changed.
_RECENT: dict[bytes, Contract] = {}
_REMEMBERED = 4
_REMEMBERING = threading.Lock()

HexHpke = Annotated[str, Field(pattern=r"^([0-9a-f]{2432}|[0-9a-f]{64})$")]


class Party(Terms):
    """A member of the roster and its long-lived public keys (hex); `hpke_key` is of the KEM that
    its contracts name.
    """

    name: Name
    role: Literal["provider", "customer", "aggregator"]
    signing_key: Hex32
    hpke_key: HexHpke


Method = Literal["ffa-lora", "lora", "head"]
ProtectionMode = Literal["sealed", "masked"]


class AdapterTerms(Terms):
    """The adapter that is trained (LoRA, arXiv:2106.09685; FFA-LoRA, arXiv:2403.12313).

    Attributes:
        method: "ffa-lora" freezes A, drawn from `seed`, and sends B (and the head); "lora" sends A
            and B; "head" leaves the whole body as it is and sends a classifier's head alone.
        rank, alpha: LoRA's r and its scaling numerator.
        targets: suffixes of the module names that get an adapter, such as "query"; none for "head".
        layers: indices of the transformer layers that get one; empty means all.
        head: train a classification head too.
        head_scale: length of a fresh head's rows, which point to the embedded names of the labels:
            an inverse temperature. Noise of a privacy mechanism is borne better by a small one.
        head_bias: whether fedark's own head has a bias. It takes half of the squared norm of a
            record's gradient: under a privacy mechanism a head without one learns more for the same
            epsilon.
        seed: of every A matrix; the same for the whole cohort.
    """

    method: Method = "ffa-lora"
    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Annotated[Finite, Field(gt=0)] = 16.0
    targets: tuple[str, ...] = ("query", "value")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    head: bool = True
    head_scale: Annotated[Finite, Field(gt=0)] = 30.0
    head_bias: bool = True
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0

    @field_validator("method", mode="before")
    @classmethod
    def _known_elsewhere(cls, value: Any) -> Any:
        """Say of a method from the literature why it is not here."""
        built = get_args(Method)
        if isinstance(value, str) and value not in built:
            from fedark.secagg.exactness import METHODS  # for the text alone

            if value in METHODS:
                raise ValueError(
                    f"fedark does not train {value!r}, only {', '.join(built)}."
                    f" {METHODS[value].reason}"
                )
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_targets(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("method") == "head":
            return {"targets": (), **value}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method != "head" and not self.targets:
            raise ValueError(f'"{self.method}" needs at least one target')
        if self.method == "head" and (self.targets or self.layers):
            raise ValueError('"head" changes no layer: leave targets and layers empty')
        if self.method == "head" and not self.head:
            raise ValueError('"head" without a head would train nothing')
        return self


class ServerTerms(Terms):
    """The server optimiser (FedOpt, arXiv:2003.00295): FedAvg or FedAdam on the averaged update.

    Attributes:
        optimizer: "fedavg" adds the averaged update; "fedadam" takes an Adam step along it.
        learning_rate: factor of the step; 1 with "fedavg" is plain averaging.
        beta1, beta2: "fedadam": decay of the first and second moment.
        tau: "fedadam": added to the root of the second moment.
        mean: how the updates of a round are averaged: weighted by records, or, in mode "sealed"
            without a privacy mechanism, in one of the ways that a few harmful customers move less
            (`fedark.tuning.server_mean`).
        trim: "trimmed": share of the customers left out at either end, rounded up.
    """

    optimizer: Literal["fedavg", "fedadam"] = "fedavg"
    learning_rate: Annotated[Finite, Field(gt=0)] = 1.0
    beta1: Annotated[Finite, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Finite, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[Finite, Field(gt=0)] = 1e-3
    mean: Literal["weighted", "trimmed", "median-norm"] = "weighted"
    trim: Annotated[Finite, Field(gt=0, lt=0.5)] = 0.2

    def trimmed(self, customers: int) -> int:
        """How many of so many customers are left out at either end."""
        return math.ceil(self.trim * customers) if self.mean == "trimmed" else 0


class TrainingTerms(Terms):
    """Local training of one round.

    Attributes:
        epochs: passes over the customer's records in one round.
        batch_size: records a step.
        optimizer: AdamW (arXiv:1711.05101), or plain gradient descent: with one step of all records
            a round, which is FedSGD (arXiv:1602.05629), customers do not drift apart however unlike
            their records are.
        learning_rate: for the LoRA matrices.
        head_learning_rate: for the head.
        schedule: how both rates change over the whole job, from its first round to the last that it
            may have: not at all, or down to nothing in a straight line or along half a cosine
            (arXiv:1608.03983).
        warmup: share of the job over which they rise from nothing before that.
        weight_decay: decoupled, as in AdamW's paper; under "sgd" it is added to the gradient.
        lora_dropout: share of the inputs of each A matrix that a training step leaves out.
        max_length: tokens; longer prompts are truncated.
        replay: records of the provider's replay set mixed in, as a fraction of the customer's own
            (0 to 1).
        baseline_epochs: passes of the local-only baseline that never leaves the enclave; 0 trains
            none.
        baseline_share: share of the customers who train it, drawn by the contract's seed. Below 1
            what is measured of it stays with these customers: a sum over few would point at
            someone.
    """

    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[Finite, Field(gt=0)] = 1e-3
    head_learning_rate: Annotated[Finite, Field(gt=0)] = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    lora_dropout: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    max_length: Annotated[int, Field(ge=4, le=8192)] = 64
    replay: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    baseline_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    baseline_share: Annotated[Finite, Field(gt=0, le=1)] = 1.0


def dropout_problem(adapter: AdapterTerms, training: TrainingTerms) -> str:
    """Why the adapter cannot be trained with this dropout; "" if it can."""
    if training.lora_dropout and adapter.method == "head":
        return '"head" has no LoRA matrices: leave training.lora_dropout at 0'
    return ""


class PersonalTerms(Terms):
    """The personal adapter: each trainer enclave goes on from the last shared adapter with its own
    customer's records (FedDPA-F, arXiv:2403.19211), and chooses between what that gives, the other
    adapters that it has, and mixtures of them (`fedark.tuning.personal`). Only its customer gets
    it.

    Attributes:
        epochs: passes over the customer's own training records before the choice, less the
            validation part; one more over all of them follows. 0 makes no personal adapter. Their
            number is fixed: where training stopped early, the time would tell of records.
        learning_rate: for the LoRA matrices, by AdamW.
        head_learning_rate: for the head.
        validation: fraction of the customer's training records that the choice is made on.
            Held-out records have no part in it.
    """

    epochs: Annotated[int, Field(ge=0, le=1000)] = 1
    learning_rate: Annotated[Finite, Field(gt=0)] = 3e-3
    head_learning_rate: Annotated[Finite, Field(gt=0)] = 1e-2
    validation: Annotated[Finite, Field(ge=0.05, le=0.5)] = 0.2


class TensorSpec(Terms):
    """One tensor of the adapter, in PEFT's own name.

    Attributes:
        name: the key in `adapter_model.safetensors`, or "head.weight" / "head.bias".
        shape: its dimensions.
        travels: part of every update; otherwise drawn from the adapter's seed (FFA-LoRA's A).
    """

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    travels: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Pooling = Literal["auto", "mean", "cls", "none"]


class ModelTerms(Terms):
    """One base model of the job.

    Attributes:
        name: what reports call it.
        task: sequence classification, or causal-LM instruction tuning.
        bundle: SHA-384 of the sealed bundle's manifest (hex).
        weights: SHA-384 over the weights inside it (hex), the same however often they are sealed.
        prompt: the template that every customer makes its prompts by.
        labels: the classes, in order; for "instruction", the admissible answers, or empty for free
            text.
        pooling: for classification, how a text's token vectors become the one that the head reads:
            their mean, or the first one ("cls"), under fedark's own head; "none": by transformers'
            own classifier. "auto", which no drafted contract holds: as the model's files say.
        pooling_why: why so, where the job file left it open.
        start: SHA-384 (hex) of the adapter that the job starts from (`fedark.tuning.start`), or "":
            it starts from the base itself.
        base: the base model's name on the Hugging Face hub, where it is public; or "".
        layout: every tensor of the adapter; the flat vector of an update is the travelling ones in
            this order, row-major.
    """

    name: Name
    task: Literal["classification", "instruction"]
    bundle: Hex48
    weights: Hex48
    prompt: Annotated[str, Field(min_length=1, max_length=10_000)]
    labels: tuple[str, ...]
    adapter: AdapterTerms
    training: TrainingTerms
    server: ServerTerms
    personal: PersonalTerms = PersonalTerms()
    pooling: Pooling = "auto"
    pooling_why: Annotated[str, Field(max_length=300)] = ""
    start: Annotated[str, Field(pattern=r"^([0-9a-f]{96})?$")] = ""
    base: Annotated[str, Field(max_length=300)] = ""
    layout: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]

    @field_validator("prompt")
    @classmethod
    def _template(cls, value: str) -> str:
        try:
            Template.parse(value)
        except InputError as error:
            raise ValueError(error.told) from None
        return value

    @model_validator(mode="after")
    def _dropped(self) -> Self:
        if problem := dropout_problem(self.adapter, self.training):
            raise ValueError(problem)
        return self

    @property
    def travelling(self) -> int:
        """Length of the flat float32 vector that an update carries."""
        return sum(spec.size for spec in self.layout if spec.travels)

    @property
    def taken(self) -> str:
        """What the base is taken for, and why, in words."""
        kinds = {
            "mean": "an encoder of sentences, the mean of its tokens under fedark's head",
            "cls": "an encoder of sentences, its first token under fedark's head",
            "none": "a base for transformers' own classification head",
            "auto": "what its own files say",
        }
        words = kinds[self.pooling] if self.task == "classification" else "a language model"
        return f"taken as {words}" + (f" ({self.pooling_why})" if self.pooling_why else "")


class ProtectionTerms(Terms):
    """How an update leaves a trainer enclave. There is no mode for a plain one.

    Attributes:
        mode: "sealed": encrypted to the attested aggregator enclave, which alone sums. "masked":
            masked too, inside the encryption, so that even that enclave learns the cohort's sum and
            nothing else (`fedark.secagg`).
        minimum_cohort: fewest customers whose updates make a round; 3 under masks. With `agreement`
            no sum covers fewer, whatever the aggregator enclave does.
        bits: masked: width of one rounded value.
        clip_norm: L2 norm that a customer's update (all models together) is clipped to inside its
            trainer enclave, before it is masked or sealed. A privacy mechanism has its own.
        value_range: masked: values, times weight / max_records, are clamped to [-value_range,
            value_range], the ends of the grid of 2**bits - 1 points.
        max_records: masked: public bound on a customer's weight; more records count as so many. The
            weight scales the update before it is rounded, so a bound far above the largest data set
            costs precision.
        colluders: masked: how many customers may work with a lying aggregator and still learn no
            more than the others' sum.
        agreement: masked: members of the committee sign one survivor set before they unmask, a
            third trip a round. They do unless it is false, and then too in large cohorts and where
            a sum could else cover fewer than two honest customers. Without, a lying aggregator
            enclave may get a sum of fewer than `minimum_cohort`:
            `fedark.contract.protection.fewest_in_a_sum`.
    """

    mode: ProtectionMode = "sealed"
    minimum_cohort: Annotated[int, Field(ge=2)] = 3
    bits: Annotated[int, Field(ge=2, le=24)] = 16
    clip_norm: Annotated[Finite, Field(gt=0)] = 10_000.0
    value_range: Annotated[Finite, Field(gt=0)] = 8.0
    max_records: Annotated[int, Field(ge=1, le=5_000_000)] = 10_000
    colluders: Annotated[int, Field(ge=0)] = 1
    agreement: bool | None = None


class PrivacyTerms(Terms):
    """The privacy mechanism and what it claims. What each term does is in
    `fedark.contract.privacy`.

    Attributes:
        mechanism: "none": the released adapter has no differential privacy guarantee.
            "example-distributed": each round sums one clipped, Poisson-sampled gradient a customer,
            and every customer adds a share of the noise. "example-local": every customer adds all
            the noise to each of several local steps. "customer-level": every customer's whole
            update is clipped, and all of its records are protected together.
        epsilon: upper bound that the whole job claims, for one record, or one customer under
            "customer-level"; each node computes it again from the other terms before it signs.
        delta: of the claim.
        noise_multiplier: standard deviation of the noise over the sensitivity. 0 in a job file:
            solved from `epsilon`.
        clip_norm: L2 norm that one record's gradient, or one customer's update, is clipped to (all
            models together).
        sampling_rate: probability with which each record is drawn, independently, for a step.
        local_steps: "example-local": steps of one round.
        records: how many training records all customers have, about; public, so that gradient sums
            are divided by it and not by what was really drawn.
        accept_noise: run the job although its noise buries what it could learn, or its steps are
            too short to learn anything (`fedark.contract.privacy.futile_problems`).
    """

    mechanism: MechanismName = "none"
    epsilon: Annotated[Finite, Field(gt=0, le=MOST_EPSILON)] = 8.0
    delta: Annotated[Finite, Field(gt=0, lt=0.1)] = 1e-5
    noise_multiplier: Annotated[Finite, Field(ge=0)] = 0.0
    clip_norm: Annotated[Finite, Field(gt=0)] = 1.0
    sampling_rate: Annotated[Finite, Field(gt=0, le=1)] = 0.1
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    records: Annotated[int, Field(ge=0)] = 0
    accept_noise: bool = False


def mean_problems(
    protection: ProtectionTerms,
    privacy: PrivacyTerms,
    customers: int,
    servers: Iterable[tuple[str, ServerTerms]],
) -> list[str]:
    """Why these averages cannot be taken, one line each.

    Args:
        servers: name and server terms of every model.
    """
    found = []
    for name, terms in servers:
        if terms.mean == "weighted":
            continue
        if protection.mode != "sealed" or privacy.mechanism != "none":
            found.append(
                f"model {name!r}: server.mean {terms.mean!r} needs to see each update: use"
                ' protection.mode "sealed" without a privacy mechanism'
            )
        left = customers - 2 * terms.trimmed(customers)
        if left < protection.minimum_cohort:
            found.append(
                f"model {name!r}: server.trim leaves {left} of {customers} customers in each value,"
                f" fewer than protection.minimum_cohort = {protection.minimum_cohort}"
            )
    return found


class EvaluationTerms(Terms):
    """What is measured: before, local-only and federated, on held-out records of each customer and
    on the acceptance set.

    Attributes:
        acceptance: name of the acceptance set inside the provider's bundles, or "" for none.
        groups: the groups of its records; a bundle with any other is refused. Under masks they fix
            what is summed.
        own: every customer holds out records of its own, so that figures on them can be summed over
            all. Under masks one who does not cannot take part: a sum over fewer than all would
            point at someone.
    """

    acceptance: str = ""
    groups: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=300)], ...], Field(max_length=1000)
    ] = ()
    own: bool = False


class CurveTerms(Terms):
    """The learning curve: how the global adapter answers the acceptance set after each round, and
    what follows from it. It follows inside the aggregator enclave.

    Attributes:
        every: rounds from one measurement to the next; 0 measures only before and at the end.
        patience: the rounds end after so many measurements in a row in which no model did better
            than before; 0: never so.
        target: they end once every model answers this share of the whole acceptance set right; 0:
            never so.
        deliver: the adapters of the last round, or of each model that of the measured round that
            answered most right ("best").
    """

    every: Annotated[int, Field(ge=0, le=10_000)] = 1
    patience: Annotated[int, Field(ge=0, le=10_000)] = 0
    target: Annotated[Finite, Field(ge=0, le=1)] = 0.0
    deliver: Literal["last", "best"] = "last"

    def problems(self, *, acceptance: bool) -> list[str]:
        """What keeps these terms from being kept."""
        if (self.patience or self.target or self.deliver == "best") and not (
            self.every and acceptance
        ):
            return [
                "curve: patience, target and the best round need an acceptance set, and every >= 1"
            ]
        return []


class TasteTerms(Terms):
    """The taster (`fedark.tuning.moments`): every model's head in closed form, from what its frozen
    body makes of all customers' training records. It is one round, the first one, and exact
    whatever the split between customers. Rounds of tuning may go on from that head.

    Attributes:
        first: round 1 is the taster's.
        held_out: share of the training records, drawn by hash, on whose sums the regularisation is
            chosen. They are in the head's own sums too once it is.
        temperature: what the head's answers, shares of 0 to 1, are multiplied by to be logits.
        rate: what both learning rates are multiplied by in the rounds after it: they go on from a
            head that is good already.
    """

    first: bool = False
    held_out: Annotated[Finite, Field(ge=0.05, le=0.5)] = 0.2
    temperature: Annotated[Finite, Field(gt=0, le=1000)] = 16.0
    rate: Annotated[Finite, Field(gt=0, le=1)] = 0.1


class Contract(Terms):
    """Everything that the parties agree on. `problems()` lists what its parts cannot see one by
    one.
    """

    version: Literal[1] = 1
    job: Name
    created: str
    expires: str
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    rounds: Annotated[int, Field(ge=1, le=10_000)]
    parties: Annotated[tuple[Party, ...], Field(min_length=3)]
    models: Annotated[tuple[ModelTerms, ...], Field(min_length=1)]
    attestation: AttestationTerms
    protection: ProtectionTerms
    privacy: PrivacyTerms
    evaluation: EvaluationTerms
    curve: CurveTerms = CurveTerms()
    taste: TasteTerms = TasteTerms()
    deliver_to: Annotated[tuple[Name, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        for kind, names in (
            ("party", [p.name for p in self.parties]),
            ("model", [m.name for m in self.models]),
        ):
            problems += [
                f"{kind} {name!r} stands twice"
                for name in sorted({n for n in names if names.count(n) > 1})
            ]
        if len({p.signing_key for p in self.parties}) != len(self.parties):
            problems.append("two parties share one signing key")
        if sum(p.role == "provider" for p in self.parties) != 1:
            problems.append("a contract has exactly one provider")
        if sum(p.role == "aggregator" for p in self.parties) != 1:
            problems.append("a contract has exactly one aggregator")
        if sum(terms.travelling for terms in self.models) > MAX_TRAVELLING:
            total = sum(terms.travelling for terms in self.models)
            problems.append(
                f"its adapters have {total} values that travel, over the limit of {MAX_TRAVELLING}"
                " in this release"
            )
        if len(self.customers) < self.protection.minimum_cohort:
            problems.append(
                f"{len(self.customers)} customers are fewer than the minimum cohort"
                f" {self.protection.minimum_cohort}"
            )
        problems += mean_problems(
            self.protection,
            self.privacy,
            len(self.customers),
            [(terms.name, terms.server) for terms in self.models],
        )
        problems += self.curve.problems(acceptance=bool(self.evaluation.groups))
        if len(set(self.evaluation.groups)) != len(self.evaluation.groups):
            problems.append("an evaluation group stands twice")
        kem, known = self.attestation.kem, {p.name for p in self.parties}
        problems += [
            f"the HPKE key of {p.name} is not one of {kem}, the KEM that attestation.kem names"
            for p in self.parties
            if len(p.hpke_key) != 2 * public_bytes(kem)
        ]
        problems += [
            f"deliver_to names a stranger: {name!r}"
            for name in self.deliver_to
            if name not in known
        ]
        for field in ("created", "expires"):
            try:
                if datetime.fromisoformat(getattr(self, field)).tzinfo is None:
                    problems.append(f"{field} has no time zone")
            except ValueError:
                problems.append(f"{field} is not an ISO 8601 time")
        if "simulated" in self.attestation.platforms and len(self.attestation.simulated_root) != 64:
            problems.append("simulated evidence is admitted but no simulated root is named")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def customers(self) -> tuple[Party, ...]:
        return tuple(p for p in self.parties if p.role == "customer")

    @property
    def provider(self) -> Party:
        return next(p for p in self.parties if p.role == "provider")

    @property
    def aggregator(self) -> Party:
        return next(p for p in self.parties if p.role == "aggregator")

    @property
    def signing_keys(self) -> dict[str, bytes]:
        """Party -> its Ed25519 public key."""
        return {party.name: bytes.fromhex(party.signing_key) for party in self.parties}

    def party(self, name: str) -> Party | None:
        return next((p for p in self.parties if p.name == name), None)

    def model(self, name: str) -> ModelTerms | None:
        return next((m for m in self.models if m.name == name), None)

    def alone(self, terms: ModelTerms) -> tuple[str, ...]:
        """The customers who train the local-only baseline of a model."""
        if not terms.training.baseline_epochs:
            return ()
        names = sorted(party.name for party in self.customers)
        drawn = sorted(
            names,
            key=lambda name: hashlib.sha256(
                canonical.encode([self.seed, terms.name, name])
            ).digest(),
        )
        return tuple(drawn[: math.ceil(terms.training.baseline_share * len(names))])

    def measures(self, number: int) -> bool:
        """Whether the global adapter of round `number` is measured for the learning curve. That of
        the last possible round is measured as the final one, unless it may not be the one.
        """
        every, last = self.curve.every, number == self.rounds
        if not every or not self.evaluation.groups:
            return False
        return self.curve.deliver == "best" if last else number % every == 0

    def expired(self, now: datetime) -> bool:
        """Whether `now` (aware) is outside the contract's validity."""
        return (
            not datetime.fromisoformat(self.created) <= now < datetime.fromisoformat(self.expires)
        )

    def to_map(self) -> dict[str, Any]:
        return self.model_dump(mode="python")

    def encode(self) -> bytes:
        """The canonical form that is hashed and signed."""
        return self._once("_encoded", lambda: canonical.encode(self.to_map()))

    def digest(self) -> bytes:
        """SHA-384 of the canonical form, 48 bytes."""
        return self._once("_digest", lambda: hashlib.sha384(self.encode()).digest())

    def _once(self, name: str, compute: Callable[[], bytes]) -> bytes:
        """What never changes for an immutable contract, and is asked for at every step of a run."""
        if name not in self.__dict__:
            self.__dict__[name] = compute()
        kept: bytes = self.__dict__[name]
        return kept

    def __copy__(self) -> Self:
        # A copy is about to get other terms (`model_copy`): nothing computed from these stays.
        copied = super().__copy__()
        copied.__dict__.pop("_encoded", None)
        copied.__dict__.pop("_digest", None)
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return super().__deepcopy__(memo).__copy__()

    @classmethod
    def decode(cls, data: bytes, source: str = "contract") -> Contract:
        """Read the canonical form.

        Raises:
            ProtocolError: not canonical CBOR.
            ContractError: not a valid contract, with every problem, or one of which `encode` gives
                other bytes.
        """
        known = _RECENT.get(data)
        if known is not None:
            return known
        value = canonical.decode(data, max_bytes=_MAX_CONTRACT_BYTES)
        if not isinstance(value, dict):
            raise ContractError(source, ["it is not a map"])
        contract = cls.build(value, source)
        if contract.encode() != data:
            raise ContractError(
                source, ["it is not in its one form: a term is left out, or is of another type"]
            )
        with _REMEMBERING:
            while len(_RECENT) >= _REMEMBERED:
                del _RECENT[next(iter(_RECENT))]
            _RECENT[data] = contract
        return contract

    @classmethod
    def build(cls, value: dict[str, Any], source: str = "contract") -> Contract:
        """Validate a map; lists may stand for tuples.

        Raises:
            ContractError: with every problem.
        """
        try:
            return cls.model_validate(to_tuples(value))
        except ValidationError as error:
            raise ContractError(source, explain(error)) from None


class SignedContract:
    """A contract that provider and every customer have signed. Only `verify` makes one."""

    __slots__ = ("contract", "digest", "signatures")

    def __init__(self) -> None:
        raise TypeError("use SignedContract.verify")

    contract: Contract
    digest: bytes
    signatures: dict[str, bytes]

    @classmethod
    def verify(cls, contract: Contract, signatures: dict[str, bytes]) -> SignedContract:
        """Check that the provider and every customer signed exactly this contract.

        Raises:
            ContractError: a signature is missing.
            Refused: a signature is wrong.
        """
        digest = contract.digest()
        signers = (contract.provider, *contract.customers)
        missing = [p.name for p in signers if p.name not in signatures]
        if missing:
            raise ContractError(
                f"contract of job {contract.job}", [f"{name} has not signed" for name in missing]
            )
        for party in signers:
            verify_signature(
                bytes.fromhex(party.signing_key),
                CONTRACT_LABEL,
                digest,
                signatures[party.name],
                by=party.name,
            )
        signed = object.__new__(cls)
        signed.contract, signed.digest = contract, digest
        signed.signatures = {p.name: signatures[p.name] for p in signers}
        return signed


def now() -> datetime:
    """The current time, aware, UTC."""
    return datetime.now(UTC)


def fingerprint(party: Party) -> str:
    """What two people compare on the telephone: 160 bits of SHA-256 over name, role and public
    keys, in groups of four.
    """
    digest = hashlib.sha256(canonical.encode(["fedark/party/1", party.model_dump()])).hexdigest()[
        :40
    ]
    return " ".join(digest[start : start + 4] for start in range(0, 40, 4))
