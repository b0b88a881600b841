"""A weight key goes to one attested enclave, for one contract and run, after it stands in the log;
every other way is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from attacks import refusing
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given, settings
from hypothesis import strategies as st

import fedark.vault.release as release_module
from fedark.foundation import canonical
from fedark.foundation.errors import LogForked, LogRefused, ReleaseRefused, SealBroken, StorageError
from fedark.foundation.keys import HpkeKey, SigningKey
from fedark.translog.log import TransparencyLog
from fedark.vault.opener import OpenedBundle, open_to_memory
from fedark.vault.release import Accepted, Receipt, ReleaseTerms
from fedark.vault.weightkey import WeightKey

Make = Callable[..., Any]
GRANT_LABEL = "fedark/grant/1"


def unsigned(grant: bytes) -> dict[str, Any]:
    body: dict[str, Any] = canonical.decode(canonical.decode(grant)["body"])
    return body


def signed(body: dict[str, Any], key: SigningKey) -> bytes:
    raw = canonical.encode(body)
    return canonical.encode({"body": raw, "signature": key.sign(GRANT_LABEL, raw)})


def terms_of(body: dict[str, Any]) -> ReleaseTerms:
    return ReleaseTerms(**{field.name: body[field.name] for field in fields(ReleaseTerms)})


def load(world: Any, accepted: Accepted) -> OpenedBundle:
    _, proof = open_to_memory(world.manifest, accepted.key, world.bundle.payload())
    return proof


# -- the good way


def test_an_attested_enclave_gets_the_key_opens_the_bundle_and_signs_a_receipt(world: Any) -> None:
    trainer = world.trainer()
    grant = world.release(trainer)
    accepted = world.accept(grant, trainer)
    data = Receipt.make(accepted, load(world, accepted), trainer.signing, now=world.now)
    receipt = Receipt.verify(
        data,
        signing_public=trainer.peer.signing_public,
        contract=world.signed.digest,
        run_id="run-1",
        party="north",
    )
    assert receipt.answers(grant)
    assert receipt.bundle == world.manifest.digest()
    (logged,) = world.log.verify([(receipt.log_index, receipt.log_entry)]).entries
    facts = logged.entry.facts
    assert (logged.entry.kind, facts["party"], facts["bundle"]) == (
        "release",
        "north",
        world.manifest.digest(),
    )


def test_a_grant_holds_neither_the_key_nor_anything_that_opens_without_the_enclave(
    world: Any,
) -> None:
    grant = world.release(world.trainer())
    secret = bytes(world.key._secret)
    assert secret not in grant
    assert secret.hex().encode() not in grant
    assert secret.hex().encode() not in world.log.path.read_bytes()


def test_a_grant_lives_an_hour_and_no_longer_than_contract_or_policy(world: Any) -> None:
    trainer = world.trainer()
    grant = world.release(trainer)
    assert unsigned(grant)["expires"] == int((world.now + timedelta(hours=1)).timestamp())
    world.accept(grant, trainer, now=world.now + timedelta(minutes=59))
    with pytest.raises(ReleaseRefused, match="expired"):
        world.accept(grant, trainer, now=world.now + timedelta(hours=1))
    ending = world.changed_contract(expires=(world.now + timedelta(minutes=5)).isoformat())
    soon = world.release(world.trainer(contract=ending), contract=ending)
    assert unsigned(soon)["expires"] == int((world.now + timedelta(minutes=5)).timestamp())


def test_releasing_twice_to_one_enclave_is_logged_twice(world: Any) -> None:
    trainer = world.trainer()
    grants = [world.release(trainer) for _ in range(2)]
    assert [unsigned(grant)["log_index"] for grant in grants] == [0, 1]
    for grant in grants:
        world.accept(grant, trainer)


# -- what the provider refuses


def refused_and_logged(world: Any, why: str, trainer: Any, **changes: Any) -> None:
    before = len(world.log.verify().entries)
    with pytest.raises(ReleaseRefused, match=why):
        world.release(trainer, **changes)
    (logged,) = world.log.verify().entries[before:]
    assert (logged.entry.kind, logged.entry.facts["party"]) == ("refusal", trainer.peer.party)
    assert re.search(why, logged.note)


def test_only_an_attested_peer_can_be_given_to_release(world: Any) -> None:
    peer = world.trainer().peer
    names = [name for name in dir(type(peer)) if not name.startswith("_")]
    lookalike = SimpleNamespace(
        peer=SimpleNamespace(**{name: getattr(peer, name) for name in names})
    )
    with pytest.raises(TypeError, match="AttestedPeer"):
        world.release(lookalike)
    assert world.log.verify().entries == ()


def test_an_aggregator_enclave_gets_no_weight_key(world: Any) -> None:
    refused_and_logged(world, "for a trainer", world.trainer("host", role="aggregator"))
    refused_and_logged(world, "for a trainer", world.trainer("north", role="aggregator"))


def test_a_party_that_is_no_customer_gets_no_weight_key(world: Any) -> None:
    refused_and_logged(world, "not the enclave of a customer", world.trainer("stranger"))
    refused_and_logged(world, "not the enclave of a customer", world.trainer("host"))


def test_an_enclave_of_another_contract_gets_no_weight_key(world: Any) -> None:
    other = world.changed_contract(rounds=4)
    refused_and_logged(world, "bound to another contract", world.trainer(contract=other))


def test_a_model_or_bundle_that_the_contract_does_not_name_is_not_released(
    world: Any, make_bundle: Make
) -> None:
    trainer = world.trainer()
    refused_and_logged(world, "no such model", trainer, model="unknown")
    refused_and_logged(world, "names another bundle", trainer, model="other")
    bundle, key = make_bundle("second", world.keys.signing)
    refused_and_logged(world, "names another bundle", trainer, manifest=bundle.manifest, key=key)


def test_another_bundles_key_is_not_released(world: Any) -> None:
    refused_and_logged(world, "commits to", world.trainer(), key=WeightKey.generate())


def test_another_provider_cannot_release(world: Any, make_bundle: Make) -> None:
    refused_and_logged(world, "one provider", world.trainer(), provider=SigningKey())
    stranger = SigningKey()
    bundle, key = make_bundle("stranger", stranger)
    refused_and_logged(
        world, "one provider", world.trainer(), manifest=bundle.manifest, key=key, provider=stranger
    )


def test_nothing_is_released_outside_the_contracts_validity_or_the_policys(world: Any) -> None:
    trainer = world.trainer()
    refused_and_logged(world, "contract has expired", trainer, now=world.now + timedelta(days=8))
    refused_and_logged(world, "not valid yet", trainer, now=world.now - timedelta(days=1))
    refused_and_logged(
        world, "release policy has expired", trainer, now=world.now + timedelta(days=301)
    )


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"platforms": ("sev-snp",)}, "platform 'simulated'"),
        ({"sandbox": "namespaces"}, "sandbox mode 'landlock' is weaker"),
        ({"minimum_svn": 2}, "security version 1 is below 2"),
        ({"minimum_cohort": 3}, "sums 2 customers"),
        ({"mechanisms": ("example-distributed",)}, "privacy mechanism 'none'"),
        ({"protection": ("masked",)}, "protects updates by 'sealed'"),
    ],
)
def test_what_the_signed_release_policy_does_not_allow_is_refused(
    world: Any, make_bundle: Make, policy: dict[str, Any], why: str, terms: dict[str, Any]
) -> None:
    strict = terms["policy"].model_copy(update=policy)
    bundle, key = make_bundle("strict", world.keys.signing, policy=strict)
    models = world.signed.contract.to_map()["models"]
    models[0]["bundle"] = bundle.manifest.digest().hex()
    contract = world.changed_contract(models=models)
    trainer = world.trainer(contract=contract, sandbox="landlock")
    refused_and_logged(world, why, trainer, manifest=bundle.manifest, key=key, contract=contract)


def test_every_reason_is_given_at_once(world: Any) -> None:
    with pytest.raises(ReleaseRefused) as caught:
        world.release(
            world.trainer("stranger"),
            model="unknown",
            key=WeightKey.generate(),
            provider=SigningKey(),
        )
    assert caught.value.what.count("\n  - ") == 4


# -- the log comes first


def test_without_a_log_entry_on_the_disk_nothing_is_released(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = list[bytes]()
    monkeypatch.setattr(WeightKey, "wrap", lambda *args: wrapped.append(b"x"))
    with pytest.raises(StorageError):
        world.release(
            world.trainer(),
            log=TransparencyLog(world.folder / "none" / "log.sqlite", world.keys.signing),
        )
    assert wrapped == []


def test_an_altered_log_stops_all_releases(world: Any) -> None:
    world.release(world.trainer())
    path = world.log.path
    path.write_bytes(path.read_bytes().replace(b"north", b"south"))
    with pytest.raises(LogRefused, match="altered"):
        world.log.verify()
    with pytest.raises(LogRefused, match="altered"):
        TransparencyLog(path, world.keys.signing)


def test_a_log_that_was_rewound_under_a_running_provider_stops_all_releases(world: Any) -> None:
    world.release(world.trainer())
    earlier = world.log.path.read_bytes()
    world.release(world.trainer())
    world.log.path.write_bytes(earlier)
    with pytest.raises(LogForked, match="cut off"):
        world.release(world.trainer())


@pytest.mark.attack("before the log append")
def test_a_grant_made_before_its_log_entry_is_of_no_use(world: Any) -> None:
    # The provider's own code cannot skip the log: what it signs names an entry, and the key is
    # wrapped for that entry alone.
    trainer = world.trainer()
    body = unsigned(world.release(trainer))
    for change in (
        {"log_index": 7},
        {"log_entry": b"e" * 32},
        {"logged": body["logged"] - 1},
        {"log_path": [bytes(32)]},
    ):
        with (
            refusing(),
            pytest.raises(ReleaseRefused, match=r"log does not hold this release|log_entry is not"),
        ):
            world.accept(signed(body | change, world.keys.signing), trainer)


def test_a_grant_is_refused_whose_log_holds_something_else_in_that_place(world: Any) -> None:
    # A log of one entry that says another party; head and proof are genuine, what they prove is not
    # this release.
    trainer, log = (
        world.trainer(),
        TransparencyLog(world.folder / "other.sqlite", world.keys.signing),
    )
    body = unsigned(world.release(trainer))
    entry = replace(terms_of(body), party="south").entry()
    logged = log.append(entry)
    change = {
        "log_head": logged.head.encoded,
        "log_entry": entry.leaf(),
        "log_index": 0,
        "log_path": [],
    }
    with pytest.raises(ReleaseRefused, match="log_entry is not this enclave's"):
        world.accept(signed(body | change, world.keys.signing), trainer)


def test_a_grant_is_refused_whose_log_is_a_strangers(world: Any) -> None:
    trainer, stranger = world.trainer(), SigningKey()
    body = unsigned(world.release(trainer))
    entry = terms_of(body).entry()
    logged = TransparencyLog(world.folder / "other.sqlite", stranger).append(entry)
    with pytest.raises(ReleaseRefused, match="log does not hold this release"):
        world.accept(signed(body | {"log_head": logged.head.encoded}, world.keys.signing), trainer)


def test_the_log_of_releases_and_refusals_holds_no_key_and_no_text_of_others(world: Any) -> None:
    world.release(world.trainer())
    with pytest.raises(ReleaseRefused):
        world.release(world.trainer("stranger"))
    for logged in world.log.verify().entries:
        assert bytes(world.key._secret) not in logged.entry.encode()
        assert b"stranger" not in logged.entry.encode() or logged.entry.facts["party"] == "stranger"
        assert all(
            isinstance(fact, bytes | int) or " " not in fact for fact in logged.entry.facts.values()
        )


# -- what the enclave refuses


@pytest.mark.attack("second enclave")
def test_a_second_enclave_cannot_take_the_first_ones_grant(world: Any) -> None:
    first, second = world.trainer(), world.trainer()
    grant = world.release(first)
    with refusing(), pytest.raises(ReleaseRefused) as caught:
        world.accept(grant, second)
    for field in ("nonce", "evidence", "recipient"):
        assert f"its {field} is not" in caught.value.what
    # Even one that lies to itself about nonce and evidence has not the key.
    with refusing(), pytest.raises(ReleaseRefused, match="recipient"):
        world.accept(grant, second, nonce=first.peer.nonce, evidence=first.peer.evidence_digest)


@pytest.mark.attack("second run")
def test_a_second_run_cannot_use_the_first_ones_grant(world: Any) -> None:
    first = world.trainer()
    grant = world.release(first)
    with pytest.raises(ReleaseRefused, match="its run_id is not"):
        world.accept(grant, first, run_id="run-2")
    again = world.trainer(run_id="run-2")
    with pytest.raises(ReleaseRefused, match="its run_id is not"):
        world.accept(grant, again, run_id="run-2")


def test_the_grant_of_another_customer_is_refused(world: Any) -> None:
    north, south = world.trainer("north"), world.trainer("south")
    with pytest.raises(ReleaseRefused, match="its party is not"):
        world.accept(world.release(north), south)


@pytest.mark.attack("each field altered by the relay", mode="signature")
@pytest.mark.parametrize("name", [field.name for field in fields(ReleaseTerms)])
def test_each_field_that_a_relay_alters_breaks_the_signature(world: Any, name: str) -> None:
    trainer = world.trainer()
    grant = world.release(trainer)
    outer, body = canonical.decode(grant), unsigned(grant)
    other = {str: "x", bytes: b"x" * 48, int: body["expires"] + 10**6 if name == "expires" else 99}[
        type(body[name])
    ]
    forged = canonical.encode(
        {"body": canonical.encode(body | {name: other}), "signature": outer["signature"]}
    )
    with pytest.raises(ReleaseRefused, match="does not verify"):
        world.accept(forged, trainer)


@pytest.mark.attack("each field altered by the relay", mode="encryption")
@pytest.mark.parametrize("name", [field.name for field in fields(ReleaseTerms)])
def test_each_field_is_bound_by_the_encryption_itself_and_not_by_the_signature_alone(
    world: Any, name: str
) -> None:
    # As if the provider's signing key were stolen: who cannot wrap anew cannot move a wrapped key
    # to another context.
    trainer = world.trainer()
    body = unsigned(world.release(trainer))
    old = body[name]
    other: Any = (
        old + 1 if isinstance(old, int) else "x" if isinstance(old, str) else b"x" * len(old)
    )
    terms = terms_of(body)
    context = replace(terms, **{name: other}).context()
    WeightKey.unwrap(body["wrapped"], trainer.hpke, terms.context())
    with refusing(), pytest.raises(Exception, match="does not open"):
        WeightKey.unwrap(body["wrapped"], trainer.hpke, context)
    with pytest.raises(ReleaseRefused):
        world.accept(signed(body | {name: other}, world.keys.signing), trainer)


@pytest.mark.parametrize(
    "name", ["model", "run_id", "party", "nonce", "evidence", "hpke", "contract", "manifest"]
)
def test_each_fact_that_is_not_the_enclaves_own_is_refused(
    world: Any, make_bundle: Make, name: str
) -> None:
    trainer = world.trainer()
    grant = world.release(trainer)
    others = {
        "model": "other",
        "run_id": "run-9",
        "party": "south",
        "nonce": b"n" * 32,
        "evidence": b"e" * 48,
        "hpke": HpkeKey(),
        "contract": world.changed_contract(rounds=9).contract,
        "manifest": make_bundle("second", world.keys.signing)[0].manifest,
    }
    with pytest.raises(ReleaseRefused):
        world.accept(grant, trainer, **{name: others[name]})


def test_a_grant_signed_by_anyone_but_the_contracts_provider_is_refused(world: Any) -> None:
    trainer = world.trainer()
    body = unsigned(world.release(trainer))
    for signer in (SigningKey(), world.customers["north"].signing, trainer.signing):
        with pytest.raises(ReleaseRefused, match="does not verify"):
            world.accept(signed(body, signer), trainer)


def test_a_bundle_that_the_contract_does_not_name_is_refused_even_with_the_providers_grant(
    world: Any, make_bundle: Make
) -> None:
    trainer = world.trainer()
    bundle, key = make_bundle("second", world.keys.signing)
    body = unsigned(world.release(trainer))
    terms = replace(
        terms_of(body), bundle=bundle.manifest.digest(), policy=bundle.manifest.policy.digest()
    )
    body |= asdict(terms) | {"wrapped": key.wrap(trainer.hpke.public, terms.context())}
    with pytest.raises(ReleaseRefused, match="names another bundle"):
        world.accept(signed(body, world.keys.signing), trainer, manifest=bundle.manifest)


def test_a_providers_second_key_for_the_same_bundle_is_refused(world: Any) -> None:
    trainer = world.trainer()
    body = unsigned(world.release(trainer))
    terms = terms_of(body)
    second = WeightKey.generate().wrap(trainer.hpke.public, terms.context())
    with pytest.raises(ReleaseRefused, match="commits to"):
        world.accept(signed(body | {"wrapped": second}, world.keys.signing), trainer)


def test_a_key_wrapped_by_the_classical_kem_alone_is_refused(world: Any) -> None:
    trainer = world.trainer()
    body = unsigned(world.release(trainer))
    terms = terms_of(body)
    secret, context = bytes(world.key._secret), terms.context()
    infos = [context, context | {"suite": "mlkem768-x25519/hkdf-sha256/aes-256-gcm"}]
    infos += [context | {"suite": "x25519/hkdf-sha256/aes-256-gcm"}]
    public = X25519PrivateKey.from_private_bytes(trainer.hpke.secret_bytes()[64:]).public_key()
    suites = [
        Suite(KEM.X25519, KDF.HKDF_SHA256, aead)
        for aead in (AEAD.AES_256_GCM, AEAD.CHACHA20_POLY1305)
    ]
    for suite, info in itertools.product(suites, infos):
        downgraded = suite.encrypt(secret, public, info=canonical.encode(info))
        with pytest.raises(ReleaseRefused, match="does not open"):
            world.accept(signed(body | {"wrapped": downgraded}, world.keys.signing), trainer)


def test_a_release_to_another_kem_key_than_the_attested_one_is_refused(world: Any) -> None:
    # The relay swaps in its own key's ciphertext, or the enclave's host offers the enclave a wrap
    # for another key.
    trainer, relay = world.trainer(), HpkeKey()
    body = unsigned(world.release(trainer))
    terms = terms_of(body)
    for public in (relay.public, trainer.hpke.public[:1184] + relay.public[1184:]):
        wrapped = world.key.wrap(public, terms.context())
        with pytest.raises(ReleaseRefused, match="does not open"):
            world.accept(signed(body | {"wrapped": wrapped}, world.keys.signing), trainer)


@settings(max_examples=200)
@given(data=st.binary(max_size=300))
def test_bytes_of_a_stranger_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(ReleaseRefused):
        release_module._signed_map(data)
    with pytest.raises(ReleaseRefused):
        Receipt.verify(
            data, signing_public=bytes(32), contract=bytes(48), run_id="r", party="north"
        )


@pytest.mark.parametrize(
    "change",
    [
        {"surplus": 1},
        {"wrapped": "text"},
        {"log_index": True},
        {"log_entry": None},
        {"expires": 1.5},
        {"wrapped": b""},
        {"log_path": [1]},
        {"log_head": b""},
        {"logged": -1},
    ],
)
def test_a_signed_but_malformed_grant_is_refused(world: Any, change: dict[str, Any]) -> None:
    trainer = world.trainer()
    body = unsigned(world.release(trainer)) | change
    with pytest.raises(ReleaseRefused):
        world.accept(signed(body, world.keys.signing), trainer)
    del body["wrapped"]
    with pytest.raises(ReleaseRefused, match="malformed"):
        world.accept(signed(body, world.keys.signing), trainer)


# -- receipts


@pytest.fixture
def receipt(world: Any) -> tuple[bytes, dict[str, Any]]:
    trainer = world.trainer()
    accepted = world.accept(world.release(trainer), trainer)
    data = Receipt.make(accepted, load(world, accepted), trainer.signing, now=world.now)
    expected = {
        "signing_public": trainer.peer.signing_public,
        "contract": world.signed.digest,
        "run_id": "run-1",
        "party": "north",
    }
    return data, expected


def test_a_receipt_cannot_be_made_without_an_accepted_grant_and_an_opened_bundle(
    world: Any,
) -> None:
    with pytest.raises(TypeError):
        Accepted()
    trainer = world.trainer()
    accepted = world.accept(world.release(trainer), trainer)
    with pytest.raises(ReleaseRefused, match="not the one that was granted"):
        Receipt.make(accepted, OpenedBundle._of(b"o" * 48), trainer.signing, now=world.now)


def test_a_bundle_that_breaks_on_the_way_gives_no_receipt(world: Any) -> None:
    trainer = world.trainer()
    accepted = world.accept(world.release(trainer), trainer)
    with pytest.raises(SealBroken):
        open_to_memory(
            world.manifest, accepted.key, [(world.bundle.path / "payload").read_bytes()[:-1]]
        )


@pytest.mark.parametrize(
    "change",
    [
        {"signing_public": SigningKey().public},
        {"contract": b"x" * 48},
        {"run_id": "run-2"},
        {"party": "south"},
    ],
)
def test_a_receipt_for_other_circumstances_is_refused(
    receipt: tuple[bytes, dict[str, Any]], change: dict[str, Any]
) -> None:
    data, expected = receipt
    Receipt.verify(data, **expected)
    with pytest.raises(ReleaseRefused):
        Receipt.verify(data, **expected | change)


def test_any_flipped_bit_of_a_receipt_is_refused(receipt: tuple[bytes, dict[str, Any]]) -> None:
    data, expected = receipt
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ReleaseRefused):
            Receipt.verify(bytes(flipped), **expected)


def test_any_flipped_bit_of_a_grant_is_refused(world: Any) -> None:
    trainer = world.trainer()
    grant = world.release(trainer)
    for bit in range(0, 8 * len(grant), 41):
        flipped = bytearray(grant)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ReleaseRefused):
            world.accept(bytes(flipped), trainer)


def test_a_receipt_does_not_answer_another_grant(
    world: Any, receipt: tuple[bytes, dict[str, Any]]
) -> None:
    data, expected = receipt
    other = world.release(world.trainer())
    assert not Receipt.verify(data, **expected).answers(other)
