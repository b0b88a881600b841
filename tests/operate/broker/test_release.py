"""Keys over TLS: for an attested trainer, once a nonce, under a contract that all have signed;
every other way is refused.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from fedark.attestation.platforms.simulated import SimulatedDevice, SimulatedRoot
from fedark.contract.contract import now
from fedark.foundation.errors import (
    ContractError,
    EvidenceRefused,
    FedarkError,
    FederationError,
    InputError,
    LogForked,
    LogRefused,
    ProtocolError,
    Refused,
)
from fedark.foundation.keys import SigningKey
from fedark.operate.broker import keys as keys_module
from fedark.operate.broker.keys import load_broker
from fedark.operate.party import DEVICE
from fedark.simulation import InProcessEnclave
from fedark.stages import provider as provider_module
from fedark.v1 import enclave_pb2
from fedark.vault.bundle import SealedBundle


def load(world: Any, trainer: InProcessEnclave, grants: Any) -> bytes:
    """Take the grant into the enclave as a customer's node does: the aggregator admitted, then the
    bundle; returns the receipt.
    """
    pool = world.enclave("aggregator", "pool")
    signatures = world.signatures(world.contract)
    collateral = {
        path.name: path.read_bytes() for path in (world.provider / "collateral").iterdir()
    }

    def admit(verifier: InProcessEnclave, prover: InProcessEnclave, party: str, asks: str) -> Any:
        nonce = verifier.call(
            enclave_pb2.Call(challenge=enclave_pb2.Challenge(peer=party))
        ).nonce.nonce
        attest = enclave_pb2.Attest(peer=asks, nonce=nonce)
        evidence = prover.call(enclave_pb2.Call(attest=attest)).evidence.evidence
        peer = enclave_pb2.AdmitPeer(
            peer=party, evidence=evidence, contract_signatures=signatures, collateral=collateral
        )
        return verifier.call(enclave_pb2.Call(admit_peer=peer)).admitted

    admit(trainer, pool, "pool", "north")
    group = admit(pool, trainer, "north", "pool").group_grant
    given = enclave_pb2.Grant(
        model="tiny",
        manifest=grants.manifests["tiny"],
        grant=grants.by_model["tiny"],
        group_grant=group,
    )
    trainer.call(enclave_pb2.Call(grant=given))
    provider = bytes.fromhex(world.contract.provider.signing_key)
    sealed = b"".join(
        SealedBundle.load(world.federation.work / "catalogue" / "tiny.fedark", provider).payload()
    )
    done = enclave_pb2.Sealed(model="tiny", data=sealed, last=True)
    return bytes(trainer.call(enclave_pb2.Call(sealed=done)).receipt.receipt)


def forget(world: Any) -> None:
    """The provider loses its log, or makes away with it."""
    for path in world.provider.glob("log.sqlite*"):
        path.unlink()


def foreign(world: Any) -> None:
    """North gets a device of another manufacturer, whose evidence is refused everywhere."""
    device = world.federation.folder("north") / DEVICE
    for path in device.iterdir():
        path.unlink()
    SimulatedRoot(now=now()).issue(now=now()).save(device)


# -- the good way


@pytest.mark.usefixtures("dead_proxy")
def test_a_broker_on_this_machine_is_asked_without_a_proxy(world: Any) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    about = {"run_id": "run-1", "party": "north", "signing": world.signing()}
    grants = client.obtain(trainer, world.signed(), heads=world.heads(), **about)
    assert load(world, trainer, grants)


def test_an_attested_trainer_gets_its_key_over_tls_opens_the_bundle_and_signs_a_receipt(
    world: Any,
) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    grants = client.obtain(
        trainer,
        world.signed(),
        run_id="run-1",
        party="north",
        signing=world.signing(),
        heads=world.heads(),
    )
    assert load(world, trainer, grants)
    assert world.entries() == [("attestation", "north"), ("release", "north")]


def test_the_log_that_the_next_caller_sees_goes_on_from_the_first(world: Any) -> None:
    client, heads = world.client(world.serve()), world.heads()
    for _ in range(2):
        client.obtain(
            world.trainer(),
            world.signed(),
            run_id="run-1",
            party="north",
            signing=world.signing(),
            heads=heads,
        )
    assert len(world.entries()) == 4


def test_a_provider_whose_log_was_rewound_releases_nothing_to_who_remembers_more(
    world: Any,
) -> None:
    client, heads = world.client(world.serve()), world.heads()
    client.obtain(
        world.trainer(),
        world.signed(),
        run_id="run-1",
        party="north",
        signing=world.signing(),
        heads=heads,
    )
    forget(world)
    again = world.client(world.serve())
    with pytest.raises(FederationError, match="cannot answer now"):
        again.obtain(
            world.trainer(),
            world.signed(),
            run_id="run-1",
            party="north",
            signing=world.signing(),
            heads=heads,
        )
    assert world.entries() == []


def test_a_provider_that_rewound_its_log_itself_is_found_out_before_the_enclave_gets_a_key(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, heads = world.client(world.serve()), world.heads()
    client.obtain(
        world.trainer(),
        world.signed(),
        run_id="run-1",
        party="north",
        signing=world.signing(),
        heads=heads,
    )
    forget(world)
    broker = world.broker()
    monkeypatch.setattr(broker, "_remembered", lambda head: None)
    with pytest.raises(LogForked, match="it signed two trees of 2 entries"):
        world.client(world.serve(broker)).obtain(
            world.trainer(),
            world.signed(),
            run_id="run-1",
            party="north",
            signing=world.signing(),
            heads=heads,
        )


def test_a_key_that_the_log_does_not_show_is_not_given_to_the_enclave(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, shown = world.broker(), provider_module.make_update
    monkeypatch.setattr(
        provider_module,
        "make_update",
        lambda *args, **named: shown(*args, **named | {"indexes": named["indexes"][:1]}),
    )
    with pytest.raises(LogRefused, match="does not show the release"):
        world.client(world.serve(broker)).obtain(
            world.trainer(),
            world.signed(),
            run_id="run-1",
            party="north",
            signing=world.signing(),
            heads=world.heads(),
        )


@pytest.mark.parametrize("withheld", [False, True])
def test_a_caller_who_is_refused_gets_the_proof_that_this_is_logged(
    world: Any, withheld: bool
) -> None:
    foreign(world)
    client, trainer, heads = world.client(world.serve()), world.trainer(), world.heads()
    if withheld:
        release = client.release

        def silent(request: Any) -> Any:
            try:
                return release(request)
            except EvidenceRefused as error:
                error.proof = b""
                raise

        client.release = silent
    with pytest.raises(EvidenceRefused) as caught:
        client.obtain(
            trainer,
            world.signed(),
            run_id="run-1",
            party="north",
            signing=world.signing(),
            heads=heads,
        )
    assert world.entries() == [("refusal", "north")]
    assert caught.value.logged == (None if withheld else 0)
    key = bytes.fromhex(world.contract.provider.signing_key)
    assert (heads.last(key, by="maker") is None) == withheld


# -- nonces


def test_a_nonce_counts_once(world: Any) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    evidence = world.evidence(trainer, client.challenge(world.ask()).nonce)
    client.release(world.claim(evidence))
    with pytest.raises(EvidenceRefused) as caught:
        client.release(world.claim(evidence))
    assert caught.value.reasons == ("its nonce was used before: this is a replay",)
    assert "not in the log: it answers no nonce that waits for an answer" in caught.value.safe
    assert world.entries() == [("attestation", "north"), ("release", "north")]


def test_of_many_concurrent_uses_of_one_nonce_one_gets_keys(world: Any) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    evidence = world.evidence(trainer, client.challenge(world.ask()).nonce)
    ready = threading.Barrier(8)

    def attempt(_: int) -> tuple[str, ...]:
        ready.wait(timeout=30)
        try:
            return tuple(client.release(world.claim(evidence)).by_model)
        except EvidenceRefused as error:
            return error.reasons

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(attempt, range(8)))
    assert answers == sorted([("tiny",), *[("its nonce was used before: this is a replay",)] * 7])
    assert sorted(kind for kind, _ in world.entries()) == ["attestation", "release"]


def test_a_nonce_that_was_never_given_out_is_refused(world: Any) -> None:
    client = world.client(world.serve())
    with pytest.raises(EvidenceRefused, match="not issued here"):
        client.release(world.claim(world.evidence(world.trainer(), b"n" * 32)))


def test_a_nonce_for_another_party_or_run_is_refused(world: Any) -> None:
    client = world.client(world.serve())
    for other in ({"party": "east"}, {"run_id": "run-2"}):
        nonce = client.challenge(world.ask(world.about(**other))).nonce
        with pytest.raises(EvidenceRefused, match="not issued here"):
            client.release(world.claim(world.evidence(world.trainer(), nonce)))


def test_after_a_restart_an_unused_nonce_still_counts_and_a_used_one_does_not(world: Any) -> None:
    first = world.serve()
    client, trainer = world.client(first), world.trainer()
    used, unused = (world.evidence(trainer, client.challenge(world.ask()).nonce) for _ in range(2))
    client.release(world.claim(used))
    first.close()
    client = world.client(world.serve())
    with pytest.raises(EvidenceRefused, match="this is a replay"):
        client.release(world.claim(used))
    assert client.release(world.claim(unused)).by_model


def test_a_verifier_that_crashed_between_appraisal_and_release_does_not_take_the_evidence_again(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    evidence = world.evidence(trainer, client.challenge(world.ask()).nonce)
    with monkeypatch.context() as crash:
        crash.setattr("fedark.stages.provider.release", lambda *args, **named: 1 / 0)
        with pytest.raises(FedarkError, match="cannot answer now"):
            client.release(world.claim(evidence))
    again = world.client(world.serve())
    with pytest.raises(EvidenceRefused, match="this is a replay"):
        again.release(world.claim(evidence))
    assert ("release", "north") not in world.entries()


# -- who asks, and for what


def test_a_contract_that_the_provider_has_not_signed_is_refused_unread_and_leaves_no_trace(
    world: Any,
) -> None:
    client = world.client(world.serve())
    strange = world.changed(rounds=9)
    mine = SigningKey().sign("fedark/contract/1", strange.digest())
    for about in (
        world.about(contract=strange.encode()),
        world.about(
            contract=strange.encode(),
            contract_signatures=world.signatures(strange) | {"maker": mine},
        ),
        world.about(contract_signatures={}),
        world.about(contract=b"\xff" * 1000),
    ):
        with pytest.raises(Refused, match="maker has not signed this contract"):
            client.challenge(world.ask(about))
        request = world.claim(b"evidence")
        request.about.CopyFrom(about)
        with pytest.raises(Refused, match="maker has not signed this contract"):
            client.release(request)
    assert world.entries() == []


def test_a_contract_that_one_customer_has_not_signed_is_refused(world: Any) -> None:
    client = world.client(world.serve())
    with pytest.raises(ContractError, match="contract") as caught:
        client.challenge(
            world.ask(world.about(contract_signatures=world.signatures(world.contract, "south")))
        )
    assert caught.value.problems == ("south has not signed",)
    forged = world.signatures(world.contract) | {"south": b"s" * 64}
    with pytest.raises(Refused, match="of south"):
        client.challenge(world.ask(world.about(contract_signatures=forged)))


@pytest.mark.parametrize("wrong", ["models", "expires", "trainer", "roster", "root"])
def test_even_a_contract_that_all_have_signed_must_agree_with_what_the_node_knows(
    world: Any, wrong: str
) -> None:
    value = world.contract.to_map()
    match wrong:
        case "models":
            changes = {"models": [{**value["models"][0], "bundle": "00" * 48}]}
        case "expires":
            early = now() - timedelta(hours=1)
            changes = {
                "created": (early - timedelta(hours=1)).isoformat(),
                "expires": early.isoformat(),
            }
        case "trainer":
            changed = {**value["attestation"]["trainer"], "runtime": "00" * 48}
            changes = {"attestation": {**value["attestation"], "trainer": changed}}
        case "roster":
            parties = [
                {**party, "hpke_key": "00" * 1216} if party["name"] == "east" else party
                for party in value["parties"]
            ]
            changes = {"parties": parties}
        case _:
            changes = {"attestation": {**value["attestation"], "simulated_root": "00" * 32}}
    contract = world.changed(**changes)
    about = world.about(contract=contract.encode(), contract_signatures=world.signatures(contract))
    client = world.client(world.serve())
    with pytest.raises(ContractError) as caught:
        client.challenge(world.ask(about))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("party", ["pool", "maker", "nobody", ""])
def test_a_party_that_is_no_customer_gets_no_nonce(world: Any, party: str) -> None:
    with pytest.raises(ProtocolError, match="no customer of that name"):
        world.client(world.serve()).challenge(world.ask(world.about(party=party)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"party": "east"}, "it is the enclave of north"),
        ({"run_id": "run-2"}, "it is bound to another run"),
        ({"run_id": ""}, "it is bound to another run"),
    ],
)
def test_each_field_of_a_release_that_is_altered_on_its_way_is_refused(
    world: Any, changes: dict[str, str], reason: str
) -> None:
    client, trainer = world.client(world.serve()), world.trainer()
    evidence = world.evidence(trainer, client.challenge(world.ask()).nonce)
    with pytest.raises(EvidenceRefused) as caught:
        client.release(world.claim(evidence, **changes))
    assert reason in caught.value.reasons
    assert world.entries() == []


def test_every_byte_of_evidence_that_is_altered_on_its_way_is_refused(world: Any) -> None:
    broker, trainer = world.broker(), world.trainer()
    whole = world.evidence(trainer, broker.challenge(world.ask()).nonce)
    for at in range(0, len(whole), 41):
        nonce = broker.challenge(world.ask()).nonce
        evidence = bytearray(world.evidence(trainer, nonce))
        evidence[at] ^= 1
        with pytest.raises(EvidenceRefused):
            broker.release(world.claim(bytes(evidence)))
    for evidence in (b"", b"\xff" * 70000, whole + b"\0", whole[:-1]):
        with pytest.raises(EvidenceRefused):
            broker.release(world.claim(bytes(evidence)))


def test_an_aggregator_enclaves_evidence_gets_no_keys(world: Any) -> None:
    client = world.client(world.serve())
    nonce = client.challenge(world.ask()).nonce
    with pytest.raises(EvidenceRefused) as caught:
        client.release(world.claim(world.evidence(world.enclave("aggregator", "pool"), nonce)))
    assert "its role is aggregator" in caught.value.reasons


def test_an_enclave_of_a_foreign_manufacturer_gets_no_keys(world: Any) -> None:
    foreign(world)
    client = world.client(world.serve())
    with pytest.raises(EvidenceRefused):
        client.release(
            world.claim(world.evidence(world.trainer(), client.challenge(world.ask()).nonce))
        )
    assert world.entries() == [("refusal", "north")]


@pytest.mark.attack("filling the provider's log", mode="evidence that answers nothing")
def test_whoever_has_the_signed_contract_cannot_fill_the_log(
    world: Any, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    told: list[str] = []
    broker = world.broker()
    monkeypatch.setitem(broker.settings.__dict__, "on_progress", told.append)
    client = world.client(world.serve(broker))
    strange = world.evidence(world.trainer(), b"n" * 32)
    for evidence in (b"", b"x", strange, strange):
        with pytest.raises(EvidenceRefused) as caught:
            client.release(world.claim(evidence))
        assert caught.value.proof == b""
        assert "not in the log: it answers no nonce that waits for an answer" in caught.value.safe
    assert world.entries() == []
    assert broker.unlogged == 4
    refusal(caught.value.safe)
    assert "(4 refusals are not in the log)" in told[-1]


@pytest.mark.attack("filling the provider's log", mode="answers that are refused")
def test_the_log_takes_so_many_refusals_of_a_party_under_a_contract_and_no_more(
    world: Any, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    monkeypatch.setattr(keys_module, "MOST_REFUSALS", 2)
    honest = world.evidence(
        world.trainer("east"), world.broker().challenge(world.ask(world.about(party="east"))).nonce
    )
    foreign(world)
    trainer = world.trainer()

    def refused(broker: Any) -> EvidenceRefused:
        with pytest.raises(EvidenceRefused) as caught:
            broker.release(
                world.claim(world.evidence(trainer, broker.challenge(world.ask()).nonce))
            )
        return caught.value

    assert [refused(world.broker()).logged for _ in range(2)] == [0, 1]
    for broker in (world.broker(), world.broker()):
        error = refused(broker)
        assert error.logged is None
        assert (
            "not in the log: 2 refusals of north under this contract are, which is the most"
            in error.safe
        )
        refusal(error.safe)
    assert world.entries() == [("refusal", "north")] * 2
    assert world.broker().release(world.claim(honest, party="east")).by_model, (
        "another party is none the worse"
    )


def test_the_broker_forgets_evidence_that_it_has_answered(world: Any) -> None:
    broker, trainer = world.broker(), world.trainer()
    for _ in range(2):
        broker.release(world.claim(world.evidence(trainer, broker.challenge(world.ask()).nonce)))
    assert (broker._proofs, broker._admissions) == ({}, {})


def test_a_head_that_the_provider_signed_and_its_log_does_not_hold_stops_the_release(
    world: Any,
) -> None:
    client, heads = world.client(world.serve()), world.heads()
    client.obtain(
        world.trainer(),
        world.signed(),
        run_id="run-1",
        party="north",
        signing=world.signing(),
        heads=heads,
    )
    head = heads.last(bytes.fromhex(world.contract.provider.signing_key), by="maker")
    forget(world)
    broker = world.broker()
    request = world.claim(world.evidence(world.trainer(), broker.challenge(world.ask()).nonce))
    request.log_head = head.encoded
    with pytest.raises(LogForked):
        broker.release(request)
    assert world.entries() == []


def test_the_broker_and_the_node_of_a_run_share_one_log_and_one_nonce_book(world: Any) -> None:
    one, two = world.broker(), world.broker()
    trainer = world.trainer()
    evidence = world.evidence(trainer, one.challenge(world.ask()).nonce)
    two.release(world.claim(evidence))
    with pytest.raises(EvidenceRefused, match="this is a replay"):
        one.release(world.claim(evidence))
    assert [kind for kind, _ in world.entries()] == ["attestation", "release"]


def test_keys_go_to_every_trainer_of_one_run_of_a_contract_and_to_no_other_run(world: Any) -> None:
    broker = world.broker()

    def evidence(party: str, run_id: str) -> bytes:
        about = world.about(party=party, run_id=run_id)
        return world.evidence(
            world.trainer(party, run_id), broker.challenge(world.ask(about)).nonce
        )

    second = evidence("north", "run-2")  # its nonce was given out before a run had begun
    for party in ("north", "east", "north"):
        assert broker.release(world.claim(evidence(party, "run-1"), party=party)).by_model
    for again in (broker, world.broker()):
        with pytest.raises(ContractError, match="has taken part in a run of it"):
            again.release(world.claim(second, run_id="run-2"))
        with pytest.raises(ContractError, match="has taken part in a run of it"):
            again.challenge(world.ask(world.about(run_id="run-2")))


def test_of_two_runs_whose_trainers_ask_at_once_one_gets_keys(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, ready = world.broker(), threading.Barrier(2)
    admit = broker._admit

    def together(*args: Any, **named: Any) -> Any:
        peer = admit(*args, **named)
        ready.wait(timeout=30)
        return peer

    runs = {}
    for run_id in ("run-1", "run-2"):
        nonce = broker.challenge(world.ask(world.about(run_id=run_id))).nonce
        runs[run_id] = world.evidence(world.trainer(run_id=run_id), nonce)
    monkeypatch.setattr(broker, "_admit", together)

    def attempt(run_id: str) -> str:
        try:
            return ", ".join(broker.release(world.claim(runs[run_id], run_id=run_id)).by_model)
        except FederationError as error:
            return error.what

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, runs)) == [
            "Another run of this contract has begun already.",
            "tiny",
        ]
    assert sorted(kind for kind, _ in world.entries()) == [
        "attestation",
        "attestation",
        "refusal",
        "release",
    ]


def test_only_a_providers_folder_makes_a_broker(world: Any) -> None:
    for name in ("north", "pool"):
        with pytest.raises(InputError):
            load_broker(world.federation.folder(name))


def test_a_node_that_was_restarted_knows_its_peers_after_the_revocation_list_was_renewed(
    world: Any, monkeypatch: Any
) -> None:
    broker, trainer = world.broker(), world.trainer()
    evidence = world.evidence(trainer, broker.challenge(world.ask()).nonce)
    peer = broker._admit(world.contract, "run-1", evidence, role="trainer", party="north")
    proof, later = broker._proof(peer), now() + timedelta(days=10)
    for module in ("node", "settings"):
        monkeypatch.setattr(f"fedark.stages.{module}.now", lambda: later)
    root, listed = world.manufacturer, world.provider / "collateral" / "simulated.crl"

    def again() -> Any:
        return world.broker()._readmit(
            world.contract, "run-1", proof, role="trainer", party="north"
        )

    listed.write_bytes(root.crl(now=later))
    assert again().signing_public == peer.signing_public
    root.revoke(SimulatedDevice.load(world.federation.folder("north") / DEVICE), now=later)
    listed.write_bytes(root.crl(now=later))
    with pytest.raises(EvidenceRefused, match="the device certificate is revoked"):
        again()
