"""The privacy ledger of a customer: what was ever spent of each of its records, charged before
anything is released.

Rules that it keeps:
- A charge is made once for a (contract, run), before training starts, for the whole job. Asked
  again, it gives the receipt of the first time; asked with other records or another cost, it
  refuses.
- A charge touches every record of the data set. Records are known by a keyed digest of their bytes,
  so a file that is renamed, copied, re-ordered, split or joined brings no new budget; what a data
  set has spent is the most that one of its records has.
- Over budget is `BudgetExceeded`, and nothing is written. Nothing that was charged is ever given
  back.
- `release` lets each release of a charge leave once: a crash or a replay cannot average the noise
  away.
- Every entry holds the hash of the one before. The head of that chain is to be witnessed by
  somebody else: a ledger file is its owner's, who can restore an old copy, start another, or edit
  records so that they count as new. docs/privacy.md says more.

Costs are composed from the events themselves (`accounting.cost`), never from sums of epsilons.
"""

from __future__ import annotations

import contextlib
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.closing import Closing
from fedark.foundation.database import transaction
from fedark.foundation.errors import BudgetExceeded, InputError, ProtocolError, Refused
from fedark.privacy._ledger_file import altered, ledger_errors, open_file
from fedark.privacy.accounting import Budget, Guarantee, Spend, cost

__all__ = ["LEDGER", "ChargeReceipt", "Head", "Ledger", "chained", "record_bytes"]

LEDGER = "ledger.sqlite"
"""Name of the file in a customer's folder."""

_DIGEST_BYTES = 20
_NEW = 0  # the team of records that were never charged
_FACTS = {
    "charge": {"kind", "time", "contract", "run", "releases", "records", "set", "spend", "budget"},
    "release": {"kind", "time", "charge", "number"},
}
_COMPOSED = "the charges of this ledger are all that was ever released of these records"


def record_bytes(*fields: str) -> bytes:
    """A record as the ledger knows it: Unicode NFKC, case folded, white space runs as one blank,
    fields kept apart.

    So that a file in another encoding, line end or column width brings no new budget. A record
    whose words were changed is another record.
    """
    folded = [" ".join(unicodedata.normalize("NFKC", field).casefold().split()) for field in fields]
    return canonical.encode(folded)


@dataclass(frozen=True)
class Head:
    """The end of a ledger's chain: a ledger that does not have it in its past was rolled back or is
    another one.

    Attributes:
        ledger: its identifier, 32 bytes.
        sequence: number of entries.
        hash: of the last one, 48 bytes.
    """

    ledger: bytes
    sequence: int
    hash: bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"ledger": self.ledger.hex(), "sequence": self.sequence, "hash": self.hash.hex()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Head:
        """The inverse of `to_dict`.

        Raises:
            InputError: `value` is no head.
        """
        try:
            head = cls(
                bytes.fromhex(value["ledger"]), value["sequence"], bytes.fromhex(value["hash"])
            )
        except (KeyError, TypeError, ValueError):
            raise InputError("This is no head of a privacy ledger.") from None
        if (
            type(head.sequence) is not int
            or head.sequence < 0
            or len(head.ledger) != 32
            or len(head.hash) != 48
        ):
            raise InputError("This is no head of a privacy ledger.")
        return head


def _genesis(ledger: bytes) -> bytes:
    return canonical.digest(["fedark/privacy-ledger/1/genesis", ledger])


def _link(before: bytes, sequence: int, body: bytes) -> bytes:
    return canonical.digest(["fedark/privacy-ledger/1/entry", before, sequence, body])


def _facts(encoded: bytes) -> dict[str, Any]:
    body: Any = canonical.decode(bytes(encoded))
    if type(body) is dict and body.keys() == _FACTS.get(str(body.get("kind"))):
        return body
    raise ProtocolError("An entry of a privacy ledger is malformed.")


def chained(ledger: bytes, bodies: Iterable[bytes]) -> list[tuple[bytes, dict[str, Any]]]:
    """The entries that `Ledger.bodies` gave, each with the hash that the chain has after it.

    Args:
        ledger: its identifier, 32 bytes.

    Raises:
        ProtocolError: one is malformed.
    """
    found, link = [], _genesis(ledger)
    for sequence, body in enumerate(bodies, 1):
        link = _link(link, sequence, body)
        found.append((link, _facts(body)))
    return found


@dataclass(frozen=True)
class ChargeReceipt:
    """That a run was charged: what a trainer must hold before it starts.

    Attributes:
        charge: number of the entry; `Ledger.release` asks for it.
        head: the chain at that entry.
        spent: of the data set, this charge included, at the budget's delta.
        resumed: whether it had been charged before.
        next_release: the first release that has not left yet.
    """

    charge: int
    head: Head
    spent: Guarantee
    resumed: bool
    next_release: int


class Ledger(Closing):
    """An open ledger. Several processes may have one open; threads must not share an instance."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._database = open_file(path, create=create)
        try:
            with ledger_errors(path):
                meta = dict(self._database.execute("SELECT name, value FROM meta").fetchall())
            if any(len(meta.get(name, b"")) != 32 for name in ("id", "secret")):
                raise altered(path, "its identifier or key is missing")
            self._id, self._secret = bytes(meta["id"]), bytes(meta["secret"])
            with self._snapshot():
                self._chain()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> Ledger:
        """The ledger at `path`, its chain verified.

        Raises:
            InputError: it is missing, or open to other users.
            StorageError: it cannot be opened or made.
            Refused: it was altered.
        """
        return cls(path, create=create)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def charge(
        self,
        records: Iterable[bytes],
        *,
        contract_digest: bytes,
        run_id: str,
        spend: Spend,
        releases: int,
        budget: Budget,
        now: int,
    ) -> ChargeReceipt:
        """Charge a whole job to a data set; durable when this returns.

        Args:
            records: the data set, each as `record_bytes` gives it; any order, duplicates count
                once.
            contract_digest: 48 bytes.
            spend: of the job, against the strongest view that the customer minds.
            releases: how many times something will leave; see `release`.
            budget: of every record over all jobs; for a customer-level job, of the customer over
                all customer-level jobs.
            now: seconds since 1970.

        Raises:
            BudgetExceeded: some record (or the customer) would have spent more; nothing was
                written.
            Refused: the run was charged with other records or another cost.
        """
        digests = self._digests(records)
        if not digests or releases < 1 or len(contract_digest) != 48:
            raise InputError(
                "A charge needs records, a contract's digest and a release.",
                safe="Nothing was charged.",
            )
        whole = hashlib.sha384(b"".join(digests)).digest()
        body = {
            "kind": "charge",
            "time": now,
            "contract": contract_digest,
            "run": run_id,
            "releases": releases,
            "records": len(digests),
            "set": whole,
            "spend": spend.to_dict(),
            "budget": [float(budget.epsilon), float(budget.delta)],
        }
        with transaction(self._database, ledger_errors(self._path)):
            found = self._database.execute(
                "SELECT sequence FROM charges WHERE contract = ? AND run = ?",
                (contract_digest, run_id),
            ).fetchone()
            if found is not None:
                return self._again(found[0], body, digests, budget)
            teams = self._touched(digests)
            spent = self._within(budget, spend, teams)
            sequence, head = self._append(body)
            self._database.execute(
                "INSERT INTO charges VALUES (?, ?, ?)", (contract_digest, run_id, sequence)
            )
            self._mark(teams, sequence)
        return ChargeReceipt(sequence, head, spent, False, 0)

    def release(self, charge: int, number: int, now: int) -> Head:
        """Let release `number` of a charge leave: call it after the noise is drawn and before a
        byte is sent.

        Raises:
            Refused: it has left already, or was never charged: numbers go up from 0, and may skip.
        """
        with transaction(self._database, ledger_errors(self._path)):
            body = self._entry(charge)
            last = self._next_release(charge) - 1
            if body["kind"] != "charge" or not last < number < body["releases"]:
                raise Refused(
                    f"Release {number} was made before, or was not charged.",
                    safe="Nothing was released.",
                    fix=(
                        "After a crash, go on with the next one: the noise of two releases of one"
                        " sum would average out."
                    ),
                )
            _, head = self._append(
                {"kind": "release", "time": now, "charge": charge, "number": number}
            )
            self._database.execute("INSERT INTO releases VALUES (?, ?)", (charge, number))
        return head

    def next_release(self, charge: int) -> int:
        """The first release of a charge that has not left yet."""
        with self._snapshot():
            return self._next_release(charge)

    def spent(self, records: Iterable[bytes], delta: float) -> Guarantee:
        """What was spent of a data set: of its record that has spent most."""
        digests = self._digests(records)
        with self._snapshot():
            charged = [self._spends(team) for team, _ in self._touched(digests)]
            return _most([[spend.of_record() for spend in spends] for spends in charged], delta)

    def head(self) -> Head:
        """The end of the chain."""
        with self._snapshot():
            row = self._database.execute(
                "SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1"
            ).fetchone()
            return (
                Head(self._id, row[0], bytes(row[1])) if row else Head(self._id, 0, self._genesis())
            )

    def entries(self) -> list[dict[str, Any]]:
        """Every entry, in order, verified; with its number and hash."""
        with self._snapshot():
            return [
                {"sequence": number, "hash": link, **body} for number, link, body in self._chain()
            ]

    def bodies(self, contract: bytes, run_id: str) -> list[bytes]:
        """The entries as the chain has them, verified, up to the charge of this contract's run; []
        if there is none. `chained` reads them.
        """
        with self._snapshot():
            bodies = [body for _, _, body in self._chain()]
        of = [(body.get("contract"), body.get("run")) == (contract, run_id) for body in bodies]
        charged = of.index(True) + 1 if True in of else 0
        return [canonical.encode(body) for body in bodies[:charged]]

    def verify(self, against: Iterable[Head] = ()) -> Head:
        """Check everything: the chain, that every table says what it says, and that every head of
        `against` is of its past.

        Raises:
            Refused: something was edited, deleted, re-ordered or rolled back.
        """
        with self._snapshot():
            if self._database.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                raise altered(self._path, "it is not a whole database any more")
            links = {0: self._genesis()}
            charges: dict[int, dict[str, Any]] = {}
            released: set[tuple[int, int]] = set()
            for sequence, link, body in self._chain():
                links[sequence] = link
                if body["kind"] == "charge":
                    charges[sequence] = body
                    continue
                charge, number = body["charge"], body["number"]
                before = max((done for of, done in released if of == charge), default=-1)
                if charge not in charges or not before < number < charges[charge]["releases"]:
                    raise altered(self._path, f"entry {sequence} releases what was not charged")
                released.add((charge, number))
            self._check_tables(charges, released)
            for head in against:
                if head.ledger != self._id:
                    raise altered(
                        self._path, "it is another ledger than the one whose head was kept"
                    )
                if links.get(head.sequence) != head.hash:
                    raise altered(
                        self._path,
                        f"entry {head.sequence}, which was witnessed, is not in its past: it was"
                        " rolled back",
                    )
            last = max(links)
            return Head(self._id, last, links[last])

    # The chain.

    def _genesis(self) -> bytes:
        return _genesis(self._id)

    def _append(self, body: Mapping[str, Any]) -> tuple[int, Head]:
        row = self._database.execute(
            "SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        sequence, before = (row[0] + 1, bytes(row[1])) if row else (1, self._genesis())
        encoded = canonical.encode(dict(body))
        link = _link(before, sequence, encoded)
        self._database.execute("INSERT INTO entries VALUES (?, ?, ?)", (sequence, encoded, link))
        return sequence, Head(self._id, sequence, link)

    def _chain(self) -> list[tuple[int, bytes, dict[str, Any]]]:
        """Every entry with its hash, each verified against the one before."""
        found: list[tuple[int, bytes, dict[str, Any]]] = []
        link = self._genesis()
        for sequence, encoded, stored in self._database.execute(
            "SELECT sequence, body, hash FROM entries ORDER BY sequence"
        ):
            if sequence != len(found) + 1:
                raise altered(self._path, f"entry {len(found) + 1} is missing")
            link = _link(link, sequence, bytes(encoded))
            if link != stored:
                raise altered(self._path, f"entry {sequence} is not what the chain says")
            found.append((sequence, link, self._decoded(sequence, encoded)))
        return found

    def _decoded(self, sequence: int, encoded: bytes) -> dict[str, Any]:
        with contextlib.suppress(ProtocolError):
            return _facts(encoded)
        raise altered(self._path, f"entry {sequence} is malformed")

    def _entry(self, sequence: int) -> dict[str, Any]:
        row = self._database.execute(
            "SELECT body FROM entries WHERE sequence = ?", (sequence,)
        ).fetchone()
        if row is None:
            raise InputError(f"The ledger has no entry {sequence}.", safe="Nothing was released.")
        return self._decoded(sequence, row[0])

    def _next_release(self, charge: int) -> int:
        last = self._database.execute(
            "SELECT max(number) FROM releases WHERE charge = ?", (charge,)
        ).fetchone()[0]
        return 0 if last is None else int(last) + 1

    # Records and their teams.

    def _digests(self, records: Iterable[bytes]) -> list[bytes]:
        key = self._secret
        return sorted(
            {
                hashlib.blake2b(record, key=key, digest_size=_DIGEST_BYTES).digest()
                for record in records
            }
        )

    def _touched(self, digests: list[bytes]) -> list[tuple[int, int]]:
        """The teams that the records are of, and how many are of each; team 0 for those that are
        new.
        """
        self._database.execute("DROP TABLE IF EXISTS temp.asked")
        self._database.execute("CREATE TEMP TABLE asked (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.executemany(
            "INSERT INTO asked VALUES (?)", ((digest,) for digest in digests)
        )
        return self._database.execute(
            "SELECT coalesce(team, 0), count(*) FROM asked LEFT JOIN records USING (digest) GROUP"
            " BY 1 ORDER BY 1"
        ).fetchall()

    def _mark(self, teams: list[tuple[int, int]], charge: int) -> None:
        """Note `charge` for every record of `temp.asked`: a team that was asked for in part is
        split first.
        """
        run = self._database.execute
        for team, count in teams:
            marked = team
            size = run("SELECT size FROM teams WHERE team = ?", (team,)).fetchone()
            if team == _NEW or size[0] != count:
                marked = run("INSERT INTO teams (size) VALUES (?)", (count,)).lastrowid or 0
            if team == _NEW:
                run(
                    "INSERT INTO records SELECT digest, ? FROM temp.asked WHERE digest NOT IN"
                    " (SELECT digest FROM records)",
                    (marked,),
                )
            elif marked != team:
                run("UPDATE teams SET size = size - ? WHERE team = ?", (count, team))
                run(
                    "INSERT INTO charged SELECT ?, charge FROM charged WHERE team = ?",
                    (marked, team),
                )
                run(
                    "UPDATE records SET team = ? WHERE team = ? AND digest IN temp.asked",
                    (marked, team),
                )
            run("INSERT INTO charged VALUES (?, ?)", (marked, charge))

    def _spends(self, team: int) -> list[Spend]:
        """What every record of a team was charged."""
        rows = self._database.execute(
            "SELECT charge FROM charged WHERE team = ? ORDER BY charge", (team,)
        ).fetchall()
        return [Spend.from_dict(self._entry(row[0])["spend"]) for row in rows]

    # Decisions.

    def _alternatives(self, unit: str, teams: list[tuple[int, int]]) -> list[list[Spend]]:
        """What was charged for each team, or for the customer: one of these lists costs most."""
        if unit == "record":
            return [[spend.of_record() for spend in self._spends(team)] for team, _ in teams]
        rows = self._database.execute("SELECT sequence FROM charges ORDER BY sequence").fetchall()
        spends = [Spend.from_dict(self._entry(row[0])["spend"]) for row in rows]
        return [[spend for spend in spends if spend.unit == "customer"]]

    def _within(self, budget: Budget, spend: Spend, teams: list[tuple[int, int]]) -> Guarantee:
        before = self._alternatives(spend.unit, teams)
        spent = _most([[*spends, spend] for spends in before], budget.delta)
        if spent.epsilon > budget.epsilon:
            raise BudgetExceeded(
                f"The privacy budget would be exceeded: epsilon {spent.epsilon:.4g} of"
                f" {budget.epsilon:.4g} at delta {budget.delta:.3g}.",
                safe="Nothing was charged, and training does not start.",
                fix=(
                    "Use records that were not used before, or agree on a contract that spends"
                    " less."
                ),
            )
        return spent

    def _again(
        self, sequence: int, body: Mapping[str, Any], digests: list[bytes], budget: Budget
    ) -> ChargeReceipt:
        before = self._entry(sequence)
        if any(before[fact] != body[fact] for fact in ("releases", "records", "set", "spend")):
            raise Refused(
                "This run was charged with other records or another cost.",
                safe="Nothing was charged, and training does not start.",
                fix="Restore the data set that the run began with, or begin another run.",
            )
        link = self._database.execute(
            "SELECT hash FROM entries WHERE sequence = ?", (sequence,)
        ).fetchone()[0]
        spent = _most(
            self._alternatives(before["spend"]["unit"], self._touched(digests)), budget.delta
        )
        return ChargeReceipt(
            sequence,
            Head(self._id, sequence, bytes(link)),
            spent,
            True,
            self._next_release(sequence),
        )

    def _check_tables(
        self, charges: Mapping[int, Mapping[str, Any]], released: set[tuple[int, int]]
    ) -> None:
        """Refuse tables that say anything else than the chain."""
        run = self._database.execute
        listed = {
            (bytes(contract), name, sequence)
            for contract, name, sequence in run("SELECT * FROM charges")
        }
        if listed != {
            (body["contract"], body["run"], sequence) for sequence, body in charges.items()
        }:
            raise altered(self._path, "its list of charges is not the chain's")
        if set(run("SELECT charge, number FROM releases")) != released:
            raise altered(self._path, "its list of releases is not the chain's")
        if {row[0] for row in run("SELECT DISTINCT charge FROM charged")} != charges.keys():
            raise altered(self._path, "it has records of a charge that the chain has not")
        counted = dict(run("SELECT team, count(*) FROM records GROUP BY team"))
        if (
            counted != dict(run("SELECT team, size FROM teams"))
            or {row[0] for row in run("SELECT team FROM charged")} != counted.keys()
        ):
            raise altered(self._path, "its groups of records do not add up")
        query = (
            "SELECT digest FROM records WHERE team IN (SELECT team FROM charged WHERE charge = ?)"
            " ORDER BY digest"
        )
        for sequence, body in charges.items():
            whole, count = hashlib.sha384(), 0
            for (digest,) in run(query, (sequence,)):
                whole.update(digest)
                count += 1
            if (whole.digest(), count) != (body["set"], body["records"]):
                raise altered(
                    self._path, f"the records of charge {sequence} are not those that were charged"
                )

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """One state of the file for everything that the block reads."""
        with ledger_errors(self._path):
            self._database.execute("BEGIN")
            try:
                yield
            finally:
                self._database.execute("ROLLBACK")


def _most(alternatives: Iterable[list[Spend]], delta: float) -> Guarantee:
    """The guarantee of the record that has spent most."""
    worst = Guarantee(
        0.0, delta, "record", "as charged", "nothing was released", "nothing released", ()
    )
    for spends in alternatives:
        value, accountant = cost(spends, delta)
        if value > worst.epsilon:
            jobs = f"{len(spends)} job{'s' if len(spends) > 1 else ''}"
            worst = Guarantee(
                value, delta, spends[0].unit, "as charged", jobs, accountant, (_COMPOSED,)
            )
    return worst
