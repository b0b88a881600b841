"""What a party's operator has agreed to: one contract, read by a person, for one run.

The aggregator proposes contracts and is trusted with nothing, so a node signs none that its own operator has not approved by
digest: recipients, cohort, models, labels and training are then what that person read. And it takes part in one run of each: two
runs of one contract with different survivors would differ by one customer's contribution, and subtraction would show it.

    consent/DIGEST.approved    written by `approve`, by the operator's command
    consent/DIGEST.used        written before the first message of a run leaves, with that run's id
"""

from __future__ import annotations

from pathlib import Path

from fedark.contract import Contract
from fedark.errors import ContractError, FederationError
from fedark.files import write_atomic

__all__ = ["Consent", "summary"]


class Consent:
    """The consents of the party whose folder this is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "consent"

    def approve(self, contract: Contract) -> None:
        """Agree to a contract.

        Raises:
            StorageError: it cannot be written down.
        """
        write_atomic(self._folder / f"{contract.digest().hex()}.approved", summary(contract).encode(), mode=0o600)

    def require(self, contract: Contract, party: str) -> None:
        """Return if the contract was approved and no run of it has begun to speak.

        Raises:
            ContractError: it was not, or one has.
        """
        digest = contract.digest().hex()
        source, safe = f"contract of job {contract.job}", f"{party} did not sign it and read no record for it."
        if not (self._folder / f"{digest}.approved").is_file():
            raise ContractError(
                source,
                [f"the operator of {party} has not approved it"],
                safe=safe,
                fix=f"Read it and agree: fedark contract approve FOLDER-OF-{party.upper()} CONTRACT",
            )
        if (self._folder / f"{digest}.used").is_file():
            raise ContractError(
                source, [f"{party} has taken part in a run of it"], safe=safe, fix="Propose a new contract: one run each."
            )

    def use(self, contract: Contract, run_id: str) -> None:
        """Write down, before a run's first message leaves, that this run is the contract's one.

        Raises:
            FederationError: another run was.
            StorageError: it cannot be written down.
        """
        path = self._folder / f"{contract.digest().hex()}.used"
        if path.is_file() and path.read_text() != run_id:
            raise FederationError("Another run of this contract has begun already.", safe="Nothing was sent.")
        write_atomic(path, run_id.encode(), mode=0o600)


def summary(contract: Contract) -> str:
    """The contract in words, for the person who approves it."""
    lines = [
        f"job {contract.job}, contract {contract.digest().hex()}",
        f"valid {contract.created} to {contract.expires}, {contract.rounds} rounds",
        f"provider {contract.provider.name}, aggregator {contract.aggregator.name}",
        f"customers: {', '.join(party.name for party in contract.customers)}; at least {contract.protection.minimum_cohort} in a sum",
        f"the adapter goes to: {', '.join(contract.deliver_to)}",
        f"updates leave protected as {contract.protection.mode!r}; privacy mechanism: {contract.privacy.mechanism!r}",
        f"enclaves on: {', '.join(contract.attestation.platforms)}; sandbox {contract.attestation.sandbox!r} or better",
    ]
    for terms in contract.models:
        lines.append(
            f"model {terms.name}: {terms.task}, {terms.adapter.method} rank {terms.adapter.rank}, {terms.travelling} values travel, "
            f"{terms.training.epochs} epochs a round, bundle {terms.bundle[:16]}..."
        )
        lines.append(f"  answers: {', '.join(terms.labels) if terms.labels else 'free text'}")
    return "\n".join(lines) + "\n"
