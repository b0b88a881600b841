"""Plain X25519 is spoken only where the provider's signed policy says so; nobody on the way can
bring it about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedark.attestation.binding import KeyBinding
from fedark.foundation import canonical
from fedark.foundation.errors import (
    ContractError,
    EvidenceRefused,
    InputError,
    ProtocolError,
    Refused,
    ReleaseRefused,
)
from fedark.foundation.keys import HYBRID, KEMS, HpkeKey, PartyKeys, SigningKey, hpke_seal, kem_of
from fedark.vault.manifest import ReleasePolicy

Make = Callable[..., Any]
CONTEXT = {"label": "test"}


@pytest.fixture
def admit(world: Any, make_bundle: Make, terms: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A bundle whose policy admits the given KEMs, and a contract that names it and one KEM."""

    def make(*kems: str, kem: Any = HYBRID) -> dict[str, Any]:
        policy = terms["policy"].model_copy(update={"kem": kems})
        bundle, key = make_bundle("-".join(kems), world.keys.signing, policy=policy)
        models = world.signed.contract.to_map()["models"]
        models[0]["bundle"] = bundle.manifest.digest().hex()
        contract = world.changed_contract(models=models, **under(world, kem))
        return {"manifest": bundle.manifest, "key": key, "contract": contract}

    return make


def under(world: Any, kem: Any) -> dict[str, Any]:
    """The changes of a contract that make it name `kem`."""
    value = world.signed.contract.to_map()
    parties = [{**party, "hpke_key": HpkeKey(kem=kem).public.hex()} for party in value["parties"]]
    return {"parties": parties, "attestation": {**value["attestation"], "kem": kem}}


def accept(world: Any, grant: bytes, trainer: Any, given: dict[str, Any], **changes: Any) -> Any:
    own = {"manifest": given["manifest"], "contract": given["contract"].contract}
    return world.accept(grant, trainer, **own | changes)


def test_the_hybrid_alone_is_admitted_by_a_policy_that_says_nothing(terms: dict[str, Any]) -> None:
    assert terms["policy"].kem == (HYBRID,)
    with pytest.raises(ValueError, match="at least 1"):
        ReleasePolicy(expires=terms["policy"].expires, platforms=("simulated",), kem=())
    with pytest.raises(ValueError, match="kem"):
        ReleasePolicy(expires=terms["policy"].expires, platforms=("simulated",), kem=("p256",))  # type: ignore[arg-type]


def test_a_contract_for_x25519_is_refused_by_the_default_policy_and_the_refusal_is_logged(
    world: Any,
) -> None:
    plain = world.changed_contract(**under(world, "x25519"))
    with pytest.raises(ReleaseRefused, match="KEM x25519 is not one that the provider allows"):
        world.release(world.trainer(kem="x25519", contract=plain), contract=plain)
    (logged,) = world.log.verify().entries
    assert (logged.entry.kind, logged.entry.facts["asked"]) == ("refusal", "release:grid")
    assert "the KEM x25519 is not one that the provider allows" in logged.note


@pytest.mark.parametrize("kem", KEMS)
def test_where_the_policy_names_both_an_enclave_gets_the_key_under_the_kem_of_the_contract(
    world: Any, admit: Make, kem: Any
) -> None:
    given = admit("mlkem768-x25519", "x25519", kem=kem)
    trainer = world.trainer(kem=kem, contract=given["contract"])
    accepted = accept(world, world.release(trainer, **given), trainer, given)
    assert bytes(accepted.key._secret) == bytes(given["key"]._secret)
    assert (accepted.terms.kem, world.log.verify().entries[-1].entry.facts["kem"]) == (kem, kem)


def test_a_policy_for_x25519_alone_refuses_the_hybrid(world: Any, admit: Make) -> None:
    given = admit("x25519")
    with pytest.raises(ReleaseRefused, match="KEM mlkem768-x25519"):
        world.release(world.trainer(contract=given["contract"]), **given)


def test_a_relay_that_swaps_the_offered_key_for_one_of_the_weaker_kem_changes_the_report_data() -> (
    None
):
    hybrid = HpkeKey()
    honest = KeyBinding(
        b"n" * 32, hybrid.public, SigningKey().public, b"c" * 48, "run-1", "trainer", "north"
    )
    for weaker in (HpkeKey(kem="x25519").public, hybrid.public[-32:]):
        assert replace(honest, hpke_public=weaker).kem == "x25519"
        assert replace(honest, hpke_public=weaker).report_data() != honest.report_data()


def test_a_hybrid_enclave_opens_no_wrap_for_its_x25519_half_even_where_the_policy_admits_it(
    world: Any, admit: Make
) -> None:
    given = admit("mlkem768-x25519", "x25519")
    trainer = world.trainer(contract=given["contract"])
    body = canonical.decode(canonical.decode(world.release(trainer, **given))["body"])
    body["wrapped"] = given["key"].wrap(trainer.hpke.public[-32:], {"label": "x"}, kem="x25519")
    raw = canonical.encode(body)
    for changed in (raw, canonical.encode(body | {"kem": "x25519"})):
        grant = canonical.encode(
            {"body": changed, "signature": world.keys.signing.sign("fedark/grant/1", changed)}
        )
        with pytest.raises(ReleaseRefused, match=r"does not open|its kem is not"):
            accept(world, grant, trainer, given)


def test_an_enclave_refuses_a_grant_under_a_kem_that_the_providers_policy_does_not_name(
    world: Any, admit: Make
) -> None:
    # As if the provider's node had released against its own signed policy.
    wide, narrow = admit("mlkem768-x25519", "x25519", kem="x25519"), admit("mlkem768-x25519")
    trainer = world.trainer(kem="x25519", contract=wide["contract"])
    grant = world.release(trainer, **wide)
    with pytest.raises(ReleaseRefused, match="KEM x25519 is not one that the provider allows"):
        accept(world, grant, trainer, wide, manifest=narrow["manifest"])


def test_an_enclave_with_a_key_of_another_kem_is_not_admitted_though_the_policy_names_it(
    world: Any, admit: Make
) -> None:
    given = admit("mlkem768-x25519", "x25519")
    with pytest.raises(
        EvidenceRefused, match="its key is of the KEM x25519, the contract names mlkem768-x25519"
    ):
        world.trainer(kem="x25519", contract=given["contract"])


@pytest.mark.attack("KEM downgrade", mode="inside an enclave")
def test_an_enclave_refuses_a_grant_for_a_key_of_another_kem_than_its_contracts(
    world: Any, admit: Make, refusal: Any
) -> None:
    # As if the provider's node had taken such a key; the enclave knows the contract that it was
    # started for.
    plain, hybrid = (
        admit("mlkem768-x25519", "x25519", kem="x25519"),
        admit("x25519", "mlkem768-x25519"),
    )
    trainer = world.trainer(kem="x25519", contract=plain["contract"])
    grant = world.release(trainer, **plain)
    reason = "key is of the KEM x25519, the contract names mlkem768-x25519"
    with pytest.raises(ReleaseRefused, match=reason):
        accept(world, grant, trainer, plain, contract=hybrid["contract"].contract)
    refusal(f"ReleaseRefused: {reason}")


def test_a_contract_whose_parties_hold_keys_of_another_kem_is_refused(world: Any) -> None:
    mixed = {"attestation": under(world, "x25519")["attestation"]}
    with pytest.raises(ContractError, match="the HPKE key of north is not one of x25519"):
        world.changed_contract(**mixed)


@pytest.mark.parametrize("kem", KEMS)
def test_a_party_key_file_names_its_kem(tmp_path: Path, kem: Any) -> None:
    keys = PartyKeys(hpke=HpkeKey(kem=kem))
    keys.save(tmp_path / "party.keys")
    loaded = PartyKeys.load(tmp_path / "party.keys")
    assert (loaded.hpke.kem, loaded.hpke.public) == (kem, keys.hpke.public)
    text = (tmp_path / "party.keys").read_text()
    assert ("x25519" in text) == (kem == "x25519")
    head, rest = text.split("\n", 1)
    swapped = {"fedark-party-keys-1": "fedark-party-keys-1 x25519"}.get(head, "fedark-party-keys-1")
    for other in ("fedark-party-keys-1 p256", "fedark-party-keys-1 ", swapped):
        (tmp_path / "party.keys").write_text(f"{other}\n{rest}")
        with pytest.raises(InputError, match="not a fedark key file"):
            PartyKeys.load(tmp_path / "party.keys")


def test_nothing_is_sealed_to_a_plain_key_unless_the_caller_names_its_kem() -> None:
    plain, hybrid = HpkeKey(kem="x25519"), HpkeKey()
    with pytest.raises(ProtocolError, match="not the 1216 of mlkem768-x25519"):
        hpke_seal(b"secret", plain.public, CONTEXT)
    with pytest.raises(ProtocolError, match="not the 32 of x25519"):
        hpke_seal(b"secret", hybrid.public, CONTEXT, kem="x25519")
    assert (
        plain.open(hpke_seal(b"secret", plain.public, CONTEXT, kem="x25519"), CONTEXT) == b"secret"
    )


def test_the_suites_name_is_part_of_what_a_ciphertext_is_bound_to() -> None:
    # The same key, algorithms and context under another suite name, or none: it does not open.
    plain = HpkeKey(kem="x25519")
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    public = plain._dh.public_key()
    for info in (CONTEXT, CONTEXT | {"suite": "mlkem768-x25519/hkdf-sha256/aes-256-gcm"}):
        with pytest.raises(Refused, match="does not open"):
            plain.open(suite.encrypt(b"secret", public, info=canonical.encode(info)), CONTEXT)
    info = canonical.encode(CONTEXT | {"suite": "x25519/hkdf-sha256/aes-256-gcm"})
    assert plain.open(suite.encrypt(b"secret", public, info=info), CONTEXT) == b"secret"


def test_a_context_cannot_choose_its_suite() -> None:
    with pytest.raises(TypeError, match="suite"):
        hpke_seal(b"secret", HpkeKey().public, CONTEXT | {"suite": "none"})


@pytest.mark.parametrize("kem", KEMS)
def test_a_stored_secret_makes_the_same_key_again_and_no_other_length_makes_one(kem: Any) -> None:
    key = HpkeKey(kem=kem)
    assert HpkeKey(key.secret_bytes(), kem=kem).public == key.public
    assert kem_of(key.public) == kem
    for size in (0, 31, 33, 64, 95, 97):
        with pytest.raises(ValueError, match="has"):
            HpkeKey(os.urandom(size), kem=kem)


@pytest.mark.parametrize("size", [0, 31, 33, 1184, 1215, 1217])
def test_a_public_key_of_any_other_length_is_of_no_kem(size: int) -> None:
    with pytest.raises(ProtocolError, match="no KEM"):
        kem_of(bytes(size))
    with pytest.raises(ProtocolError, match="hpke_public"):
        KeyBinding(
            b"n" * 32, bytes(size), SigningKey().public, b"c" * 48, "run-1", "trainer", "north"
        )
