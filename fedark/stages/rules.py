"""Standing rules: which contracts a party's operator agrees to without being asked. `rules.toml` in
the party's folder.

    version = 1
    [[allow]]
    name = "weekly dispatch"
    jobs = ["grid-dispatch"]
    parties = { gridworks = "ab12...", dispatch-pool = "cd34...", ... }   # name = fingerprint
    models = ["encoder"]
    protection = ["masked"]
    minimum_cohort = 3
    max_rounds = 20
    deliver_to = ["gridworks", "north"]
    platforms = ["simulated"]
    terms = ["9f3c..."]                       # 96 hex digits: what a person read all of, see below
    privacy = { mechanism = "none" }          # else each term: a value, or { min = , max = }
    max_jobs = 1                              # contracts that it approves in all
    max_days = 30
    until = "2027-01-01T00:00:00+00:00"

Every key is needed, and a file with any problem allows nothing. A contract is allowed if one rule
covers all of it; the rule names exactly its `parties`.

- `terms`: a name says nothing of what bears it. So these are digests of all that the other keys do
  not bound: models with their bundles and training, protection, attestation, evaluation
  (`terms_digest`; `fedark node jobs` prints it). Any other value there waits for a person. Free are
  a contract's seed, which orders batches and hides nothing, and its dates within `max_days`.
- `max_jobs`: whoever learns the sums of two contracts over the same records learns, by subtraction,
  what a customer contributed who was in one of them alone. Only a privacy mechanism bounds that.
- `minimum_cohort`: of every sum (`fedark.contract.protection.fewest_in_a_sum`).

Rules decide before a job begins. To stop one that runs, its approval is withdrawn.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedark.contract.contract import Contract, ProtectionMode, fingerprint
from fedark.contract.protection import fewest_in_a_sum
from fedark.foundation import canonical
from fedark.foundation.errors import ContractError, InputError
from fedark.foundation.terms import Finite, Hex48, Name, Terms, explain, to_tuples

__all__ = ["RULES", "Rule", "Rules", "terms_digest"]

RULES = "rules.toml"
_MAX_RULES = 1 << 20
_BOUNDED = (
    "version",
    "job",
    "created",
    "expires",
    "seed",
    "rounds",
    "parties",
    "privacy",
    "deliver_to",
)
"""What a rule's other keys look at, and the seed; everything else of a contract is in its
`terms_digest`.
"""


def terms_digest(contract: Contract) -> str:
    """SHA-384 (hex) of all of a contract but what a rule bounds by its other keys."""
    rest = {key: value for key, value in contract.to_map().items() if key not in _BOUNDED}
    return canonical.digest(["fedark/standing-terms/1", rest]).hex()


class Range(Terms):
    """Bounds of a number, both included."""

    min: Finite | int | None = None
    max: Finite | int | None = None

    def admits(self, value: Any) -> bool:
        """Whether `value` is a number within them."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)


class Rule(Terms):
    """One `[[allow]]`; see the module's docstring."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    jobs: Annotated[tuple[Name, ...], Field(min_length=1)]
    parties: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{4} ?){10}$")]]
    models: Annotated[tuple[Name, ...], Field(min_length=1)]
    protection: Annotated[tuple[ProtectionMode, ...], Field(min_length=1)]
    minimum_cohort: Annotated[int, Field(ge=2)]
    max_rounds: Annotated[int, Field(ge=1)]
    deliver_to: Annotated[tuple[Name, ...], Field(min_length=1)]
    platforms: Annotated[tuple[str, ...], Field(min_length=1)]
    terms: Annotated[tuple[Hex48, ...], Field(min_length=1)]
    privacy: dict[str, Range | str | int | float | bool]
    max_jobs: Annotated[int, Field(ge=1)]
    max_days: Annotated[int, Field(ge=1)]
    until: str

    def objections(self, contract: Contract, now: datetime, approved: int = 0) -> list[str]:
        """Everything of a contract that this rule, which has approved so many others, does not
        cover.
        """
        found = []
        if approved >= self.max_jobs:
            found.append(f"the rule has approved {approved} of {self.max_jobs} jobs")
        if now >= datetime.fromisoformat(self.until):
            found.append(f"the rule ended at {self.until}")
        if contract.job not in self.jobs:
            found.append(f"job {contract.job} is not named")
        for party in contract.parties:
            known = self.parties.get(party.name)
            if known is None:
                found.append(f"{party.role} {party.name} is not named")
            elif known.replace(" ", "") != fingerprint(party).replace(" ", ""):
                found.append(f"{party.name} has other keys than the rule says")
        missing = sorted(self.parties.keys() - {party.name for party in contract.parties})
        found += [f"{name}, whom the rule names, is not in it" for name in missing]
        found += [
            f"model {terms.name} is not named"
            for terms in contract.models
            if terms.name not in self.models
        ]
        if contract.protection.mode not in self.protection:
            found.append(f"protection {contract.protection.mode!r} is not named")
        if (fewest := fewest_in_a_sum(contract)) < self.minimum_cohort:
            found.append(
                f"a sum of it may cover {fewest} customers, fewer than {self.minimum_cohort}"
            )
        if contract.rounds > self.max_rounds:
            found.append(f"its {contract.rounds} rounds are over {self.max_rounds}")
        found += [
            f"the adapter would go to {name}"
            for name in contract.deliver_to
            if name not in self.deliver_to
        ]
        found += [
            f"platform {name!r} is not named"
            for name in contract.attestation.platforms
            if name not in self.platforms
        ]
        if (digest := terms_digest(contract)) not in self.terms:
            found.append(
                "its models, protection, attestation and evaluation are other terms"
                f" ({digest[:16]}...) than those named"
            )
        terms = contract.privacy.model_dump()
        if contract.privacy.mechanism == "none":  # the other terms mean nothing then
            terms = {"mechanism": "none"}
        for key, value in terms.items():
            if key == "accept_noise" and not value:
                continue  # the contract asks for nothing
            bound = self.privacy.get(key)
            if not (
                bound.admits(value)
                if isinstance(bound, Range)
                else type(bound) is type(value) and bound == value
            ):
                found.append(f"privacy.{key} = {value!r} is not covered")
        if datetime.fromisoformat(contract.expires) - datetime.fromisoformat(
            contract.created
        ) > timedelta(days=self.max_days):
            found.append(f"it is valid for more than {self.max_days} days")
        return found


class Rules(Terms):
    """All of `rules.toml`."""

    version: Literal[1]
    allow: tuple[Rule, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Rules:
        """The rules of a party's folder; no file is no rule.

        Raises:
            InputError: it cannot be read.
            ContractError: with every problem in it; nothing is allowed by it then.
        """
        path = folder / RULES
        safe = "No rule of it counts: every contract waits for its operator."
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls(version=1)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.", safe=safe) from None
        if len(data) > _MAX_RULES:
            raise ContractError(
                str(path), [f"it has {len(data)} bytes, over the limit of {_MAX_RULES}"], safe=safe
            )
        try:
            rules = cls.model_validate(to_tuples(tomllib.loads(data.decode("utf-8"))))
        except ValidationError as error:
            raise ContractError(str(path), explain(error), safe=safe) from None
        except ValueError as error:
            raise ContractError(str(path), [str(error)], safe=safe) from None
        problems = []
        for rule in rules.allow:
            try:
                if datetime.fromisoformat(rule.until).tzinfo is None:
                    problems.append(f"rule {rule.name!r}: until has no time zone")
            except ValueError:
                problems.append(f"rule {rule.name!r}: until is not an ISO 8601 time")
        if problems:
            raise ContractError(str(path), problems, safe=safe)
        return rules

    def allowing(
        self, contract: Contract, now: datetime, approved: Mapping[str, int] = MappingProxyType({})
    ) -> tuple[Rule | None, list[str]]:
        """The rule that covers a contract; or None, and what each rule objects to.

        Args:
            approved: name of a rule -> how many other contracts it has approved.
        """
        objections = []
        for rule in self.allow:
            found = rule.objections(contract, now, approved.get(rule.name, 0))
            if not found:
                return rule, []
            objections += [f"rule {rule.name!r}: {objection}" for objection in found]
        return None, objections
