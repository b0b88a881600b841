"""A provider's own appraisal policy, in its folder, counts for the broker as for a run."""

from __future__ import annotations

from typing import Any

import pytest
import tomli_w

from fedark.foundation.errors import ContractError, EvidenceRefused
from fedark.measurement import reference_policies


def write(world: Any, **changes: Any) -> None:
    terms = world.contract.attestation
    rules = {"root": terms.simulated_root, "sandbox": "none"} | changes.pop("simulated", {})
    policies = {mode: one.model_dump(mode="json") for mode, one in reference_policies().items()}
    value = {"version": 1, "platforms": {"simulated": rules}, "policies": policies}
    value |= {"trainer": terms.trainer, "aggregator": terms.aggregator}
    (world.provider / "policy.toml").write_text(tomli_w.dumps(value | changes), encoding="utf-8")


def test_evidence_that_meets_contract_and_policy_gets_keys(world: Any) -> None:
    write(world)
    broker = world.broker()
    assert broker.release(
        world.claim(world.evidence(world.trainer(), broker.challenge(world.ask()).nonce))
    ).by_model


@pytest.mark.parametrize("rules", [{"minimum_svn": 2}, {"sandbox": "namespaces"}])
def test_evidence_that_meets_the_contract_alone_gets_none(
    world: Any, rules: dict[str, Any]
) -> None:
    write(world, simulated=rules)
    broker = world.broker()
    with pytest.raises(EvidenceRefused):
        broker.release(
            world.claim(world.evidence(world.trainer(), broker.challenge(world.ask()).nonce))
        )


def test_a_contract_that_names_other_enclaves_than_the_policy_is_refused(world: Any) -> None:
    write(world, trainer={"launcher": "ab" * 48})
    with pytest.raises(
        ContractError, match="none that the policy of maker has reference values for"
    ):
        world.broker().challenge(world.ask())
