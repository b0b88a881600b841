"""A customer is taken out by a re-run: what to run again, what the statement rests on, and every
statement that would be false.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attacks import refusing
from safetensors.numpy import load_file
from small import write_job
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.job import Job
from fedark.foundation import canonical
from fedark.foundation.errors import FedarkError, ProtocolError, Refused
from fedark.foundation.keys import PartyKeys
from fedark.operate.party import KEYS
from fedark.report import withdrawal
from fedark.report.verify import verify_dossier
from fedark.report.withdrawal import RERUN, Withdrawal, last_untouched, withdrawal_of
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER

FIRST = ("north", "east", "south")
CLOSED = ('models.0.adapter={method="head"}', "models.0.training.replay=0", "taste.first=true")


class Weeks:
    """Week one without west; week two with it, from week one; and what follows when west leaves."""

    def __init__(self, folder: Path) -> None:
        self.work, self.folder = folder / "work", folder
        self.results: dict[str, Path] = {}
        self.one = self.run("one")
        self.two = self.run("two", "one", (*FIRST, "west"))
        self.again = self.run("again", "one")
        self.fresh = self.run("fresh")

    def run(
        self,
        name: str,
        start: str = "",
        customers: tuple[str, ...] = FIRST,
        more: tuple[str, ...] = (),
    ) -> bytes:
        path = write_job(self.folder / name, rounds=1, records=16, customers=customers)
        terms = [
            "models.0.training.baseline_epochs=0",
            "models.0.personal.epochs=0",
            f'job.name="{name}"',
            *more,
        ]
        if start:
            terms.append(f"models.0.start={json.dumps(str(self.results[start]))}")
        with simulate(Job.load(path, tuple(terms)), self.work) as running:
            running.run()
            run_id = running.run_id
        self.results[name] = self.work / "parties" / "maker" / "runs" / run_id
        return (self.results[name] / DOSSIER).read_bytes()

    def keys(self, party: str) -> PartyKeys:
        return PartyKeys.load(self.work / "parties" / party / KEYS)


@pytest.fixture(scope="module")
def weeks(tmp_path_factory: pytest.TempPathFactory) -> Weeks:
    return Weeks(tmp_path_factory.mktemp("weeks"))


def refusal(call: object) -> str:
    with pytest.raises(FedarkError) as error:
        call()  # type: ignore[operator]
    return error.value.what


def test_what_is_run_again_begins_at_the_last_state_that_the_customer_did_not_touch(
    weeks: Weeks,
) -> None:
    kept, again = last_untouched("west", [weeks.one, weeks.two])
    assert [job.contract.job for job in kept] == ["one"]
    assert [job.contract.job for job in again] == ["two"]
    kept, again = last_untouched("north", [weeks.one, weeks.two])
    assert [job.contract.job for job in again] == ["one", "two"]
    kept, again = last_untouched("west", [weeks.two])  # what it started from is not shown
    assert not kept
    assert "customer of none" in refusal(lambda: last_untouched("far", [weeks.one]))


def test_the_statement_says_which_kind_it_is_and_anybody_makes_it_anew(weeks: Weeks) -> None:
    chain = [weeks.one, weeks.again]
    said = withdrawal_of("west", weeks.two, chain, by="maker")
    assert (said.kind, said.customer, said.by) == (RERUN, "west", "maker")
    assert said.jobs[-1].customers == list(FIRST)
    assert said.jobs[-1].adapters == verify_dossier(weeks.again).adapters
    assert said.jobs[-1].adapters != said.replaced.adapters
    signed = said.sign(weeks.keys("maker").signing)
    assert Withdrawal.verify(signed, weeks.two, chain) == said


@pytest.mark.slow
def test_the_re_run_gives_the_adapter_of_a_run_that_never_had_the_customer(weeks: Weeks) -> None:
    never = Weeks.__new__(Weeks)
    never.work, never.folder, never.results = weeks.folder / "never", weeks.folder, {}
    never.run("one")
    never.run("again", "one")
    for file in ("adapter_model.safetensors", "head.safetensors"):
        one, other = (
            load_file(ran.results["again"] / "adapter-tiny" / file) for ran in (weeks, never)
        )
        assert all((one[key] == other[key]).all() for key in one)


@pytest.mark.slow
def test_a_head_in_closed_form_is_bit_for_bit_that_of_a_run_that_never_had_the_customer(
    tmp_path: Path,
) -> None:
    heads = []
    for name, start in (("left", (*FIRST, "west")), ("never", FIRST)):
        weeks = Weeks.__new__(Weeks)
        weeks.work, weeks.folder, weeks.results = tmp_path / name, tmp_path, {}
        weeks.run("week", customers=start, more=CLOSED)
        weeks.run("week", customers=FIRST, more=CLOSED)
        heads.append(load_file(weeks.results["week"] / "adapter-tiny" / "head.safetensors"))
    assert all((heads[0][key] == heads[1][key]).all() for key in heads[0])


@pytest.mark.attack("a withdrawal that left the customer in")
def test_attack_no_statement_where_the_customer_is_in_a_job_or_in_what_one_started_from(
    weeks: Weeks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(customer: str, *chain: bytes, replaced: bytes = weeks.two, by: str = "maker") -> str:
        with refusing():
            return refusal(lambda: withdrawal_of(customer, replaced, chain, by=by))

    assert "takes part in job two" in of("west", weeks.one, weeks.two)
    assert "none of the jobs before it delivered" in of("west", weeks.again)
    assert "none of the jobs before it delivered" in of("west", weeks.again, weeks.one)
    assert "takes part in job one" in of("north", weeks.one, weeks.again)
    assert "no job was run again" in of("west")
    assert "is no customer" in of("maker", weeks.fresh)
    assert "is no customer" in of("west", weeks.fresh, replaced=weeks.one)
    assert "who shall sign" in of("west", weeks.fresh, by="far")
    party = verify_dossier(weeks.one).contract.customers[0]
    renamed = party.model_copy(update={"name": "somebody-else"})
    assert withdrawal._touched(verify_dossier(weeks.one).contract, renamed)


@pytest.mark.attack("a forged statement of a withdrawal")
def test_attack_a_statement_that_was_altered_or_is_of_other_dossiers_is_not_believed(
    weeks: Weeks,
) -> None:
    said = withdrawal_of("west", weeks.two, [weeks.fresh], by="maker")
    signed = said.sign(weeks.keys("maker").signing)
    with pytest.raises(Refused, match="does not verify"):
        Withdrawal.verify(said.sign(weeks.keys("north").signing), weeks.two, [weeks.fresh])
    lie = said.model_copy(update={"kind": "exact"})
    for data, chain in (
        (lie.sign(weeks.keys("maker").signing), [weeks.fresh]),
        (signed, [weeks.one, weeks.again]),
    ):
        with pytest.raises(Refused, match="something else than the dossiers show"):
            Withdrawal.verify(data, weeks.two, chain)
    with pytest.raises(Refused):
        Withdrawal.verify(signed, weeks.two, [weeks.two])
    with pytest.raises(FedarkError):
        Withdrawal.verify(signed, weeks.two[:-1] + b"x", [weeks.fresh])
    for malformed in (b"", canonical.encode({"body": b""}), canonical.encode(3)):
        with pytest.raises(ProtocolError):
            Withdrawal.verify(malformed, weeks.two, [weeks.fresh])


def test_a_party_signs_and_another_checks_at_the_command_line(weeks: Weeks, tmp_path: Path) -> None:
    files = {name: str(weeks.results[name] / DOSSIER) for name in ("one", "two", "again")}
    planned = CliRunner().invoke(app, ["withdraw", "plan", "west", files["one"], files["two"]])
    assert planned.exit_code == 0, planned.output
    assert "keep       job one" in planned.output
    assert "run again  job two" in planned.output
    out, maker = str(tmp_path / "said"), str(weeks.work / "parties" / "maker")
    chain = [files["two"], files["one"], files["again"]]
    done = CliRunner().invoke(app, ["withdraw", "sign", maker, "west", *chain, "--out", out])
    assert done.exit_code == 0, done.output
    assert "by a re-run" in done.output
    checked = CliRunner().invoke(app, ["withdraw", "check", out, *chain])
    assert checked.exit_code == 0, checked.output
    assert verify_dossier(weeks.again).adapters["tiny"].hex() in checked.output
    wrong = CliRunner().invoke(app, ["withdraw", "check", out, *chain[:2]])
    assert wrong.exit_code != 0
