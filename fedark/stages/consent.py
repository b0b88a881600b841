"""What a party's operator has agreed to: one contract, for one run, read by a person or covered by
a standing rule.

The aggregator proposes contracts and is trusted with nothing. So a node signs no contract that its
operator has not approved by its digest: what that person read is what runs.

A contract is for one run. Two runs of it could leave out different customers, and the difference of
their sums would show what one customer contributed. So what is made from a customer's records, and
a provider's keys, leave for one run of a contract and for no second one, over Flower and over a key
broker alike. A run is its run id: for that id a broker answers every attested trainer enclave, as
often as one asks.

    consent/DIGEST.contract    proposed: what the operator is asked
    consent/DIGEST.approved    by the operator's command or by a rule, which it names
    consent/DIGEST.refused     by the operator's command, also during a run, which then ends at its
                               next stage
    consent/DIGEST.used        the run's id, written before a key, or anything that was made from
                               records, leaves for it

Approving a contract adds the parties in it that were unknown to the roster, after the operator was
shown their fingerprints. Keys of a party that is known change by `fedark node replace` alone.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedark.contract.contract import Contract, fingerprint, now
from fedark.contract.privacy import learning_lines
from fedark.contract.protection import fewest_in_a_sum
from fedark.foundation.errors import (
    ContractError,
    FedarkError,
    FederationError,
    InputError,
    Refused,
    printable,
)
from fedark.foundation.files import disk_errors, write_atomic
from fedark.foundation.terms import Terms
from fedark.stages.roster import read_roster, write_roster
from fedark.stages.rules import Rules, terms_digest

__all__ = ["Consent", "Decision", "summary"]

_DIGEST = re.compile(r"[0-9a-f]{16,96}")


@dataclass(frozen=True)
class Decision:
    """Where a contract stands with this party's operator.

    Attributes:
        status: "approved", by a person or a rule; "waiting" for one; "refused"; or "used": a run of
            it has begun.
        reason: for people.
    """

    status: Literal["approved", "waiting", "refused", "used", "ended"]
    reason: str


class Consent:
    """The consents of the party whose folder this is."""

    def __init__(self, folder: Path) -> None:
        self._party = folder
        self._folder = folder / "consent"

    def propose(self, contract: Contract) -> None:
        """Keep a contract for the operator to read."""
        path = self._path(contract, "contract")
        if not path.exists():
            write_atomic(path, contract.encode(), mode=0o600)

    def proposed(self) -> list[Contract]:
        """What the operator was ever asked, oldest first."""
        paths = sorted(self._folder.glob("*.contract"), key=lambda path: path.stat().st_mtime)
        return [Contract.decode(path.read_bytes(), path.name) for path in paths]

    def find(self, name: str) -> Contract:
        """The contract whose digest begins so, or the one of the job of that name: of several, the
        one that is still open.

        Raises:
            InputError: there is none, or there are several.
        """
        proposed = self.proposed()
        named = [contract for contract in proposed if contract.job == name]
        still = [
            one
            for one in named
            if self.decision(one).status not in ("refused", "ended") and not one.expired(now())
        ]
        begin = [
            contract
            for contract in proposed
            if len(name) >= 8 and contract.digest().hex().startswith(name)
        ]
        return _only(name, [*(still or named), *begin])

    def by_digest(self, digest: str) -> Contract:
        """The contract with this digest, given by 16 hex digits at least. The host names jobs, so
        no name says which was read.

        Raises:
            InputError: it is no digest, or not of one contract.
        """
        if not _DIGEST.fullmatch(digest):
            raise InputError(
                f"{digest!r} is no contract's digest, nor the first 16 of its hex digits.",
                safe="Nothing was approved.",
                fix=(
                    "Read the contract with fedark node jobs, which prints the command that agrees"
                    " to it."
                ),
            )
        return _only(
            digest,
            [
                contract
                for contract in self.proposed()
                if contract.digest().hex().startswith(digest)
            ],
        )

    def decision(self, contract: Contract) -> Decision:
        """Where a contract stands."""
        if (refused := self._path(contract, "refused")).is_file():
            return Decision("refused", refused.read_text())
        if (used := self._path(contract, "used")).is_file():
            return Decision("used", f"run {used.read_text()}")
        if (ended := self._path(contract, "ended")).is_file():
            return Decision("ended", ended.read_text())
        if contract.expired(now()):
            return Decision("ended", f"it was to be run before {contract.expires}")
        if (approved := self._path(contract, "approved")).is_file():
            return Decision("approved", approved.read_text().partition("\n")[0])
        try:
            rules = Rules.read(self._party)
            rule, objections = rules.allowing(contract, now(), self._approved_by(rules))
        except FedarkError as error:
            return Decision("waiting", error.what)
        if rule is not None and not (problems := self._key_problems(contract)):
            return Decision("approved", _by_rule(rule.name))
        return Decision(
            "waiting", "; ".join(objections if rule is None else problems) or "no rule covers it"
        )

    def before(self, contract: Contract) -> list[Contract]:
        """Other contracts over the same weights, however they were sealed, for which a run has
        begun
        here: two sums over the same records can be subtracted.
        """
        weights = {terms.weights for terms in contract.models}
        return [
            other
            for other in self.proposed()
            if other.digest() != contract.digest()
            and weights & {terms.weights for terms in other.models}
            and self._path(other, "used").is_file()
        ]

    def approve(self, contract: Contract, *, by: str = "by its operator") -> None:
        """Agree to a contract, and to the keys in it of parties that were unknown.

        Raises:
            InputError: it is over: a run of it has begun, or the host has ended it.
            ContractError: a party that is known has other keys in it.
            StorageError: it cannot be written down.
        """
        if (decision := self.decision(contract)).status in ("ended", "used"):
            raise InputError(
                f"This contract of job {contract.job} is over: {decision.reason}.",
                safe="Nothing was approved.",
                fix="A new contract comes with the next proposal of the job.",
            )
        if problems := self._key_problems(contract):
            raise ContractError(
                f"contract of job {contract.job}",
                problems,
                safe="It was not approved.",
                fix=(
                    "Ask those parties, not the host. One that has new keys tells you their"
                    " fingerprint, for: fedark node replace FOLDER PARTY --fingerprint ..."
                ),
            )
        known = read_roster(self._party) if (self._party / "roster.json").exists() else {}
        if unknown := {party.name: party for party in contract.parties if party.name not in known}:
            write_roster(self._party, {**known, **unknown}.values())
        self.propose(contract)
        text = f"{by}, {now().isoformat(timespec='seconds')}\n{summary(contract)}"
        write_atomic(self._path(contract, "approved"), text.encode(), mode=0o600)
        with disk_errors(self._folder):
            self._path(contract, "refused").unlink(missing_ok=True)

    def refuse(self, contract: Contract, reason: str = "") -> None:
        """Say no, or take an approval back: a run of it ends here at its next stage."""
        text = f"{reason or 'by its operator'}, {now().isoformat(timespec='seconds')}"
        write_atomic(self._path(contract, "refused"), text.encode(), mode=0o600)

    def end(self, contract: Contract, how: str) -> None:
        """The host says that this job is over. It stays so here, whatever the host says later."""
        path = self._path(contract, "ended")
        if not path.is_file():
            write_atomic(path, how.encode(), mode=0o600)

    def require(self, contract: Contract, party: str, run_id: str | None = None) -> None:
        """Return if the contract is approved and no run of it has begun to speak, other than
        `run_id`.

        Raises:
            ContractError: it is not, or one has.
        """
        decision = self.decision(contract)
        source, safe = (
            f"contract of job {contract.job}",
            f"{party} did not sign it and read no record for it.",
        )
        if decision.status == "used" and (
            run_id is None or self._path(contract, "used").read_text() != run_id
        ):
            raise ContractError(
                source,
                [f"{party} has taken part in a run of it"],
                safe=safe,
                fix="Propose a new contract: one run each.",
            )
        if decision.status == "refused":
            raise ContractError(source, [f"the operator of {party} has refused it"], safe=safe)
        if decision.status == "ended":
            raise ContractError(source, [f"it is over for {party}: {decision.reason}"], safe=safe)
        if decision.status == "waiting":
            self.propose(contract)
            raise ContractError(
                source,
                [f"the operator of {party} has not approved it"],
                safe=safe,
                fix=(
                    f"Its operator reads it: fedark node jobs FOLDER-OF-{party.upper()}"
                    f" {contract.digest().hex()[:16]}"
                ),
            )
        if not self._path(contract, "approved").is_file():
            with self._alone():  # or of two at once each would be a rule's last
                decision = self.decision(contract)
                if decision.status == "approved":
                    self.approve(
                        contract, by=decision.reason
                    )  # a rule did: written down like any other
            if decision.status != "approved":
                self.require(contract, party, run_id)

    def require_standing(self, digest: bytes, party: str) -> None:
        """Return if nobody has taken back the approval of the contract with this digest.

        Raises:
            Refused: the operator has.
        """
        if (self._folder / f"{digest.hex()}.refused").is_file():
            raise Refused(
                f"The operator of {party} has taken its approval back.",
                safe=f"{party} does no more for this job.",
                fix=f"Ask the operator of {party}.",
            )

    def use(self, contract: Contract, run_id: str) -> None:
        """Write down, before anything of a run leaves that its contract is for, that this run is
        the contract's one.

        Of several processes or threads that ask for different runs, one gets it.

        Raises:
            FederationError: another run was.
            StorageError: it cannot be written down.
        """
        path = self._path(contract, "used")
        with self._alone():
            if not path.is_file():
                write_atomic(path, run_id.encode(), mode=0o600)
            elif path.read_text() != run_id:
                raise FederationError(
                    "Another run of this contract has begun already.",
                    safe="Nothing was sent.",
                    fix="Propose a new contract: one run each.",
                )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder: a provider's broker may share it with its node."""
        with disk_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            descriptor = os.open(
                self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        try:
            with disk_errors(self._folder):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _path(self, contract: Contract, what: str) -> Path:
        return self._folder / f"{contract.digest().hex()}.{what}"

    def _approved_by(self, rules: Rules) -> dict[str, int]:
        """How many contracts each rule has approved, by its name; those refused later count."""
        texts = [path.read_text() for path in self._folder.glob("*.approved")]
        return {
            rule.name: sum(text.startswith(f"{_by_rule(rule.name)},") for text in texts)
            for rule in rules.allow
        }

    def _key_problems(self, contract: Contract) -> list[str]:
        known = read_roster(self._party) if (self._party / "roster.json").exists() else {}
        return [
            f"{party.name} has other keys in it than the roster here says"
            for party in contract.parties
            if known.get(party.name, party) != party
        ]


def _by_rule(name: str) -> str:
    return f"by rule {name!r}"


def _only(name: str, found: list[Contract]) -> Contract:
    several = {contract.digest().hex(): contract for contract in found}
    if not several:
        raise InputError(f"No contract is named or begins with {name!r}.")
    if len(several) > 1:
        raise InputError(
            f"Several contracts are named or begin with {name!r}:"
            f" {', '.join(digest[:32] for digest in sorted(several)[:10])}.",
            safe="None was chosen.",
            fix="Give the digest of the one that you mean.",
        )
    return next(iter(several.values()))


def summary(
    contract: Contract, known: frozenset[str] | None = None, before: Sequence[Contract] = ()
) -> str:
    """The contract in words, for the person who approves it.

    Args:
        before: see `Consent.before`.
        known: names of the parties whose keys are in the roster already; the others are marked.
            None marks none.
    """
    lines = [
        f"job {contract.job}, contract {contract.digest().hex()}",
        f"valid {_line(contract.created)} to {_line(contract.expires)}, {contract.rounds} rounds"
        + (" at most" if contract.curve.patience or contract.curve.target else ""),
        f"provider {contract.provider.name}, aggregator {contract.aggregator.name}",
        (
            f"customers: {', '.join(party.name for party in contract.customers)}; at least"
            f" {fewest_in_a_sum(contract)} in a sum"
        ),
        f"the adapter goes to: {', '.join(contract.deliver_to)}",
        (
            f"updates leave protected as {contract.protection.mode!r}; nothing else leaves but"
            " counts and losses of the cohort"
        ),
        f"  {_listed(contract.protection)}",
        *_privacy_lines(contract),
    ]
    for other in before:
        lines.append(
            f"  before this: job {other.job}, contract {other.digest().hex()[:16]}... over the same"
            " models; whoever learns both sums"
        )
        lines.append(
            "  learns, by subtraction, what a customer contributed who was in one of them alone"
        )
    lines.append(
        f"enclaves on: {_line(', '.join(contract.attestation.platforms))}; sandbox"
        f" {contract.attestation.sandbox!r} or better"
    )
    if "simulated" in contract.attestation.platforms:
        lines.append(
            "  the simulated platform protects from neither an enclave's own host nor the"
            " platform's manufacturer"
        )
    for terms in contract.models:
        lines.append(
            f"model {terms.name}: {terms.task}, {terms.adapter.method} rank {terms.adapter.rank},"
            f" {terms.travelling} values travel, {terms.training.epochs} epochs a round, bundle"
            f" {terms.bundle[:16]}..."
        )
        lines.append(f"  {_line(terms.taken)}")
        lines += [
            f"  {part}: {_listed(getattr(terms, part))}"
            for part in ("adapter", "training", "server", "personal")
        ]
        if terms.start:
            lines.append(
                f"  starts from the adapter {terms.start}"
                " (`fedark contract start` compares it with a folder)"
            )
        lines.append(f"  prompt: {_line(terms.prompt)}")
        lines.append(
            f"  answers: {_line(', '.join(terms.labels)) if terms.labels else 'free text'}"
        )
    lines.append(f"evaluation: {_listed(contract.evaluation)}")
    lines.append(f"learning curve: {_listed(contract.curve)}")
    lines.append(f"taster: {_listed(contract.taste)}")
    lines.append(f"terms that a standing rule names: {terms_digest(contract)}")
    lines.append("keys, to compare with what each party says of itself:")
    for party in contract.parties:
        new = "" if known is None or party.name in known else "   (new: not known here before)"
        lines.append(f"  {party.role:10s} {party.name}: {fingerprint(party)}{new}")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Another party's text, which begins no line of its own."""
    return printable(text, 2000).replace("\n", "?")


def _listed(terms: Terms) -> str:
    """Every term of a part."""
    found, words = [], {None: "by default", True: "yes", False: "no"}
    for key, value in terms.model_dump().items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        said = words[value] if value is None or isinstance(value, bool) else _line(text) or "none"
        found.append(f"{key} {said}")
    return "; ".join(found)


def _privacy_lines(contract: Contract) -> list[str]:
    terms = contract.privacy.model_dump(exclude={"accept_noise"})
    mechanism = terms.pop("mechanism")
    if mechanism == "none":
        return [
            "privacy: no mechanism; who holds the adapter may learn something of single records"
        ]
    others = ", ".join(
        f"{key} {value:g}" for key, value in terms.items() if key not in ("epsilon", "delta")
    )
    return [
        (
            f"privacy: {mechanism}, epsilon {terms['epsilon']:g} at delta {terms['delta']:g} for"
            " the whole job"
        ),
        f"  {others}",
        *(f"  {line}" for line in learning_lines(contract)),
    ]
