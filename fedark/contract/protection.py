"""What `protection.mode = "masked"` in a contract means: which problems it can have, and the
`fedark.secagg.SessionTerms` that it fixes.

Trainer and aggregator enclaves derive the same terms from the contract, and nothing of it comes
from a server. Its layouts:

    update      one vector: the travelling values of all models, in the contract's order
    evaluated   all figures of the job: before, local-only, training losses round by round, the
                final adapter's; no vector
    tasted      the moments of all models, where the first round is the taster's
                (`fedark.contract.taste`)

Figures travel once, at the end, over those who were there to the end: given out round by round, the
sums of two cohorts would differ by the figures of whoever dropped out between them. They are lanes
of the masked sum, three for each model and key (correct, total, loss); in an update a customer's
weight is a lane too. `lanes` and `figures` are the two directions. Lanes are fixed by the contract,
so which keys exist tells nothing of a customer.

The one place that asks `fedark.secagg.check_method` which methods may be averaged under which
protection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedark.contract.contract import (
    AdapterTerms,
    Contract,
    ModelTerms,
    PrivacyTerms,
    ProtectionTerms,
)
from fedark.contract.privacy import noised_layout
from fedark.contract.taste import TASTED, is_taste, taste_layout
from fedark.foundation.errors import ContractError
from fedark.privacy.kinds import TRAITS
from fedark.secagg import Lane, Layout, RoundSum, SessionTerms, check_method
from fedark.secagg.topology import smallest_sum

__all__ = [
    "CURVE",
    "EVALUATED",
    "UPDATE",
    "Figure",
    "bytes_per_value",
    "detail_keys",
    "fewest_in_a_sum",
    "figures",
    "gain_keys",
    "kind_of",
    "lanes",
    "makes_personal",
    "masked_terms",
    "may_leave",
    "protection_problems",
    "protection_warnings",
    "shares_noise",
    "train_key",
]

UPDATE, EVALUATED = "update", "evaluated"
CURVE = "curve"
"""The kind of what is measured for the learning curve: never masked (`fedark.enclave.curve`)."""

Figure = tuple[int, int, float]
"""Correct answers, answers, and the sum of their losses (nats)."""

# The sums of 2,048 customers stay below 2**63. Losses are rounded to 0.001 nats.
_COUNT_LIMIT = float(1 << 40)
_CONFUSED = 16  # labels of which a table of confusions is made
_LOSS_LIMIT, _LOSS_RESOLUTION = float(1 << 40), 2.0**-10


def protection_problems(
    protection: ProtectionTerms,
    customers: Iterable[str],
    adapters: Iterable[tuple[str, AdapterTerms]],
) -> list[str]:
    """Everything that keeps these terms from being kept, one line each.

    Args:
        adapters: name and adapter of every model.
    """
    found = []
    for name, adapter in adapters:
        try:
            check_method(adapter.method, protection.mode)
        except ContractError as error:
            found += [f"model {name!r}: {problem}" for problem in error.problems]
    if protection.mode == "masked":
        try:
            _session(
                protection, customers, [_update(protection, PrivacyTerms(), 1)], bytes(48), "", 1
            )
        except ContractError as error:
            found += [f"protection: {problem}" for problem in error.problems]
    return found


def protection_warnings(
    protection: ProtectionTerms, adapters: Iterable[tuple[str, AdapterTerms]]
) -> list[str]:
    """What a reader of the job should know of its methods, one line each.

    Raises:
        ContractError: a method cannot run under this protection at all.
    """
    said = ((name, check_method(adapter.method, protection.mode)) for name, adapter in adapters)
    return [f"model {name!r}: {warning}" for name, warning in said if warning]


def masked_terms(contract: Contract, run_id: str) -> SessionTerms:
    """The terms of the contract's masked session.

    Raises:
        ContractError: the contract is not masked, or its terms cannot be kept, with every problem.
    """
    protection = contract.protection
    if protection.mode != "masked":
        raise ContractError(f"contract of job {contract.job}", ["its updates are not masked"])
    length = sum(terms.travelling for terms in contract.models)
    private = shares_noise(contract)
    update = (
        noised_layout(contract, UPDATE)
        if private
        else _update(protection, contract.privacy, length)
    )
    layouts = [update, Layout(EVALUATED, 0, metrics=_metrics(contract))]
    if contract.taste.first:
        layouts.append(taste_layout(contract))
    customers = [party.name for party in contract.customers]
    # A sum of fewer than the minimum would have fewer shares of noise than are counted on.
    if private:
        protection = protection.model_copy(update={"agreement": True})
    return _session(protection, customers, layouts, contract.digest(), run_id, contract.rounds + 1)


def fewest_in_a_sum(contract: Contract) -> int:
    """How many customers every sum covers at least, also one that a lying aggregator enclave gets
    of masked updates: fewer than the minimum cohort if the contract does without agreement. Of a
    contract without `protection_problems`.
    """
    terms = contract.protection
    if terms.mode != "masked" or terms.agreement is not False or shares_noise(contract):
        return terms.minimum_cohort
    # Others have no session; a person may be shown them all the same.
    if terms.minimum_cohort - terms.colluders < 2:
        return 0
    return smallest_sum(len(contract.customers), terms.colluders, terms.minimum_cohort, False)


def makes_personal(contract: Contract, terms: ModelTerms) -> bool:
    """Whether trainer enclaves make personal adapters for a model: where the contract says so, and
    gives every customer the shared adapter, on which a personal one is built.
    """
    customers = {party.name for party in contract.customers}
    return terms.personal.epochs > 0 and customers <= set(contract.deliver_to)


def bytes_per_value(terms: SessionTerms) -> float:
    """Of an update's masked vector, while the whole cohort takes part."""
    layout = terms.by_name[UPDATE]
    return 8 * layout.vector_words(len(terms.roster)) / layout.length


def lanes(contract: Contract, metrics: Mapping[str, Mapping[str, Figure]]) -> dict[str, float]:
    """The values of all figures for one customer.

    Args:
        metrics: model -> "before/...", "local/...", "train/ROUND" and "federated/..." -> its
            counts.

    Raises:
        ContractError: `metrics` lacks a figure that the contract sums.
    """
    keys = [key for stage in _keys(contract) for key in stage]
    missing = [f"{model}: {key}" for model, key in keys if key not in metrics[model]]
    if missing:
        raise ContractError(
            "figures to sum",
            [f"{what} was not measured here" for what in missing],
            safe="Nothing was uploaded.",
        )
    return {
        _lane(model, key, part): float(value)
        for model, key in keys
        for part, value in zip(("correct", "total", "loss"), metrics[model][key], strict=True)
    }


def figures(contract: Contract, total: RoundSum) -> list[dict[str, dict[str, list[int | float]]]]:
    """For loading, each round and evaluating: model -> key -> [correct, total, loss sum] over the
    cohort.
    """
    values, history = total.metrics, []
    for stage in _keys(contract):
        found: dict[str, dict[str, list[int | float]]] = {
            terms.name: {} for terms in contract.models
        }
        for model, key in stage:
            correct, count, loss = (
                values[_lane(model, key, part)] for part in ("correct", "total", "loss")
            )
            found[model][key.partition("/")[0] if key.startswith("train/") else key] = [
                int(correct),
                int(count),
                loss,
            ]
        history.append(found)
    return history


def _session(
    protection: ProtectionTerms,
    customers: Iterable[str],
    layouts: Sequence[Layout],
    digest: bytes,
    run_id: str,
    rounds: int,
) -> SessionTerms:
    roster = tuple(sorted(customers))
    return SessionTerms(
        contract_digest=digest,
        run_id=run_id,
        roster=roster,
        minimum=protection.minimum_cohort,
        colluders=protection.colluders,
        layouts=tuple(layouts),
        agreement=protection.agreement is not False,
        rounds=rounds,
    )


def shares_noise(contract: Contract) -> bool:
    """Whether the noise of a sum is made up of its customers' shares."""
    name = contract.privacy.mechanism
    return name != "none" and TRAITS[name].shared


def _update(protection: ProtectionTerms, privacy: PrivacyTerms, length: int) -> Layout:
    return Layout(
        UPDATE,
        length,
        bits=protection.bits,
        clip_norm=protection.clip_norm,
        value_range=protection.value_range,
        # The sum of weights is public: where records are protected one by one it must not depend on
        # how many there are.
        max_weight=protection.max_records if privacy.mechanism == "none" else 1,
    )


def _metrics(contract: Contract) -> tuple[Lane, ...]:
    return tuple(
        metric
        for stage in _keys(contract)
        for model, key in stage
        for metric in (
            Lane(_lane(model, key, "correct"), _COUNT_LIMIT),
            Lane(_lane(model, key, "total"), _COUNT_LIMIT),
            Lane(_lane(model, key, "loss"), _LOSS_LIMIT, _LOSS_RESOLUTION),
        )
    )


def _keys(contract: Contract) -> list[list[tuple[str, str]]]:
    """Model and key of every figure that is summed: those of loading, of each round, and of
    evaluating.

    Under a privacy mechanism only what the provider's acceptance set says of the base and of the
    private adapter leaves: losses, local-only adapters and held-out records of customers are not
    noised, and stay with each customer.
    """
    private = contract.privacy.mechanism != "none"
    own = ["own"] if contract.evaluation.own and not private else []
    groups = contract.evaluation.groups
    measured = own + [f"acceptance/{group}" for group in groups]
    details = {
        terms.name: detail_keys(terms) if groups else list[str]() for terms in contract.models
    }
    names = [terms.name for terms in contract.models]
    loading = [
        (terms.name, f"{when}/{what}")
        for terms in contract.models
        for when in (
            ("before", "local") if _everybody_alone(terms) and not private else ("before",)
        )
        for what in measured + (details[terms.name] if when == "before" else [])
    ]
    rounds = [
        [] if private else [(name, train_key(number)) for name in names]
        for number in range(1, contract.rounds + 1)
    ]
    final = [(name, f"federated/{what}") for name in names for what in measured + details[name]]
    for terms in contract.models if not private else ():
        if makes_personal(contract, terms):
            final += [(terms.name, f"personal/{what}") for what in measured]
            final += [(terms.name, key) for key in (gain_keys(terms) if own else ())]
    return [loading, *rounds, final]


def gain_keys(terms: ModelTerms) -> list[str]:
    """Keys that count customers: whose personal adapter is better on their held-out records than
    the other adapter by more than noise (in place of right answers), of how many, and whose is
    worse (in place of a loss).
    """
    return ["gain/together", *(["gain/alone"] if _everybody_alone(terms) else [])]


def detail_keys(terms: ModelTerms) -> list[str]:
    """What is summed besides right and wrong on the acceptance set, which all parties may see:

    class/I        of the records of label I, how many were answered right and how many there are;
                   in place of a loss, how many records were answered by it
    said/I/J       records of label I that were answered by label J, for few labels
    token-f1, rouge-l    of free text, the sum over the records in place of a loss
    """
    count = len(terms.labels)
    if not count:
        return ["token-f1", "rouge-l"]
    keys = [f"class/{index}" for index in range(count)]
    if count <= _CONFUSED:
        keys += [f"said/{gold}/{said}" for gold in range(count) for said in range(count)]
    return keys


def may_leave(
    contract: Contract, metrics: Mapping[str, Mapping[str, Figure]]
) -> dict[str, dict[str, Figure]]:
    """Those of a customer's figures that the contract sums, for an update that is sealed."""
    if contract.privacy.mechanism == "none":
        kept = {terms.name for terms in contract.models if not _everybody_alone(terms)}
        return {
            model: {
                key: value
                for key, value in items.items()
                if model not in kept or not key.startswith("local/")
            }
            for model, items in metrics.items()
        }
    wanted = {pair for stage in _keys(contract) for pair in stage}
    return {
        model: {key: value for key, value in items.items() if (model, key) in wanted}
        for model, items in metrics.items()
    }


def _everybody_alone(terms: ModelTerms) -> bool:
    """Whether every customer trains the local-only baseline, so that its figures are summed."""
    return terms.training.baseline_epochs > 0 and terms.training.baseline_share == 1


def kind_of(contract: Contract, number: int) -> str:
    """Of what customers send in round `number`, from 1 to the contract's last."""
    return TASTED if is_taste(contract, number) else UPDATE


def train_key(number: int) -> str:
    """The key of the training losses of one round."""
    return f"train/{number}"


def _lane(model: str, key: str, part: str) -> str:
    return f"{model}/{key}/{part}"
