"""Nothing runs unapproved: what the operator reads, what a standing rule covers, and how an
approval is taken back.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import parties
import pytest
import tomli_w
from small import HostileRelay

from fedark.attestation.platforms.simulated import SimulatedDevice
from fedark.contract.contract import CONTRACT_LABEL, Contract, Party, fingerprint, now
from fedark.contract.job import Job
from fedark.enclave.session import RunConfig
from fedark.enclave.vouching import vouch
from fedark.foundation.errors import ContractError, FederationError, InputError, Refused
from fedark.foundation.keys import PartyKeys
from fedark.operate.party import DEVICE, reference_values
from fedark.simulation import InProcessEnclave, simulate
from fedark.stages.consent import Consent, summary
from fedark.stages.coordinator import coordinate
from fedark.stages.roster import FORMER, read_roster, replace_keys, write_roster
from fedark.stages.rules import RULES, Rules, terms_digest
from fedark.v1 import enclave_pb2, stage_pb2
from fedark.vault.manifest import ReleasePolicy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_roster(tmp_path, [parties.party("north"), parties.party("pool")])
    return tmp_path


def rule(**changes: Any) -> dict[str, Any]:
    value = {
        "name": "weekly",
        "jobs": ["dispatch"],
        "parties": {name: fingerprint(parties.party(name)) for name in parties.ROLES},
        "models": ["tiny"],
        "protection": ["sealed"],
        "minimum_cohort": 3,
        "max_rounds": 5,
        "deliver_to": ["maker", "north"],
        "platforms": ["simulated"],
        "terms": [terms_digest(parties.contract())],
        "privacy": {"mechanism": "none"},
        "max_jobs": 1,
        "max_days": 7,
        "until": (now() + timedelta(days=1)).isoformat(),
    }
    return value | changes


def write_rules(folder: Path, *rules: dict[str, Any], version: int = 1) -> None:
    (folder / RULES).write_text(tomli_w.dumps({"version": version, "allow": list(rules)}))


# -- a person


def test_a_contract_waits_until_its_operator_approves_it_and_counts_for_one_run(
    folder: Path,
) -> None:
    consent, contract = Consent(folder), parties.contract()
    assert consent.decision(contract).status == "waiting"
    with pytest.raises(ContractError, match="has not approved"):
        consent.require(contract, "north")
    assert consent.proposed() == [contract]
    consent.approve(consent.by_digest(contract.digest().hex()))
    consent.require(contract, "north")
    consent.use(contract, "run-1")
    consent.use(contract, "run-1")
    consent.require(contract, "north", "run-1")
    for other in (None, "", "run-2"):
        with pytest.raises(ContractError, match="has taken part"):
            consent.require(contract, "north", other)
    with pytest.raises(FederationError, match="Another run"):
        consent.use(contract, "run-2")


def test_of_many_runs_that_would_begin_at_once_one_does(folder: Path) -> None:
    contract, ready = parties.contract(), threading.Barrier(8)

    def begin(number: int) -> bool:
        ready.wait(timeout=30)
        try:
            Consent(folder).use(contract, f"run-{number}")
        except FederationError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(begin, range(8))) == 1


def test_approving_one_contract_approves_no_other(folder: Path) -> None:
    consent = Consent(folder)
    consent.approve(parties.contract())
    with pytest.raises(ContractError):
        consent.require(parties.contract(rounds=4), "north")


def test_a_refused_contract_is_refused_until_it_is_approved_anew(folder: Path) -> None:
    consent, contract = Consent(folder), parties.contract()
    consent.approve(contract)
    consent.refuse(contract, "not this week")
    assert consent.decision(contract).reason.startswith("not this week")
    with pytest.raises(ContractError, match="refused"):
        consent.require(contract, "north")
    with pytest.raises(Refused, match="taken its approval back"):
        consent.require_standing(contract.digest(), "north")
    consent.approve(contract)
    consent.require(contract, "north")
    consent.require_standing(contract.digest(), "north")


def test_the_operator_is_told_who_which_model_what_leaves_protected_how_until_when_by_whom() -> (
    None
):
    contract = parties.contract()
    text = summary(contract, frozenset({"north", "pool"}))
    for words in (
        "provider maker, aggregator pool",
        "customers: north, east, south; at least 3 in a sum",
        "the adapter goes to: maker, north",
        "protected as 'sealed'",
        "privacy: no mechanism; who holds the adapter may learn",
        f"valid {contract.created} to {contract.expires}, 3 rounds",
        "model tiny",
        f"maker: {fingerprint(parties.party('maker'))}   (new",
        "simulated platform protects from neither",
        "colluders 1; agreement by default",
        "training: epochs 1; batch_size 32; optimizer adamw; learning_rate 0.001",
        "rank 8; alpha 16.0; targets query, value; layers none",
        "evaluation: acceptance none; groups none; own no",
    ):
        assert words in text, words
    assert f"north: {fingerprint(parties.party('north'))}\n" in text
    assert "customer-level, epsilon 2 at delta 1e-05 for the whole job" in summary(
        parties.contract(privacy=PRIVATE)
    )


def test_no_text_in_a_contract_makes_a_line_of_its_own_in_what_the_operator_reads() -> None:
    forged = "x\nthe adapter goes to: maker"
    contract = parties.contract()
    dates = {
        "created": contract.created.replace("T", "\n"),
        "expires": contract.expires.replace("T", "\n"),
    }
    attestation = contract.attestation.model_dump() | {"platforms": ("simulated", forged)}
    model = parties.model() | {"labels": ("open", forged), "adapter": {"targets": (forged,)}}
    evaluation = {"acceptance": forged, "groups": (forged,)}
    bad = parties.contract(attestation=attestation, models=[model], evaluation=evaluation, **dates)
    assert [line.split(" ")[0] for line in summary(bad).splitlines()] == [
        line.split(" ")[0] for line in summary(contract).splitlines()
    ]


def test_approval_adds_unknown_parties_to_the_roster_and_never_changes_a_known_ones_keys(
    folder: Path,
) -> None:
    consent = Consent(folder)
    consent.approve(parties.contract())
    assert read_roster(folder).keys() == parties.ROLES.keys()
    people = [parties.party(name) for name in parties.ROLES if name != "north"]
    forged = parties.contract(parties=[*people, parties.party("north", PartyKeys())])
    with pytest.raises(ContractError, match="north has other keys in it than the roster"):
        consent.approve(forged)
    assert read_roster(folder)["north"] == parties.party("north")
    assert consent.decision(forged).status == "waiting"


def replaced(folder: Path) -> tuple[Consent, Contract, Party]:
    """A folder that approved a contract, and was proposed another with new keys of north."""
    consent = Consent(folder)
    consent.approve(parties.contract())
    new = parties.party("north", PartyKeys())
    people = [parties.party(name) for name in parties.ROLES if name != "north"]
    contract = parties.contract(parties=[*people, new])
    consent.propose(contract)
    return consent, contract, new


def test_a_party_with_new_keys_is_taken_in_by_the_fingerprint_that_it_told(folder: Path) -> None:
    consent, contract, new = replaced(folder)
    with pytest.raises(ContractError, match="fedark node replace FOLDER PARTY --fingerprint"):
        consent.approve(contract)
    offered = contract.parties
    told = fingerprint(new).upper().replace(" ", "  ")
    assert replace_keys(folder, "north", told, offered) == new
    assert read_roster(folder)["north"] == new
    consent.approve(contract)
    assert consent.decision(contract).status == "approved"
    (line,) = (folder / FORMER).read_text().splitlines()
    assert json.loads(line)["party"] == parties.party("north").model_dump()
    replace_keys(folder, "north", told, offered)  # once more changes nothing
    assert len((folder / FORMER).read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "told", "why"),
    [
        ("north", "0" * 40, "with this fingerprint"),
        ("north", "", "with this fingerprint"),
        ("north", "old", "with this fingerprint"),
        ("east", "north", "with this fingerprint"),
        ("stranger", "north", "knows no stranger"),
        ("pool", "north", "is the aggregator"),
    ],
)
def test_keys_are_replaced_by_nothing_else(folder: Path, name: str, told: str, why: str) -> None:
    _, contract, new = replaced(folder)
    told = {"north": fingerprint(new), "old": fingerprint(parties.party("north"))}.get(told, told)
    before = read_roster(folder)
    with pytest.raises(InputError, match=why):
        replace_keys(folder, name, told, contract.parties)
    assert read_roster(folder) == before
    assert not (folder / FORMER).exists()


def test_the_same_weights_sealed_again_are_the_same_models_as_before(folder: Path) -> None:
    consent = Consent(folder)
    first = parties.contract()
    again = parties.contract(models=[parties.model(bundle="7" * 96)])
    other = parties.contract(models=[parties.model(weights="8" * 96)])
    for contract in (first, again, other):
        consent.approve(contract)
    consent.use(first, "run-1")
    assert consent.before(again) == [first]
    assert consent.before(other) == []
    assert "before this: job dispatch" in summary(again, None, consent.before(again))


def test_find_refuses_what_is_not_one_contract(folder: Path) -> None:
    consent = Consent(folder)
    first, second = parties.contract(), parties.contract(job="other")
    consent.propose(first)
    consent.propose(second)
    assert consent.find(first.digest().hex()[:8]) == first
    assert consent.find("other") == second
    for name in ("third", "", first.digest().hex()[:7]):
        with pytest.raises(InputError, match="No contract"):
            consent.find(name)


def of_twenty(**terms: Any) -> Contract:
    """Masked, a minimum of 10; most customers have keys that nobody holds."""
    contract = parties.contract()
    more = [
        Party.model_validate(
            {
                "name": f"c{i:02d}",
                "role": "customer",
                "signing_key": f"{i:064x}",
                "hpke_key": f"{i:02432x}",
            }
        )
        for i in range(17)
    ]
    people = (*contract.parties, *more)
    return parties.contract(
        parties=people, protection={"mode": "masked", "minimum_cohort": 10, **terms}
    )


@pytest.mark.parametrize(
    ("terms", "fewest"),
    [
        ({}, 10),
        ({"agreement": True}, 10),
        ({"agreement": False}, 6),
        ({"agreement": False, "colluders": 10**9}, 0),
    ],
)
def test_whoever_asks_for_a_minimum_is_told_how_few_a_sum_may_really_cover(
    folder: Path, terms: dict[str, Any], fewest: int
) -> None:
    """Found in review: without agreement a lying aggregator and one customer get a sum of 6 of 20,
    with a minimum of 10.
    """
    contract = of_twenty(**terms)
    assert f"; at least {fewest} in a sum" in summary(contract)
    write_rules(folder, rule(minimum_cohort=7))
    assert (
        f"may cover {fewest} customers, fewer than 7" in Consent(folder).decision(contract).reason
    ) == (fewest < 7)
    policy = ReleasePolicy(
        expires="2100-01-01T00:00:00+00:00", platforms=("simulated",), minimum_cohort=7
    )
    asked = [f"the contract sums {fewest} customers, the provider asks for 7"]
    assert policy.contract_problems(contract) == (asked if fewest < 7 else [])


def test_a_contract_that_the_host_proposes_after_another_was_read_is_not_the_one_that_is_approved(
    folder: Path,
) -> None:
    consent, read, swapped = (
        Consent(folder),
        parties.contract(),
        parties.contract(deliver_to=("maker", "north", "pool")),
    )
    consent.propose(read)
    assert consent.find("dispatch") == read
    consent.propose(swapped)
    for by in (consent.find, consent.by_digest):
        with pytest.raises(InputError):
            by("dispatch")
    consent.approve(consent.by_digest(read.digest().hex()))
    assert consent.decision(swapped).status == "waiting"
    with pytest.raises(
        InputError, match="Several"
    ):  # nor is another than the approved one refused by name
        consent.find("dispatch")
    consent.refuse(consent.find(swapped.digest().hex()[:8]))
    assert consent.find("dispatch") == read


def test_a_job_that_is_named_as_another_contracts_digest_begins_does_not_hide_it(
    folder: Path,
) -> None:
    consent, first = Consent(folder), parties.contract()
    digest = first.digest().hex()
    consent.propose(first)
    consent.propose(parties.contract(job=digest[:16]))
    assert consent.by_digest(digest[:16]) == first
    with pytest.raises(InputError, match="Several"):
        consent.find(digest[:16])


@pytest.mark.parametrize(
    "cut",
    [
        lambda text: text[:15],
        lambda text: text + "0",
        str.upper,
        lambda text: "",
        lambda text: "f" * 16,
    ],
)
def test_only_the_digest_of_one_contract_approves(folder: Path, cut: Callable[[str], str]) -> None:
    consent, contract = Consent(folder), parties.contract()
    consent.propose(contract)
    with pytest.raises(InputError):
        consent.by_digest(cut(contract.digest().hex()))


def test_a_closed_contract_leaves_its_jobs_name_to_the_open_one(folder: Path) -> None:
    consent, past = Consent(folder), now() - timedelta(days=3)
    old = parties.contract(created=past.isoformat(), expires=(past + timedelta(days=1)).isoformat())
    consent.propose(old)
    assert consent.find("dispatch") == old
    consent.propose(new := parties.contract())
    assert consent.find("dispatch") == new


# -- standing rules


def test_a_rule_that_covers_all_of_a_contract_approves_it_and_that_is_written_down(
    folder: Path,
) -> None:
    write_rules(folder, rule())
    consent, contract = Consent(folder), parties.contract()
    assert consent.decision(contract).reason == "by rule 'weekly'"
    consent.require(contract, "north")
    written = (folder / "consent" / f"{contract.digest().hex()}.approved").read_text()
    assert written.startswith("by rule 'weekly'")
    assert "job dispatch" in written
    assert read_roster(folder).keys() == parties.ROLES.keys()


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"job": "other"}, "job other is not named"),
        ({"rounds": 6}, "6 rounds are over 5"),
        ({"deliver_to": ("maker", "north", "east")}, "the adapter would go to east"),
        ({"models": [parties.model(), parties.model("second")]}, "model second is not named"),
        (
            {"protection": {"mode": "masked", "minimum_cohort": 3}},
            "protection 'masked' is not named",
        ),
        ({"protection": {"minimum_cohort": 2}}, "a sum of it may cover 2 customers, fewer than 3"),
        ({"expires": (now() + timedelta(days=30)).isoformat()}, "valid for more than 7 days"),
        (
            {
                "parties": [
                    parties.party(n, None if n != "east" else PartyKeys()) for n in parties.ROLES
                ]
            },
            "east has other keys",
        ),
    ],
)
def test_whatever_a_rule_does_not_cover_waits_for_the_operator(
    folder: Path, changes: dict[str, Any], objection: str
) -> None:
    write_rules(folder, rule())
    decision = Consent(folder).decision(parties.contract(**changes))
    assert decision.status == "waiting"
    assert objection in decision.reason
    with pytest.raises(ContractError):
        Consent(folder).require(parties.contract(**changes), "north")


def _trained(**changes: Any) -> dict[str, Any]:
    return {"models": [parties.model() | changes]}


@pytest.mark.parametrize(
    "changes",
    [
        {"models": [parties.model(bundle="f" * 96)]},
        _trained(task="instruction"),
        _trained(labels=("PII-a", "PII-b")),
        _trained(adapter={"rank": 512}),
        _trained(adapter={"method": "lora"}),
        _trained(training={"epochs": 1000}),
        _trained(training={"learning_rate": 50.0}),
        _trained(training={"batch_size": 1}),
        _trained(training={"replay": 1.0}),
        _trained(server={"learning_rate": 9.0}),
        {"evaluation": {"groups": ("a",)}},
        {"evaluation": {"own": True}},
        *(
            {"protection": {"minimum_cohort": 3} | change}
            for change in (
                {"colluders": 0},
                {"agreement": False},
                {"bits": 2},
                {"max_records": 5_000_000},
                {"clip_norm": 1.0},
                {"value_range": 1.0},
            )
        ),
        *(
            {"attestation": parties.contract().attestation.model_dump() | change}
            for change in (
                {"sandbox": "none"},
                {"minimum_svn": 0},
                {"simulated_root": "4" * 64},
                {"trainer": {"launcher": "5" * 96}},
            )
        ),
    ],
)
def test_a_contract_with_every_name_of_a_rule_and_one_other_term_waits_for_the_operator(
    folder: Path, changes: dict[str, Any]
) -> None:
    write_rules(folder, rule())
    decision = Consent(folder).decision(parties.contract(**changes))
    assert decision.status == "waiting"
    assert "are other terms" in decision.reason


def test_a_rule_goes_on_covering_the_contracts_that_follow_with_the_same_terms(
    folder: Path,
) -> None:
    write_rules(folder, rule())
    begun = now() - timedelta(hours=1)
    times = {"created": begun.isoformat(), "expires": (begun + timedelta(days=7)).isoformat()}
    for changes in ({"seed": 7}, {"rounds": 5}, times, {"deliver_to": ("maker",)}):
        assert Consent(folder).decision(parties.contract(**changes)).status == "approved"


def test_a_rule_approves_as_many_contracts_as_it_says_and_one_that_is_approved_stays_so(
    folder: Path,
) -> None:
    write_rules(folder, rule(max_jobs=2), rule(name="weekly'", max_jobs=1, jobs=["other"]))
    consent = Consent(folder)
    contracts = [parties.contract(seed=seed) for seed in range(3)]
    for contract in contracts[:2]:
        consent.require(contract, "north")
        consent.use(contract, f"run{contract.seed}")
    assert "the rule has approved 2 of 2 jobs" in consent.decision(contracts[2]).reason
    with pytest.raises(ContractError, match="has not approved"):
        consent.require(contracts[2], "north")
    consent.require(contracts[1], "north", "run1")
    consent.require(parties.contract(job="other"), "north")
    consent.refuse(contracts[0])
    assert consent.decision(contracts[2]).status == "waiting", "what was summed stays summed"


def test_of_many_contracts_at_once_a_rule_approves_no_more_than_it_says(folder: Path) -> None:
    write_rules(folder, rule(max_jobs=2))
    start, outcomes = threading.Barrier(8), list[bool]()

    def ask(seed: int) -> None:
        start.wait(timeout=60)
        try:
            Consent(folder).require(parties.contract(seed=seed), "north")
        except ContractError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 6 + [True] * 2


def test_whoever_approves_a_second_contract_over_the_same_models_is_told_of_the_first(
    folder: Path,
) -> None:
    consent, first, second = Consent(folder), parties.contract(), parties.contract(seed=9)
    consent.approve(first)
    assert consent.before(second) == []
    consent.use(first, "run")
    assert consent.before(first) == []
    assert consent.before(second) == [first]
    assert consent.before(parties.contract(models=[parties.model(weights="f" * 96)])) == []
    text = summary(second, before=consent.before(second))
    assert first.digest().hex()[:16] in text
    assert "by subtraction" in text
    assert "by subtraction" not in summary(second)


def test_the_digest_that_a_rule_names_is_of_every_term_that_it_does_not_bound_itself(
    folder: Path,
) -> None:
    bounded = {
        "version",
        "job",
        "created",
        "expires",
        "seed",
        "rounds",
        "parties",
        "privacy",
        "deliver_to",
    }
    assert set(Contract.model_fields) - bounded == {
        "models",
        "attestation",
        "protection",
        "evaluation",
        "curve",
        "taste",
    }
    contract = parties.contract()
    assert f"terms that a standing rule names: {terms_digest(contract)}\n" in summary(contract)
    write_rules(folder, rule(terms=[terms_digest(contract)[:16]]))
    assert Consent(folder).decision(contract).status == "waiting", (
        "a beginning of a digest is easily met twice"
    )


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({"until": (now() - timedelta(seconds=1)).isoformat()}, "the rule ended"),
        (
            {"parties": {"maker": fingerprint(parties.party("maker"))}},
            "customer north is not named",
        ),
        (
            {"parties": rule()["parties"] | {"west": " ".join(["ab12"] * 10)}},
            "west, whom the rule names, is not in it",
        ),
        ({"platforms": ["tdx"]}, "platform 'simulated' is not named"),
        ({"privacy": {}}, "privacy.mechanism = 'none' is not covered"),
        ({"privacy": {"mechanism": "example-distributed"}}, "privacy.mechanism"),
        ({"privacy": {"mechanism": {"max": 1}}}, "privacy.mechanism"),
        ({"privacy": {"mechanism": {}}}, "privacy.mechanism"),
    ],
)
def test_a_rule_denies_by_default(folder: Path, changes: dict[str, Any], objection: str) -> None:
    write_rules(folder, rule(**changes))
    decision = Consent(folder).decision(parties.contract())
    assert decision.status == "waiting"
    assert objection in decision.reason


def test_two_rules_that_each_cover_a_part_cover_nothing(folder: Path) -> None:
    write_rules(folder, rule(jobs=["x"]), rule(name="second", models=["x"]))
    assert Consent(folder).decision(parties.contract()).status == "waiting"


PRIVATE = {"mechanism": "customer-level", "epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.5}
BOUNDS = {
    "mechanism": "customer-level",
    "epsilon": {"max": 3.0},
    "delta": {"max": 1e-5},
    "noise_multiplier": {"min": 1.0},
    "clip_norm": {},
    "sampling_rate": {},
    "local_steps": {},
    "records": {},
}


def test_under_a_mechanism_every_privacy_term_is_held_against_the_rule(folder: Path) -> None:
    write_rules(folder, rule(privacy=BOUNDS))
    assert Consent(folder).decision(parties.contract(privacy=PRIVATE)).status == "approved"
    for change in (
        {"epsilon": 3.5},
        {"delta": 1e-4},
        {"noise_multiplier": 0.9},
        {"mechanism": "example-local"},
    ):
        decision = Consent(folder).decision(parties.contract(privacy=PRIVATE | change))
        assert decision.status == "waiting"
        assert f"privacy.{next(iter(change))}" in decision.reason
    for name in BOUNDS:
        write_rules(
            folder, rule(privacy={key: value for key, value in BOUNDS.items() if key != name})
        )
        assert (
            f"privacy.{name}" in Consent(folder).decision(parties.contract(privacy=PRIVATE)).reason
        )


def test_numbers_of_the_privacy_terms_are_held_against_bounds() -> None:
    from fedark.stages.rules import Range

    assert Range(max=3.0).admits(3.0)
    assert not Range(max=3.0).admits(3.1)
    assert not Range(min=1).admits(0)
    assert not Range(max=3.0).admits(True)
    assert not Range(max=3.0).admits(float("nan"))
    assert not Range().admits("none")


def test_a_rules_file_with_problems_names_all_of_them_and_allows_nothing(folder: Path) -> None:
    good, bad = rule(), rule(name="second", until="soon")
    write_rules(folder, good, bad)
    with pytest.raises(ContractError) as caught:
        Rules.read(folder)
    assert "second" in str(caught.value)
    assert Consent(folder).decision(parties.contract()).status == "waiting"
    broken = rule(max_rounds=0, surprise=1)
    del broken["models"]
    write_rules(folder, good, broken)
    with pytest.raises(ContractError) as caught:
        Rules.read(folder)
    assert {"max_rounds", "surprise", "models"} <= {
        problem.split(":")[0].split(".")[2] for problem in caught.value.problems
    }
    assert Consent(folder).decision(parties.contract()).status == "waiting"


@pytest.mark.parametrize(
    "text",
    ["", "version = 2", "allow = 1", "version = 1\n[[allow]]", "\x00", "version = 1\nallow = [{}]"],
)
def test_a_malformed_rules_file_allows_nothing(folder: Path, text: str) -> None:
    (folder / RULES).write_text(text)
    assert Consent(folder).decision(parties.contract()).status == "waiting"
    with pytest.raises(ContractError):
        Rules.read(folder)


@pytest.mark.parametrize("missing", sorted(rule()))
def test_every_key_of_a_rule_is_needed(folder: Path, missing: str) -> None:
    value = rule()
    del value[missing]
    write_rules(folder, value)
    with pytest.raises(ContractError, match=missing):
        Rules.read(folder)


# -- in a run


def _take_back_at(
    stage: str, folder: Callable[[str], Path], contract: Any, who: str
) -> Callable[[str, bytes, bool], bytes]:
    seen = itertools.count()

    def alter(name: str, data: bytes, is_reply: bool) -> bytes:
        body = None if is_reply else stage_pb2.StageRequest.FromString(data).WhichOneof("body")
        if name == who and body == stage and next(seen) == 0:
            Consent(folder(who)).refuse(contract)
        return data

    return alter


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("stage", ["attest", "round", "evaluate"])
def test_a_customer_that_takes_its_approval_back_is_out_at_the_next_stage_and_its_enclave_ends(
    small_job: Path, tmp_path: Path, stage: str
) -> None:
    said: list[str] = []
    with simulate(Job.load(small_job), tmp_path / "work", say=said.append) as running:
        alter = _take_back_at(stage, running.federation.folder, running.federation.contract, "east")
        report = coordinate(HostileRelay(running, alter), running.host.handle)
        assert "taken its approval back" in report["passed_over"]["east"]
        assert report["passed_over"]["east"].startswith(stage)
        assert running.nodes["east"]._runs == {}
        assert "east: The operator of east has taken its approval back." in said
        assert not list((tmp_path / "work" / "parties" / "east").glob("runs/*/adapter-*"))


@pytest.mark.usefixtures("measured_once")
def test_a_provider_that_takes_its_approval_back_before_release_ends_the_job_and_no_key_goes_out(
    small_job: Path, tmp_path: Path
) -> None:
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        alter = _take_back_at(
            "release", running.federation.folder, running.federation.contract, "maker"
        )
        with pytest.raises(FederationError, match="taken its approval back"):
            coordinate(HostileRelay(running, alter), running.host.handle)
        assert running.nodes["maker"]._runs == {}


@pytest.mark.usefixtures("measured_once")
def test_a_provider_releases_keys_for_one_run_of_a_contract_and_answers_that_one_again(
    small_job: Path, tmp_path: Path
) -> None:
    """Its approval is for one run as a customer's is, also where two enrolled before either was
    released to.
    """
    with simulate(Job.load(small_job), tmp_path / "work") as running:
        maker, contract, folder = (
            running.nodes["maker"],
            running.federation.contract,
            running.federation.folder,
        )
        reference = reference_values()
        signatures = {
            name: (
                PartyKeys.load(folder(name) / "party.keys").signing.sign(
                    CONTRACT_LABEL, contract.digest()
                )
            )
            for name in ("maker", "north", "east", "south")
        }

        def ask(run_id: str, **body: Any) -> stage_pb2.StageReply:
            request = stage_pb2.StageRequest(
                version=1, run_id=run_id, contract_digest=contract.digest(), **body
            )
            return stage_pb2.StageReply.FromString(maker.handle(request.SerializeToString()))

        def enrol(run_id: str) -> stage_pb2.StageReply:
            return ask(run_id, enrol=stage_pb2.EnrolRequest(contract=contract.encode()))

        def evidence(role: str, party: str, run_id: str, nonce: bytes) -> bytes:
            config = RunConfig(role=role, party=party, contract=contract, run_id=run_id)
            enclave = InProcessEnclave(
                role, config.encode(), SimulatedDevice.load(folder(party) / DEVICE), reference[role]
            )
            vouch(enclave.call, config, PartyKeys.load(folder(party) / "party.keys").signing)
            return bytes(
                enclave.call(
                    enclave_pb2.Call(attest=enclave_pb2.Attest(peer="maker", nonce=nonce))
                ).evidence.evidence
            )

        def release(run_id: str, nonces: Mapping[str, bytes]) -> Callable[[], stage_pb2.StageReply]:
            request = stage_pb2.ReleaseRequest(
                contract_signatures=signatures,
                trainer_evidence={
                    "north": evidence("trainer", "north", run_id, nonces["trainer:north"])
                },
                aggregator_evidence=evidence("aggregator", "pool", run_id, nonces["node"]),
            )
            return lambda: ask(run_id, release=request)

        first, second = "a" * 32, "b" * 32
        one, two = (release(run_id, enrol(run_id).enrol.nonces) for run_id in (first, second))
        assert set(one().release.grants) == {"north"}
        refused = two().release
        assert not refused.grants
        assert "Another run of this contract" in refused.refused["north"].what
        assert set(one().release.grants) == {"north"}
        assert "has taken part in a run of it" in enrol("c" * 32).fault.what
        assert Consent(folder("maker")).decision(contract).status == "used"
