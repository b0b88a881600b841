"""A customer leaves: what was trained with its records is trained again without it, and a party
signs a statement of what was done.

Of the two ways in which a customer can be taken out, this is the re-run: jobs begin again from the
last state that the customer did not touch, without it. A tuned adapter cannot be changed into one
that never saw a customer, so there is no shorter way for it. The other way, to subtract a part from
exact sums, is possible for heads in closed form alone; nothing here subtracts anything.

Everything is shown by dossiers (`fedark.report.verify`), so whoever has them makes the statement
anew and compares; without them it is its signer's word. It is a chain: each job starts from its
base, or from an adapter that an earlier job of the chain delivered, and the customer has part in
none of them, under no name: it is known by its signing key.

What no statement can say: that nobody has a copy of the old adapters, or of a personal adapter that
was made from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedark.contract.contract import Contract, Party
from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError, Refused, printable
from fedark.foundation.keys import SigningKey, verify_signature
from fedark.foundation.snapshot import Bytes32, Bytes48, Snapshot
from fedark.report.verify import Verified, verify_dossier
from fedark.tuning.start import start_digest

__all__ = ["RERUN", "Rerun", "Withdrawal", "last_untouched", "withdrawal_of"]

RERUN = "re-run"
_LABEL = "fedark/withdrawal/1"
_MAX_BYTES = 1 << 20
_SAME = ("task", "weights", "labels", "pooling", "layout", "adapter")
_NO_SAFE = "No statement was made."


class Rerun(Snapshot):
    """A job of the chain.

    Attributes:
        contract: digest of its contract.
        adapters: model -> SHA-384 of the travelling values that it delivered.
    """

    contract: Bytes48
    run_id: str
    customers: list[str]
    adapters: dict[str, Bytes48]


class Withdrawal(Snapshot):
    """The statement.

    Attributes:
        kind: of the two ways to take a customer out, the one that was taken: `RERUN`.
        customer, key: its name, and its signing key.
        replaced: the job whose adapters shall not be used any more.
        jobs: the chain that stands in for it; the last one's adapters are those to use.
        by: the party of the replaced job that signs.
    """

    called = "A statement of a withdrawal"

    kind: str
    customer: str
    key: Bytes32
    replaced: Rerun
    jobs: list[Rerun]
    by: str

    def sign(self, key: SigningKey) -> bytes:
        """The signed form: canonical CBOR of {"body", "signature"}."""
        body = self.encode()
        return canonical.encode({"body": body, "signature": key.sign(_LABEL, body)})

    @classmethod
    def verify(
        cls, data: bytes, replaced: bytes, jobs: Sequence[bytes], *, root: str = ""
    ) -> Withdrawal:
        """Make the statement anew from the dossiers, and compare.

        Raises:
            ProtocolError: it is malformed.
            Refused: it was altered, says something else than the dossiers, or these do not hold.
        """
        outer: Any = canonical.decode(data, max_bytes=_MAX_BYTES, max_depth=1)
        if type(outer) is not dict or {name: type(value) for name, value in outer.items()} != {
            "body": bytes,
            "signature": bytes,
        }:
            raise ProtocolError("This is no statement of a withdrawal.", safe="It was not used.")
        said = cls.decode(outer["body"])
        contract = verify_dossier(replaced, root=root).contract
        signer = contract.party(said.by)
        if signer is None:
            raise Refused(
                f"{printable(said.by)} is no party of the job that was replaced.",
                safe="The statement was not believed.",
            )
        verify_signature(
            bytes.fromhex(signer.signing_key),
            _LABEL,
            outer["body"],
            outer["signature"],
            by=signer.name,
        )
        if withdrawal_of(said.customer, replaced, jobs, by=said.by, root=root) != said:
            raise Refused(
                "The statement says something else than the dossiers show.",
                safe="It was not believed.",
                fix="Ask its signer for the dossiers that it was made from.",
            )
        return said


def withdrawal_of(
    customer: str, replaced: bytes, jobs: Sequence[bytes], *, by: str, root: str = ""
) -> Withdrawal:
    """What the dossiers show.

    Args:
        customer: who leaves, by its name in the replaced job.
        replaced: the dossier of the job whose adapters it is in.
        jobs: the dossiers of the chain, in order; jobs that it never was in may be among them.
        by: the party of the replaced job that will sign.
        root: of the simulated platform, as in `verify_dossier`.

    Raises:
        Refused: they do not show that the customer is out, with every reason.
    """
    old = verify_dossier(replaced, root=root)
    new = [verify_dossier(job, root=root) for job in jobs]
    party = old.contract.party(customer)
    problems = [] if new else ["no job was run again"]
    if party is None or party.role != "customer":
        raise Refused(
            f"{printable(customer)} is no customer of the job that is to be replaced.",
            safe=_NO_SAFE,
        )
    if old.contract.party(by) is None:
        problems.append(f"{printable(by)}, who shall sign, is no party of the replaced job")
    for place, job in enumerate(new):
        problems += _touched(job.contract, party) + _loose(job, new[:place])
    if new:
        problems += _stands_in(new[-1].contract, old.contract)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise Refused(
            f"It is not shown that {customer} is out:\n{lines}",
            safe=_NO_SAFE,
            fix="Name the dossiers of every job from the last state that it did not touch.",
        )
    return Withdrawal(
        kind=RERUN,
        customer=customer,
        key=bytes.fromhex(party.signing_key),
        replaced=_rerun(old),
        jobs=[_rerun(job) for job in new],
        by=by,
    )


def last_untouched(
    customer: str, dossiers: Sequence[bytes], *, root: str = ""
) -> tuple[list[Verified], list[Verified]]:
    """Of jobs in the order in which they were run: those that the customer has no part in, whose
    results may be kept, and those that have to be run again without it.

    A job is touched if the customer was in it, or if it started from one that was touched, or from
    an adapter that none of these jobs delivered.

    Raises:
        DossierRefused: a dossier does not hold.
        Refused: the customer is in none of them.
    """
    found = [verify_dossier(data, root=root) for data in dossiers]
    parties = [job.contract.party(customer) for job in found]
    party = next((one for one in parties if one is not None and one.role == "customer"), None)
    if party is None:
        raise Refused(f"{printable(customer)} is a customer of none of these jobs.", safe=_NO_SAFE)
    kept: list[Verified] = []
    again: list[Verified] = []
    for job in found:
        clean = not _touched(job.contract, party) and not _loose(job, kept)
        (kept if clean else again).append(job)
    return kept, again


def _touched(contract: Contract, party: Party) -> list[str]:
    return [
        f"{one.name} takes part in job {contract.job} ({contract.digest().hex()[:16]}...)"
        for one in contract.parties
        if party.name == one.name or party.signing_key == one.signing_key
    ]


def _loose(job: Verified, before: Sequence[Verified]) -> list[str]:
    """Models of a job that start from something that is of none of the jobs before it."""
    return [
        f"model {terms.name} of job {job.contract.job} starts from an adapter that none of the jobs"
        " before it delivered"
        for terms in job.contract.models
        if terms.start
        and terms.start
        not in {
            start_digest(terms, values) for other in before for values in other.adapters.values()
        }
    ]


def _stands_in(new: Contract, old: Contract) -> list[str]:
    """Why a job cannot take the place of another."""
    problems = []
    if new.provider.signing_key != old.provider.signing_key:
        problems.append("the last job has another provider")
    for terms in old.models:
        other = new.model(terms.name)
        if other is None or any(getattr(other, key) != getattr(terms, key) for key in _SAME):
            problems.append(f"the last job has no model {terms.name} of the same base and shape")
    return problems


def _rerun(job: Verified) -> Rerun:
    return Rerun(
        contract=job.contract.digest(),
        run_id=str(job.report["run_id"]),
        customers=[party.name for party in job.contract.customers],
        adapters=dict(job.adapters),
    )
